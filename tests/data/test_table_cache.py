"""The binary copy of a CSV file: the same rows, dataset by content alone, never stale, never trusted unseen."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from attire.data import csv_table, table_cache
from attire.data.csv_table import _PIXEL_COLUMNS, Table
from attire.data.dataset import ImageDataset
from attire.data.loading import _read_csv, read_csv_images, write_csv
from attire.errors import AttireError, AttireWarning


@pytest.fixture(autouse=True)
def keep_small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_cache, "_MIN_BYTES", 0)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were parsed, in order."""
    paths: list[Path] = []
    real = csv_table.read_parts

    def counted(path: Path, file: IO[bytes], class_count: int, labelled: bool, on_bytes: Any) -> Iterator[Table]:
        paths.append(path)
        return real(path, file, class_count, labelled, on_bytes)

    monkeypatch.setattr(table_cache, "read_parts", counted)
    return paths


def parse(path: Path, class_count: int = 10) -> Table:
    """Without a copy."""
    with path.open("rb") as file:
        return Table.concatenate(csv_table.read_parts(path, file, class_count))


def test_a_file_is_parsed_once_and_the_copy_holds_the_same_rows(
    small_csv: Path, synthetic: ImageDataset, parsed: list[Path]
) -> None:
    for _ in range(2):
        dataset = _read_csv(small_csv)
        assert np.array_equal(dataset.images, synthetic.images)
        assert np.array_equal(dataset.labels, synthetic.labels)
        assert dataset.digest == synthetic.digest
    assert parsed == [small_csv]
    assert [size for _, size in table_cache.copies()] == [60 * (784 + 8) + 16 + 32]


def test_a_copy_is_found_whatever_the_file_is_called(small_csv: Path, tmp_path: Path, parsed: list[Path]) -> None:
    _read_csv(small_csv)
    assert len(_read_csv(small_csv.rename(tmp_path / "other.csv"))) == 60
    assert parsed == [small_csv]


def test_a_changed_file_of_the_same_size_and_time_is_not_served_stale(
    small_csv: Path, synthetic: ImageDataset, parsed: list[Path]
) -> None:
    _read_csv(small_csv)
    before, text = small_csv.stat(), small_csv.read_bytes()
    at = text.rindex(b",") + 1  # the last pixel
    changed = text[:at] + (b"1" if text[at : at + 1] != b"1" else b"2") + text[at + 1 :]
    small_csv.write_bytes(changed)
    os.utime(small_csv, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert small_csv.stat().st_size == before.st_size
    assert _read_csv(small_csv).images[-1, -1, -1] != synthetic.images[-1, -1, -1]
    assert len(parsed) == 2


def test_a_damaged_copy_is_made_again_with_one_warning(
    small_csv: Path, synthetic: ImageDataset, parsed: list[Path]
) -> None:
    _read_csv(small_csv)
    (path,) = table_cache._folder().iterdir()
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.warns(AttireWarning, match="damaged and made again"):
        assert np.array_equal(_read_csv(small_csv).images, synthetic.images)
    assert np.array_equal(_read_csv(small_csv).images, synthetic.images)
    assert len(parsed) == 2


def test_a_cache_that_cannot_be_written_costs_only_time(
    small_csv: Path, synthetic: ImageDataset, cache: Path, parsed: list[Path]
) -> None:
    cache.mkdir(exist_ok=True)
    (cache / "tables").write_text("a file where the folder should be")
    with pytest.warns(AttireWarning, match="small.csv is parsed anew each time"):
        assert np.array_equal(_read_csv(small_csv).images, synthetic.images)


def test_what_is_wrong_is_said_as_without_a_copy_and_nothing_is_kept(small_csv: Path) -> None:
    text = small_csv.read_text().splitlines()
    small_csv.write_text("\n".join([*text[:5], text[5] + ",7", *text[6:]]))
    with pytest.raises(AttireError) as caught:
        _read_csv(small_csv)
    with pytest.raises(AttireError, match=r"786 values, expected 785 \(line 6\)") as expected:
        parse(small_csv)
    assert str(caught.value) == str(expected.value)
    assert not list(table_cache._folder().iterdir())


def test_labels_are_checked_against_the_classes_of_each_reading(small_csv: Path) -> None:
    _read_csv(small_csv)
    with pytest.raises(AttireError) as caught:
        _read_csv(small_csv, ("a", "b", "c"))
    with pytest.raises(AttireError, match=r"label is 3, expected a whole number from 0 to 2 \(line 5\)") as expected:
        parse(small_csv, 3)
    assert str(caught.value) == str(expected.value)


def test_a_file_without_labels_has_a_copy_and_still_no_labels(tmp_path: Path, synthetic: ImageDataset) -> None:
    path = tmp_path / "bare.csv"
    rows = [",".join(_PIXEL_COLUMNS), *(",".join(map(str, image.ravel())) for image in synthetic.images)]
    path.write_text("\n".join(rows))
    for _ in range(2):
        assert np.array_equal(read_csv_images(path), synthetic.images)
    with pytest.raises(AttireError, match="no column label"):
        _read_csv(path)


def test_small_files_are_not_kept(small_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_cache, "_MIN_BYTES", 2**23)
    _read_csv(small_csv)
    assert not list(table_cache.copies())


def test_copies_can_be_deleted_while_one_is_mapped(small_csv: Path, synthetic: ImageDataset) -> None:
    dataset = _read_csv(small_csv)
    assert table_cache.delete_copies() == 60 * 792 + 48
    assert not list(table_cache.copies())
    assert np.array_equal(dataset.images, synthetic.images)


def test_mapped_images_are_used_without_a_warning(small_csv: Path) -> None:
    from attire.analysis import duplicates
    from attire.model import vgg

    dataset = _read_csv(small_csv)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert vgg.preprocess(dataset.images[:3], 32).shape == (3, 3, 32, 32)
        duplicates._descriptors(dataset.images)
    assert not dataset.images.flags.writeable


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("text", [700, 3000, 5000])
def test_pieces_of_any_size_give_the_same_rows_and_line_numbers(
    synthetic: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: bytes, text: int
) -> None:
    path = tmp_path / "mine.csv"
    write_csv(synthetic, path)
    lines = path.read_bytes().splitlines()
    monkeypatch.setattr(csv_table, "_TEXT_BYTES", text)
    monkeypatch.setattr(csv_table, "_FIRST_BYTES", len(csv_table._HEADER) + 20)
    path.write_bytes(end.join([*lines, b"", b""]))
    assert np.array_equal(parse(path).pixels, synthetic.images.reshape(60, 784))
    path.write_bytes(end.join([*lines[:50], lines[50] + b"x", *lines[51:]]))
    with pytest.raises(AttireError, match=r"\(line 51\)"):
        parse(path)
    path.write_bytes(end.join([*lines[:50], b"", b"", *lines[50:]]))
    with pytest.raises(AttireError, match=r"empty line between rows \(line 51\)"):
        parse(path)
    path.write_bytes(end.join([*lines[:60], lines[60][:400]]) + end)
    with pytest.raises(AttireError, match=r"\(line 61\); the file may be cut off there"):
        parse(path)
