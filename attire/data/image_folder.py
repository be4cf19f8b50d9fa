"""Read pictures in class folders."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attire.data.pictures import EXPECTED_FORMATS, SUFFIXES
from attire.errors import AttireError, one_line


def read_class_folders(
    folder: str | Path,
    classes: Sequence[str] | None,
    read: Callable[[Path], NDArray[np.uint8]],
) -> tuple[NDArray[np.uint8], NDArray[np.int64], tuple[str, ...]]:
    """Read `<folder>/<class>/<picture>`: images (N, 28, 28) uint8, labels (N,) int64 and class names.

    classes: names in order, default the sub-folders' names, sorted; a "/" in a name is "_" on disk. read: decodes one
    picture as (28, 28) uint8. Hidden files are skipped. Raises AttireError for any other file that is not a picture.
    """
    folder = Path(folder)
    entries = list_visible(folder)
    present = {entry.name for entry in entries}
    for entry in entries:
        if not entry.is_dir():
            raise AttireError(entry, "lies outside the class folders", do="put it into the folder of its class")
    names = tuple(classes or (entry.name for entry in entries))
    if len(names) < 2:
        raise AttireError(folder, f"{len(names)} class folder{'s' if not names else ''}, expected at least two")
    folders = [name.replace("/", "_") for name in names]
    if missing := sorted(set(folders) - present):
        raise AttireError(folder, f"no folder for the class {one_line(missing[0])}", do="each class needs its folder")
    if extra := sorted(present - set(folders)):
        raise AttireError(folder, f"{one_line(extra[0])} is none of the {len(names)} classes")
    paths = [(path, label) for label, name in enumerate(folders) for path in _pictures(folder / name)]
    images = np.stack([read(path) for path, _ in paths])
    return images, np.array([label for _, label in paths], np.int64), names


def _pictures(folder: Path) -> list[Path]:
    """List the pictures of one class. Raises AttireError where there is none, or anything else."""
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
    """List a folder, sorted by name, without hidden entries. Raises AttireError where it cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except FileNotFoundError as error:
        raise AttireError(folder, "no such folder") from error
    except OSError as error:
        raise AttireError(folder, "cannot read the folder", error.strerror or "") from error
