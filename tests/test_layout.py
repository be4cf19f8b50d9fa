"""The rooms of docs/design.md: what each file may import, and what none of them may do."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "attire"


def room_of(path: str) -> str:
    """A file's name as an import says it: `data` for data.py, `cli.options` for cli/options.py."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
ROOMS = {room_of(name): ast.parse(path.read_text()) for name, path in FILES.items() if name != "__init__.py"}
UNPICKLER = "weights"  # the one file that reads a pickle, whose every byte is pinned
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


def listed_rooms() -> list[str]:
    """The first column of the table under "Rooms", in its order."""
    text = (ROOT / "docs" / "design.md").read_text().partition("## Rooms")[2].partition("\n## ")[0]
    return [room_of(name) for name in re.findall(r"^\| `([\w/]+\.py)` \|", text, re.M)]


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


def test_every_file_is_one_room_of_the_table() -> None:
    assert sorted(listed_rooms()) == sorted(ROOMS)


@pytest.mark.parametrize(
    ("text", "room"),
    [("import attire.data", "data"), ("from attire import __version__, data", "data"),
     ("from attire.data import Splits", "data"), ("from attire.cli import main", "cli"),
     ("from attire.cli import options", "cli.options"), ("from attire.cli.options import PATH", "cli.options")],
)  # fmt: skip
def test_an_import_is_found_in_its_room(text: str, room: str) -> None:
    assert imports(ast.parse(text)) == {room}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_above_it(room: str) -> None:
    above = listed_rooms()
    assert imports(ROOMS[room]) <= set(above[: above.index(room)])


@pytest.mark.parametrize("room", ROOMS)
def test_imports_within_the_package_are_written_in_full(room: str) -> None:
    assert not [node for node in ast.walk(ROOMS[room]) if isinstance(node, ast.ImportFrom) and node.level]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_a_name_of_its_own_and_says_what_it_is(room: str) -> None:
    assert room.rpartition(".")[2] not in ("utils", "util", "common", "helpers", "misc", "base", "manager")
    assert ast.get_docstring(ROOMS[room])


def readme_tree() -> str:
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    return next((block for block in blocks if "attire/\n" in block), "").partition("attire/\n")[2]


def readme_files() -> list[str]:
    """Its files in its order, as paths inside the package; those of a folder stand indented under it."""
    found, folder = [], ""
    for indent, name in re.findall(r"^( {2,4})(\w+(?:\.py|\.html|/)) +\S", readme_tree(), re.M):
        folder = folder if len(indent) > 2 else ""
        if name.endswith("/"):
            folder = name
        else:
            found.append(folder + name)
    return found


def test_the_readme_s_tree_names_every_file_and_no_other() -> None:
    there = {*FILES, *(path.name for path in PACKAGE.glob("*.html"))} - {"__init__.py"}
    assert sorted(readme_files()) == sorted(there)


def test_the_readme_s_tree_names_every_folder_and_no_other() -> None:
    told = set(re.findall(r"^ *(\w+)/ +\S.*$", readme_tree(), re.M)) | {"attire"}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    paths = [Path(name) for name in listed.stdout.splitlines() if not name.startswith(".")]
    folders = {path.parts[0] for path in paths if len(path.parts) > 1}
    folders |= {path.parts[1] for path in paths if path.parts[0] == "attire" and len(path.parts) > 2}
    assert told == folders


def test_the_readme_s_tree_follows_the_design() -> None:
    """A newcomer who reads one finds the same rooms in the same order in the other."""
    assert [room_of(name) for name in readme_files() if name.endswith(".py")] == listed_rooms()


def test_what_the_design_names_exists() -> None:
    """`room.name` in backticks is a function, a class or a value at the top of that room, or a method in it."""
    text = (ROOT / "docs" / "design.md").read_text()
    named = set(re.findall(r"`(\w+)\.(\w+)(?:\(\))?`", text)) | set(re.findall(r"--(\w+)\.(\w+)-->", text))
    files = ("py", "html", "json", "npy", "safetensors")
    for room, name in sorted((room, name) for room, name in named if room in ROOMS and name not in files):
        top = {getattr(node, "name", "") for node in ROOMS[room].body}
        top |= {ast.unparse(x) for node in ROOMS[room].body if isinstance(node, ast.Assign) for x in node.targets}
        assert name in top, f"{room}.{name}"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "--help"], ["evalute"]], ids=" ".join)
def test_nothing_slow_is_imported_before_it_is_needed(arguments: list[str]) -> None:
    run = f"import attire, sys\nsys.argv[1:] = {arguments}\n"
    if arguments:
        run += "from attire.cli import main\ntry: main()\nexcept SystemExit: pass\n"
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
            assert room == "runtimes"


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
