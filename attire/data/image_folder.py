"""Pictures in class folders."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attire.data.pictures import EXPECTED_FORMATS, SUFFIXES, read_image
from attire.errors import AttireError, one_line


def read_class_folders(
    folder: str | Path,
    classes: Sequence[str] | None = None,
    read: Callable[[Path], NDArray[np.uint8]] = read_image,
) -> tuple[NDArray[np.uint8], NDArray[np.int64], tuple[str, ...]]:
    """Images (N, 28, 28), labels (N,) and class names of `<folder>/<class>/<picture>`, in the order of the names.

    Classes are the sub-folders' names, sorted; with `classes` given, those in that order, a "/" in a name standing as
    "_" on disk. Hidden files are passed over; any other file that is not a picture is an AttireError.
    """
    folder = Path(folder)
    found = [entry.name for entry in list_visible(folder)]
    for entry in list_visible(folder):
        if not entry.is_dir():
            raise AttireError(entry, "lies outside the class folders", do="put it into the folder of its class")
    names = tuple(classes or found)
    if len(names) < 2:
        raise AttireError(folder, f"{len(names)} class folder{'s' if not names else ''}, expected at least two")
    folders = [name.replace("/", "_") for name in names]
    if missing := sorted(set(folders) - set(found)):
        raise AttireError(folder, f"no folder for the class {one_line(missing[0])}", do="each class needs its folder")
    if extra := sorted(set(found) - set(folders)):
        raise AttireError(folder, f"{one_line(extra[0])} is none of the {len(names)} classes")
    paths = [(path, label) for label, name in enumerate(folders) for path in _pictures(folder / name)]
    images = np.stack([read(path) for path, _ in paths])
    return images, np.array([label for _, label in paths], np.int64), names


def _pictures(folder: Path) -> list[Path]:
    paths = list_visible(folder)
    if not paths:
        raise AttireError(folder, "no pictures in this class", do=f"{EXPECTED_FORMATS} or more")
    for path in paths:
        if path.is_dir():
            raise AttireError(path, "a folder inside a class folder", do="pictures lie directly in their class folder")
        if path.suffix.lower() not in SUFFIXES:
            raise AttireError(path, "not a picture by its name", do=EXPECTED_FORMATS)
    return paths


def list_visible(folder: Path) -> list[Path]:
    """What lies in a folder, sorted by name, without hidden entries."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except FileNotFoundError as error:
        raise AttireError(folder, "no such folder") from error
    except OSError as error:
        raise AttireError(folder, "cannot read the folder", error.strerror or "") from error
