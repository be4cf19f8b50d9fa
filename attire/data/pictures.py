"""Decode picture files safely."""

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from attire.errors import AttireError, one_line
from attire.storage.formats import is_text, name_format, open_input

SIDE = 28
EXPECTED_FORMATS = "expected a PNG, JPEG, WebP or BMP picture"
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_MAX_BYTES = 256 << 20  # a file of 50 megapixels at 4 uncompressed bytes each, and its metadata
_MAX_PIXELS = 50_000_000  # above what phones and most cameras take; 200 MB in memory
_MIN_SIDE = 2
_MAX_RATIO = 20  # longer side to shorter: beyond it, less than 2 of 28 rows would be left of the picture


class _StrictPillow:
    """Turns Pillow's warnings into errors while a thread is inside.

    The list of warning filters belongs to the process, and a server decodes in threads: the first thread sets the
    filter, the last one restores the list, and in between they decode side by side.
    """

    def __init__(self) -> None:
        self.inside, self.lock = 0, threading.Lock()

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.before = warnings.catch_warnings()
                self.before.__enter__()
                warnings.filterwarnings("error", module=r"PIL\.")
            self.inside += 1

    def __exit__(self, *raised: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.before.__exit__(None, None, None)


_strict_pillow = _StrictPillow()


def decode_colour(source: str | Path | bytes, name: str = "picture") -> Image.Image:
    """Decode one picture in 8 bits, upright, at its own size; `name` stands for it in errors when `source` is bytes.

    The mode is L, RGB, or RGBA where it may be transparent. EXIF's orientation is applied; 16-bit grey keeps its high
    byte, rounded. Raises AttireError for what is damaged, cut off, animated, of another format, or of a size out of
    bounds. Sizes are refused from the header, before anything is decoded.
    """
    data, name = (source, name) if isinstance(source, bytes) else (_read_bytes(Path(source)), str(source))
    if not data:
        raise AttireError(name, "empty file", do=EXPECTED_FORMATS)
    with _pillow_errors(name, data), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        _check(name, image)
        if image.format == "PNG":  # only verify() checks the checksums of pixel data, and it must come alone
            image.verify()
    with _pillow_errors(name, data), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        image.load()
        return _eight_bits(ImageOps.exif_transpose(image))


def _read_bytes(path: Path) -> bytes:
    with open_input(path) as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise AttireError(path, f"larger than {_MAX_BYTES >> 20} MB", do=EXPECTED_FORMATS)
    return data


@contextmanager
def _pillow_errors(name: str, data: bytes) -> Iterator[None]:
    """Turn whatever Pillow raises or warns about while it reads `data` into an AttireError."""
    with _strict_pillow:
        try:
            yield
        except AttireError:
            raise
        except UnidentifiedImageError as error:
            kind = name_format(data[:4096]) or ("text" if is_text(data[:4096]) else "of no known format")
            if kind in ("a PNG picture", "a JPEG picture", "a WebP picture"):
                raise AttireError(name, f"{kind}, damaged or cut off", do="get the file again") from error
            raise AttireError(name, f"{kind}, not a picture that can be read", do=EXPECTED_FORMATS) from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise _too_large(name, "") from error
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
            raise AttireError(name, "damaged or cut off", one_line(str(error))[:80], "get the file again") from error


def _check(name: str, image: Image.Image) -> None:
    """Raise AttireError for what the header alone rules out."""
    width, height = image.size
    size = f"{width:,} x {height:,} pixels"
    if min(width, height) < _MIN_SIDE:
        raise AttireError(name, f"{size}, too small", do=f"each side needs at least {_MIN_SIDE}")
    if max(width, height) > _MAX_RATIO * min(width, height):
        raise AttireError(name, f"{size}, too narrow", do=f"one side may be {_MAX_RATIO} times the other at most")
    if width * height > _MAX_PIXELS:
        raise _too_large(name, f"{size}, ")
    frames = getattr(image, "n_frames", 1)
    if frames != 1:
        raise AttireError(name, f"{frames} pictures in one file, expected one", do="save one of them by itself")


def _too_large(name: str, size: str) -> AttireError:
    return AttireError(name, f"{size}more than {_MAX_PIXELS // 1_000_000} megapixels", do="make it smaller first")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert any mode of the allowed formats to L, RGB, or with transparency data of any kind RGBA."""
    if image.mode.startswith("I"):  # 16 bits
        levels = np.asarray(image).astype(np.uint32)
        small = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
        if not isinstance(clear := image.info.get("transparency"), int):
            return small
        return Image.merge("RGBA", (small, small, small, Image.fromarray((levels != clear).astype(np.uint8) * 255)))
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")
