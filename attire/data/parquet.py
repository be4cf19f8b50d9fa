"""Read pictures from Parquet files, as on Hugging Face: bytes in one column, labels in another, in batches."""

import glob
import json
import os
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

from attire.data import photos
from attire.data.csv_table import Table
from attire.data.table_cache import cached_table
from attire.errors import AttireError, one_line
from attire.storage import files, url_copies
from attire.storage.stores import StorageLocation, is_url, open_location
from attire.version import __version__

SUFFIX = ".parquet"
IMAGE_COLUMN, _LABEL = "image", "label"
_SIDE = 28
_BATCH_ROWS = 512  # at most
_BATCH_BYTES = 32 * 2**20  # about: six photographs of 5 MB at a time
_READ_BYTES = 4 * 2**20  # of one read: neither a row group in memory, nor a request to a store for every page
DECODE_THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes beside the interpreter
_VERSION = 1  # of the copies in the cache


@dataclass(frozen=True)
class ParquetSource:
    """One Parquet file, local or in a store; opened at its first use."""

    location: StorageLocation

    def __str__(self) -> str:
        return self.location.url

    @cached_property
    def file(self) -> Any:
        """The pyarrow.parquet.ParquetFile. Raises AttireError where it is none, or has no pictures."""
        opened = self.location.open()
        try:
            file = pq.ParquetFile(opened, buffer_size=_READ_BYTES, page_checksum_verification=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise AttireError(self, "not a Parquet file, or cut off", do="get the file again") from error
        kind = file.schema_arrow.field(IMAGE_COLUMN).type if IMAGE_COLUMN in file.schema_arrow.names else None
        if kind is not None and pa.types.is_struct(kind):
            kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else None
        if kind is None or not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            columns = ", ".join(file.schema_arrow.names[:8])
            raise AttireError(self, f"no column {IMAGE_COLUMN} of picture bytes", f"its columns: {columns}"[:160])
        return file

    @property
    def version(self) -> str:
        """The file's size and the time of its last change."""
        info = self.location.info()
        return f"{info.size} {info.mtime_ns}"

    @property
    def rows(self) -> int:
        return int(self.file.metadata.num_rows)

    @property
    def schema(self) -> Any:
        return self.file.schema_arrow

    def batches(self, columns: Sequence[str] | None = None, first: int = 0) -> Iterator[Any]:
        """Yield record batches from row `first` on, small enough for memory. Earlier row groups are not read."""
        start = 0
        for group in range(self.file.metadata.num_row_groups):
            metadata = self.file.metadata.row_group(group)
            end = start + metadata.num_rows
            size = max(1, min(_BATCH_ROWS, _BATCH_BYTES * metadata.num_rows // max(1, metadata.total_byte_size)))
            if end > first:
                with _read_errors(self, f"rows {start + 1:,} to {end:,}"):
                    for batch in self.file.iter_batches(size, row_groups=[group], columns=columns):
                        skip = min(len(batch), max(0, first - start))
                        if skip < len(batch):
                            yield batch[skip:]
                        start += len(batch)
            start = end


@contextmanager
def _read_errors(source: ParquetSource, where: str) -> Iterator[None]:
    """Turn what pyarrow raises while it reads into an AttireError."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise AttireError(source, "damaged, or its store fell silent", where, one_line(str(error))[:100]) from error


def find_sources(path_or_url: str | Path) -> list[ParquetSource]:
    """Find the Parquet files that a path, a folder, a pattern or a URL of these names, in the order of their names.

    Raises AttireError where there is none.
    """
    text = str(path_or_url)
    if is_url(text) and not text.startswith("file:"):
        locations = [at for at in url_copies.locations(text) if at.folder or at.path.lower().endswith(SUFFIX)]
        if not locations:
            raise AttireError(text, f"no {SUFFIX} files there")
        return [ParquetSource(location) for location in locations]
    return [ParquetSource(open_location(path)) for path in find_files(url_copies.local_copy(text))]


def find_files(path: Path) -> list[Path]:
    """As `find_sources`, for a path on this machine."""
    if path.is_dir():
        paths = sorted(entry for entry in path.iterdir() if is_parquet(entry) and entry.name[0] != ".")
    elif glob.has_magic(str(path)) and not path.exists():
        paths = sorted(Path(name) for name in glob.glob(str(path)))  # noqa: PTH207  (absolute patterns too)
    else:
        paths = [path]
    if not paths:
        raise AttireError(path, f"no {SUFFIX} files there")
    return paths


def is_parquet(path_or_url: str | Path) -> bool:
    """Check by its name whether a file, a pattern or a URL is of Parquet files."""
    return str(path_or_url).lower().endswith(SUFFIX)


def image_bytes(batch: Any) -> list[bytes | None]:
    """Return the encoded pictures of a record batch."""
    column = batch.column(batch.schema.get_field_index(IMAGE_COLUMN))
    column = pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column
    data: list[bytes | None] = column.to_pylist()
    return data


def prepare_image(data: bytes | None, source: ParquetSource, row: int) -> NDArray[np.uint8]:
    """Prepare a picture as for a prediction: (28, 28) uint8. Raises AttireError with file and row, counted from 1."""
    if data is None:
        what = "no picture bytes, expected those of a PNG, JPEG, WebP or BMP file"
        raise AttireError(source, what, f"row {row:,}")
    try:
        return photos.prepare(data, str(source)).image
    except AttireError as error:
        where = f"row {row:,}, {error.where}" if error.where else f"row {row:,}"
        raise AttireError(source, error.what, where, error.do) from error


def read_table(paths: Sequence[Path], classes: Sequence[str] | None = None) -> tuple[Table, tuple[str, ...] | None]:
    """Read labelled pictures: pixels (N, 784), labels (N,), and class names, None where no file has them.

    Pictures are prepared once: their pixels are kept in the cache by the files' digests, and memory-mapped. Integer
    labels take their names from Hugging Face's metadata; text labels are the names, sorted, or `classes`. Raises
    AttireError with file and row for whatever is not a labelled picture.
    """
    sources = [ParquetSource(open_location(path)) for path in paths]
    encoder = _LabelEncoder(sources, None if classes is None else tuple(classes))
    digests = [_file_digest(path) for path in paths]
    key = {"parquet": digests, "classes": encoder.names, "version": _VERSION, "attire": __version__}
    subjects = {str(source) for source in sources}
    table = cached_table(key, "Parquet files", lambda: _tables(sources, encoder), subjects)
    if not len(table):
        raise AttireError(sources[0], "no rows")
    return table, encoder.names


def _file_digest(path: Path) -> str:
    try:
        return files.sha256_file(path)
    except OSError as error:
        raise files.io_error("read", path, error) from error


def _tables(sources: Sequence[ParquetSource], encoder: "_LabelEncoder") -> Iterator[Table]:
    """Yield rows in the order of the files, a batch at a time."""
    with ThreadPoolExecutor(DECODE_THREADS, "decode") as pool:
        for source in sources:
            row = 1
            for batch in source.batches([IMAGE_COLUMN, _LABEL]):
                labels = encoder.encode(source, batch, row)
                numbers = range(row, row + len(batch))
                images = list(pool.map(prepare_image, image_bytes(batch), [source] * len(batch), numbers))
                yield Table(np.stack(images).reshape(len(batch), _SIDE * _SIDE), labels)
                row += len(batch)


class _LabelEncoder:
    """Encodes labels as numbers into `names`, which are None for integers that no file names.

    Raises AttireError where the files' labels disagree in type or names.
    """

    def __init__(self, sources: Sequence[ParquetSource], classes: tuple[str, ...] | None) -> None:
        self.orders: dict[str, list[int]] = {}  # of files that number the same names otherwise
        kinds = {_is_text(source) for source in sources}
        if len(kinds) > 1:
            raise AttireError(sources[-1], "labels of another type than in the files before it")
        self.text = kinds == {True}
        self.names: tuple[str, ...] | None = classes
        if self.text:
            self.names = classes or tuple(sorted({name for source in sources for name in _label_names(source)}))
            return
        for source in sources:
            self._add_names(source)

    def _add_names(self, source: ParquetSource) -> None:
        """Take class names from a file's metadata, or the order of its numbers where the names are known."""
        own = _schema_names(source)
        self.names = self.names or own
        if own and self.names and own != self.names:
            plain, known = [_plain(name) for name in own], [_plain(name) for name in self.names]
            if sorted(plain) != sorted(known) or len(set(plain)) < len(plain):
                what = f"its classes are {', '.join(own)}"[:120]
                raise AttireError(source, what, f"expected {', '.join(self.names)}"[:120])
            self.orders[str(source)] = [known.index(name) for name in plain]

    def encode(self, source: ParquetSource, batch: Any, row: int) -> NDArray[np.int64]:
        """Return labels (n,) int64 of a batch whose first row is `row`. Raises AttireError with the bad row."""
        column = batch.column(batch.schema.get_field_index(_LABEL))
        if column.null_count:
            missing = column.is_null().to_pylist().index(True)
            raise AttireError(source, "no label", f"row {row + missing:,}")
        return self._encode_text(source, column, row) if self.text else self._encode_numbers(source, column, row)

    def _encode_numbers(self, source: ParquetSource, column: Any, row: int) -> NDArray[np.int64]:
        values: NDArray[np.int64] = column.cast(pa.int64()).to_numpy(zero_copy_only=False)
        count = len(self.names) if self.names else 10
        wrong = np.flatnonzero((values < 0) | (values >= count))
        if len(wrong):
            what = f"label is {values[wrong[0]]}, expected 0 to {count - 1}"
            raise AttireError(source, what, f"row {row + wrong[0]:,}")
        order = self.orders.get(str(source))
        return values if order is None else np.array(order, np.int64)[values]

    def _encode_text(self, source: ParquetSource, column: Any, row: int) -> NDArray[np.int64]:
        assert self.names is not None
        numbers = {name: i for i, name in enumerate(self.names)}
        labels = column.cast(pa.string()).to_pylist()
        for i, name in enumerate(labels):
            if name not in numbers:
                what = f"label is {one_line(name)[:60]!r}, none of the {len(numbers)} classes"
                raise AttireError(source, what, f"row {row + i:,}")
        return np.array([numbers[name] for name in labels], np.int64)


def _plain(name: str) -> str:
    """Keep letters and digits only: Hugging Face's Fashion-MNIST calls "T-shirt/top" "T - shirt / top"."""
    return "".join(c for c in name.casefold() if c.isalnum())


def _is_text(source: ParquetSource) -> bool:
    """Check whether labels are names rather than integers. Raises AttireError for anything else."""
    if _LABEL not in source.schema.names:
        raise AttireError(source, f"no column {_LABEL}", f"its columns: {', '.join(source.schema.names[:8])}"[:160])
    kind = source.schema.field(_LABEL).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_integer(kind):
        return False
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return True
    raise AttireError(source, f"column {_LABEL} is {kind}, expected integers or text")


def _label_names(source: ParquetSource) -> set[str]:
    return {
        name
        for batch in source.batches([_LABEL])
        for name in batch.column(0).cast(pa.string()).unique().to_pylist()
        if name
    }


def _schema_names(source: ParquetSource) -> tuple[str, ...] | None:
    """Return class names as Hugging Face's `datasets` stores them in the schema: info.features.label.names."""
    try:
        value = json.loads((source.schema.metadata or {})[b"huggingface"])
        names = value["info"]["features"][_LABEL]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
