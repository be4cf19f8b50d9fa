"""Sample garments for the page: one small PNG of 28x28 cells, their names inside it."""

import base64
import io
import json
import struct
import zlib
from collections.abc import Sequence
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from attire.data.pictures import SIDE

_COLUMNS = 10
_NAMES = "names"  # the PNG's text chunk: a JSON list, from left to right and top to bottom


def read_samples() -> list[tuple[str, NDArray[np.uint8]]]:
    """Name and image (28, 28) uint8 of each sample in the package; none where it ships none."""
    path = files("attire").joinpath("shipped/samples.png")
    if not path.is_file():
        return []
    with Image.open(io.BytesIO(path.read_bytes()), formats=("PNG",)) as sheet:
        pixels, names = np.asarray(sheet), json.loads(sheet.info[_NAMES])
    return list(zip(names, _cells(pixels), strict=False))


def _cells(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A sheet (rows * 28, columns * 28) as images (rows * columns, 28, 28)."""
    rows, columns = (side // SIDE for side in pixels.shape)
    return pixels.reshape(rows, SIDE, columns, SIDE).swapaxes(1, 2).reshape(-1, SIDE, SIDE)


def _sheet_png(names: Sequence[str], images: NDArray[np.uint8]) -> bytes:
    """The PNG that `read_samples` reads, of images (n, 28, 28); the last row is filled up with black."""
    rows = -(-len(images) // _COLUMNS)
    full = np.zeros((rows * _COLUMNS, SIDE, SIDE), np.uint8)
    full[: len(images)] = images
    pixels = full.reshape(rows, _COLUMNS, SIDE, SIDE).swapaxes(1, 2).reshape(rows * SIDE, _COLUMNS * SIDE)
    info, out = PngInfo(), io.BytesIO()
    info.add_text(_NAMES, json.dumps(list(names)))
    Image.fromarray(pixels).save(out, "PNG", pnginfo=info, optimize=True)
    return out.getvalue()


def grey_png(image: NDArray[np.uint8]) -> bytes:
    """A grey picture (H, W) as PNG: what Pillow writes, in a tenth of the time, for a server writes one an answer."""
    height, width = image.shape
    lines = np.zeros((height, width + 1), np.uint8)  # each line begins with its filter: 0, none
    lines[:, 1:] = image
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 1)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
