"""Images as PNG: alone, on a sheet with text, as a data URI."""

import io

import numpy as np
import pytest
from PIL import Image

from attire.evaluation.png import data_uri, grey_png, read_sheet, write_sheet


def test_a_sheet_is_read_as_it_was_made() -> None:
    images = np.random.default_rng(0).integers(0, 256, (13, 28, 28), np.uint8)
    png = write_sheet(images, columns=10, names="thirteen")
    with Image.open(io.BytesIO(png)) as sheet:
        assert (sheet.size, sheet.mode) == ((280, 56), "L")
    cells, texts = read_sheet(png)
    assert (cells[:13] == images).all()
    assert not cells[13:].any()
    assert texts["names"] == "thirteen"


@pytest.mark.parametrize("n", [7, 0])
def test_images_survive_the_sheet(n: int) -> None:
    images = np.random.default_rng(1).integers(256, size=(7, 28, 28), dtype=np.uint8)
    cells, _ = read_sheet(write_sheet(images[:n], columns=3))
    assert (cells[:n] == images[:n]).all()
    assert cells[:0].shape == (0, 28, 28)


@pytest.mark.parametrize("shape", [(28, 28), (1, 1), (3, 200)])
def test_a_written_png_is_what_pillow_reads(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with Image.open(io.BytesIO(grey_png(image))) as picture:
        picture.verify()
    with Image.open(io.BytesIO(grey_png(image))) as picture:
        assert (np.asarray(picture) == image).all()
    assert data_uri(b"a") == "data:image/png;base64,YQ=="
