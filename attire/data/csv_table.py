"""Read and write the CSV form of Fashion-MNIST, `label,pixel1,...,pixel784`; errors name line and column."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv

from attire.errors import AttireError, one_line
from attire.storage.files import atomic_file
from attire.storage.formats import name_format

_Columns = tuple[str, ...]
_OnBytes = Callable[[bytes], object]

_PIXEL_COLUMNS: _Columns = tuple(f"pixel{i}" for i in range(1, 785))
_COLUMNS: _Columns = ("label", *_PIXEL_COLUMNS)
_HEADER = ",".join(_COLUMNS).encode()
_BOM = b"\xef\xbb\xbf"
_PLAIN = b"0123456789,\r\n"
_SEPARATORS = {b";": "semicolons", b"\t": "tabs", b"|": "bars", b" ": "spaces"}
_LINE = re.compile(rb"([^\r\n]*)(\r\n|\r|\n|\Z)")
_PIXELS = frozenset(str(i).encode() for i in range(256))
_FIRST_BYTES = 1 << 16  # the header line needs 6,949 of them
_TEXT_BYTES = 1 << 24  # held at a time, some 7,500 rows; 8 MB are 10 % slower, 32 MB no faster
_BLOCK_BYTES = 1 << 23  # parsed by Arrow at a time; with its own 1 MB, 785 columns become 100,000 tiny arrays


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of a CSV file: `pixels` (N, 784) uint8 and `labels` (N,) int64, None where the file has none."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.pixels)

    @classmethod
    def concatenate(cls, parts: Iterable["Table"]) -> "Table":
        tables = list(parts)
        labels = [part.labels for part in tables if part.labels is not None]
        return cls(np.concatenate([part.pixels for part in tables]), np.concatenate(labels) if labels else None)


def read_parts(
    path: Path, file: IO[bytes], class_count: int = 10, labelled: bool = True, on_bytes: _OnBytes = lambda data: None
) -> Iterator[Table]:
    """Read a table some thousand rows at a time, so that memory does not grow with the file; one part or more.

    Labels must lie in 0 to class_count - 1. labelled: whether a file of `pixel1` to `pixel784` alone is refused.
    on_bytes: called with every byte of the file, in order. Raises AttireError with the 1-based line of the first
    fault. No cell is ever filled in, rounded or stripped.
    """
    data = file.read(_FIRST_BYTES)
    on_bytes(data)
    if not data:
        raise AttireError(path, "empty file", do="expected a CSV file with the header label,pixel1,...,pixel784")
    _check_kind(path, data)
    line = _LINE.match(data)
    assert line
    header = line[1].removeprefix(_BOM)
    bare = not labelled and header.startswith(b"pixel") and b"label" not in header.split(b",")
    columns = _PIXEL_COLUMNS if bare else _COLUMNS
    _check_header(path, header, columns)
    rows = 0
    for text, last in _whole_lines(file, data[line.end() :], on_bytes):
        part = _parse(text, columns)
        if part is None or len(_wrong_labels(part.labels, class_count)):
            _diagnose(path, text, rows + 2, last, columns, class_count)
        rows += len(part)
        yield part
    if not rows:
        raise AttireError(path, "only a header, no rows", do="the file may be cut off there")


def _wrong_labels(labels: NDArray[np.int64] | None, class_count: int) -> NDArray[np.int64]:
    """Return the rows whose label is out of range."""
    if labels is None:
        return np.empty(0, np.int64)
    return np.flatnonzero((labels < 0) | (labels >= class_count))


def check_labels(path: Path, labels: NDArray[np.int64] | None, class_count: int) -> None:
    """Raise AttireError with the line of the first label out of range."""
    rows = _wrong_labels(labels, class_count)
    if labels is not None and len(rows):
        _wrong_label(path, str(labels[rows[0]]).encode(), int(rows[0]) + 2, class_count - 1)


def _whole_lines(file: IO[bytes], text: bytes, on_bytes: _OnBytes) -> Iterator[tuple[bytes, bool]]:
    """Yield whole lines, about 16 MB at a time, without the last line's end; and whether they are the file's last.

    text: the bytes read before. A part ends only where more lines follow: line ends at the end of the file are
    dropped, an empty line between rows is not.
    """
    size = _TEXT_BYTES
    while data := file.read(size):
        on_bytes(data)
        text += data
        end = len(text.rstrip(b"\r\n"))
        cut = max(text.rfind(b"\n", 0, end), text.rfind(b"\r", 0, end))
        stop = len(text[: cut + 1].rstrip(b"\r\n"))
        if not stop:  # a longer line, or line ends alone
            size *= 2
            continue
        yield text[:stop], False
        text, size = text[stop + (2 if text.startswith(b"\r\n", stop) else 1) :], _TEXT_BYTES
    if text := text.rstrip(b"\r\n"):
        yield text, True


def _check_kind(path: Path, data: bytes) -> None:
    """Raise AttireError where a file's first bytes show another format."""
    kind = name_format(data) or ("binary data" if b"\x00" in data else "")
    if not kind:
        return
    do = "unpack it first" if "compressed" in kind or "archive" in kind else ""
    if kind == "UTF-16 text":
        do = "save it as UTF-8"
    elif "Excel" in kind:
        do = "export the sheet as CSV"
    elif "IDX" in kind:
        do = "name the pair ...-images-idx3-ubyte and ...-labels-idx1-ubyte"
    raise AttireError(path, f"{kind}, expected CSV text", do=do)


def _parse(text: bytes, columns: _Columns) -> Table | None:
    """Parse rows; None where a cell is not a plain number in its column's range.

    Arrow accepts blanks around numbers, and 0x1F; the check of the bytes refuses such cells.
    """
    if text.translate(None, _PLAIN):
        return None
    try:
        table = csv.read_csv(
            pa.BufferReader(text),
            read_options=csv.ReadOptions(column_names=columns, block_size=_BLOCK_BYTES),
            parse_options=csv.ParseOptions(quote_char=False, escape_char=False, ignore_empty_lines=False),
            convert_options=csv.ConvertOptions(
                column_types=dict.fromkeys(_PIXEL_COLUMNS, pa.uint8()) | {"label": pa.int64()},
                null_values=[],
                strings_can_be_null=False,
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError):
        return None
    pixels = np.empty((len(_PIXEL_COLUMNS), len(table)), np.uint8)
    for out, column in zip(pixels, table.columns[-len(_PIXEL_COLUMNS) :], strict=True):
        out[:] = column.to_numpy()
    labels = table["label"].to_numpy() if columns == _COLUMNS else None
    return Table(np.ascontiguousarray(pixels.T), labels)


def _check_header(path: Path, line: bytes, columns: _Columns) -> None:
    """Raise AttireError that says whether a header is missing, quoted, misspelt, doubled or reordered."""
    if line == ",".join(columns).encode():
        return
    expected = f"expected {'label,' * (columns == _COLUMNS)}pixel1,...,pixel784"
    _check_separator(path, line, 1)
    names = [_show(name) for name in line.split(b",")]
    bare = [name.strip("\"' ") for name in names]
    if re.fullmatch(rb"[-+.\d,eE\s]+", line):
        raise AttireError(path, "no header", "line 1", f"{expected} above the rows")
    if not line.strip():
        raise AttireError(path, "empty line in place of the header", "line 1", expected)
    if tuple(bare) == columns:
        raise AttireError(path, "column names with quotes or spaces", "line 1", f"{expected}, without them")
    seen: set[str] = set()
    for place, name in enumerate(names, 1):
        if name in seen:
            raise AttireError(path, f"column {name} stands twice", f"line 1, column {place}", expected)
        seen.add(name)
    missing = [name for name in columns if name not in seen]
    if not missing and len(names) == len(columns):
        place = next(i for i, name in enumerate(names) if name != columns[i])
        what = f"columns in another order: {names[place]} where {columns[place]} belongs"
        raise AttireError(path, what, f"line 1, column {place + 1}", expected)
    if missing:
        present = f"{len(names):,} columns" if len(names) != 1 else f"one column, {names[0]}"
        raise AttireError(path, f"no column {missing[0]} among {present}", "line 1", expected)
    extra = next(name for name in names if name not in columns)
    what = f"{len(names)} columns, expected {len(columns)}; {extra} is not one of them"
    raise AttireError(path, what, "line 1", expected)


def _check_separator(path: Path, line: bytes, number: int) -> None:
    for mark, name in _SEPARATORS.items():
        if line.count(mark) > max(line.count(b","), 99):
            raise AttireError(path, f"values separated by {name}, expected commas", f"line {number:,}")


def _diagnose(path: Path, text: bytes, first: int, last: bool, columns: _Columns, class_count: int) -> NoReturn:
    """Raise AttireError for the first line that has other than whole numbers within their ranges.

    first: the number of the text's first line. last: whether the file ends with the text.
    """
    for number, line, at_end in _lines(text, first):
        ends = last and at_end
        cells = line.split(b",")
        if len(cells) != len(columns):
            _check_separator(path, line, number)
            _wrong_count(path, line, len(cells), len(columns), number, ends)
        top = class_count - 1
        if columns == _COLUMNS and not (cells[0].isdigit() and int(cells[0][-9:]) <= top and len(cells[0]) <= 9):
            _wrong_label(path, cells[0], number, top)
        pixels = cells[-len(_PIXEL_COLUMNS) :]
        if set(pixels) <= _PIXELS:
            continue
        for name, cell in zip(_PIXEL_COLUMNS, pixels, strict=True):
            if not cell.isdigit() or cell.lstrip(b"0") not in _PIXELS | {b""}:
                _wrong_pixel(path, name, cell, number, ends and name == _PIXEL_COLUMNS[-1])
    raise AttireError(path, "cannot be read as CSV", do="write it again as plain comma-separated whole numbers")


def _lines(text: bytes, first: int) -> Iterator[tuple[int, bytes, bool]]:
    """Yield number, content and "is the last" of each line; lines end with \\n, \\r\\n or \\r, as for Arrow."""
    for number, match in enumerate(_LINE.finditer(text), first):
        if number > first and match.start() == len(text):
            return
        yield number, match[1], match.end() == len(text)


def _wrong_count(path: Path, line: bytes, count: int, expected: int, number: int, last: bool) -> NoReturn:
    if not line.strip():
        raise AttireError(path, "empty line between rows", f"line {number:,}", "take it out, or put the row back")
    row = "a row is one label and 784 pixels" if expected == len(_COLUMNS) else "a row is 784 pixels"
    do = "the file may be cut off there" if last and count < expected else row
    values = f"{count:,} value{'s' if count != 1 else ''}"
    raise AttireError(path, f"{values}, expected {expected}", f"line {number:,}", do)


def _wrong_label(path: Path, cell: bytes, number: int, top: int) -> NoReturn:
    expected = f"expected a whole number from 0 to {top}"
    do = "name the classes with --classes when they are not these" if cell.isdigit() else ""
    raise AttireError(path, f"label {_quote(cell)}, {expected}", f"line {number:,}", do)


def _wrong_pixel(path: Path, name: str, cell: bytes, number: int, last: bool) -> NoReturn:
    do = "" if cell.strip() else "put the true value there, or take the row out; gaps are never filled"
    if last and not cell:
        do = "the file may be cut off there"
    expected = "expected a whole number from 0 to 255"
    raise AttireError(path, f"{name} {_quote(cell)}, {expected}", f"line {number:,}", do)


def _quote(cell: bytes) -> str:
    text = _show(cell)
    return "is empty" if not text else f"is {text}" if re.fullmatch(r"[-+.\w]+", text) else f"is '{text}'"


def _show(cell: bytes) -> str:
    text = cell.decode("utf-8", "backslashreplace")
    return one_line(text if len(text) <= 24 else text[:20] + "...")


def write_table(path: str | Path, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
    """Write images (N, 28, 28) uint8 and labels (N,) int64 as CSV, atomically. Raises AttireError."""
    with atomic_file(Path(path)) as file:
        file.write(_HEADER + b"\n")
        options = csv.WriteOptions(include_header=False, quoting_style="none", batch_size=2048)
        for start in range(0, len(images), 8192):
            pixels = np.ascontiguousarray(images[start : start + 8192].reshape(-1, 784).T)  # (784, n)
            columns = [pa.array(labels[start : start + 8192]), *(pa.array(column) for column in pixels)]
            csv.write_csv(pa.table(columns, names=_COLUMNS), file, options)
