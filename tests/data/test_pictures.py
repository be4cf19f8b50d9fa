import io
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from attire.data.pictures import decode_colour
from attire.errors import AttireError

GREY = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
SHOULD = "expected a PNG, JPEG, WebP or BMP picture"


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def read_image(source: Path | bytes, name: str = "picture") -> NDArray[np.uint8]:
    """Grey values, transparency on black."""
    image = decode_colour(source, name)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.array(image.convert("L"))


def message(data: bytes) -> str:
    with pytest.raises(AttireError) as caught:
        read_image(data, "shirt.png")
    text = str(caught.value)
    assert text.startswith("shirt.png: ")
    assert "\n" not in text
    return text.removeprefix("shirt.png: ")


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_28_by_28_is_taken_as_it_is(kind: str, tmp_path: Path) -> None:
    data = encode(Image.fromarray(GREY), kind)
    assert np.array_equal(read_image(data), GREY)
    (tmp_path / "a").write_bytes(data)
    assert np.array_equal(read_image(tmp_path / "a"), GREY)


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})])
def test_lossy_formats_are_read(kind: str, options: dict[str, Any]) -> None:
    smooth = np.add.outer(np.arange(28), np.arange(28)).astype(np.uint8) * 4
    values = read_image(encode(Image.fromarray(smooth), kind, **options))
    assert np.abs(values.astype(int) - smooth).max() <= 4


def test_modes_become_grey() -> None:
    size = (28, 28)
    assert set(read_image(encode(Image.new("1", size, 1))).ravel()) == {255}
    assert set(read_image(encode(Image.new("RGB", size, (255, 0, 0)))).ravel()) == {76}
    assert set(read_image(encode(Image.new("RGBA", size, (255, 255, 255, 0)))).ravel()) == {0}
    assert set(read_image(encode(Image.new("RGBA", size, (255, 255, 255, 128)))).ravel()) == {128}
    assert set(read_image(encode(Image.new("LA", size, (200, 255)))).ravel()) == {200}
    palette = Image.new("P", size, 1)
    palette.putpalette([0, 0, 0, 255, 255, 255])
    assert set(read_image(encode(palette)).ravel()) == {255}
    assert set(read_image(encode(palette, transparency=1)).ravel()) == {0}
    assert set(read_image(encode(palette, transparency=b"\xff\x80")).ravel()) == {128}
    assert set(read_image(encode(Image.new("L", size, 50), transparency=50)).ravel()) == {0}
    cmyk = read_image(encode(Image.new("CMYK", size, (0, 0, 0, 0)), "JPEG"))
    assert cmyk.min() >= 250


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    levels = np.full((28, 28), 257 * 100, np.uint16)
    levels[0] = 65535
    values = read_image(encode(Image.fromarray(levels)))
    assert values[0, 0] == 255
    assert values[1, 1] == 100
    assert read_image(encode(Image.fromarray(levels), transparency=257 * 100))[1, 1] == 0


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to show"
    values = read_image(encode(Image.fromarray(GREY), exif=exif))
    assert np.array_equal(values, np.rot90(GREY, -1))


def test_decode_keeps_the_size() -> None:
    image = decode_colour(encode(Image.new("RGB", (60, 40))))
    assert (image.size, image.mode) == ((60, 40), "RGB")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", f"empty file; {SHOULD}"),
        (b"hello there", f"text, not a picture that can be read; {SHOULD}"),
        (b"<!doctype html><p>", f"an HTML page, not a picture that can be read; {SHOULD}"),
        (b"%PDF-1.4\n%\xe2\xe3", f"a PDF document, not a picture that can be read; {SHOULD}"),
        (b'<?xml version="1.0"?><svg/>', f"an SVG drawing, not a picture that can be read; {SHOULD}"),
        (b"\x00\x01\x02\xff", f"of no known format, not a picture that can be read; {SHOULD}"),
        (encode(Image.new("L", (9, 9)), "GIF"), f"a GIF picture, not a picture that can be read; {SHOULD}"),
        (encode(Image.new("L", (9, 9)), "TIFF"), f"a TIFF picture, not a picture that can be read; {SHOULD}"),
        (b"\x89PNG\r\n\x1a\n", "a PNG picture, damaged or cut off; get the file again"),
        (png_header(1, 1), "1 x 1 pixels, too small; each side needs at least 2"),
        (png_header(1, 20000), "1 x 20,000 pixels, too small; each side needs at least 2"),
        (png_header(100, 2001), "100 x 2,001 pixels, too narrow; one side may be 20 times the other at most"),
        (png_header(50000, 50000), "more than 50 megapixels; make it smaller first"),
        (png_header(10000, 9000), "more than 50 megapixels; make it smaller first"),
        (png_header(8000, 8000), "8,000 x 8,000 pixels, more than 50 megapixels; make it smaller first"),
    ],
)
def test_what_is_refused(data: bytes, said: str) -> None:
    assert message(data) == said


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_cut_off_anywhere(kind: str) -> None:
    data = encode(Image.fromarray(np.tile(GREY, (4, 4))), kind)
    for keep in (0.02, 0.3, 0.6, 0.9):
        assert "damaged or cut off" in message(data[: int(len(data) * keep)])


def test_a_flipped_bit_in_a_png_is_found() -> None:
    data = bytearray(encode(Image.fromarray(GREY)))
    crc = data.index(b"IDAT") + 4 + int.from_bytes(data[data.index(b"IDAT") - 4 : data.index(b"IDAT")])
    data[crc] ^= 1
    assert message(bytes(data)).startswith("damaged or cut off (")


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animations_are_refused(kind: str) -> None:
    frames = [Image.new("L", (28, 28), level) for level in (0, 100, 200)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert message(data) == "3 pictures in one file, expected one; save one of them by itself"


def test_threads_leave_the_warning_filters_as_they_were() -> None:
    before = list(warnings.filters)
    data = encode(Image.fromarray(GREY))
    threads = [threading.Thread(target=lambda: [read_image(data) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before
