"""A photograph of a garment becomes what Fashion-MNIST would have made of it: 28x28, light on black."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from attire.pictures import SIDE, decode_colour

WORK = 512  # longest side, in px, at which the garment is looked for
FUZZ = 0.05 * 255 * 3**0.5  # distance in RGB that still counts as the background's colour (Xiao et al. 2017: 5 %)
NOISE = 6.0  # deviations of the background's own noise that count as its colour as well
PATCH = 0.03  # of the shorter side: the square in each corner that tells the background's colour
SPECK = 0.02  # of the largest piece: smaller pieces are no part of the garment
THIN = 0.04  # of the garment's longer side: what is narrower does not widen the crop
LINE = 0.02  # of the same: lines narrower than this, such as a drawing's outlines, are taken out
THUMB = 73  # px: Fashion-MNIST was made of shop thumbnails, 51 x 73, whose rows and columns were then skipped
SHARPEN = 0.863  # ImageMagick's `-sharpen 0x1`: 2 I - G without its centre, normalised: x + (x - Gx) / (1 + G(0, 0))
PALE = 217  # mean grey: a cut-out garment lighter than this would vanish on white
GAIN = 4.0  # at most: what differs less from its background than that stays faint

Grey = NDArray[np.uint8]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Steps:
    """Which steps `prepare` takes; others than these only to measure them, see docs/photos.md."""

    trim: bool = True
    specks: bool = True
    thin: bool = True
    polarity: bool = True
    lines: bool = True
    clear: bool = True
    subsample: bool = True
    sharpen: bool = False  # published, but with it more garments were rejected and more other things were not
    stretch: bool = True


@dataclass(frozen=True, eq=False)
class Photo:
    """What `prepare` made of a picture.

    image: (28, 28) uint8, light on black, what the model sees; original: RGB, upright, transparency filled;
    crop: left, top, right, bottom in its pixels; polarity: "dark on light" or "light on dark", of the original;
    kind: "as it is" (grey 28x28) or "photo".
    """

    image: Grey
    original: Image.Image
    crop: Box
    polarity: str
    kind: str


def prepare(source: str | Path | bytes, name: str = "picture", steps: Steps | None = None) -> Photo:
    """Any PNG, JPEG, WebP or BMP picture as Fashion-MNIST would show it; `name` stands for it in errors.

    The steps are those of the data set (Xiao et al. 2017, section 2): trim what has the corners' colour, fit the longer
    side to 28 by skipping rows and columns, extend the shorter side, negate, turn grey; but without its sharpening.
    Specks, laces and the outlines of drawings are left out. A garment lighter than its background is not negated.
    Transparency becomes white, or black around a garment that is nearly white.
    A grey 28x28 picture is taken as it is, negated where its corners are light.

    Raises AttireError for what `pictures.decode` refuses.
    """
    steps = steps or Steps()
    picture = decode_colour(source, name)
    original = filled(picture)
    if original.size == (SIDE, SIDE) and is_grey(original):
        return as_it_is(original)
    small = shrunk(original)
    colours = np.asarray(small, np.float64)  # (h, w, 3), 0 to 255
    ground = corner_colour(colours)  # (3,)
    mask = garment(colours, ground, steps.specks)
    box = bounds(thick(mask) if steps.thin else mask) if steps.trim else (0, 0, small.width, small.height)
    light = steps.polarity and is_lighter(colours[mask], ground)
    values = tone(luma(colours), float(luma(ground)), light)  # (h, w), 0 to 255, the background 0
    values = cleared(values, mask, max(1, round(LINE * longest(box))), steps)
    image = fit(values[box[1] : box[3], box[0] : box[2]], steps)
    crop = scaled(box, small.size, original.size)
    return Photo(image, original, crop, "light on dark" if light else "dark on light", "photo")


def filled(picture: Image.Image) -> Image.Image:
    """RGB, what is transparent filled with white, or with black where the rest is nearly white."""
    if picture.mode != "RGBA":
        return picture.convert("RGB")
    opaque = picture.getchannel("A").point(lambda level: 255 if level > 127 else 0)
    histogram = picture.convert("L").histogram(opaque)
    mean = sum(level * count for level, count in enumerate(histogram)) / max(1, sum(histogram))
    paper = Image.new("RGBA", picture.size, (0, 0, 0, 255) if mean > PALE else (255, 255, 255, 255))
    return Image.alpha_composite(paper, picture).convert("RGB")


def is_grey(picture: Image.Image) -> bool:
    red, green, blue = (np.asarray(channel, np.int16) for channel in picture.split())
    return bool(max(np.abs(red - green).max(), np.abs(blue - green).max()) <= 2)  # JPEG may round channels apart


def as_it_is(picture: Image.Image) -> Photo:
    """The middle of the four corners tells the polarity; it is right for all 60,000 training images."""
    image = np.array(picture.convert("L"))
    dark = bool(np.median(image[[0, 0, -1, -1], [0, -1, 0, -1]]) > 127)
    polarity = "dark on light" if dark else "light on dark"
    return Photo(255 - image if dark else image, picture, (0, 0, SIDE, SIDE), polarity, "as it is")


def shrunk(picture: Image.Image) -> Image.Image:
    """At most WORK px a side, each pixel the mean of those it stands for."""
    scale = WORK / max(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BOX)


def luma(colours: Floats) -> Floats:
    """ITU-R BT.601, as Pillow's mode L, of (..., 3)."""
    grey: Floats = colours @ np.array([0.299, 0.587, 0.114])
    return grey


def corners(colours: Floats) -> Floats:
    """(4, n, 3): the pixels of a small square in each corner."""
    side = max(1, round(PATCH * min(colours.shape[:2])))
    ends = slice(None, side), slice(-side, None)
    return np.stack([colours[rows, columns].reshape(-1, 3) for rows in ends for columns in ends])


def corner_colour(colours: Floats) -> Floats:
    """(3,): the median over the corners, so that a garment may reach into one of them."""
    found: Floats = np.median(corners(colours).mean(1), axis=0)
    return found


def garment(colours: Floats, ground: Floats, specks: bool = True) -> Mask:
    """(h, w): what is not of the background's colour, without small pieces; all of it where nothing is left."""
    from scipy import ndimage  # a 28x28 picture is answered without waiting for it, here and below

    noise = np.median([patch.std(0).max() for patch in corners(colours)])
    mask: Mask = np.linalg.norm(colours - ground, axis=2) > max(FUZZ, NOISE * float(noise))
    if specks and mask.any():
        pieces, count = ndimage.label(mask, np.ones((3, 3)))
        sizes = ndimage.sum_labels(mask, pieces, np.arange(count + 1))
        mask = (sizes >= SPECK * sizes.max())[pieces] & mask
    return mask if mask.any() else np.ones(mask.shape, bool)


def bounds(mask: Mask) -> Box:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def longest(box: Box) -> int:
    return max(box[2] - box[0], box[3] - box[1])


def thick(mask: Mask) -> Mask:
    """The mask without laces, stands and loose strokes, which would widen the crop; as it is where little is left."""
    from scipy import ndimage

    side = max(1, round(THIN * longest(bounds(mask))))
    body: Mask = ndimage.binary_opening(ndimage.binary_fill_holes(mask), np.ones((side, side), bool))
    return body if body.sum() > mask.sum() / 2 else mask


def is_lighter(colours: Floats, ground: Floats) -> bool:
    """Whether the garment's pixels (n, 3) are lighter than the background on the whole."""
    return bool(luma(colours).mean() > luma(ground))


def tone(grey: Floats, ground: float, light: bool) -> Floats:
    """Grey values as distances from the background, 0 to 255: on pure white the negative, on pure black themselves."""
    distance = (grey - ground) / max(1.0, 255 - ground) if light else (ground - grey) / max(1.0, ground)
    found: Floats = 255 * distance.clip(0, 1)
    return found


def cleared(values: Floats, mask: Mask, line: int, steps: Steps) -> Floats:
    """Without lines narrower than `line` px, and black where the garment is not."""
    from scipy import ndimage

    if steps.lines:
        values = ndimage.grey_opening(values, (line, line))
    if steps.clear:
        values[~ndimage.binary_dilation(mask)] = 0
    return values


def fit(values: Floats, steps: Steps) -> Grey:
    """(28, 28) uint8 of (h, w): the longer side 28, centred on black, the lightest pixel near 255."""
    height, width = values.shape
    picture = Image.fromarray(values.astype(np.float32))
    if steps.subsample and max(values.shape) > THUMB:
        picture = picture.resize(within(width, height, THUMB), Image.Resampling.BOX)
    skip = steps.subsample and max(picture.size) > SIDE
    way = Image.Resampling.NEAREST if skip else Image.Resampling.LANCZOS
    small = np.asarray(picture.resize(within(width, height, SIDE), way), np.float64)
    if steps.sharpen:
        from scipy import ndimage

        small = small + SHARPEN * (small - ndimage.gaussian_filter(small, 1.0, mode="nearest"))
    return centred(stretched(small) if steps.stretch else small)


def stretched(values: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """The lightest pixel near 255."""
    return values * min(GAIN, max(1.0, 255 / max(1.0, float(values.max()))))


def centred(small: NDArray[np.floating[Any]]) -> Grey:
    """(28, 28) uint8 of (h, w), neither of them above 28, on black."""
    image = np.zeros((SIDE, SIDE), np.uint8)
    top, left = (SIDE - small.shape[0]) // 2, (SIDE - small.shape[1]) // 2
    image[top : top + small.shape[0], left : left + small.shape[1]] = small.clip(0, 255).round()
    return image


def within(width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height with the longer one `side`, their ratio kept."""
    scale = side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def scaled(box: Box, small: tuple[int, int], full: tuple[int, int]) -> Box:
    """A box in the pixels of the full picture, none of it cut off."""
    x, y = full[0] / small[0], full[1] / small[1]
    right, bottom = min(full[0], int(np.ceil(box[2] * x))), min(full[1], int(np.ceil(box[3] * y)))
    return int(box[0] * x), int(box[1] * y), right, bottom


def strip(photo: Photo, height: int = 224) -> bytes:
    """A PNG of three pictures side by side: the original with its crop marked, the crop, what the model sees."""
    marked = photo.original.copy()
    line = max(1, max(marked.size) // 150)
    ImageDraw.Draw(marked).rectangle(inner(photo.crop), outline=(255, 0, 128), width=line)
    seen = Image.fromarray(photo.image).convert("RGB").resize((height, height), Image.Resampling.NEAREST)
    parts = [panel(marked, height), panel(photo.original.crop(photo.crop), height), seen]
    gap = max(1, height // 28)
    wide = Image.new("RGB", (sum(part.width for part in parts) + gap * (len(parts) - 1), height), (128, 128, 128))
    left = 0
    for part in parts:
        wide.paste(part, (left, 0))
        left += part.width + gap
    file = io.BytesIO()
    wide.save(file, "PNG")
    return file.getvalue()


def inner(box: Box) -> Box:
    """The box with its last pixels, as ImageDraw counts."""
    return box[0], box[1], box[2] - 1, box[3] - 1


def panel(picture: Image.Image, height: int) -> Image.Image:
    """As high as asked for and at most twice as wide, on grey where its shape needs it."""
    width = min(2 * height, max(height // 2, round(picture.width * height / picture.height)))
    return ImageOps.pad(picture, (width, height), Image.Resampling.LANCZOS, color=(128, 128, 128))
