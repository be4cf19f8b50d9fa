"""Where a bundle lies and what its files are called; no torch."""

from pathlib import Path

from attire.errors import AttireError
from attire.storage.formats import is_folder

MODEL_JSON, WEIGHTS = "model.json", "model.safetensors"
GRAPH = "network.onnx"  # optional: how ONNX Runtime computes with WEIGHTS, see graphs.py
_SHIPPED = Path(__file__).parent.parent / "shipped"  # the bundle that is part of the package, see release.py


def find_bundle(path: str | Path | None = None) -> Path:
    """The folder of the bundle that `path` names: itself, its `model.json` or its run; None is the shipped one.

    Raises AttireError where there is none.
    """
    folder = _SHIPPED if path is None else Path(path)
    if folder.name == MODEL_JSON:
        folder = folder.parent
    if not (folder / MODEL_JSON).exists() and (folder / "model" / MODEL_JSON).exists():
        folder = folder / "model"  # a run's folder is as good as its bundle's
    if not (folder / MODEL_JSON).exists():
        what = f"not a bundle: it holds no {MODEL_JSON}" if folder.is_dir() else "no such bundle"
        raise AttireError(folder, what, do="give a folder such as runs/1/model")
    return folder


def is_bundle(path: Path) -> bool:
    """Whether `find_bundle` finds one there: what `attire predict` takes for a bundle, not for a folder of pictures."""
    if path.name == MODEL_JSON:
        return path.is_file()
    try:
        return is_folder(path) and any((path / part / MODEL_JSON).is_file() for part in ("", "model"))
    except OSError:  # a folder that cannot be searched
        return False
