"""Open input files, and name the format that a file's first bytes show."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attire.errors import AttireError
from attire.storage.files import io_error

# From the formats' specifications; the first match counts.
_MAGICS = (
    (b"\x1f\x8b", "gzip-compressed data"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel or Word file"),
    (b"BZh", "bzip2-compressed data"),
    (b"\xfd7zXZ\x00", "xz-compressed data"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed data"),
    (b"PAR1", "a Parquet file"),
    (b"\x00\x00\x08\x03", "an IDX file of images"),
    (b"\x00\x00\x08\x01", "an IDX file of labels"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"%PDF", "a PDF document"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"II*\x00", "a TIFF picture"),
    (b"MM\x00*", "a TIFF picture"),
    (b"\x00\x00\x01\x00", "an icon"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
)
_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"mif1", b"msf1"}


def name_format(data: bytes) -> str:
    """Name the format that a file's first few hundred bytes show, such as "a PDF document"; "" when unknown."""
    if data.startswith(b"PK\x03\x04") and (b"[Content_Types].xml" in data or b"xl/" in data):
        return "an Excel workbook"
    if data[4:8] == b"ftyp":
        return "a HEIC picture" if data[8:12] in _HEIF_BRANDS else "an AVIF picture or a video"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "a WebP picture"
    for magic, name in _MAGICS:
        if data.startswith(magic):
            return name
    start = data.removeprefix(b"\xef\xbb\xbf").lstrip()[:512].lower()
    if b"<svg" in start and start.startswith(b"<"):
        return "an SVG drawing"
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if b"\x00" in data[:2] and data[:2].strip(b"\x00").isalpha():
        return "UTF-16 text"
    return ""


def is_text(data: bytes) -> bool:
    """Check for UTF-8 without control characters. The last character may be cut off."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if error.start < len(data) - 3:
            return False
        text = data[: error.start].decode()
    return all(c.isprintable() or c in "\t\r\n\f\ufeff" for c in text)


@contextmanager
def open_input(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file for reading in binary. Every failure to open or read it becomes an AttireError."""
    try:
        if is_folder(path):
            raise AttireError(path, "is a folder, expected a file")
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise AttireError(path, "no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise io_error("read", path, OSError(*error.args)) from error


def is_folder(path: Path) -> bool:
    """`Path.is_dir`, but False for a name that no file can have."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
