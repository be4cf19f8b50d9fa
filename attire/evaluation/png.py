"""Grey images as PNG: one alone, or many on one sheet; and PNG as a data URI for a page."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo


def grey_png(pixels: NDArray[np.uint8], **texts: str) -> bytes:
    """An image (H, W) as PNG; each keyword becomes a text chunk."""
    info, buffer = PngInfo(), io.BytesIO()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def write_sheet(images: NDArray[np.uint8], columns: int, **texts: str) -> bytes:
    """Square images (n, S, S) as one PNG, `columns` to a row, the last row filled up with black.

    `read_sheet` reads the images back. Each keyword becomes a text chunk of the PNG.
    """
    n, side, _ = images.shape
    rows = max(1, -(-n // columns))
    cells = np.zeros((rows * columns, side, side), dtype=np.uint8)
    cells[:n] = images
    sheet = cells.reshape(rows, columns, side, side).swapaxes(1, 2).reshape(rows * side, columns * side)
    return grey_png(sheet, **texts)


def read_sheet(png: bytes, side: int = 28) -> tuple[NDArray[np.uint8], dict[str, str]]:
    """All cells (rows * columns, side, side) of a sheet, from left to right and top to bottom, and its text chunks."""
    with Image.open(io.BytesIO(png), formats=("PNG",)) as picture:
        pixels, texts = np.asarray(picture.convert("L")), {str(key): str(text) for key, text in picture.info.items()}
    rows, columns = (length // side for length in pixels.shape)
    cells = pixels.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1, side, side)
    return cells, texts
