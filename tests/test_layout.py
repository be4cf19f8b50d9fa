"""The packages of docs/design.md: what each may import, and what no module may do."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "attire"
ORDER = "storage < data, model < features, evaluation < inference < training, export, server < analysis < cli"
LEVEL = {package: level for level, group in enumerate(ORDER.split(" < ")) for package in group.split(", ")}
FOR_ALL = {"errors", "version", "progress", "blocks", "recipes", "terminal"}  # at the root: all may import them
ABOVE_ALL = {"estimator", "cluster", "__main__"}  # at the root: they may import all
SLOW = (
    "matplotlib", "numpy", "pandas", "pyarrow", "ray", "rich", "sklearn", "starlette", "torch", "torchvision", "uvicorn"
)  # fmt: skip
UNPICKLER = "model.weights"  # the one module that reads a pickle, whose every byte is pinned

# `cli.options` for attire/cli/options.py.
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem != "__init__"
}


def imports(tree: ast.AST) -> set[str]:
    """The modules that a module imports from, at its top, inside functions, or for types alone."""
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name.removeprefix("attire.") for name in names if name.startswith("attire.")}
    return {name if name in MODULES else name.rpartition(".")[0] for name in ours} & set(MODULES)


def may_import(module: str, other: str) -> bool:
    """The rule of docs/design.md: a package imports only from packages left of it."""
    package, other_package = module.partition(".")[0], other.partition(".")[0]
    if other in FOR_ALL or module in ABOVE_ALL:
        return module not in FOR_ALL or other in FOR_ALL
    if other in ABOVE_ALL:
        return (package, other) == ("cli", "cluster")
    return module not in FOR_ALL and (package == other_package or LEVEL[other_package] < LEVEL[package])


@pytest.mark.parametrize(
    ("text", "module"),
    [("import attire.data.idx", "data.idx"), ("from attire import cluster", "cluster"),
     ("from attire.data.dataset import Splits", "data.dataset"), ("from attire.cli.main import main", "cli.main"),
     ("from attire.cli import options", "cli.options"), ("from attire.cli.options import PATH", "cli.options")],
)  # fmt: skip
def test_an_import_is_recognised(text: str, module: str) -> None:
    assert imports(ast.parse(text)) == {module}


def test_a_package_imports_only_from_packages_left_of_it() -> None:
    graph = {module: imports(tree) for module, tree in MODULES.items()}
    assert not [f"{name} imports {other}" for name in graph for other in graph[name] if not may_import(name, other)]
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize(
    ("module", "other", "allowed"),
    [("model.vgg", "storage.files", True), ("storage.files", "model.vgg", False), ("data.idx", "model.vgg", False),
     ("data.idx", "errors", True), ("errors", "storage.files", False), ("recipes", "blocks", True),
     ("estimator", "training.run", True), ("training.run", "estimator", False), ("cli.options", "cluster", True),
     ("training.run", "cluster", False)],
)  # fmt: skip
def test_the_rule_of_imports(module: str, other: str, allowed: bool) -> None:
    assert may_import(module, other) is allowed


def test_every_module_says_what_it_is_and_imports_by_full_names() -> None:
    for module, tree in MODULES.items():
        assert module.rpartition(".")[2] not in ("utils", "util", "common", "helpers", "misc", "base", "manager")
        assert ast.get_docstring(tree), module
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level], module
    assert not [path for path in PACKAGE.glob("*/__init__.py") if path.read_text()]


def test_the_design_states_the_rule_and_every_package() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    assert ORDER in text
    assert set(LEVEL) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert not [package for package in LEVEL if f"| `{package}` |" not in text]
    assert {path.stem for path in PACKAGE.glob("*.py")} == FOR_ALL | ABOVE_ALL | {"__init__"}


def test_what_the_design_names_exists() -> None:
    """`module.name` in backticks, the module with or without its package, is a name at the top of that module."""
    text = (ROOT / "docs" / "design.md").read_text()
    for named, name in re.findall(r"(?:`|--)((?:\w+\.)?\w+)\.(\w+)(?:\(\))?(?:`|-->)", text):
        trees = [tree for module, tree in MODULES.items() if f".{module}".endswith(f".{named}")]
        if not trees or name in ("py", "html", "json", "npy", "onnx", "safetensors"):
            continue
        nodes = [node for tree in trees for node in tree.body]
        top = {getattr(node, "name", "") for node in nodes}
        top |= {ast.unparse(target) for node in nodes if isinstance(node, ast.Assign) for target in node.targets}
        assert name in top, f"{named}.{name}"


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
    "pd.eval", "pandas.eval", "ctypes.cdll*", "*.extractall", "*archive.extract",  # a member's name may lead elsewhere
)  # fmt: skip
PATTERN = re.compile("|".join(re.escape(name).replace(r"\*", ".*") + r"(?:\..*)?" for name in FORBIDDEN), re.S)
PICKLE_NAMES = {"pickle", "pickle.Unpickler", "pickle.UnpicklingError"}  # all that UNPICKLER needs
KEYWORDS = {"shell": None, "allow_pickle": "False", "weights_only": "True"}  # the one value each may have


def names(tree: ast.AST) -> set[str]:
    """What a module calls, refers to by a dotted name, or imports."""
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            used.add(ast.unparse(node.func))
        elif isinstance(node, ast.Attribute):
            used.add(ast.unparse(node))
        elif isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            used |= {f"{node.module}.{alias.name}" for alias in node.names}
    return used


def forbidden(tree: ast.AST) -> list[str]:
    return [name for name in names(tree) if PATTERN.fullmatch(name)]


@pytest.mark.parametrize("module", MODULES)
def test_no_module_runs_text_unpickles_or_opens_a_shell(module: str) -> None:
    tree, used = MODULES[module], names(MODULES[module])
    assert not forbidden(tree)
    pickles = {name for name in used if name.split(".")[0] in ("pickle", "_pickle", "copyreg")}
    assert pickles <= (PICKLE_NAMES if module == UNPICKLER else set())
    assert "onnxruntime" not in used or module == "inference.runtimes"  # which makes it keep to itself
    for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg in KEYWORDS}
        assert given == {name: KEYWORDS[name] for name in given}, ast.unparse(call)
        assert ast.unparse(call.func) != "torch.load" or "weights_only" in given


@pytest.mark.parametrize(
    "text",
    ["eval('1')", "exec(x)", "import marshal", "from joblib import load", "import yaml\nyaml.load(x)", "os.execvp(x)",
     "from xml.etree import ElementTree", "torch.jit.load(x)", "pd.read_pickle(x)", "subprocess.getoutput(x)",
     "tarfile.open(x).extractall()"],
)  # fmt: skip
def test_what_is_forbidden_is_found(text: str) -> None:
    assert forbidden(ast.parse(text))
    assert not forbidden(ast.parse("import re\nre.compile(x)\nmodel.eval()"))
