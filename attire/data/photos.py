"""Prepare a photograph of a garment as Fashion-MNIST would have: 28x28, light on black."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from attire.data.pictures import SIDE, decode_colour

_WORK_SIDE = 512  # px, longest side at which the garment is looked for
_FUZZ = 0.05 * 255 * 3**0.5  # distance in RGB that still counts as the background's colour (Xiao et al. 2017: 5 %)
_NOISE = 6.0  # deviations of the background's own noise that count as its colour as well
_PATCH = 0.03  # of the shorter side: the square in each corner that shows the background's colour
_FRAME = 64  # points along each side of the picture at which an uneven background is sampled
_MIN_BACKGROUND = 0.6  # of these points must be background
_SPECK = 0.02  # of the largest piece: smaller pieces are not part of the garment
_THIN = 0.04  # of the garment's longer side: narrower parts do not widen the crop
_LINE = 0.02  # of the same: narrower lines, such as a drawing's outlines, become shadows
_SHADOW = 0.6  # how much darker such a line is than the cloth around it, black on white
_CLEAR = 0.02  # of a picture's pixels: with more transparent ones, the opaque ones are the garment
_HOLLOW = 0.6  # of its filled outline: a drawing that covers less may be an outline alone, and is filled
_SOLID = 0.25  # of the same: where parts thicker than two lines cover less than this
_FAINT = 12  # grey value: of cloth that stands out less, only lines are visible, so it is filled too
_PAPER = 200  # grey value of filled cloth
_THUMB = 73  # px: Fashion-MNIST was made of shop thumbnails, 51 x 73, by skipping rows and columns
_PALE = 217  # mean grey: a cut-out garment lighter than this would vanish on white
_MAX_GAIN = 6.0  # a garment that differs less from its background stays faint
_CLOTH = 140  # grey value that half of the garment reaches, where the gain allows it

_Grey = NDArray[np.uint8]
_Floats = NDArray[np.float64]
_Mask = NDArray[np.bool_]
_Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True, eq=False)
class _PreparedPhoto:
    """A prepared picture.

    image: (28, 28) uint8, light on black, the model's input. original: RGB, upright, transparency filled. crop: left,
    top, right, bottom in pixels of `original`. polarity: "dark on light" or "light on dark", of `original`. kind: "as
    it is" (grey 28x28) or "photo".
    """

    image: _Grey
    original: Image.Image
    crop: _Box
    polarity: str
    kind: str


def prepare(source: str | Path | bytes, name: str = "picture") -> _PreparedPhoto:
    """Prepare any PNG, JPEG, WebP or BMP picture as Fashion-MNIST's were; `name` stands for it in errors.

    The steps are the data set's (Xiao et al. 2017, section 2): trim the corners' colour, fit the longer side to 28 by
    skipping rows and columns, extend the shorter side, negate, turn grey. Its sharpening is left out: with it, more
    garments were rejected and fewer other things. Specks, laces and the outlines of drawings are removed. A garment
    lighter than its background is not negated. Transparency becomes white, or black around a nearly white garment. A
    grey 28x28 picture stays as it is, negated where its corners are light.

    Raises AttireError as `pictures.decode_colour` does.
    """
    picture = decode_colour(source, name)
    paper = _paper_of(picture)
    original = _filled(picture, paper)
    if original.size == (SIDE, SIDE) and _is_grey(original):
        return _as_it_is(original)
    small = _shrunk(original)
    colours = np.asarray(small, np.float64)  # (h, w, 3), 0 to 255
    cut = _opaque(picture, small.size)
    flat, rough = _background(colours) if cut is None else (paper, 0.0)
    ground = np.broadcast_to(flat, colours.shape)
    mask = _without_specks(_differing(colours, ground, rough) if cut is None else cut)
    light = _is_lighter(colours[mask], ground[mask])
    values = _tone(_luma(colours), _luma(ground), light)  # (h, w), 0 to 255, the background 0
    if flat.ndim == 3:  # a glow that the surface does not follow is no garment
        mask = _without_specks(mask & (values > 0))
    box, image = render(values, mask)
    crop = _scaled(box, small.size, original.size)
    return _PreparedPhoto(image, original, crop, "light on dark" if light else "dark on light", "photo")


def render(values: _Floats, mask: _Mask) -> tuple[_Box, _Grey]:
    """Return the crop, and the garment in it as (28, 28) uint8.

    values: distances from the background (h, w), 0 to 255; mask: where the garment is (h, w). `synthetic` renders its
    drawings by this function too.
    """
    box = _bounds(_thick(mask))
    line = max(1, round(_LINE * _longest(box)))
    if (whole := _hollow(values, mask, line)) is not None:
        values, mask = np.where(whole, _PAPER * (1 - _SHADOW * values / 255), 0), whole
    else:
        values = _without_lines(values, line)
    inside = slice(box[1], box[3]), slice(box[0], box[2])
    return box, _fit(_lifted(_cleared(values, mask)[inside], mask[inside]))


def _filled(picture: Image.Image, paper: _Floats) -> Image.Image:
    """Convert to RGB, transparency filled with paper of this colour (3,)."""
    if picture.mode != "RGBA":
        return picture.convert("RGB")
    sheet = Image.new("RGBA", picture.size, (*map(int, paper), 255))
    return Image.alpha_composite(sheet, picture).convert("RGB")


def _paper_of(picture: Image.Image) -> _Floats:
    """Choose the paper (3,): white, or black where the opaque part of an RGBA picture is nearly white."""
    if picture.mode != "RGBA":
        return np.full(3, 255.0)
    solid = picture.getchannel("A").point(lambda level: 255 if level > 127 else 0)
    histogram = picture.convert("L").histogram(solid)
    mean = sum(level * count for level, count in enumerate(histogram)) / max(1, sum(histogram))
    return np.full(3, 0.0 if mean > _PALE else 255.0)


def _opaque(picture: Image.Image, size: tuple[int, int]) -> _Mask | None:
    """Return the mask (h, w) of a cut-out garment, at `size`; None where the picture is not transparent."""
    if picture.mode != "RGBA":
        return None
    mask: _Mask = np.asarray(picture.getchannel("A").resize(size, Image.Resampling.BOX)) > 127
    return mask if mask.any() and np.mean(~mask) > _CLEAR else None


def _is_grey(picture: Image.Image) -> bool:
    red, green, blue = (np.asarray(channel, np.int16) for channel in picture.split())
    return bool(max(np.abs(red - green).max(), np.abs(blue - green).max()) <= 2)  # JPEG may round channels apart


def _as_it_is(picture: Image.Image) -> _PreparedPhoto:
    """Take a grey 28x28 picture. The median corner tells the polarity, rightly for all 60,000 training images."""
    image = np.array(picture.convert("L"))
    dark = bool(np.median(image[[0, 0, -1, -1], [0, -1, 0, -1]]) > 127)
    polarity = "dark on light" if dark else "light on dark"
    return _PreparedPhoto(255 - image if dark else image, picture, (0, 0, SIDE, SIDE), polarity, "as it is")


def _shrunk(picture: Image.Image) -> Image.Image:
    """Shrink to at most 512 px a side, each pixel the mean of those it stands for."""
    scale = _WORK_SIDE / max(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BOX)


def _luma(colours: _Floats) -> _Floats:
    """Return ITU-R BT.601 luma (...) of (..., 3), as Pillow's mode L."""
    grey: _Floats = colours @ np.array([0.299, 0.587, 0.114])
    return grey


def _corners(colours: _Floats) -> _Floats:
    """Return the pixels (4, n, 3) of a small square in each corner."""
    side = max(1, round(_PATCH * min(colours.shape[:2])))
    ends = slice(None, side), slice(-side, None)
    return np.stack([colours[rows, columns].reshape(-1, 3) for rows in ends for columns in ends])


def _background(colours: _Floats) -> tuple[_Floats, float]:
    """Return the background's colour, and how far the background itself strays from it.

    The colour is the corners' (3,), or (h, w, 3) where light falls off towards the edges along a smooth surface.
    """
    flat = _corner_colour(colours)
    if min(colours.shape[:2]) < _FRAME // 2:
        return flat, 0.0
    height, width = colours.shape[:2]
    down, right = np.linspace(-1, 1, height), np.linspace(-1, 1, width)
    y, x = _frame_points(height, width)
    samples, terms = colours[y, x], _surface(down[y], right[x])  # (4 FRAME, 3), (4 FRAME, 6)
    used = np.ones(len(y), bool)
    for _ in range(4):  # points that the garment covers are left out step by step
        weights = np.linalg.lstsq(terms[used], samples[used], rcond=None)[0]
        residuals = np.linalg.norm(samples - terms @ weights, axis=1)
        used = residuals <= max(_FUZZ / 2, 2 * float(np.median(residuals)))
    strays = float(residuals[used].max())
    differs = float(np.linalg.norm(terms[used] @ weights - flat, axis=1).max())
    if used.mean() < _MIN_BACKGROUND or strays > 2 * _FUZZ or differs < max(_FUZZ, 2 * strays):
        return flat, 0.0
    return (_surface(down[:, None], right[None]) @ weights).clip(0, 255), 1.5 * strays


def _frame_points(height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows and columns of 64 points along each edge: left, right, top, bottom."""
    rows, columns = np.linspace(0, height - 1, _FRAME).astype(int), np.linspace(0, width - 1, _FRAME).astype(int)
    first = np.zeros(_FRAME, int)
    return np.concatenate([rows, rows, first, first - 1]), np.concatenate([first, first - 1, columns, columns])


def _surface(down: _Floats, right: _Floats) -> _Floats:
    """Return the terms (..., 6) of a quadratic surface at these points, -1 to 1."""
    down, right = np.broadcast_arrays(down, right)
    return np.stack([np.ones(down.shape), down, right, down * down, right * right, down * right], -1)


def _corner_colour(colours: _Floats) -> _Floats:
    """Return the median (3,) over the corners, so that a garment may reach into one of them."""
    colour: _Floats = np.median(_corners(colours).mean(1), axis=0)
    return colour


def _differing(colours: _Floats, ground: _Floats, rough: float) -> _Mask:
    """Return the mask (h, w) of pixels that differ from the background's colour."""
    noise = np.median([patch.std(0).max() for patch in _corners(colours)])
    mask: _Mask = np.linalg.norm(colours - ground, axis=2) > max(_FUZZ, _NOISE * float(noise), rough)
    return mask


def _without_specks(mask: _Mask) -> _Mask:
    """Remove small pieces; the mask is the whole picture where nothing is left."""
    from scipy import ndimage  # imported here and below, as a 28x28 picture does not need it

    if mask.any():
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
    """Remove laces, stands and loose strokes, which would widen the crop, unless little is left."""
    from scipy import ndimage

    side = max(1, round(_THIN * _longest(_bounds(mask))))
    body: _Mask = ndimage.binary_opening(ndimage.binary_fill_holes(mask), np.ones((side, side), bool))
    return body if body.sum() > mask.sum() / 2 else mask


def _is_lighter(colours: _Floats, ground: _Floats) -> bool:
    """Check whether the garment's pixels (n, 3) are lighter on average than the background there (n, 3)."""
    return bool(_luma(colours).mean() > _luma(ground).mean())


def _tone(grey: _Floats, ground: _Floats, light: bool) -> _Floats:
    """Return distances from the background, 0 to 255: on pure white the negative, on pure black the grey values."""
    distance = (grey - ground) / (255 - ground).clip(1) if light else (ground - grey) / ground.clip(1)
    values: _Floats = 255 * distance.clip(0, 1)
    return values


def _hollow(values: _Floats, mask: _Mask, line: int) -> _Mask | None:
    """Return the mask of a garment whose cloth is as bright as its background; None where the cloth stands out.

    Such a garment is a drawing's outline, or a cut-out of white cloth with dark lines.
    """
    if mask.any() and np.median(values[mask]) < _FAINT and values[mask].max() > 4 * _FAINT:
        return mask
    return _outline(mask, line)


def _outline(mask: _Mask, line: int) -> _Mask | None:
    """Return the area that a drawing's lines enclose, small gaps bridged; None where the mask is cloth, not lines."""
    from scipy import ndimage

    side = 2 * line + 1
    room = np.pad(mask, side).astype(np.uint8)  # so that lines at the picture's edge are closed as elsewhere
    solid = ndimage.grey_opening(room, (side, side)).sum()
    if 4 * solid > 3 * mask.sum():
        return None  # most garments
    closed = ndimage.binary_fill_holes(ndimage.grey_closing(room, (side, side)))
    whole: _Mask = closed[side:-side, side:-side]
    return whole if mask.sum() < _HOLLOW * whole.sum() and solid < _SOLID * whole.sum() else None


def _without_lines(values: _Floats, line: int) -> _Floats:
    """Turn lines narrower than `line` px into shadows on the cloth."""
    from scipy import ndimage

    cloth: _Floats = ndimage.grey_opening(ndimage.grey_closing(values, (line, line)), (line, line))
    return cloth * (1 - _SHADOW * np.abs(values - cloth) / 255)


def _cleared(values: _Floats, mask: _Mask) -> _Floats:
    """Make everything but the garment black."""
    from scipy import ndimage

    return np.where(ndimage.binary_dilation(mask), values, 0)


def _lifted(values: _Floats, cloth: _Mask) -> _Floats:
    """Brighten, so that half of the cloth reaches `_CLOTH` while at most a quarter of it saturates."""
    middle, bright = np.quantile(values[cloth], (0.5, 0.75)) if cloth.any() else (0.0, 0.0)
    gain = min(_CLOTH / max(1.0, float(middle)), 255 / max(1.0, float(bright)))
    return (values * min(_MAX_GAIN, max(1.0, gain))).clip(0, 255)


def _fit(values: _Floats) -> _Grey:
    """Return (28, 28) uint8 of (h, w): the longer side 28, centred on black, the lightest pixel near 255."""
    height, width = values.shape
    picture = Image.fromarray(values.astype(np.float32))
    if max(values.shape) > _THUMB:
        picture = picture.resize(_within(width, height, _THUMB), Image.Resampling.BOX)
    method = Image.Resampling.NEAREST if max(picture.size) > SIDE else Image.Resampling.LANCZOS
    small = np.asarray(picture.resize(_within(width, height, SIDE), method), np.float64)
    return _centred(_stretched(small))


def _stretched(values: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Stretch the contrast, so that the lightest pixel is near 255."""
    return values * min(_MAX_GAIN, max(1.0, 255 / max(1.0, float(values.max()))))


def _centred(small: NDArray[np.floating[Any]]) -> _Grey:
    """Centre (h, w), at most (28, 28), on black: (28, 28) uint8."""
    image = np.zeros((SIDE, SIDE), np.uint8)
    top, left = (SIDE - small.shape[0]) // 2, (SIDE - small.shape[1]) // 2
    image[top : top + small.shape[0], left : left + small.shape[1]] = small.clip(0, 255).round()
    return image


def _within(width: int, height: int, side: int) -> tuple[int, int]:
    """Return width and height with `side` as the longer one, their ratio kept."""
    scale = side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _scaled(box: _Box, small: tuple[int, int], full: tuple[int, int]) -> _Box:
    """Return a box in pixels of the full picture, rounded outwards."""
    x, y = full[0] / small[0], full[1] / small[1]
    right, bottom = min(full[0], int(np.ceil(box[2] * x))), min(full[1], int(np.ceil(box[3] * y)))
    return int(box[0] * x), int(box[1] * y), right, bottom


def comparison_strip(photo: _PreparedPhoto, height: int = 224) -> bytes:
    """Return a PNG of three pictures: the original with its crop marked, the crop, the model's input."""
    marked = photo.original.copy()
    line = max(1, max(marked.size) // 150)
    ImageDraw.Draw(marked).rectangle(_inner(photo.crop), outline=(255, 0, 128), width=line)
    prepared = Image.fromarray(photo.image).convert("RGB").resize((height, height), Image.Resampling.NEAREST)
    parts = [_panel(marked, height), _panel(photo.original.crop(photo.crop), height), prepared]
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
    """Return the box with its last pixels, as ImageDraw counts."""
    return box[0], box[1], box[2] - 1, box[3] - 1


def _panel(picture: Image.Image, height: int) -> Image.Image:
    """Fit a picture into a panel of this height, at most twice as wide, padded with grey."""
    width = min(2 * height, max(height // 2, round(picture.width * height / picture.height)))
    return ImageOps.pad(picture, (width, height), Image.Resampling.LANCZOS, color=(128, 128, 128))
