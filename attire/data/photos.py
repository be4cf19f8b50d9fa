"""A photograph of a garment becomes what Fashion-MNIST would have made of it: 28x28, light on black."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from attire.data.pictures import SIDE, decode_colour

WORK = 512  # longest side, in px, at which the garment is looked for
FUZZ = 0.05 * 255 * 3**0.5  # distance in RGB that still counts as the background's colour (Xiao et al. 2017: 5 %)
NOISE = 6.0  # deviations of the background's own noise that count as its colour as well
PATCH = 0.03  # of the shorter side: the square in each corner that tells the background's colour
FRAME = 64  # places along each side of the picture at which an uneven background is looked at
MOST = 0.6  # of them are to be background
SPECK = 0.02  # of the largest piece: smaller pieces are no part of the garment
THIN = 0.04  # of the garment's longer side: what is narrower does not widen the crop
LINE = 0.02  # of the same: lines narrower than this, such as a drawing's outlines, become shadows
SHADOW = 0.6  # how much darker such a line is than the cloth around it, black on white
CLEAR = 0.02  # of a picture's pixels: with more that are transparent, what is opaque is the garment
HOLLOW = 0.6  # of its filled outline: a drawing that covers less is an outline alone, and is filled,
SOLID = 0.25  # where what is thicker than two lines covers less than this
FAINT = 12  # grey value: of cloth that stands out less only the lines are seen, so that it is filled too
PAPER = 200  # grey value of such cloth
THUMB = 73  # px: Fashion-MNIST was made of shop thumbnails, 51 x 73, whose rows and columns were then skipped
SHARPEN = 0.863  # ImageMagick's `-sharpen 0x1`: 2 I - G without its centre, normalised: x + (x - Gx) / (1 + G(0, 0))
PALE = 217  # mean grey: a cut-out garment lighter than this would vanish on white
GAIN = 6.0  # at most: what differs less from its background than that stays faint
CLOTH = 140  # grey value that half of the garment reaches, where the gain allows it

Grey = NDArray[np.uint8]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Steps:
    """Which steps `prepare` takes; others than these only to measure them, see docs/photos.md."""

    cut_out: bool = True
    uneven: bool = True
    trim: bool = True
    specks: bool = True
    thin: bool = True
    polarity: bool = True
    hollow: bool = True
    lines: bool = True
    shadows: bool = True
    clear: bool = True
    subsample: bool = True
    sharpen: bool = False  # published, but with it more garments were rejected and more other things were not
    stretch: bool = True
    lift: bool = True


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
    paper = paper_of(picture)
    original = filled(picture, paper)
    if original.size == (SIDE, SIDE) and is_grey(original):
        return as_it_is(original)
    small = shrunk(original)
    colours = np.asarray(small, np.float64)  # (h, w, 3), 0 to 255
    cut = opaque(picture, small.size) if steps.cut_out else None
    flat, rough = background(colours, steps) if cut is None else (paper, 0.0)
    ground = np.broadcast_to(flat, colours.shape)
    mask = without_specks(differing(colours, ground, rough) if cut is None else cut, steps.specks)
    light = steps.polarity and is_lighter(colours[mask], ground[mask])
    values = tone(luma(colours), luma(ground), light)  # (h, w), 0 to 255, the background 0
    if flat.ndim == 3:  # a glow that the surface does not follow is no garment
        mask = without_specks(mask & (values > 0), steps.specks)
    box, image = rendered(values, mask, steps)
    crop = scaled(box, small.size, original.size)
    return Photo(image, original, crop, "light on dark" if light else "dark on light", "photo")


def rendered(values: Floats, mask: Mask, steps: Steps) -> tuple[Box, Grey]:
    """The crop, and the garment in it as (28, 28), of distances from the background (h, w) and where the garment is.

    `drawings` sends what it draws through here too.
    """
    box = bounds(thick(mask) if steps.thin else mask) if steps.trim else (0, 0, mask.shape[1], mask.shape[0])
    line = max(1, round(LINE * longest(box)))
    if steps.hollow and (whole := hollow(values, mask, line)) is not None:
        values, mask = np.where(whole, PAPER * (1 - SHADOW * values / 255), 0), whole
    else:
        values = without_lines(values, line, steps)
    if steps.clear:
        values = cleared(values, mask)
    inside = slice(box[1], box[3]), slice(box[0], box[2])
    part = values[inside]
    if steps.lift and steps.stretch:
        part = lifted(part, mask[inside])
    return box, fit(part, steps)


def filled(picture: Image.Image, paper: Floats) -> Image.Image:
    """RGB, what is transparent filled with paper of this colour (3,)."""
    if picture.mode != "RGBA":
        return picture.convert("RGB")
    sheet = Image.new("RGBA", picture.size, (*map(int, paper), 255))
    return Image.alpha_composite(sheet, picture).convert("RGB")


def paper_of(picture: Image.Image) -> Floats:
    """(3,): white, or black where what is opaque of an RGBA picture is nearly white."""
    if picture.mode != "RGBA":
        return np.full(3, 255.0)
    solid = picture.getchannel("A").point(lambda level: 255 if level > 127 else 0)
    histogram = picture.convert("L").histogram(solid)
    mean = sum(level * count for level, count in enumerate(histogram)) / max(1, sum(histogram))
    return np.full(3, 0.0 if mean > PALE else 255.0)


def opaque(picture: Image.Image, size: tuple[int, int]) -> Mask | None:
    """(h, w) of this size: the garment, where the picture is one cut out; None where it is not transparent."""
    if picture.mode != "RGBA":
        return None
    mask: Mask = np.asarray(picture.getchannel("A").resize(size, Image.Resampling.BOX)) > 127
    return mask if mask.any() and np.mean(~mask) > CLEAR else None


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


def background(colours: Floats, steps: Steps) -> tuple[Floats, float]:
    """(3,): the corners' colour; or (h, w, 3) where light falls off towards the edges and a smooth surface explains it;
    and how far from that surface the background itself strays."""
    flat = corner_colour(colours)
    if not steps.uneven or min(colours.shape[:2]) < FRAME // 2:
        return flat, 0.0
    height, width = colours.shape[:2]
    down, right = np.linspace(-1, 1, height), np.linspace(-1, 1, width)
    rows, columns = np.linspace(0, height - 1, FRAME).astype(int), np.linspace(0, width - 1, FRAME).astype(int)
    top, left = np.zeros(FRAME, int), np.zeros(FRAME, int)
    y, x = np.concatenate([rows, rows, top, top - 1]), np.concatenate([left, left - 1, columns, columns])
    seen, terms = colours[y, x], surface(down[y], right[x])  # (4 FRAME, 3), (4 FRAME, 6)
    kept = np.ones(len(y), bool)
    for _ in range(4):  # what the garment covers of the frame is left out step by step
        found = np.linalg.lstsq(terms[kept], seen[kept], rcond=None)[0]
        off = np.linalg.norm(seen - terms @ found, axis=1)
        kept = off <= max(FUZZ / 2, 2 * float(np.median(off)))
    strays, differs = float(off[kept].max()), float(np.linalg.norm(terms[kept] @ found - flat, axis=1).max())
    if kept.mean() < MOST or strays > 2 * FUZZ or differs < max(FUZZ, 2 * strays):
        return flat, 0.0
    return (surface(down[:, None], right[None]) @ found).clip(0, 255), 1.5 * strays


def surface(down: Floats, right: Floats) -> Floats:
    """(..., 6): the terms of a quadratic surface at these places, -1 to 1."""
    down, right = np.broadcast_arrays(down, right)
    return np.stack([np.ones(down.shape), down, right, down * down, right * right, down * right], -1)


def corner_colour(colours: Floats) -> Floats:
    """(3,): the median over the corners, so that a garment may reach into one of them."""
    found: Floats = np.median(corners(colours).mean(1), axis=0)
    return found


def differing(colours: Floats, ground: Floats, rough: float) -> Mask:
    """(h, w): what is not of the background's colour."""
    noise = np.median([patch.std(0).max() for patch in corners(colours)])
    mask: Mask = np.linalg.norm(colours - ground, axis=2) > max(FUZZ, NOISE * float(noise), rough)
    return mask


def without_specks(mask: Mask, specks: bool = True) -> Mask:
    """Without small pieces; all of the picture where nothing is left."""
    from scipy import ndimage  # a 28x28 picture is answered without waiting for it, here and below

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
    """Whether the garment's pixels (n, 3) are lighter than the background there (n, 3) on the whole."""
    return bool(luma(colours).mean() > luma(ground).mean())


def tone(grey: Floats, ground: Floats, light: bool) -> Floats:
    """Grey values as distances from the background, 0 to 255: on pure white the negative, on pure black themselves."""
    distance = (grey - ground) / (255 - ground).clip(1) if light else (ground - grey) / ground.clip(1)
    found: Floats = 255 * distance.clip(0, 1)
    return found


def hollow(values: Floats, mask: Mask, line: int) -> Mask | None:
    """Where the garment is, if its cloth is as bright as its background: a drawing's outline, or a cut-out of white
    cloth with dark lines; None where the cloth itself stands out."""
    if mask.any() and np.median(values[mask]) < FAINT and values[mask].max() > 4 * FAINT:
        return mask
    return outline(mask, line)


def outline(mask: Mask, line: int) -> Mask | None:
    """The area that a drawing's lines enclose, gaps of two lines' width bridged; None where it is cloth, not lines."""
    from scipy import ndimage

    side = 2 * line + 1
    room = np.pad(mask, side).astype(np.uint8)  # what touches the picture's edge is closed as elsewhere
    solid = ndimage.grey_opening(room, (side, side)).sum()
    if 4 * solid > 3 * mask.sum():
        return None  # most garments: not looked at further
    closed = ndimage.binary_fill_holes(ndimage.grey_closing(room, (side, side)))
    whole: Mask = closed[side:-side, side:-side]
    return whole if mask.sum() < HOLLOW * whole.sum() and solid < SOLID * whole.sum() else None


def without_lines(values: Floats, line: int, steps: Steps) -> Floats:
    """Lines narrower than `line` px, dark ones on white, taken out, or left as shadows on the cloth."""
    from scipy import ndimage

    if not steps.lines:
        return values
    cloth: Floats = ndimage.grey_opening(ndimage.grey_closing(values, (line, line)), (line, line))
    return cloth * (1 - SHADOW * np.abs(values - cloth) / 255) if steps.shadows else cloth


def cleared(values: Floats, mask: Mask) -> Floats:
    """Black where the garment is not."""
    from scipy import ndimage

    return np.where(ndimage.binary_dilation(mask), values, 0)


def lifted(values: Floats, cloth: Mask) -> Floats:
    """So bright that half of the cloth reaches CLOTH, but for no more than a quarter of it the brightest there is."""
    middle, bright = np.quantile(values[cloth], (0.5, 0.75)) if cloth.any() else (0.0, 0.0)
    gain = min(CLOTH / max(1.0, float(middle)), 255 / max(1.0, float(bright)))
    return (values * min(GAIN, max(1.0, gain))).clip(0, 255)


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
