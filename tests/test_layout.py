"""The packages of docs/design.md: what each may import, and what none of them may do."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "attire"


def room_of(path: str) -> str:
    """A file's name as an import says it: `data` for data.py, `cli.options` for cli/options.py."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
ROOMS = {room_of(name): ast.parse(path.read_text()) for name, path in FILES.items() if "__init__" not in name}
ORDER = "storage < data, model < features, evaluation < inference < training, export, server < analysis < cli"
LEVEL = {package: level for level, group in enumerate(ORDER.split(" < ")) for package in group.split(", ")}
FOUNDATIONS = {"errors", "version", "progress", "blocks", "recipes", "terminal"}
TOP = {"estimator", "cluster", "__main__"}
UNPICKLER = "model.weights"  # the one file that reads a pickle, whose every byte is pinned
SLOW = (
    "matplotlib",
    "numpy",
    "pandas",
    "pyarrow",
    "ray",
    "rich",
    "sklearn",
    "starlette",
    "torch",
    "torchvision",
    "uvicorn",
)


def imports(tree: ast.AST) -> set[str]:
    """Rooms that a file imports from, at its top, inside functions, or for types alone."""
    named = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            named |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name.removeprefix("attire.") for name in named if name.startswith("attire.")}
    return {name if name in ROOMS else name.rpartition(".")[0] for name in ours} & set(ROOMS)


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize(
    ("text", "room"),
    [("import attire.data.idx", "data.idx"), ("from attire import cluster", "cluster"),
     ("from attire.data.dataset import Splits", "data.dataset"), ("from attire.cli.main import main", "cli.main"),
     ("from attire.cli import options", "cli.options"), ("from attire.cli.options import PATH", "cli.options")],
)  # fmt: skip
def test_an_import_is_found_in_its_room(text: str, room: str) -> None:
    assert imports(ast.parse(text)) == {room}


@pytest.mark.parametrize("room", ROOMS)
def test_a_package_imports_only_from_packages_left_of_it(room: str) -> None:
    for other in imports(ROOMS[room]):
        assert may_import(room, other), f"{room} imports {other}"


def may_import(room: str, other: str) -> bool:
    """The rule of docs/design.md. At the root lie what all may use (FOUNDATIONS) and what stands above all (TOP)."""
    package, other_package = room.partition(".")[0], other.partition(".")[0]
    if other in FOUNDATIONS or room in TOP:
        return room not in FOUNDATIONS or other in FOUNDATIONS
    if other in TOP:
        return (room, other) in {("__main__", "cli.main")} or (package == "cli" and other == "cluster")
    if room in FOUNDATIONS:
        return False
    return package == other_package or LEVEL[other_package] < LEVEL[package]


def test_no_import_runs_in_a_circle() -> None:
    graph = {room: imports(tree) for room, tree in ROOMS.items()}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("room", ROOMS)
def test_imports_within_the_package_are_written_in_full(room: str) -> None:
    assert not [node for node in ast.walk(ROOMS[room]) if isinstance(node, ast.ImportFrom) and node.level]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_a_name_of_its_own_and_says_what_it_is(room: str) -> None:
    assert room.rpartition(".")[2] not in ("utils", "util", "common", "helpers", "misc", "base", "manager")
    assert ast.get_docstring(ROOMS[room])


def test_what_the_design_names_exists() -> None:
    """`room.name` in backticks is a function, a class or a value at the top of that room, or a method in it."""
    text = (ROOT / "docs" / "design.md").read_text()
    named = set(re.findall(r"`(\w+)\.(\w+)(?:\(\))?`", text)) | set(re.findall(r"--(\w+)\.(\w+)-->", text))
    files = ("py", "html", "json", "npy", "safetensors")
    for room, name in sorted((room, name) for room, name in named if room in ROOMS and name not in files):
        top = {getattr(node, "name", "") for node in ROOMS[room].body}
        top |= {ast.unparse(x) for node in ROOMS[room].body if isinstance(node, ast.Assign) for x in node.targets}
        assert name in top, f"{room}.{name}"


def test_the_design_states_the_rule_and_every_package() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    assert ORDER in text
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(LEVEL) == folders
    assert not [package for package in LEVEL if f"| `{package}` |" not in text]
    assert {path.stem for path in PACKAGE.glob("*.py")} == FOUNDATIONS | TOP | {"__init__"}


def test_the_packages_own_files_are_empty() -> None:
    assert not [path for path in PACKAGE.glob("*/__init__.py") if path.read_text()]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "--help"], ["evalute"]], ids=" ".join)
def test_nothing_slow_is_imported_before_it_is_needed(arguments: list[str]) -> None:
    run = f"import attire, sys\nsys.argv[1:] = {arguments}\n"
    if arguments:
        run += "from attire.cli.main import main\ntry: main()\nexcept SystemExit: pass\n"
    run += f"print('\\nslow:', *[name for name in {SLOW} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", run], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["slow:"], done


# What runs text, or code that a file holds: a name, and all behind it and a dot; with a star all that begins so.
FORBIDDEN = (
    "eval", "exec", "compile", "__import__", "importlib.util.module_from_spec", "importlib.machinery", "runpy",
    "marshal", "pty", "os.system", "os.popen", "os.exec*", "os.spawn*", "os.posix_spawn*", "subprocess.get*", "yaml",
    "joblib", "dill", "cloudpickle", "shelve", "xml", "tempfile.mktemp", "shutil.unpack_archive", "torch.jit.load",
    "torch.hub", "torch.package", "torch.classes*", "torch.ops.load_library", "pd.read_pickle", "pandas.read_pickle",
    "pd.eval", "pandas.eval", "ctypes.cdll*",
)  # fmt: skip
PICKLES = {"pickle", "pickle.Unpickler", "pickle.UnpicklingError"}  # all that the one room needs


def names(tree: ast.AST) -> set[str]:
    """What a file calls, refers to by a dotted name, or imports."""
    found = {ast.unparse(call.func) for call in calls(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def forbidden(tree: ast.AST) -> set[str]:
    patterns = [re.escape(bad).replace(r"\*", ".*") + r"(\..*)?" for bad in FORBIDDEN]
    return {name for name in names(tree) for pattern in patterns if re.fullmatch(pattern, name, re.S)}


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_evaluates_text_or_opens_a_shell(room: str) -> None:
    assert not forbidden(ROOMS[room])
    for call in calls(ROOMS[room]):
        for keyword in call.keywords:
            given = ast.unparse(keyword.value)
            assert keyword.arg != "shell", ast.unparse(call)
            assert keyword.arg != "allow_pickle" or given == "False", ast.unparse(call)
            assert keyword.arg != "weights_only" or given == "True", ast.unparse(call)


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_unpickles_but_the_one_that_pins_the_bytes(room: str) -> None:
    pickles = {name for name in names(ROOMS[room]) if name.split(".")[0] in ("pickle", "_pickle", "copyreg")}
    assert pickles <= (PICKLES if room == UNPICKLER else set())
    for call in calls(ROOMS[room]):
        if ast.unparse(call.func) == "torch.load":
            assert "weights_only=True" in [ast.unparse(keyword) for keyword in call.keywords]


@pytest.mark.parametrize("room", ROOMS)
def test_onnx_runtime_is_imported_where_it_is_told_to_keep_to_itself(room: str) -> None:
    for node in ast.walk(ROOMS[room]):
        if isinstance(node, ast.Import) and any(alias.name == "onnxruntime" for alias in node.names):
            assert room == "inference.runtimes"


@pytest.mark.parametrize("room", ROOMS)
def test_archives_are_read_and_never_unpacked(room: str) -> None:
    """A member's name could lead elsewhere."""
    assert not {name for name in names(ROOMS[room]) if name.endswith((".extractall", "archive.extract"))}


@pytest.mark.parametrize(
    "text",
    ["eval('1')", "exec(x)", "import marshal", "from joblib import load", "import yaml\nyaml.load(x)", "os.execvp(x)",
     "from xml.etree import ElementTree", "torch.jit.load(x)", "pd.read_pickle(x)", "subprocess.getoutput(x)"],
)  # fmt: skip
def test_what_is_forbidden_is_found(text: str) -> None:
    assert forbidden(ast.parse(text))
    assert not forbidden(ast.parse("import re\nre.compile(x)\nmodel.eval()"))
