"""Keep CSV files as verified binary copies in the cache: parsed once, memory-mapped ever after."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from attire.data.csv_table import Table, check_labels, read_parts
from attire.errors import AttireError, AttireWarning, one_line
from attire.storage import files
from attire.storage.formats import open_input

_MIN_BYTES = 8 * 2**20  # a smaller file is parsed in less than a tenth of a second, and not kept
_VERSION = 1  # of the form below and of what `read_parts` accepts: raise it when either changes
_WIDTH = 784
_SUFFIX = ".table"
_SEAL_BYTES = hashlib.sha256().digest_size


def read_table(path: str | Path, class_count: int = 10, labelled: bool = True) -> Table:
    """Read a CSV file as `read_parts` does, from its binary copy where the cache has one, memory-mapped.

    The copy is found by the SHA-256 of the CSV file's content, never by name or time, and its own digest is checked
    each time. A damaged copy is made again with a warning. Where the cache is not writable, the file is parsed each
    time. Raises AttireError as `read_parts` does.
    """
    path = Path(path)
    with open_input(path) as file:
        if not file.seekable() or _size_of(file) < _MIN_BYTES:
            return Table.concatenate(read_parts(path, file, class_count, labelled))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        table = _open_copy(_csv_copy(digest), "a CSV file")
        if table is None or (labelled and table.labels is None):  # the parser refuses that
            sha = hashlib.sha256()  # of the very bytes that are parsed, should the file have changed meanwhile

            def read() -> Iterator[Table]:
                file.seek(0)
                return read_parts(path, file, class_count, labelled, sha.update)

            note = f"{path.name} is parsed anew each time it is read"
            table = _read_and_keep(read, lambda: _csv_copy(sha.hexdigest()), {str(path)}, note)
    check_labels(path, table.labels, class_count)
    return table


def cached_table(key: dict[str, Any], what: str, read: Callable[[], Iterator[Table]], subjects: set[str]) -> Table:
    """Open the copy of the data that `key` describes; without one, read the data and keep a copy.

    what: names the data where a copy is damaged. subjects: of errors about the data itself, which are raised. Where
    the cache is not writable, a warning (AttireWarning) is all.
    """
    path = _copy_path(key)
    table = _open_copy(path, what)
    if table is None:
        name = one_line(Path(min(subjects)).name)
        table = _read_and_keep(read, lambda: path, subjects, f"{name} is read anew each time")
    return table


def _size_of(file: IO[bytes]) -> int:
    size = file.seek(0, 2)
    file.seek(0)
    return size


def _folder() -> Path:
    return files.cache_dir() / "tables"


def _copy_path(key: dict[str, Any]) -> Path:
    return _folder() / (files.sha256(files.canonical_json(key))[:32] + _SUFFIX)


def _csv_copy(digest: str) -> Path:
    return _copy_path({"csv": digest, "version": _VERSION})


def _open_copy(path: Path, what: str) -> Table | None:
    """Open a copy; None where there is no undamaged one. Warns (AttireWarning) where it is damaged."""
    try:
        if not path.exists():
            return None
        if files.has_valid_seal(path):
            return _mapped(path)
    except (OSError, AttireError):
        return None  # an unreadable cache is as good as none
    line = f"{path}: the copy of {what} is damaged and made again"
    warnings.warn(line, AttireWarning, stacklevel=4)
    return None


def _read_and_keep(
    read: Callable[[], Iterator[Table]], path_of_copy: Callable[[], Path], subjects: set[str], note: str
) -> Table:
    """Read a table and keep a copy, in one pass and without holding the pixels.

    Raises AttireError about one of the `subjects`. Other errors are the cache's: they become a warning with a note.
    """
    try:
        return _write_copy(read(), path_of_copy)
    except (AttireError, OSError) as error:
        if isinstance(error, AttireError) and error.subject in subjects:
            raise
        warnings.warn(f"{error}; {note}", AttireWarning, stacklevel=4)
    return Table.concatenate(read())


def _write_copy(parts: Iterator[Table], path_of_copy: Callable[[], Path]) -> Table:
    """Write a copy of these rows and open it. `path_of_copy` is called after the last part."""
    unfinished = _folder() / f"{os.getpid()}-{id(parts)}.new"
    with files.sealed_file(unfinished) as out:
        labels, rows = [], 0
        for table in parts:
            out.write(np.ascontiguousarray(table.pixels).data)
            labels += [table.labels.astype("<i8")] if table.labels is not None else []
            rows += len(table)
        out.write(b"".join(array.tobytes() for array in labels))
        out.write(np.array([rows, bool(labels)], "<i8").tobytes())
    return _mapped(unfinished.replace(path_of_copy()))


def _mapped(path: Path) -> Table:
    """Map a copy: pixels (N, 784) uint8, labels (N,) int64 if any, then N and "has labels" as int64."""
    whole = np.asarray(np.memmap(path, np.uint8, "r"))
    rows, has_labels = whole[-_SEAL_BYTES - 16 : -_SEAL_BYTES].copy().view("<i8").tolist()
    end = rows * _WIDTH
    labels = whole[end : end + 8 * rows].copy().view("<i8").astype(np.int64) if has_labels else None
    return Table(whole[:end].reshape(rows, _WIDTH), labels)


def copies() -> Iterator[tuple[str, int]]:
    """Yield key and bytes of each copy."""
    for path in sorted(_folder().glob(f"*{_SUFFIX}")):
        yield path.stem, path.stat().st_size


def delete_copies() -> int:
    """Delete all copies; returns the bytes freed."""
    freed = sum(size for _, size in copies())
    for path in _folder().glob("*"):
        with suppress(FileNotFoundError):
            path.unlink()
    return freed
