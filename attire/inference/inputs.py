"""The pictures and rows that arguments name: files, folders, patterns, standard input; read ahead, in their order."""

import glob
import io
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attire.data.pictures import EXPECTED_FORMATS, SUFFIXES
from attire.errors import AttireError
from attire.inference.prediction import read_picture
from attire.storage import files
from attire.storage.formats import is_folder, is_text, name_format
from attire.storage.stores import is_url

_STDIN = "-"
_THREADS = 2  # one reads a file while another decodes
_AHEAD = 256  # pictures waiting, 784 bytes each


@dataclass(frozen=True, eq=False)
class PictureInput:
    """One image (28, 28) uint8 and its name; picture: its file, or its bytes, where it is not a row of a table."""

    name: str
    image: NDArray[np.uint8]
    picture: Path | bytes | None = None


_Item = PictureInput | AttireError  # an input, or the error in its place


def expand_paths(arguments: Iterable[str], globs: bool = True) -> Iterator[str | AttireError]:
    """Every file that the arguments name: themselves, pictures below folders, what matches a pattern."""
    for argument in arguments:
        path = Path(argument)
        if argument == _STDIN and globs:
            yield argument
        elif is_url(argument):
            do = "Parquet files may lie elsewhere, with --out; fetch others first"
            yield AttireError(argument, "a URL, expected a file", do=do)
        elif is_folder(path):
            yield from _list_pictures(path)
        elif globs and glob.has_magic(argument) and not os.path.lexists(path):
            matches = sorted(glob.iglob(argument, recursive=True))  # noqa: PTH207  (absolute patterns too)
            yield from (
                expand_paths(matches, globs=False) if matches else [AttireError(path, "no file matches the pattern")]
            )
        else:
            yield argument


def _list_pictures(folder: Path) -> Iterator[str | AttireError]:
    """The pictures of a folder and of those in it, by name, hidden ones left out."""
    refused: list[OSError] = []
    empty = True
    for here, folders, names in os.walk(folder, onerror=refused.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                empty = False
                yield str(Path(here) / name)
    yield from (files.io_error("read the folder", Path(error.filename), error) for error in refused)
    if empty and not refused:
        yield AttireError(folder, "no pictures in this folder", do=EXPECTED_FORMATS)


def read_inputs(paths: Iterator[str | AttireError], classes: Sequence[str]) -> Generator[_Item, None, None]:
    """The images of these files in their order; threads read pictures ahead. An unreadable file gives its error.

    classes: the model's; a CSV file with labels must fit them.
    """
    waiting: deque[Future[_Item] | Callable[[], Iterator[_Item]]] = deque()
    pool = ThreadPoolExecutor(_THREADS, "read")
    try:
        for path in paths:
            if isinstance(path, AttireError):
                waiting.append(partial(iter, (path,)))
            elif path == _STDIN:
                waiting.append(partial(_read_stdin, classes))
            elif path.lower().endswith(".csv"):
                waiting.append(partial(_read_rows, path, path, classes))  # when its turn comes: it may be large
            elif path.lower().endswith(".parquet"):
                waiting.append(partial(_read_parquet, path))
            else:
                waiting.append(pool.submit(_read_file, path))
            if len(waiting) >= _AHEAD:
                yield from _next_of(waiting)
        while waiting:
            yield from _next_of(waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def _next_of(waiting: deque[Any]) -> Iterator[_Item]:
    first = waiting.popleft()
    if isinstance(first, Future):
        yield first.result()
    else:
        yield from first()


def _read_file(source: str) -> _Item:
    try:
        return PictureInput(source, read_picture(Path(source)), Path(source))
    except AttireError as error:
        return error


def _read_rows(path: str, name: str, classes: Sequence[str]) -> Iterator[_Item]:
    """Each row of a CSV file, called by its line in the file."""
    from attire.data.loading import read_csv_images

    try:
        images = read_csv_images(path, classes)
    except AttireError as error:
        yield error if name == path else _renamed(error)
        return
    yield from (PictureInput(f"{name}:{line}", image) for line, image in enumerate(images, 2))  # after the header


def _read_parquet(path: str) -> Iterator[_Item]:
    """Each row of a Parquet file, called by its number in the file; a bad one is an error in its place."""
    from attire.data import parquet

    try:
        (source,) = parquet.find_sources(path)
        cells = (data for batch in source.batches([parquet.IMAGE_COLUMN]) for data in parquet.image_bytes(batch))
        for row, data in enumerate(cells, 1):
            try:
                yield PictureInput(f"{path}:{row}", parquet.prepare_image(data, source, row), data)
            except AttireError as error:
                yield error
    except AttireError as error:
        yield error


def _read_stdin(classes: Sequence[str]) -> Iterator[_Item]:
    """A picture or a table, by its first bytes; a temporary file holds it meanwhile."""
    with tempfile.TemporaryDirectory(prefix="attire-") as folder:
        path = Path(folder) / "stdin"
        with path.open("wb") as file:
            shutil.copyfileobj(getattr(sys.stdin, "buffer", io.BytesIO()), file)
        with path.open("rb") as file:
            head = file.read(4096)
        if head and is_text(head) and name_format(head) in ("", "UTF-16 text"):
            yield from _read_rows(str(path), _STDIN, classes)
            return
        try:
            yield PictureInput(_STDIN, read_picture(path), path.read_bytes())
        except AttireError as error:
            yield _renamed(error)


def _renamed(error: AttireError) -> AttireError:
    return AttireError("standard input", error.what, error.where, error.do)
