"""A photograph of a garment becomes what Fashion-MNIST would have made of it: 28x28, light on black."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from attire.data.pictures import SIDE, decode_colour

_WORK = 512  # longest side, in px, at which the garment is looked for
_FUZZ = 0.05 * 255 * 3**0.5  # distance in RGB that still counts as the background's colour (Xiao et al. 2017: 5 %)
_NOISE = 6.0  # deviations of the background's own noise that count as its colour as well
_PATCH = 0.03  # of the shorter side: the square in each corner that tells the background's colour
_FRAME = 64  # places along each side of the picture at which an uneven background is looked at
_MOST = 0.6  # of them are to be background
_SPECK = 0.02  # of the largest piece: smaller pieces are no part of the garment
_THIN = 0.04  # of the garment's longer side: what is narrower does not widen the crop
_LINE = 0.02  # of the same: lines narrower than this, such as a drawing's outlines, become shadows
_SHADOW = 0.6  # how much darker such a line is than the cloth around it, black on white
_CLEAR = 0.02  # of a picture's pixels: with more that are transparent, what is opaque is the garment
_HOLLOW = 0.6  # of its filled outline: a drawing that covers less is an outline alone, and is filled,
_SOLID = 0.25  # where what is thicker than two lines covers less than this
_FAINT = 12  # grey value: of cloth that stands out less only the lines are seen, so that it is filled too
_PAPER = 200  # grey value of such cloth
_THUMB = 73  # px: Fashion-MNIST was made of shop thumbnails, 51 x 73, whose rows and columns were then skipped
_SHARPEN = 0.863  # ImageMagick's `-sharpen 0x1`: 2 I - G without its centre, normalised: x + (x - Gx) / (1 + G(0, 0))
_PALE = 217  # mean grey: a cut-out garment lighter than this would vanish on white
_GAIN = 6.0  # at most: what differs less from its background than that stays faint
_CLOTH = 140  # grey value that half of the garment reaches, where the gain allows it

Grey = NDArray[np.uint8]
_Floats = NDArray[np.float64]
_Mask = NDArray[np.bool_]
_Box = tuple[int, int, int, int]  # left, top, right, bottom


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
class _PreparedPhoto:
    """What `prepare` made of a picture.

    image: (28, 28) uint8, light on black, what the model sees; original: RGB, upright, transparency filled;
    crop: left, top, right, bottom in its pixels; polarity: "dark on light" or "light on dark", of the original;
    kind: "as it is" (grey 28x28) or "photo".
    """

    image: Grey
    original: Image.Image
    crop: _Box
    polarity: str
    kind: str


def prepare(source: str | Path | bytes, name: str = "picture", steps: Steps | None = None) -> _PreparedPhoto:
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
    paper = _paper_of(picture)
    original = _filled(picture, paper)
    if original.size == (SIDE, SIDE) and _is_grey(original):
        return _as_it_is(original)
    small = _shrunk(original)
    colours = np.asarray(small, np.float64)  # (h, w, 3), 0 to 255
    cut = _opaque(picture, small.size) if steps.cut_out else None
    flat, rough = _background(colours, steps) if cut is None else (paper, 0.0)
    ground = np.broadcast_to(flat, colours.shape)
    mask = _without_specks(_differing(colours, ground, rough) if cut is None else cut, steps.specks)
    light = steps.polarity and _is_lighter(colours[mask], ground[mask])
    values = _tone(_luma(colours), _luma(ground), light)  # (h, w), 0 to 255, the background 0
    if flat.ndim == 3:  # a glow that the surface does not follow is no garment
        mask = _without_specks(mask & (values > 0), steps.specks)
    box, image = render(values, mask, steps)
    crop = _scaled(box, small.size, original.size)
    return _PreparedPhoto(image, original, crop, "light on dark" if light else "dark on light", "photo")


def render(values: _Floats, mask: _Mask, steps: Steps) -> tuple[_Box, Grey]:
    """The crop, and the garment in it as (28, 28), of distances from the background (h, w) and where the garment is.

    `drawings` sends what it draws through here too.
    """
    box = _bounds(_thick(mask) if steps.thin else mask) if steps.trim else (0, 0, mask.shape[1], mask.shape[0])
    line = max(1, round(_LINE * _longest(box)))
    if steps.hollow and (whole := _hollow(values, mask, line)) is not None:
        values, mask = np.where(whole, _PAPER * (1 - _SHADOW * values / 255), 0), whole
    else:
        values = _without_lines(values, line, steps)
    if steps.clear:
        values = _cleared(values, mask)
    inside = slice(box[1], box[3]), slice(box[0], box[2])
    part = values[inside]
    if steps.lift and steps.stretch:
        part = _lifted(part, mask[inside])
    return box, _fit(part, steps)


def _filled(picture: Image.Image, paper: _Floats) -> Image.Image:
    """RGB, what is transparent filled with paper of this colour (3,)."""
    if picture.mode != "RGBA":
        return picture.convert("RGB")
    sheet = Image.new("RGBA", picture.size, (*map(int, paper), 255))
    return Image.alpha_composite(sheet, picture).convert("RGB")


def _paper_of(picture: Image.Image) -> _Floats:
    """(3,): white, or black where what is opaque of an RGBA picture is nearly white."""
    if picture.mode != "RGBA":
        return np.full(3, 255.0)
    solid = picture.getchannel("A").point(lambda level: 255 if level > 127 else 0)
    histogram = picture.convert("L").histogram(solid)
    mean = sum(level * count for level, count in enumerate(histogram)) / max(1, sum(histogram))
    return np.full(3, 0.0 if mean > _PALE else 255.0)


def _opaque(picture: Image.Image, size: tuple[int, int]) -> _Mask | None:
    """(h, w) of this size: the garment, where the picture is one cut out; None where it is not transparent."""
    if picture.mode != "RGBA":
        return None
    mask: _Mask = np.asarray(picture.getchannel("A").resize(size, Image.Resampling.BOX)) > 127
    return mask if mask.any() and np.mean(~mask) > _CLEAR else None


def _is_grey(picture: Image.Image) -> bool:
    red, green, blue = (np.asarray(channel, np.int16) for channel in picture.split())
    return bool(max(np.abs(red - green).max(), np.abs(blue - green).max()) <= 2)  # JPEG may round channels apart


def _as_it_is(picture: Image.Image) -> _PreparedPhoto:
    """The middle of the four corners tells the polarity; it is right for all 60,000 training images."""
    image = np.array(picture.convert("L"))
    dark = bool(np.median(image[[0, 0, -1, -1], [0, -1, 0, -1]]) > 127)
    polarity = "dark on light" if dark else "light on dark"
    return _PreparedPhoto(255 - image if dark else image, picture, (0, 0, SIDE, SIDE), polarity, "as it is")


def _shrunk(picture: Image.Image) -> Image.Image:
    """At most WORK px a side, each pixel the mean of those it stands for."""
    scale = _WORK / max(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BOX)


def _luma(colours: _Floats) -> _Floats:
    """ITU-R BT.601, as Pillow's mode L, of (..., 3)."""
    grey: _Floats = colours @ np.array([0.299, 0.587, 0.114])
    return grey


def _corners(colours: _Floats) -> _Floats:
    """(4, n, 3): the pixels of a small square in each corner."""
    side = max(1, round(_PATCH * min(colours.shape[:2])))
    ends = slice(None, side), slice(-side, None)
    return np.stack([colours[rows, columns].reshape(-1, 3) for rows in ends for columns in ends])


def _background(colours: _Floats, steps: Steps) -> tuple[_Floats, float]:
    """(3,): the corners' colour; or (h, w, 3) where light falls off towards the edges and a smooth surface explains it;
    and how far from that surface the background itself strays."""
    flat = _corner_colour(colours)
    if not steps.uneven or min(colours.shape[:2]) < _FRAME // 2:
        return flat, 0.0
    height, width = colours.shape[:2]
    down, right = np.linspace(-1, 1, height), np.linspace(-1, 1, width)
    rows, columns = np.linspace(0, height - 1, _FRAME).astype(int), np.linspace(0, width - 1, _FRAME).astype(int)
    top, left = np.zeros(_FRAME, int), np.zeros(_FRAME, int)
    y, x = np.concatenate([rows, rows, top, top - 1]), np.concatenate([left, left - 1, columns, columns])
    seen, terms = colours[y, x], _surface(down[y], right[x])  # (4 FRAME, 3), (4 FRAME, 6)
    kept = np.ones(len(y), bool)
    for _ in range(4):  # what the garment covers of the frame is left out step by step
        found = np.linalg.lstsq(terms[kept], seen[kept], rcond=None)[0]
        off = np.linalg.norm(seen - terms @ found, axis=1)
        kept = off <= max(_FUZZ / 2, 2 * float(np.median(off)))
    strays, differs = float(off[kept].max()), float(np.linalg.norm(terms[kept] @ found - flat, axis=1).max())
    if kept.mean() < _MOST or strays > 2 * _FUZZ or differs < max(_FUZZ, 2 * strays):
        return flat, 0.0
    return (_surface(down[:, None], right[None]) @ found).clip(0, 255), 1.5 * strays


def _surface(down: _Floats, right: _Floats) -> _Floats:
    """(..., 6): the terms of a quadratic surface at these places, -1 to 1."""
    down, right = np.broadcast_arrays(down, right)
    return np.stack([np.ones(down.shape), down, right, down * down, right * right, down * right], -1)


def _corner_colour(colours: _Floats) -> _Floats:
    """(3,): the median over the corners, so that a garment may reach into one of them."""
    found: _Floats = np.median(_corners(colours).mean(1), axis=0)
    return found


def _differing(colours: _Floats, ground: _Floats, rough: float) -> _Mask:
    """(h, w): what is not of the background's colour."""
    noise = np.median([patch.std(0).max() for patch in _corners(colours)])
    mask: _Mask = np.linalg.norm(colours - ground, axis=2) > max(_FUZZ, _NOISE * float(noise), rough)
    return mask


def _without_specks(mask: _Mask, specks: bool = True) -> _Mask:
    """Without small pieces; all of the picture where nothing is left."""
    from scipy import ndimage  # a 28x28 picture is answered without waiting for it, here and below

    if specks and mask.any():
        pieces, count = ndimage.label(mask, np.ones((3, 3)))
        sizes = ndimage.sum_labels(mask, pieces, np.arange(count + 1))
        mask = (sizes >= _SPECK * sizes.max())[pieces] & mask
    return mask if mask.any() else np.ones(mask.shape, bool)


def _bounds(mask: _Mask) -> _Box:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _longest(box: _Box) -> int:
    return max(box[2] - box[0], box[3] - box[1])


def _thick(mask: _Mask) -> _Mask:
    """The mask without laces, stands and loose strokes, which would widen the crop; as it is where little is left."""
    from scipy import ndimage

    side = max(1, round(_THIN * _longest(_bounds(mask))))
    body: _Mask = ndimage.binary_opening(ndimage.binary_fill_holes(mask), np.ones((side, side), bool))
    return body if body.sum() > mask.sum() / 2 else mask


def _is_lighter(colours: _Floats, ground: _Floats) -> bool:
    """Whether the garment's pixels (n, 3) are lighter than the background there (n, 3) on the whole."""
    return bool(_luma(colours).mean() > _luma(ground).mean())


def _tone(grey: _Floats, ground: _Floats, light: bool) -> _Floats:
    """Grey values as distances from the background, 0 to 255: on pure white the negative, on pure black themselves."""
    distance = (grey - ground) / (255 - ground).clip(1) if light else (ground - grey) / ground.clip(1)
    found: _Floats = 255 * distance.clip(0, 1)
    return found


def _hollow(values: _Floats, mask: _Mask, line: int) -> _Mask | None:
    """Where the garment is, if its cloth is as bright as its background: a drawing's outline, or a cut-out of white
    cloth with dark lines; None where the cloth itself stands out."""
    if mask.any() and np.median(values[mask]) < _FAINT and values[mask].max() > 4 * _FAINT:
        return mask
    return _outline(mask, line)


def _outline(mask: _Mask, line: int) -> _Mask | None:
    """The area that a drawing's lines enclose, gaps of two lines' width bridged; None where it is cloth, not lines."""
    from scipy import ndimage

    side = 2 * line + 1
    room = np.pad(mask, side).astype(np.uint8)  # what touches the picture's edge is closed as elsewhere
    solid = ndimage.grey_opening(room, (side, side)).sum()
    if 4 * solid > 3 * mask.sum():
        return None  # most garments: not looked at further
    closed = ndimage.binary_fill_holes(ndimage.grey_closing(room, (side, side)))
    whole: _Mask = closed[side:-side, side:-side]
    return whole if mask.sum() < _HOLLOW * whole.sum() and solid < _SOLID * whole.sum() else None


def _without_lines(values: _Floats, line: int, steps: Steps) -> _Floats:
    """Lines narrower than `line` px, dark ones on white, taken out, or left as shadows on the cloth."""
    from scipy import ndimage

    if not steps.lines:
        return values
    cloth: _Floats = ndimage.grey_opening(ndimage.grey_closing(values, (line, line)), (line, line))
    return cloth * (1 - _SHADOW * np.abs(values - cloth) / 255) if steps.shadows else cloth


def _cleared(values: _Floats, mask: _Mask) -> _Floats:
    """Black where the garment is not."""
    from scipy import ndimage

    return np.where(ndimage.binary_dilation(mask), values, 0)


def _lifted(values: _Floats, cloth: _Mask) -> _Floats:
    """So bright that half of the cloth reaches CLOTH, but for no more than a quarter of it the brightest there is."""
    middle, bright = np.quantile(values[cloth], (0.5, 0.75)) if cloth.any() else (0.0, 0.0)
    gain = min(_CLOTH / max(1.0, float(middle)), 255 / max(1.0, float(bright)))
    return (values * min(_GAIN, max(1.0, gain))).clip(0, 255)


def _fit(values: _Floats, steps: Steps) -> Grey:
    """(28, 28) uint8 of (h, w): the longer side 28, centred on black, the lightest pixel near 255."""
    height, width = values.shape
    picture = Image.fromarray(values.astype(np.float32))
    if steps.subsample and max(values.shape) > _THUMB:
        picture = picture.resize(_within(width, height, _THUMB), Image.Resampling.BOX)
    skip = steps.subsample and max(picture.size) > SIDE
    way = Image.Resampling.NEAREST if skip else Image.Resampling.LANCZOS
    small = np.asarray(picture.resize(_within(width, height, SIDE), way), np.float64)
    if steps.sharpen:
        from scipy import ndimage

        small = small + _SHARPEN * (small - ndimage.gaussian_filter(small, 1.0, mode="nearest"))
    return _centred(_stretched(small) if steps.stretch else small)


def _stretched(values: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """The lightest pixel near 255."""
    return values * min(_GAIN, max(1.0, 255 / max(1.0, float(values.max()))))


def _centred(small: NDArray[np.floating[Any]]) -> Grey:
    """(28, 28) uint8 of (h, w), neither of them above 28, on black."""
    image = np.zeros((SIDE, SIDE), np.uint8)
    top, left = (SIDE - small.shape[0]) // 2, (SIDE - small.shape[1]) // 2
    image[top : top + small.shape[0], left : left + small.shape[1]] = small.clip(0, 255).round()
    return image


def _within(width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height with the longer one `side`, their ratio kept."""
    scale = side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _scaled(box: _Box, small: tuple[int, int], full: tuple[int, int]) -> _Box:
    """A box in the pixels of the full picture, none of it cut off."""
    x, y = full[0] / small[0], full[1] / small[1]
    right, bottom = min(full[0], int(np.ceil(box[2] * x))), min(full[1], int(np.ceil(box[3] * y)))
    return int(box[0] * x), int(box[1] * y), right, bottom


def comparison_strip(photo: _PreparedPhoto, height: int = 224) -> bytes:
    """A PNG of three pictures side by side: the original with its crop marked, the crop, what the model sees."""
    marked = photo.original.copy()
    line = max(1, max(marked.size) // 150)
    ImageDraw.Draw(marked).rectangle(_inner(photo.crop), outline=(255, 0, 128), width=line)
    seen = Image.fromarray(photo.image).convert("RGB").resize((height, height), Image.Resampling.NEAREST)
    parts = [_panel(marked, height), _panel(photo.original.crop(photo.crop), height), seen]
    gap = max(1, height // 28)
    wide = Image.new("RGB", (sum(part.width for part in parts) + gap * (len(parts) - 1), height), (128, 128, 128))
    left = 0
    for part in parts:
        wide.paste(part, (left, 0))
        left += part.width + gap
    file = io.BytesIO()
    wide.save(file, "PNG")
    return file.getvalue()


def _inner(box: _Box) -> _Box:
    """The box with its last pixels, as ImageDraw counts."""
    return box[0], box[1], box[2] - 1, box[3] - 1


def _panel(picture: Image.Image, height: int) -> Image.Image:
    """As high as asked for and at most twice as wide, on grey where its shape needs it."""
    width = min(2 * height, max(height // 2, round(picture.width * height / picture.height)))
    return ImageOps.pad(picture, (width, height), Image.Resampling.LANCZOS, color=(128, 128, 128))
