"""Pictures in Parquet files, as Hugging Face lays them out: bytes in one column, labels in another; read in batches."""

import glob
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import parquet as pq

from attire.data import photos, table_cache
from attire.data.csv_table import Table, joined
from attire.errors import AttireError, AttireWarning, one_line
from attire.storage import files, url_copies
from attire.storage.stores import StorageLocation, is_url, open_location
from attire.version import __version__

SUFFIX = ".parquet"
IMAGE_COLUMN, _LABEL = "image", "label"
_SIDE = 28
_ROWS = 512  # of a batch at most
_BATCH_BYTES = 32 * 2**20  # of a batch, about: photographs of 5 MB come six at a time
_READ = 4 * 2**20  # bytes a read: neither a row group in memory, nor a request to a store for every page
DECODE_THREADS = min(8, os.cpu_count() or 1)  # decode pictures, which Pillow does beside the interpreter
_VERSION = 1  # of what is kept of a file


@dataclass(frozen=True)
class ParquetSource:
    """One Parquet file, here or in a store; opened when it is first asked for something."""

    place: StorageLocation

    def __str__(self) -> str:
        return self.place.url

    @cached_property
    def file(self) -> Any:
        """The pyarrow.parquet.ParquetFile; raises AttireError where it is none, or has no pictures."""
        opened = self.place.open()
        try:
            file = pq.ParquetFile(opened, buffer_size=_READ, page_checksum_verification=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise AttireError(self, "not a Parquet file, or cut off", do="get the file again") from error
        kind = file.schema_arrow.field(IMAGE_COLUMN).type if IMAGE_COLUMN in file.schema_arrow.names else None
        if kind is not None and pa.types.is_struct(kind):
            kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else None
        if kind is None or not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            found = ", ".join(file.schema_arrow.names[:8])
            raise AttireError(self, f"no column {IMAGE_COLUMN} of picture bytes", f"its columns: {found}"[:160])
        return file

    @property
    def version(self) -> str:
        """Changes when the file does: its size and the time of its last change."""
        info = self.place.info()
        return f"{info.size} {info.mtime_ns}"

    @property
    def rows(self) -> int:
        return int(self.file.metadata.num_rows)

    @property
    def schema(self) -> Any:
        return self.file.schema_arrow

    def batches(self, columns: Sequence[str] | None = None, first: int = 0) -> Iterator[Any]:
        """Record batches from row `first` on, small enough for memory; row groups before that are not read."""
        start = 0
        for group in range(self.file.metadata.num_row_groups):
            about = self.file.metadata.row_group(group)
            end = start + about.num_rows
            size = max(1, min(_ROWS, _BATCH_BYTES * about.num_rows // max(1, about.total_byte_size)))
            if end > first:
                with _damage(self, f"rows {start + 1:,} to {end:,}"):
                    for batch in self.file.iter_batches(size, row_groups=[group], columns=columns):
                        skip = min(len(batch), max(0, first - start))
                        if skip < len(batch):
                            yield batch[skip:]
                        start += len(batch)
            start = end


@contextmanager
def _damage(source: ParquetSource, where: str) -> Iterator[None]:
    """What pyarrow raises while it reads becomes one AttireError."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise AttireError(source, "damaged, or its store fell silent", where, one_line(str(error))[:100]) from error


def find_sources(where: str | Path) -> list[ParquetSource]:
    """The Parquet files that a path, a folder, a pattern or a URL of these names, in the order of their names."""
    text = str(where)
    if is_url(text) and not text.startswith("file:"):
        found = url_copies.list_objects(text)
        if any(isinstance(one, url_copies.HttpFile) for one in found.values()):
            return [ParquetSource(open_location(url_copies.local_copy(text)))]
        places = [one.place for one in found.values() if isinstance(one, url_copies.StoredObject)]
        chosen = [at for at in places if at.path.lower().endswith(SUFFIX)]
        if not chosen:
            raise AttireError(text, f"no {SUFFIX} files there")
        return [ParquetSource(at) for at in chosen]
    return [ParquetSource(open_location(path)) for path in find_files(url_copies.local_copy(text))]


def find_files(where: Path) -> list[Path]:
    """The files of `sources`, of a path on this machine."""
    if where.is_dir():
        found = sorted(path for path in where.iterdir() if path.suffix.lower() == SUFFIX and path.name[0] != ".")
    elif glob.has_magic(str(where)) and not where.exists():
        found = sorted(Path(name) for name in glob.glob(str(where)))  # noqa: PTH207  (absolute patterns too)
    else:
        found = [where]
    if not found:
        raise AttireError(where, f"no {SUFFIX} files there")
    return found


def is_parquet(where: str | Path) -> bool:
    """By its name: a file, a pattern or a URL that ends as Parquet files do."""
    return str(where).lower().endswith(SUFFIX)


# Pictures.


def image_bytes(batch: Any) -> list[bytes | None]:
    """The column of pictures of a record batch."""
    column = batch.column(batch.schema.get_field_index(IMAGE_COLUMN))
    column = pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column
    found: list[bytes | None] = column.to_pylist()
    return found


def prepare_image(data: bytes | None, source: ParquetSource, row: int) -> NDArray[np.uint8]:
    """(28, 28) as predictions see it. Raises AttireError that names file and row, counted from 1."""
    if data is None:
        what = "no picture bytes, expected those of a PNG, JPEG, WebP or BMP file"
        raise AttireError(source, what, f"row {row:,}")
    try:
        return photos.prepare(data, str(source)).image
    except AttireError as error:
        where = f"row {row:,}, {error.where}" if error.where else f"row {row:,}"
        raise AttireError(source, error.what, where, error.do) from error


# Labelled pictures as a data set.


def read_table(paths: Sequence[Path], classes: Sequence[str] | None = None) -> tuple[Table, tuple[str, ...] | None]:
    """Pixels (N, 784) and labels (N,) of these files, and the names of the classes, None where no file tells them.

    Pictures are prepared once: rows of pixels are kept in the cache by the digests of the files, and memory-mapped.
    Integer labels have their names from Hugging Face's metadata; text labels are the names, sorted, or `classes`.
    Raises AttireError with file and row for whatever is not a labelled picture.
    """
    parts = [ParquetSource(open_location(path)) for path in paths]
    coding = _LabelEncoder(parts, None if classes is None else tuple(classes))
    key = {"parquet": [_file_digest(path) for path in paths], "classes": coding.names, "version": _VERSION}
    kept = (
        table_cache.folder()
        / f"{files.sha256(files.canonical_json({**key, 'attire': __version__}))[:32]}{table_cache.SUFFIX}"
    )
    table = table_cache.open_copy(kept, "Parquet files")
    if table is None:
        try:
            table = table_cache.write_copy(_tables(parts, coding), lambda: kept)
        except AttireError as error:
            if error.subject in {str(part) for part in parts}:
                raise
            line = f"{error}; {one_line(paths[0].name)} is read anew each time"
            warnings.warn(line, AttireWarning, stacklevel=3)
            table = joined(_tables(parts, coding))
    if not len(table):
        raise AttireError(parts[0], "no rows")
    return table, coding.names


def _file_digest(path: Path) -> str:
    try:
        return files.sha256_file(path)
    except OSError as error:
        raise files.io_error("read", path, error) from error


def _tables(parts: Sequence[ParquetSource], coding: "_LabelEncoder") -> Iterator[Table]:
    """Rows in the order of the files, a batch at a time."""
    with ThreadPoolExecutor(DECODE_THREADS, "decode") as pool:
        for part in parts:
            row = 1
            for batch in part.batches([IMAGE_COLUMN, _LABEL]):
                labels = coding.codes(part, batch, row)
                numbers = range(row, row + len(batch))
                images = list(pool.map(prepare_image, image_bytes(batch), [part] * len(batch), numbers))
                yield Table(np.stack(images).reshape(len(batch), _SIDE * _SIDE), labels)
                row += len(batch)


class _LabelEncoder:
    """Labels as numbers into `names`: None for integers that no file has names for."""

    def __init__(self, parts: Sequence[ParquetSource], classes: tuple[str, ...] | None) -> None:
        self.order: dict[str, list[int]] = {}  # of files with other numbers for the same names
        kinds = {_is_text(part) for part in parts}
        if len(kinds) > 1:
            raise AttireError(parts[-1], "labels of another type than in the files before it")
        self.text = kinds == {True}
        self.names: tuple[str, ...] | None = classes
        if self.text:
            self.names = classes or tuple(sorted({name for part in parts for name in _label_names(part)}))
            return
        for part in parts:
            told = _told_names(part)
            self.names = self.names or told
            if told and self.names and told != self.names:
                own, known = [_plain(name) for name in told], [_plain(name) for name in self.names]
                if sorted(own) != sorted(known) or len(set(own)) < len(own):
                    what = f"its classes are {', '.join(told)}"[:120]
                    raise AttireError(part, what, f"expected {', '.join(self.names)}"[:120])
                self.order[str(part)] = [known.index(name) for name in own]

    def codes(self, part: ParquetSource, batch: Any, row: int) -> NDArray[np.int64]:
        """(n,) int64 of a batch whose first row is `row`."""
        column = batch.column(batch.schema.get_field_index(_LABEL))
        if column.null_count:
            missing = column.is_null().to_pylist().index(True)
            raise AttireError(part, "no label", f"row {row + missing:,}")
        if not self.text:
            values: NDArray[np.int64] = column.cast(pa.int64()).to_numpy(zero_copy_only=False)
            count = len(self.names) if self.names else 10
            wrong = np.flatnonzero((values < 0) | (values >= count))
            if len(wrong):
                what = f"label is {values[wrong[0]]}, expected 0 to {count - 1}"
                raise AttireError(part, what, f"row {row + wrong[0]:,}")
            order = self.order.get(str(part))
            return values if order is None else np.array(order, np.int64)[values]
        assert self.names is not None
        places = {name: i for i, name in enumerate(self.names)}
        found = column.cast(pa.string()).to_pylist()
        for i, name in enumerate(found):
            if name not in places:
                what = f"label is {one_line(name)[:60]!r}, none of the {len(places)} classes"
                raise AttireError(part, what, f"row {row + i:,}")
        return np.array([places[name] for name in found], np.int64)


def _plain(name: str) -> str:
    """Letters and digits alone: Hugging Face's Fashion-MNIST calls "T-shirt/top" "T - shirt / top"."""
    return "".join(c for c in name.casefold() if c.isalnum())


def _is_text(part: ParquetSource) -> bool:
    """Whether labels are names; False for integers, AttireError for anything else."""
    if _LABEL not in part.schema.names:
        raise AttireError(part, f"no column {_LABEL}", f"its columns: {', '.join(part.schema.names[:8])}"[:160])
    kind = part.schema.field(_LABEL).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_integer(kind):
        return False
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return True
    raise AttireError(part, f"column {_LABEL} is {kind}, expected integers or text")


def _label_names(part: ParquetSource) -> set[str]:
    return {
        name
        for batch in part.batches([_LABEL])
        for name in batch.column(0).cast(pa.string()).unique().to_pylist()
        if name
    }


def _told_names(part: ParquetSource) -> tuple[str, ...] | None:
    """Class names as Hugging Face's `datasets` stores them in the schema: info.features.label.names."""
    try:
        value = json.loads((part.schema.metadata or {})[b"huggingface"])
        names = value["info"]["features"][_LABEL]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
