import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from attire.data.idx import _Kind, _read_idx, find_pair, find_partner, read_pair
from attire.errors import AttireError

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
LABELS = np.array([0, 9, 3, 3, 1], np.uint8)


def image_bytes(count: int = 5, rows: int = 28, columns: int = 28, data: bytes = IMAGES.tobytes()) -> bytes:
    return struct.pack(">IIII", 0x803, count, rows, columns) + data


def label_bytes(count: int = 5, data: bytes = LABELS.tobytes()) -> bytes:
    return struct.pack(">II", 0x801, count) + data


def message(path: Path, content: bytes, kind: _Kind | None = None) -> str:
    path.write_bytes(content)
    with pytest.raises(AttireError) as caught:
        _read_idx(path, kind)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_images_and_labels_plain_and_gz(tmp_path: Path, pack: type[bytes]) -> None:
    (tmp_path / "i").write_bytes(pack(image_bytes()))
    (tmp_path / "l").write_bytes(pack(label_bytes()))
    images, labels = read_pair(tmp_path / "i", tmp_path / "l")
    assert np.array_equal(images, IMAGES)
    assert images.dtype == np.uint8
    assert np.array_equal(labels, LABELS)
    assert labels.dtype == np.int64


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty file; expected IDX data"),
        (b"\x00\x00\x08", "3 bytes, too short for an IDX header; get the file again"),
        (image_bytes()[:12], "12 bytes, too short for an IDX header; get the file again"),
        (
            struct.pack("<IIII", 0x803, 5, 28, 28),
            "little-endian IDX header, expected big-endian (magic 0x03080000); write it again as IDX has it",
        ),
        (
            struct.pack(">II", 0xD03, 5),
            "3 dimensions of type 0x0d, expected 3 (images) or 1 (labels) of type 0x08, unsigned bytes "
            "(magic 0x00000d03)",
        ),
        (b"label,pixel1", "not an IDX file, expected IDX images or labels (magic 0x6c616265)"),
        (b"%PDF-1.7", "a PDF document, expected IDX images or labels (magic 0x25504446)"),
        (image_bytes(0, data=b""), "holds no images (IDX header)"),
        (label_bytes(0, b""), "holds no labels (IDX header)"),
        (image_bytes(rows=32), "pictures of 32 x 28, expected 28 x 28 (IDX header)"),
        (
            image_bytes(0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
            "pictures of 4,294,967,295 x 4,294,967,295, expected 28 x 28",
        ),
        (
            image_bytes(0xFFFFFFFF),
            "the header declares 4,294,967,295 x 28 x 28 bytes, more than the file can hold; it is cut off or damaged",
        ),
        (
            image_bytes()[:-10],
            "3,910 bytes of data, expected 3,920 (the header declares 5 x 28 x 28); the file may be cut off there",
        ),
        (
            image_bytes() + b"x",
            "more than the expected 3,920 bytes of data (the header declares 5 x 28 x 28); get the file again",
        ),
        (label_bytes() + b"x", "more than the expected 5 bytes of data (the header declares 5); get the file again"),
    ],
)
def test_what_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    assert message(tmp_path / "plain", content).startswith(said)
    if content and "can hold" not in said:
        assert message(tmp_path / "packed.gz", gzip.compress(content)).startswith(said)


def test_a_gz_that_expands_beyond_its_header_is_left_at_once(tmp_path: Path) -> None:
    bomb = gzip.compress(image_bytes() + bytes(50_000_000))
    assert message(tmp_path / "bomb.gz", bomb).startswith("more than the expected 3,920 bytes of data")


def test_a_gz_cannot_declare_more_than_deflate_can_hold(tmp_path: Path) -> None:
    said = message(tmp_path / "liar.gz", gzip.compress(image_bytes(0xFFFFFFFF)))
    assert said.startswith("the header declares 4,294,967,295 x 28 x 28 bytes, more than the file can hold")


def test_damaged_gz(tmp_path: Path) -> None:
    packed = gzip.compress(image_bytes())
    cut_off = "the gzip data ends too early; the file was cut off; get it again"
    assert message(tmp_path / "f", packed[:-1]) == cut_off
    assert message(tmp_path / "f", packed[:1000]) == cut_off
    flipped = packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:]
    assert message(tmp_path / "f", flipped).startswith("damaged gzip data (CRC check failed")
    assert message(tmp_path / "f", packed + b"rubbish").startswith("bytes after the gzip data")


def test_swapped_files_and_unequal_counts(tmp_path: Path) -> None:
    images, labels = tmp_path / "i", tmp_path / "l"
    images.write_bytes(image_bytes())
    labels.write_bytes(label_bytes(4, bytes(4)))
    with pytest.raises(
        AttireError, match=r"i: holds images, expected labels \(magic 0x00000803\); are the two swapped"
    ):
        read_pair(labels, images)
    with pytest.raises(AttireError, match=r"l: 4 labels for the 5 images of i; the two must belong together$"):
        read_pair(images, labels)


def test_finding_the_files_of_a_folder(tmp_path: Path) -> None:
    assert find_pair(tmp_path, "train") is None
    images = tmp_path / "train-images-idx3-ubyte.gz"
    images.write_bytes(b"")
    with pytest.raises(AttireError, match=r"no train-labels-idx1-ubyte \(or .gz\) \(beside train-images-idx3-ubyte.gz"):
        find_pair(tmp_path, "train")
    with pytest.raises(AttireError, match=r"no file of labels beside it \(expected train-labels-idx1-ubyte\)"):
        find_partner(images)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(b"")
    assert find_pair(tmp_path, "train") == find_partner(images) == find_partner(labels) == (images, labels)
    assert find_pair(tmp_path, "test") is None
    assert find_partner(tmp_path / "mine.csv") is None
    with pytest.raises(AttireError, match=r"t10k-images-idx3-ubyte: no such file$"):
        find_partner(tmp_path / "t10k-images-idx3-ubyte")
