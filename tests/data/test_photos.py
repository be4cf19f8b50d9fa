import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from attire.data import photos
from attire.data.loading import load_dataset
from attire.data.photos import _PreparedPhoto, comparison_strip, prepare
from attire.errors import AttireError
from attire.inference.bundle_files import _SHIPPED
from attire.inference.classifier import load_bundle

BOX = (60, 40, 140, 200)  # of the trousers below; their picture is 200 x 240


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def trousers(paper: Any = (255, 255, 255), cloth: Any = (30, 40, 90), mode: str = "RGB") -> Image.Image:
    """A belt and two legs."""
    image = Image.new(mode, (200, 240), paper)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = BOX
    draw.rectangle((left, top, right - 1, top + 40), fill=cloth)
    draw.rectangle((left, top, left + 29, bottom - 1), fill=cloth)
    draw.rectangle((right - 30, top, right - 1, bottom - 1), fill=cloth)
    return image


EXPECTED = prepare(encode(trousers())).image.astype(int)


def close(photo: _PreparedPhoto, least: float = 0.9) -> bool:
    """Whether this is the shape of the trousers, whatever their shade."""
    return float(np.corrcoef(photo.image.ravel(), EXPECTED.ravel())[0, 1]) >= least


@pytest.fixture
def unstretched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grey values as they are, without more contrast."""
    monkeypatch.setattr(photos, "_stretched", lambda values: values)
    monkeypatch.setattr(photos, "_lifted", lambda values, cloth: values)


def test_the_published_steps() -> None:
    photo = prepare(encode(trousers()))
    assert (photo.crop, photo.polarity, photo.kind) == (BOX, "dark on light", "photo")
    rows, columns = np.flatnonzero(photo.image.any(1)), np.flatnonzero(photo.image.any(0))
    assert (rows[0], rows[-1]) == (0, 27)  # the longer side fits
    assert (columns[0], columns[-1]) == (7, 20)  # the shorter one is centred
    assert (photo.image[12:, 13:15] == 0).all()  # the paper between the legs is black
    assert photo.image[2:5, 8:20].min() > 200
    assert photo.original.size == (200, 240)


def test_light_on_dark_is_not_negated(monkeypatch: pytest.MonkeyPatch) -> None:
    photo = prepare(encode(trousers((10, 10, 10), (240, 230, 220))))
    assert (photo.crop, photo.polarity) == (BOX, "light on dark")
    assert close(photo, 0.98)
    monkeypatch.setattr(photos, "_is_lighter", lambda colours, ground: False)
    assert not prepare(encode(trousers((10, 10, 10), (240, 230, 220)))).image.any()


@pytest.mark.parametrize(
    ("paper", "cloth"),
    [((90, 160, 110), (20, 20, 20)), ((90, 160, 110), (250, 240, 240)), ((60, 60, 200), (230, 200, 40))],
)
def test_coloured_backgrounds(paper: tuple[int, ...], cloth: tuple[int, ...]) -> None:
    photo = prepare(encode(trousers(paper, cloth)))
    assert photo.crop == BOX
    assert close(photo, 0.95)
    assert photo.image.max() >= 250


def test_light_that_falls_off_towards_the_edges_is_background(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = np.mgrid[-1:1:240j, -1:1:200j]
    light = (1 - 0.3 * columns - 0.15 * rows * rows)[..., None] / 1.3
    image = Image.fromarray((np.asarray(trousers()) * light).clip(0, 255).astype(np.uint8))
    photo = prepare(encode(image))
    assert photo.crop == BOX
    assert close(photo, 0.95)
    monkeypatch.setattr(photos, "_background", lambda colours: (photos._corner_colour(colours), 0.0))
    assert prepare(encode(image)).crop != BOX


def test_a_garment_that_covers_the_edges_is_no_uneven_light() -> None:
    image = Image.new("RGB", (200, 240), (255, 255, 255))
    ImageDraw.Draw(image).rectangle((0, 60, 199, 239), fill=(30, 40, 90))
    assert prepare(encode(image)).image.any()


def test_noise_and_specks_do_not_widen_the_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    noisy = np.asarray(trousers((200, 200, 200))) + rng.normal(0, 9, (240, 200, 3))
    image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    ImageDraw.Draw(image).rectangle((180, 220, 184, 224), fill=(0, 0, 0))
    assert prepare(encode(image)).crop == BOX
    monkeypatch.setattr(photos, "_without_specks", lambda mask: mask)
    monkeypatch.setattr(photos, "_thick", lambda mask: mask)
    assert prepare(encode(image)).crop[2:] == (185, 225)


def test_laces_do_not_widen_the_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    image = trousers()
    ImageDraw.Draw(image).line((100, 60, 190, 8), fill=(0, 0, 0), width=3)
    assert prepare(encode(image)).crop == BOX
    monkeypatch.setattr(photos, "_thick", lambda mask: mask)
    assert prepare(encode(image)).crop[2] > 185


@pytest.mark.usefixtures("unstretched")
def test_the_outlines_of_a_drawing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("L", (400, 400), 255)
    ImageDraw.Draw(image).rectangle((100, 50, 300, 350), fill=155, outline=0, width=5)
    monkeypatch.setattr(photos, "_SHADOW", 0)
    without = prepare(encode(image)).image
    assert (without[2:-2, 7:20] == 100).all()
    assert without.max() <= 100
    monkeypatch.setattr(photos, "_without_lines", lambda values, line: values)
    assert prepare(encode(image)).image.max() > 130


@pytest.mark.parametrize("ink", [0, 255])
def test_thin_lines_are_shadows_on_the_cloth(ink: int) -> None:
    """Seams and buttons are, in the data set; a pen's negative would be bright."""
    image = Image.new("L", (400, 400), 0)
    ImageDraw.Draw(image).rectangle((100, 50, 300, 350), fill=100)
    ImageDraw.Draw(image).line((200, 60, 200, 340), fill=255 - ink, width=5)
    values = photos._without_lines(np.asarray(image, float), 6)
    assert (values[60:340, 110:190] == 100).all()
    assert (values[70:330, 199:202] < 97).all()
    assert values.max() <= 101


def test_a_drawing_that_is_an_outline_alone_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("L", (400, 400), 255)
    ImageDraw.Draw(image).polygon(((150, 50), (250, 50), (330, 350), (70, 350)), outline=0, width=6)
    ImageDraw.Draw(image).rectangle((190, 40, 200, 60), fill=255)  # a gap, as pens leave it
    ImageDraw.Draw(image).rectangle((193, 40, 197, 56), fill=0)
    photo = prepare(encode(image))
    assert photo.image[3:25, 13:15].min() > 140
    assert (photo.image[:8, :3] == 0).all()
    monkeypatch.setattr(photos, "_hollow", lambda values, mask, line: None)
    hollow = prepare(encode(image)).image
    assert hollow[8:20, 12:16].max() == 0


def test_a_cut_out_of_white_cloth_with_dark_lines_is_cloth(monkeypatch: pytest.MonkeyPatch) -> None:
    image = trousers((0, 0, 0, 0), (255, 255, 255, 255), "RGBA")
    ImageDraw.Draw(image).rectangle((BOX[0], BOX[1], BOX[2] - 1, BOX[1] + 12), fill=(0, 0, 0, 255))
    ImageDraw.Draw(image).line((65, 80, 65, 190), fill=(0, 0, 0, 255), width=14)
    assert close(prepare(encode(image)), 0.8)
    monkeypatch.setattr(photos, "_hollow", lambda values, mask, line: None)
    assert not close(prepare(encode(image)), 0.8)


def test_pale_cloth_is_lifted_and_dark_cloth_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dark sole would keep a pale shoe dark."""
    image = Image.new("L", (400, 240), 255)
    ImageDraw.Draw(image).rectangle((50, 40, 349, 199), fill=215)
    ImageDraw.Draw(image).rectangle((50, 180, 349, 199), fill=0)
    black = Image.new("L", (400, 240), 255)
    ImageDraw.Draw(black).rectangle((50, 40, 349, 199), fill=20)
    lifted, dark = prepare(encode(image)).image, prepare(encode(black)).image
    monkeypatch.setattr(photos, "_lifted", lambda values, cloth: values)
    assert np.median(lifted[8:18]) > 130
    assert np.median(prepare(encode(image)).image[8:18]) < 60
    assert np.array_equal(dark, prepare(encode(black)).image)


def test_what_is_opaque_is_the_garment_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may reach into three corners, and be of the paper's colour in part."""
    image = Image.new("RGBA", (200, 240))
    ImageDraw.Draw(image).rectangle((0, 0, 199, 150), fill=(30, 40, 90, 255))
    ImageDraw.Draw(image).rectangle((0, 151, 120, 239), fill=(255, 255, 255, 255))
    photo = prepare(encode(image))
    assert (photo.crop, photo.polarity) == ((0, 0, 200, 240), "dark on light")
    assert photo.image[2:14, 6:22].min() > 180
    covered = trousers().convert("RGBA")  # opaque throughout: its corners tell
    assert prepare(encode(covered)).crop == BOX
    monkeypatch.setattr(photos, "_opaque", lambda picture, size: None)
    assert prepare(encode(image)).polarity == "light on dark"


def test_the_published_sharpening_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("L", (200, 240), 255)
    ImageDraw.Draw(image).rectangle((60, 40, 139, 199), fill=150)
    ImageDraw.Draw(image).rectangle((60, 40, 139, 70), fill=0)
    monkeypatch.setattr(photos, "_lifted", lambda values, cloth: values)
    assert (prepare(encode(image)).image[6:, 14] == 105).all()  # the lower part, right up to the dark one


def test_exif_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to show"
    turned = trousers().transpose(Image.Transpose.ROTATE_90)
    photo = prepare(encode(turned, "JPEG", quality=95, exif=exif))
    assert photo.original.size == (200, 240)
    assert close(photo, 0.98)


def test_transparency_of_every_kind() -> None:
    cut_out = trousers((0, 0, 0, 0), (30, 40, 90, 255), "RGBA")
    pale = trousers((0, 0, 0, 0), (250, 250, 245, 255), "RGBA")
    two = trousers((0, 0), (40, 255), "LA")
    palette = trousers(0, 1, "P")
    palette.putpalette([255, 0, 0, 30, 40, 90])
    for image, options, polarity in (
        (cut_out, {}, "dark on light"),
        (pale, {}, "light on dark"),
        (two, {}, "dark on light"),
        (palette, {"transparency": 0}, "dark on light"),
        (palette, {"transparency": b"\0\xff"}, "dark on light"),
    ):
        photo = prepare(encode(image, **options))
        assert (photo.crop, photo.polarity) == (BOX, polarity)
        assert close(photo, 0.98)


def test_other_modes() -> None:
    levels = np.asarray(trousers(255, 40, "L")).astype(np.uint16) * 257
    ink = trousers((0, 0, 0, 0), (200, 200, 60, 100), "CMYK")
    for data in (
        encode(Image.fromarray(levels)),
        encode(Image.fromarray(levels), transparency=65535),
        encode(trousers(255, 40, "L").convert("1", dither=Image.Dither.NONE)),
        encode(trousers(255, 40, "L"), "BMP"),
        encode(trousers(), "WEBP", quality=90),
    ):
        photo = prepare(data)
        assert photo.crop == BOX
        assert close(photo, 0.98)
    assert close(prepare(encode(ink, "JPEG", quality=95)))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_grey_28_by_28_picture_is_taken_as_it_is(mode: str) -> None:
    image = np.zeros((28, 28), np.uint8)
    image[2:26, 8:20] = np.random.default_rng(0).integers(1, 256, (24, 12))
    for levels, polarity in ((image, "light on dark"), (255 - image, "dark on light")):
        photo = prepare(encode(Image.fromarray(levels).convert(mode)))
        assert (photo.kind, photo.polarity, photo.crop) == ("as it is", polarity, (0, 0, 28, 28))
        assert np.array_equal(photo.image, image)


def test_a_coloured_28_by_28_picture_is_a_photo() -> None:
    assert prepare(encode(Image.new("RGB", (28, 28), (200, 10, 10)))).kind == "photo"


def test_sizes_small_and_narrow() -> None:
    tiny = Image.new("L", (2, 2), 255)
    tiny.putpixel((0, 0), 0)
    photo = prepare(encode(tiny))
    assert photo.crop == (0, 0, 1, 1)
    assert photo.image.min() > 250
    narrow = Image.new("L", (40, 800), 255)
    ImageDraw.Draw(narrow).rectangle((10, 2, 29, 797), fill=0)
    photo = prepare(encode(narrow))
    assert np.abs(np.subtract(photo.crop, (10, 2, 30, 798))).max() <= 1  # found at 512 px
    assert np.flatnonzero(photo.image.any(0)).tolist() == [13]
    assert photo.image.any(1).all()


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (120, 60, 30)])
def test_a_picture_of_one_colour_is_black(colour: tuple[int, ...]) -> None:
    photo = prepare(encode(Image.new("RGB", (90, 60), colour)))
    assert photo.crop == (0, 0, 90, 60)
    assert not photo.image.any()
    assert not prepare(encode(Image.new("RGBA", (90, 60)))).image.any()


def test_a_large_photograph_has_its_crop_in_its_own_pixels() -> None:
    large = trousers().resize((2000, 2400), Image.Resampling.NEAREST)
    photo = prepare(encode(large, "JPEG"))
    assert np.abs(np.subtract(photo.crop, [10 * side for side in BOX])).max() <= 5
    assert close(photo, 0.98)


def test_what_cannot_be_read_is_refused_as_elsewhere() -> None:
    with pytest.raises(AttireError, match=r"^shirt.png: empty file; expected a PNG"):
        prepare(b"", "shirt.png")
    with pytest.raises(AttireError, match="too narrow"):
        prepare(encode(Image.new("L", (2, 50))))


def test_a_file_is_read_by_its_path(tmp_path: Path) -> None:
    trousers().save(tmp_path / "a.png")
    assert np.array_equal(prepare(tmp_path / "a.png").image, EXPECTED)


@pytest.mark.parametrize("size", [(200, 240), (28, 28), (800, 40), (40, 800)])
def test_the_strip_shows_original_crop_and_result(size: tuple[int, int]) -> None:
    photo = prepare(encode(trousers(cloth=(60, 60, 60)).resize(size)))
    with Image.open(io.BytesIO(comparison_strip(photo, 112))) as image:
        image.load()
    assert (image.format, image.mode, image.height) == ("PNG", "RGB", 112)
    assert 112 + 2 * 56 <= image.width <= 5 * 112 + 8
    shown = np.asarray(image)[2::4, -110::4, 0]
    assert np.array_equal(shown, photo.image)


def photographed(image: NDArray[np.uint8]) -> bytes:
    """A test image as it may have been before it was prepared: large, dark on white, with a border around it."""
    large = Image.fromarray(255 - image).resize((336, 336), Image.Resampling.BICUBIC)
    paper = Image.new("RGB", (460, 420), (255, 255, 255))
    paper.paste(large, (70, 30))
    return encode(paper, "JPEG", quality=90)


@pytest.mark.real
def test_test_images_photographed_again_keep_their_class() -> None:
    model, data = load_bundle(_SHIPPED, "cpu"), load_dataset(part="test")
    images = data.images[:200]
    again = np.stack([prepare(photographed(image)).image for image in images])
    kept = model.predict_proba(images).argmax(1) == model.predict_proba(again).argmax(1)
    assert kept.mean() >= 0.85


ICONS = {  # outlines in hundredths of the picture's side, from the middle axis; their other half is mirrored
    "T-shirt/top": ((40, 12), (32, 12), (8, 28), (18, 46), (28, 40), (28, 90)),
    "Trouser": ((28, 8), (20, 92), (42, 92), (50, 34)),
    "Pullover": ((40, 12), (30, 14), (14, 26), (6, 82), (18, 86), (27, 46), (27, 88)),
}


def icon(name: str, cloth: tuple[int, ...], side: int = 128) -> bytes:
    """A garment of one colour on nothing, as icons show them."""
    half = [(4 * x, 4 * y) for x, y in ICONS[name]]
    image = Image.new("RGBA", (400, 400))
    ImageDraw.Draw(image).polygon([*half, *((400 - x, y) for x, y in reversed(half))], fill=cloth)
    return encode(image.resize((side, side), Image.Resampling.LANCZOS))


@pytest.mark.real
@pytest.mark.parametrize("name", ["T-shirt/top", "Trouser", "Pullover"])
@pytest.mark.parametrize("cloth", [(59, 136, 195, 255), (255, 204, 77, 255), (41, 47, 51, 255), (204, 214, 221, 255)])
def test_plain_icons_are_named_and_most_are_accepted(name: str, cloth: tuple[int, ...]) -> None:
    prediction = load_bundle(_SHIPPED, "cpu").predict(prepare(icon(name, cloth)).image)
    assert prediction.label == name
    assert not prediction.out_of_distribution or name == "T-shirt/top"
