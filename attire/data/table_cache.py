"""CSV files kept as verified binary in the cache: parsed once, memory-mapped ever after."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from attire.data.csv_table import Table, in_range, joined, read_parts, wrong_label
from attire.errors import AttireError, AttireWarning
from attire.storage import files
from attire.storage.files import canonical_json
from attire.storage.formats import open_input

_LEAST = 8 * 2**20  # bytes; a smaller file is parsed in less than a tenth of a second, and not kept
_VERSION = 1  # of the form below and of what `tables` accepts: raise it when either changes
_WIDTH = 784
SUFFIX = ".table"
_SEAL = hashlib.sha256().digest_size


def read_table(path: str | Path, class_count: int = 10, labelled: bool = True) -> Table:
    """What `tables.read_parts` reads, from its binary copy where the cache has one; pixels are then memory-mapped.

    The copy is found by the SHA-256 of the CSV file's content, never by its name or time, and its own digest is
    checked at each open. A damaged one is made again with a warning; a cache that cannot be written costs only time.
    Raises AttireError as `tables.read_frame` does.
    """
    path = Path(path)
    with open_input(path) as file:
        if not file.seekable() or _size_of(file) < _LEAST:
            return joined(read_parts(path, file, class_count, labelled))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        table = open_copy(_copy_path(digest), "a CSV file")
        if table is None or (labelled and table.labels is None):  # that is for the parser to refuse
            table = _kept(path, file, class_count, labelled)
    if table.labels is not None and not in_range(table.labels, class_count):
        row = int(np.flatnonzero((table.labels < 0) | (table.labels >= class_count))[0])
        wrong_label(path, str(table.labels[row]).encode(), row + 2, class_count - 1)
    return table


def _size_of(file: IO[bytes]) -> int:
    size = file.seek(0, 2)
    file.seek(0)
    return size


def folder() -> Path:
    return files.cache_dir() / "tables"


def _copy_path(digest: str) -> Path:
    """Where the copy of the CSV file with this SHA-256 is kept."""
    return folder() / (files.sha256(canonical_json({"csv": digest, "version": _VERSION}))[:32] + SUFFIX)


def open_copy(path: Path, what: str) -> Table | None:
    """The copy, when there is a sound one."""
    try:
        if not path.exists():
            return None
        if files.has_valid_seal(path):
            return _mapped(path)
    except (OSError, AttireError):
        return None  # a cache that cannot be read is as good as none
    line = f"{path}: the copy of {what} is damaged and made again"
    warnings.warn(line, AttireWarning, stacklevel=4)
    return None


def _kept(path: Path, file: IO[bytes], class_count: int, labelled: bool) -> Table:
    """Parse the file and keep a copy, in one pass and without holding the pixels.

    The copy's key is the digest of the very bytes that were parsed, should the file have changed meanwhile.
    """
    found = hashlib.sha256()
    try:
        parts = read_parts(path, file, class_count, labelled, found.update)
        return write_copy(parts, lambda: _copy_path(found.hexdigest()))
    except (AttireError, OSError) as error:
        if isinstance(error, AttireError) and error.subject == str(path):
            raise
        line = f"{error}; {path.name} is parsed anew each time it is read"
        warnings.warn(line, AttireWarning, stacklevel=3)
    file.seek(0)
    return joined(read_parts(path, file, class_count, labelled))


def write_copy(parts: Iterator[Table], place: Callable[[], Path]) -> Table:
    """Write a copy of these rows; its place is asked for once they have all come."""
    new = folder() / f"{os.getpid()}-{id(parts)}.new"
    with files.sealed_file(new) as out:
        labels, rows = [], 0
        for table in parts:
            out.write(np.ascontiguousarray(table.pixels).data)
            labels += [table.labels.astype("<i8")] if table.labels is not None else []
            rows += len(table)
        out.write(b"".join(array.tobytes() for array in labels))
        out.write(np.array([rows, bool(labels)], "<i8").tobytes())
    return _mapped(new.replace(place()))


def _mapped(path: Path) -> Table:
    """The form of a copy: pixels (N, 784) uint8, labels (N,) int64 if any, N and whether there are labels as int64."""
    whole = np.asarray(np.memmap(path, np.uint8, "r"))
    rows, has_labels = whole[-_SEAL - 16 : -_SEAL].copy().view("<i8").tolist()
    end = rows * _WIDTH
    labels = whole[end : end + 8 * rows].copy().view("<i8").astype(np.int64) if has_labels else None
    return Table(whole[:end].reshape(rows, _WIDTH), labels)


def copies() -> Iterator[tuple[str, int]]:
    """(key, bytes) of each copy."""
    for path in sorted(folder().glob(f"*{SUFFIX}")):
        yield path.stem, path.stat().st_size


def delete_copies() -> int:
    """Remove them all; returns the bytes freed."""
    freed = sum(size for _, size in copies())
    for path in folder().glob("*"):
        with suppress(FileNotFoundError):
            path.unlink()
    return freed
