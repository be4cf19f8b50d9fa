"""Read IDX, the form of the official files (http://yann.lecun.com/exdb/mnist): a big-endian header, then bytes."""

import gzip
import io
import math
import re
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attire.errors import AttireError
from attire.storage.formats import name_format, open_input

_Kind = Literal["images", "labels"]
_MAGICS: dict[bytes, _Kind] = {b"\x00\x00\x08\x03": "images", b"\x00\x00\x08\x01": "labels"}
_DIMENSIONS = {"images": 3, "labels": 1}
_NAME = re.compile(r"(images|labels)[-.]idx[13]-ubyte(\.gz)?$")
_PREFIXES = {"train": "train", "test": "t10k"}
_DEFLATE_RATIO = 1032  # the most that a byte of deflate can expand to (zlib's documentation)
_CHUNK = 1 << 22


def _read_idx(path: str | Path, kind: _Kind | None = None) -> NDArray[np.uint8]:
    """Read images (N, 28, 28) or labels (N,), uint8, from one IDX file, plain or .gz by its content.

    The header is checked first, and at most one byte more than it declares is read or expanded. Raises AttireError for
    a bad header, size, compression or `kind`.
    """
    path = Path(path)
    with open_input(path) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        try:
            if not packed:
                return _read_stream(path, file, size, kind)
            with gzip.GzipFile(fileobj=file) as stream:
                return _read_stream(path, stream, size * _DEFLATE_RATIO, kind)
        except EOFError as error:
            raise AttireError(path, "the gzip data ends too early", do="the file was cut off; get it again") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            what = "bytes after the gzip data" if "Not a gzipped" in str(error) else "damaged gzip data"
            raise AttireError(path, what, str(error)[:60], "get the file again") from error


def _read_stream(path: Path, stream: io.BufferedIOBase, at_most: int, kind: _Kind | None) -> NDArray[np.uint8]:
    """Read header and data of a file with at most `at_most` bytes of content."""
    shape = _read_header(path, stream, kind)
    expected = math.prod(shape)
    declared = f"the header declares {' x '.join(f'{n:,}' for n in shape)}"
    if expected > at_most:
        raise AttireError(path, f"{declared} bytes, more than the file can hold", do="it is cut off or damaged")
    data = bytearray()
    while len(data) <= expected and (part := stream.read(min(_CHUNK, expected + 1 - len(data)))):
        data += part
    if len(data) < expected:
        what = f"{len(data):,} bytes of data, expected {expected:,}"
        raise AttireError(path, what, declared, "the file may be cut off there")
    if len(data) > expected:
        raise AttireError(path, f"more than the expected {expected:,} bytes of data", declared, "get the file again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_header(path: Path, stream: io.BufferedIOBase, kind: _Kind | None) -> tuple[int, ...]:
    magic = stream.read(4)
    if not magic:
        raise AttireError(path, "empty file", do="expected IDX data")
    declared = _MAGICS.get(magic)
    if len(magic) == 4 and declared is None:
        _refuse_magic(path, magic, stream)
    sizes = stream.read(4 * _DIMENSIONS[declared]) if declared else b""
    if declared is None or len(sizes) < 4 * _DIMENSIONS[declared]:
        raise AttireError(path, f"{len(magic + sizes)} bytes, too short for an IDX header", do="get the file again")
    if kind not in (None, declared):
        raise AttireError(path, f"holds {declared}, expected {kind}", f"magic 0x{magic.hex()}", "are the two swapped?")
    shape = tuple(int.from_bytes(sizes[i : i + 4]) for i in range(0, len(sizes), 4))
    if shape[1:] not in ((), (28, 28)):
        raise AttireError(path, f"pictures of {shape[1]:,} x {shape[2]:,}, expected 28 x 28", "IDX header")
    if not shape[0]:
        raise AttireError(path, f"holds no {declared}", "IDX header")
    return shape


def _refuse_magic(path: Path, magic: bytes, stream: io.BufferedIOBase) -> None:
    where = f"magic 0x{magic.hex()}"
    if magic[::-1] in _MAGICS:
        raise AttireError(path, "little-endian IDX header, expected big-endian", where, "write it again as IDX has it")
    if magic[:2] == b"\x00\x00" and magic[2] in (0x08, 0x09, 0x0B, 0x0C, 0x0D, 0x0E):
        what = f"{magic[3]} dimensions of type 0x{magic[2]:02x}"
        raise AttireError(path, f"{what}, expected 3 (images) or 1 (labels) of type 0x08, unsigned bytes", where)
    name = name_format(magic + stream.read(508))
    raise AttireError(path, f"{name or 'not an IDX file'}, expected IDX images or labels", where)


def read_pair(images: str | Path, labels: str | Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read images (N, 28, 28) uint8 and labels (N,) int64 from two files. Raises AttireError."""
    labels_read = _read_idx(labels, "labels").astype(np.int64)  # the small file first: a swap shows at once
    images_read = _read_idx(images, "images")
    if len(images_read) != len(labels_read):
        what = f"{len(labels_read):,} labels for the {len(images_read):,} images of {Path(images).name}"
        raise AttireError(labels, what, do="the two must belong together")
    return images_read, labels_read


def find_pair(folder: Path, part: str) -> tuple[Path, Path] | None:
    """Return images and labels of part "train" or "test" (t10k-...) in a folder, plain before .gz; None without both.

    Raises AttireError where only one of the two is there.
    """
    images, labels = (_find_file(folder, _PREFIXES[part], kind) for kind in _DIMENSIONS)
    if images and labels:
        return images, labels
    if images or labels:
        missing = f"{_PREFIXES[part]}-{'labels-idx1' if images else 'images-idx3'}-ubyte"
        raise AttireError(folder, f"no {missing} (or .gz)", f"beside {(images or labels or folder).name}")
    return None


def _find_file(folder: Path, prefix: str, kind: str) -> Path | None:
    stem = f"{prefix}-{kind}"
    names = [f"{stem}{dot}idx{_DIMENSIONS[kind]}-ubyte{end}" for end in ("", ".gz") for dot in "-."]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def find_partner(path: Path) -> tuple[Path, Path] | None:
    """Return images and labels for one IDX file by its name; None for another name.

    Raises AttireError where the other file is not beside it.
    """
    match = _NAME.search(path.name)
    if not match:
        return None
    with open_input(path):  # a missing file is reported before its missing partner
        pass
    start, kind = path.name[: match.start()], match[1]
    other = "labels" if kind == "images" else "images"
    for end in (match[2] or "", "", ".gz"):
        beside = path.with_name(f"{start}{other}{path.name[match.end(1)]}idx{_DIMENSIONS[other]}-ubyte{end}")
        if beside.is_file():
            return (path, beside) if kind == "images" else (beside, path)
    raise AttireError(path, f"no file of {other} beside it", f"expected {start}{other}-idx{_DIMENSIONS[other]}-ubyte")
