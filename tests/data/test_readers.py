"""Files that Hypothesis makes and spoils: what the readers accept is what was written, the rest is refused in one line.

Few examples, always the same, are part of `make test`. For 3,000 new ones of each property:
make test ARGS="tests/test_readers.py --hypothesis-profile long"
"""

import gzip
import io
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from attire.data import csv_table, table_cache
from attire.data.csv_table import _COLUMNS, _HEADER, Table, write_table
from attire.data.idx import _read_idx
from attire.errors import AttireError, AttireWarning

Result = TypeVar("Result")
Edit = tuple[str, float, bytes]
CHARACTERS = b"0123456789,\r\n\"'; \t-+.exna\x00\xff\xef\xbb\xbf"
PLACES = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0]))
TEXTS = st.lists(st.sampled_from(list(CHARACTERS)), min_size=1, max_size=4).map(bytes)
BYTES = st.one_of(st.binary(min_size=1, max_size=4), TEXTS)
KINDS = st.sampled_from(["replace", "insert", "delete", "cut", "repeat"])
EDITS = st.lists(st.tuples(KINDS, PLACES, BYTES), max_size=4)


def edited(data: bytes, edits: list[Edit]) -> bytes:
    for kind, share, what in edits:
        at = round(share * len(data))
        far = at + 7 * what[0]
        data = {
            "replace": data[:at] + what + data[at + len(what) :],
            "insert": data[:at] + what + data[at:],
            "delete": data[:at] + data[far:],
            "cut": data[:at],
            "repeat": data[:far] + data[at:],
        }[kind]
    return data


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers") / "file"


def drawn(rows: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (rows, 28, 28), np.uint8), rng.integers(0, 10, rows)


def written(path: Path, rows: int = 3, seed: int = 0) -> bytes:
    write_table(path, *drawn(rows, seed))
    return path.read_bytes()


def result_of(reader: Callable[[], Result]) -> Result | None:
    """What a reader returns; None where it refuses in one line."""
    try:
        return reader()
    except AttireError as error:
        said = str(error)
    assert said.isprintable()
    return None


def read_plain(path: Path) -> Table:
    with path.open("rb") as file:
        return Table.concatenate(csv_table.read_parts(path, file))


def same(read: Table, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> bool:
    assert read.labels is not None
    return np.array_equal(read.pixels, pixels.reshape(-1, 784)) and np.array_equal(read.labels, labels)


def strictly(data: bytes) -> list[list[int]] | None:
    """The rows of a CSV file, slowly, by the letter of what docs/data.md promises; None where it is not such a file."""
    lines = re.split(rb"\r\n|\r|\n", data.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n"))
    if lines[0] != _HEADER or len(lines) < 2:
        return None
    rows = [line.split(b",") for line in lines[1:]]
    if not all(re.fullmatch(rb"[0-9]+", cell) for row in rows for cell in row):
        return None
    numbers = [[int(cell) if len(cell) < 4000 else 256 for cell in row] for row in rows]
    good = all(len(row) == len(_COLUMNS) and row[0] <= 9 and max(row[1:]) <= 255 for row in numbers)
    return numbers if good else None


@given(st.integers(1, 40), st.integers(0, 2**32), st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.integers(0, 3))
def test_what_is_written_as_csv_is_read(path: Path, rows: int, seed: int, end: bytes, mark: bool, blank: int) -> None:
    images, labels = drawn(rows, seed)
    data = written(path, rows, seed).rstrip(b"\n").replace(b"\n", end) + blank * end
    path.write_bytes(b"\xef\xbb\xbf" * mark + data)
    assert same(read_plain(path), images, labels)


@given(EDITS)
def test_a_spoilt_csv_is_read_by_the_letter_or_refused(path: Path, edits: list[Edit]) -> None:
    data = edited(written(path), edits)
    path.write_bytes(data)
    read, true = result_of(lambda: read_plain(path)), strictly(data)
    assert (read is None) == (true is None)
    if read is not None and true is not None:
        rows = np.array(true)
        assert same(read, rows[:, 1:].astype(np.uint8), rows[:, 0])


@given(st.integers(1, 20), st.integers(0, 2**32), EDITS)
def test_whatever_happens_to_a_copy_the_rows_stay_those_of_the_file(
    path: Path, rows: int, seed: int, edits: list[Edit]
) -> None:
    images, labels = drawn(rows, seed)
    written(path, rows, seed)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(table_cache, "_MIN_BYTES", 0)
        patch.setenv("ATTIRE_CACHE", str(path.parent / "cache"))
        warnings.simplefilter("ignore", AttireWarning)
        assert same(table_cache.read_table(path), images, labels)
        (copy,) = (path.parent / "cache" / "tables").glob("*.table")
        copy.write_bytes(edited(copy.read_bytes(), edits))
        assert same(table_cache.read_table(path), images, labels)
        assert same(table_cache.read_table(path), images, labels)
        table_cache.delete_copies()


def as_idx(images: NDArray[np.uint8]) -> bytes:
    sizes = images.shape
    return struct.pack(f">HBB{len(sizes)}I", 0, 8, len(sizes), *sizes) + images.tobytes()


@given(st.integers(1, 40), st.integers(0, 2**32), st.booleans(), st.booleans())
def test_what_is_written_as_idx_is_read(path: Path, rows: int, seed: int, packed: bool, is_labels: bool) -> None:
    images, labels = drawn(rows, seed)
    values = labels.astype(np.uint8) if is_labels else images
    data = as_idx(values)
    path.write_bytes(gzip.compress(data) if packed else data)
    assert np.array_equal(_read_idx(path, "labels" if is_labels else "images"), values)


def unpacked(data: bytes) -> bytes | None:
    """As Python's own reader of gzip has it."""
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        return gzip.GzipFile(fileobj=io.BytesIO(data)).read()
    except Exception:
        return None


@given(st.booleans(), st.booleans(), EDITS)
def test_a_spoilt_idx_is_what_its_header_says_or_refused(
    path: Path, packed: bool, is_labels: bool, edits: list[Edit]
) -> None:
    images, labels = drawn(3, 0)
    whole = as_idx(labels.astype(np.uint8) if is_labels else images)
    data = edited(gzip.compress(whole) if packed else whole, edits)
    path.write_bytes(data)
    plain, read = unpacked(data), result_of(lambda: _read_idx(path))
    if read is None:  # refused: then it is none, or one that is not ours to take
        assert plain is None or as_read(plain) is None
    else:
        assert plain is not None
        assert np.array_equal(read, np.array(as_read(plain)))


def as_read(data: bytes) -> NDArray[np.uint8] | None:
    """The array of an IDX file of labels or of 28x28 images, by the letter of the format."""
    count = {b"\x00\x00\x08\x01": 1, b"\x00\x00\x08\x03": 3}.get(data[:4], 0)
    if not count or len(data) < 4 + 4 * count:
        return None
    sizes = struct.unpack(f">{count}I", data[4 : 4 + 4 * count])
    body = data[4 + 4 * count :]
    if not sizes[0] or sizes[1:] not in ((), (28, 28)) or len(body) != int(np.prod(sizes, dtype=object)):
        return None
    return np.frombuffer(body, np.uint8).reshape(sizes)
