import gzip
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from attire.data.csv_table import _COLUMNS, _HEADER, Table, read_parts, write_table
from attire.errors import AttireError
from attire.storage.formats import open_input


def read(path: str | Path, class_count: int = 10) -> Table:
    with open_input(Path(path)) as file:
        return Table.concatenate(read_parts(Path(path), file, class_count))


GOOD = [str(value) for value in (7, *[i % 256 for i in range(784)])]


def with_cell(place: int, cell: str) -> str:
    return ",".join([*GOOD[:place], cell, *GOOD[place + 1 :]])


ROW = ",".join(GOOD)


def write(tmp_path: Path, *lines: str | bytes, end: bytes = b"\n", name: str = "mine.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(end.join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def message(path: Path, class_count: int = 10) -> str:
    """The error's line, after the file's name."""
    with pytest.raises(AttireError) as caught:
        read(path, class_count)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


def test_a_table_has_the_types_and_values_of_the_file(tmp_path: Path) -> None:
    table = read(write(tmp_path, _HEADER, ROW, with_cell(0, "0"), ""))
    assert table.labels is not None
    assert table.labels.dtype == np.int64
    assert table.pixels.dtype == np.uint8
    assert table.labels.tolist() == [7, 0]
    assert table.pixels[1].tolist() == [i % 256 for i in range(784)]
    assert tuple(_COLUMNS) == ("label", *(f"pixel{i}" for i in range(1, 785)))


def test_a_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    content = b"\n".join([_HEADER, *[ROW.encode()] * 40])
    writer = threading.Thread(target=pipe.write_bytes, args=(content,))
    writer.start()
    assert len(read(pipe)) == 40
    writer.join()


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("tail", [[], [""], ["", "", ""]])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_harmless_variations_are_accepted(tmp_path: Path, end: bytes, tail: list[str], bom: bytes) -> None:
    assert len(read(write(tmp_path, bom + _HEADER, ROW, ROW, *tail, end=end))) == 2


def test_leading_zeros_are_the_same_number(tmp_path: Path) -> None:
    path = write(tmp_path, _HEADER, with_cell(3, "007"), with_cell(3, "000"))
    assert read(path).pixels[:, 2].tolist() == [7, 0]


@pytest.mark.parametrize(
    "cell",
    ["256", "-1", "12.0", "1e2", "nan", "NULL", "0x1F", "+5", '"12"', "' 12'", "'12 '", "99999999999999999999", "'٣'"],
)
def test_a_pixel_that_is_no_whole_number_in_range_is_shown(tmp_path: Path, cell: str) -> None:
    path = write(tmp_path, _HEADER, ROW, with_cell(12, cell.strip("'")), ROW)
    shown = {'"12"': "'\"12\"'", "'٣'": "٣"}.get(cell, cell)
    assert message(path) == f"pixel12 is {shown}, expected a whole number from 0 to 255 (line 3)"


def test_an_empty_pixel_is_never_filled(tmp_path: Path) -> None:
    what = "expected a whole number from 0 to 255 (line 2); "
    do = "put the true value there, or take the row out; gaps are never filled"
    assert message(write(tmp_path, _HEADER, with_cell(1, ""), ROW)) == f"pixel1 is empty, {what}{do}"
    assert message(write(tmp_path, _HEADER, with_cell(1, " "), ROW)) == f"pixel1 is ' ', {what}{do}"
    cut = write(tmp_path, _HEADER, with_cell(784, ""))
    assert message(cut) == f"pixel784 is empty, {what}the file may be cut off there"


@pytest.mark.parametrize("cell", ["-1", "Sneaker", "7.0", "nan", "", "1e0", " 7"])
def test_a_label_that_is_no_class_number(tmp_path: Path, cell: str) -> None:
    shown = {"": "empty", " 7": "' 7'"}.get(cell, cell)
    assert message(write(tmp_path, _HEADER, with_cell(0, cell))) == (
        f"label is {shown}, expected a whole number from 0 to 9 (line 2)"
    )


@pytest.mark.parametrize("cell", ["10", "99999999999999999999999"])
def test_a_label_beyond_the_classes_points_to_the_option(tmp_path: Path, cell: str) -> None:
    path = write(tmp_path, _HEADER, ROW, with_cell(0, cell))
    do = "name the classes with --classes when they are not these"
    assert message(path) == f"label is {cell}, expected a whole number from 0 to 9 (line 3); {do}"


def test_class_count_sets_the_range_of_labels(tmp_path: Path) -> None:
    path = write(tmp_path, _HEADER, with_cell(0, "10"))
    assert read(path, 11).labels == [10]
    assert message(write(tmp_path, _HEADER, ROW), 3).startswith("label is 7, expected a whole number from 0 to 2 (line")


def test_counts_of_values(tmp_path: Path) -> None:
    short, long = ROW.rsplit(",", 1)[0], ROW + ",0"
    a_row = "a row is one label and 784 pixels"
    assert message(write(tmp_path, _HEADER, ROW, short, ROW)) == f"784 values, expected 785 (line 3); {a_row}"
    assert message(write(tmp_path, _HEADER, long, ROW)) == f"786 values, expected 785 (line 2); {a_row}"
    assert message(write(tmp_path, _HEADER, ROW, long)) == f"786 values, expected 785 (line 3); {a_row}"
    cut = "the file may be cut off there"
    assert message(write(tmp_path, _HEADER, ROW, short)) == f"784 values, expected 785 (line 3); {cut}"
    assert message(write(tmp_path, _HEADER, *[ROW] * 1040, "7,0")) == f"2 values, expected 785 (line 1,042); {cut}"
    assert message(write(tmp_path, _HEADER, "7", ROW + ",7")) == f"1 value, expected 785 (line 2); {a_row}"


def test_an_empty_line_between_rows(tmp_path: Path) -> None:
    for blank in ("", "  "):
        path = write(tmp_path, _HEADER, ROW, blank, ROW)
        assert message(path) == "empty line between rows (line 3); take it out, or put the row back"


def test_the_first_fault_is_the_one_reported(tmp_path: Path) -> None:
    path = write(tmp_path, _HEADER, ROW, with_cell(0, "11"), with_cell(1, "x"), "1")
    assert message(path).startswith("label is 11, expected a whole number from 0 to 9 (line 3)")


def header(*changes: tuple[int, str]) -> str:
    names = list(_COLUMNS)
    for place, name in changes:
        names[place] = name
    return ",".join(names)


EXPECTED = "expected label,pixel1,...,pixel784"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (ROW, f"no header (line 1); {EXPECTED} above the rows"),
        ("", f"empty line in place of the header (line 1); {EXPECTED}"),
        (header((2, "pixel1")), f"column pixel1 stands twice (line 1, column 3); {EXPECTED}"),
        (
            header((2, "pixel3"), (3, "pixel2")),
            f"columns in another order: pixel3 where pixel2 belongs (line 1, column 3); {EXPECTED}",
        ),
        (
            ",".join([*_COLUMNS[1:], "label"]),
            f"columns in another order: pixel1 where label belongs (line 1, column 1); {EXPECTED}",
        ),
        (",".join(_COLUMNS[1:]), f"no column label among 784 columns (line 1); {EXPECTED}"),
        (header((784, "pixel0")), f"no column pixel784 among 785 columns (line 1); {EXPECTED}"),
        (",".join([*_COLUMNS, "note"]), f"786 columns, expected 785; note is not one of them (line 1); {EXPECTED}"),
        ("hello", f"no column label among one column, hello (line 1); {EXPECTED}"),
        (
            ",".join(f'"{name}"' for name in _COLUMNS),
            f"column names with quotes or spaces (line 1); {EXPECTED}, without them",
        ),
        (_HEADER.decode().replace(",", ";"), "values separated by semicolons, expected commas (line 1)"),
        (_HEADER.decode().replace(",", "\t"), "values separated by tabs, expected commas (line 1)"),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, line: str, said: str) -> None:
    assert message(write(tmp_path, line, ROW)) == said


def test_rows_with_other_separators(tmp_path: Path) -> None:
    path = write(tmp_path, _HEADER, ROW, ROW.replace(",", ";"))
    assert message(path) == "values separated by semicolons, expected commas (line 3)"


def test_nothing_there(tmp_path: Path) -> None:
    empty = "empty file; expected a CSV file with the header label,pixel1,...,pixel784"
    assert message(write(tmp_path, b"")) == empty
    assert message(write(tmp_path, _HEADER, "", "")) == "only a header, no rows; the file may be cut off there"
    assert message(tmp_path / "none.csv") == "no such file"
    assert message(tmp_path) == "is a folder, expected a file"
    assert message(tmp_path / ("x" * 300)).startswith("cannot read (File name too long)")
    with pytest.raises(AttireError, match=r"^a\\x00b: cannot read \(.*null"):
        read("a\x00b")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(_HEADER, mtime=0), "gzip-compressed data, expected CSV text; unpack it first"),
        (b"PK\x03\x04" + b"\0" * 30, "a zip archive, expected CSV text; unpack it first"),
        (
            b"PK\x03\x04" + b"\0" * 26 + b"[Content_Types].xml",
            "an Excel workbook, expected CSV text; export the sheet as CSV",
        ),
        (_HEADER.decode().encode("utf-16"), "UTF-16 text, expected CSV text; save it as UTF-8"),
        (_HEADER.decode().encode("utf-16-le"), "UTF-16 text, expected CSV text; save it as UTF-8"),
        (
            b"\x00\x00\x08\x03" + b"\0" * 12,
            "an IDX file of images, expected CSV text; name the pair ...-images-idx3-ubyte and ...-labels-idx1-ubyte",
        ),
        (b"<!DOCTYPE html><html>", "an HTML page, expected CSV text"),
        (b"ab\x00\x01", "binary data, expected CSV text"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, content: bytes, said: str) -> None:
    assert message(write(tmp_path, content)) == said


def test_a_file_name_with_a_line_break_stays_one_line(tmp_path: Path) -> None:
    with pytest.raises(AttireError, match=re.escape(r"two\nlines.csv: empty file")):
        read(write(tmp_path, b"", name="two\nlines.csv"))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (300, 28, 28), np.uint8)
    labels = rng.integers(0, 10, 300)
    write_table(tmp_path / "out.csv", images, labels)
    table = read(tmp_path / "out.csv")
    assert table.labels is not None
    assert np.array_equal(table.labels, labels)
    assert np.array_equal(table.pixels, images.reshape(-1, 784))
    assert (tmp_path / "out.csv").read_bytes().startswith(_HEADER + b"\n" + f"{labels[0]},{images[0, 0, 0]},".encode())
