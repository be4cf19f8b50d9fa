"""Draw synthetic pictures for training: a garment as drawings show it, and outliers that are no garment.

Photographs and drawings reach a model cut out, flat and stretched to full contrast (`photos.prepare`), as no training
image is; synthetic pictures therefore go through the same steps. Outliers are for outlier exposure (Hendrycks et al.
2019): a head that also learns to answer "each class alike" for them is rarely certain about unknown things. They are
made of random shapes and of the garments' own pieces, so that no further data is needed. What is drawn depends on the
image alone.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from attire.data.photos import render
from attire.data.pictures import SIDE

_Grey = NDArray[np.uint8]
_Floats = NDArray[np.floating[Any]]
_Mask = NDArray[np.bool_]
_Rng = np.random.Generator

VERSION = 2  # of what is drawn: part of the views' names, and so of the features' cache keys
_CANVAS = 112  # px a side of the canvas for shapes
_SHEET = 84  # px a side of the canvas for garments
_CLOTH = 20  # grey value above which a pixel is part of the garment
_MIN_PIXELS = 20  # of a garment; a smaller one is not redrawn


def draw_garments(images: _Grey) -> _Grey:
    """Redraw each of (n, 28, 28) uint8: turned, wider, flared, in one to three shades, with lines, lit from a side."""
    return np.stack([_draw_garment(image, _generator(image, b"drawn")) for image in images])


def draw_outliers(images: _Grey) -> _Grey:
    """Draw an outlier for each of (n, 28, 28) uint8: its pieces in wrong places, or random shapes."""
    return np.stack([_draw_outlier(image, _generator(image, b"strange")) for image in images])


def _generator(image: _Grey, kind: bytes) -> _Rng:
    """Return a generator that depends on the image alone."""
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8, person=kind).digest()))


def _draw_garment(image: _Grey, rng: _Rng) -> _Grey:
    from scipy import ndimage  # imported here and below, as reading a cache does not need it

    values = _enlarged(image, rng)
    cloth = values > _CLOTH
    if cloth.any():  # a higher threshold keeps the gap between sleeve and body
        cloth = values > max(_CLOTH, rng.uniform(0.1, 0.45) * float(np.median(values[cloth])))
    if rng.random() < 0.35:
        cloth = ndimage.binary_fill_holes(cloth)
    if cloth.sum() < _MIN_PIXELS * (_SHEET / SIDE) ** 2:
        return image
    drawing = _shaded(values, cloth, rng)
    if rng.random() < 0.25:
        drawing = _banded(drawing, cloth, rng)
    drawing = _lined(drawing, values, cloth, rng)
    if rng.random() < 0.3:
        drawing = drawing * _lit(rng, _SHEET)
    return render(drawing.clip(0, 255), cloth)[1]


def _enlarged(image: _Grey, rng: _Rng) -> _Floats:
    """Return (84, 84): turned by some degrees, sheared, narrower or wider, sometimes flared to the bottom or top."""
    from scipy import ndimage

    angle, shear, shift = np.deg2rad(rng.normal(0, 8)), rng.normal(0, 0.06), rng.normal(0, 0.5, 2)
    wide = np.exp(rng.uniform(-0.3, 0.5)) if rng.random() < 0.6 else rng.uniform(0.9, 1.1)
    flare = rng.uniform(-0.2, 0.5) if rng.random() < 0.35 else 0.0
    zoom = 1.25 * max(1.0, wide * (1 + abs(flare) / 2))  # so that nothing leaves the sheet
    across = np.linspace(-0.5, 0.5, _SHEET) * SIDE * zoom  # of 28 px, from the middle
    down, right = np.meshgrid(across, across, indexing="ij")
    down, right = np.cos(angle) * down - np.sin(angle) * right, np.sin(angle) * down + np.cos(angle) * right
    right = (right + shear * down) / (wide * (1 + flare * (down / SIDE).clip(-0.5, 0.5)))
    middle = (SIDE - 1) / 2 + shift
    large = ndimage.map_coordinates(image.astype(np.float32), [down + middle[0], right + middle[1]], order=1)
    smooth: _Floats = ndimage.gaussian_filter(large, rng.uniform(0.6, 1.4))
    return smooth


def _shaded(values: _Floats, cloth: _Mask, rng: _Rng) -> _Floats:
    """Draw the cloth in one shade, in two or three, with another contrast, or as it was."""
    from scipy import ndimage

    way = rng.random()
    if way < 0.35:
        return cloth * rng.uniform(25, 255)
    if way < 0.6:
        count = int(rng.integers(2, 4))
        ends = np.quantile(values[cloth], np.linspace(0, 1, count + 1)[1:-1])
        smooth = ndimage.gaussian_filter(values, rng.uniform(0.8, 3))
        shades: _Floats = np.sort(rng.uniform(40, 255, count))
        if rng.random() < 0.3:
            shades = rng.permutation(shades)
        shades = shades[np.digitize(smooth, ends)]
        return cloth * shades
    if way < 0.8:
        floor = rng.uniform(0, 120)
        light = (values.clip(0) / max(1.0, float(values.max()))) ** rng.uniform(0.4, 2.2)
        return cloth * (floor + (255 - floor) * light)
    return values


def _banded(drawing: _Floats, cloth: _Mask, rng: _Rng) -> _Floats:
    """Add a sole, a hem or a waistband: a strip at the bottom or the top, in a shade of its own."""
    rows = np.flatnonzero(cloth.any(1))
    high = max(1, round(len(rows) * rng.uniform(0.06, 0.22)))
    strip = rows[-high:] if rng.random() < 0.7 else rows[:high]
    drawing = drawing.copy()
    drawing[strip] = cloth[strip] * rng.uniform(40, 255)
    return drawing


def _lined(drawing: _Floats, values: _Floats, cloth: _Mask, rng: _Rng) -> _Floats:
    """Add an outline to half of the pictures, thin or thick, dark on white as pens are; seams to a third."""
    from scipy import ndimage

    pen = rng.uniform(180, 255)
    if rng.random() < 0.35:
        edges = ndimage.gaussian_gradient_magnitude(values, 1.5)
        seams = cloth & (edges > rng.uniform(0.35, 0.6) * max(1.0, float(edges[cloth].max())))
        drawing = np.where(seams, pen if rng.random() < 0.7 else rng.uniform(0, 40), drawing)
    if rng.random() < 0.5:
        inner = ndimage.binary_erosion(cloth, iterations=int(rng.integers(1, 4)))
        drawing = np.where(cloth & ~inner, pen, drawing)
    return drawing


def _lit(rng: _Rng, side: int) -> _Floats:
    """Return light (side, 1) or (1, side) that changes from one side to the other."""
    light = np.linspace(rng.uniform(0.5, 1), rng.uniform(0.5, 1), side)
    return light[:, None] if rng.random() < 0.5 else light[None]


def _draw_outlier(image: _Grey, rng: _Rng) -> _Grey:
    for _ in range(8):
        drawing = _pieces(image, rng) if rng.random() < 0.25 else _shapes(image, rng)
        if (drawing > 8).any():  # garments have pen lines, so that lines must be no sign of a garment
            drawing = _lined(drawing, drawing, drawing > 8, rng)
        visible = drawing > 8
        if visible.sum() >= _MIN_PIXELS:
            return render(drawing.astype(float), visible)[1]
    return 255 - image  # eight empty canvases in a row: has never happened


def _pieces(image: _Grey, rng: _Rng) -> _Floats:
    """Return (84, 84): the image's quarters or sixteenths, each turned, in another order."""
    count = int(rng.choice([2, 4]))
    step = SIDE // count
    corners = [(i * step, j * step) for i in range(count) for j in range(count)]
    parts = [np.rot90(image[i : i + step, j : j + step], int(rng.integers(4))) for i, j in corners]
    order = rng.permutation(len(parts))
    rows = [[parts[order[i * count + j]] for j in range(count)] for i in range(count)]
    return np.kron(np.block(rows), np.ones((3, 3)))


def _shapes(image: _Grey, rng: _Rng) -> _Floats:
    """Return (112, 112): shapes over each other, some mirrored, some of the garment's cloth, some lit or rough."""
    from scipy import ndimage

    canvas = Image.new("L", (_CANVAS, _CANVAS))
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(1, 7))):
        _add_shape(pen, int(rng.choice([255, int(rng.integers(40, 255)), 0], p=[0.35, 0.5, 0.15])), rng)
    drawing = np.asarray(canvas, float)
    if rng.random() < 0.3:
        drawing = np.maximum(drawing, drawing[:, ::-1])
    if rng.random() < 0.35:
        cloth = np.kron(image, np.ones((_CANVAS // SIDE,) * 2)) / 255
        drawing = drawing * (cloth * rng.uniform(0.6, 1) + rng.uniform(0, 0.5))
    if rng.random() < 0.3:
        drawing = drawing * _lit(rng, _CANVAS)
    if rng.random() < 0.3:
        rough = ndimage.gaussian_filter(rng.uniform(0, 2, drawing.shape), rng.uniform(0.5, 4))
        drawing = drawing * rough.clip(0, 1.5)
    return drawing.clip(0, 255)


def _add_shape(pen: ImageDraw.ImageDraw, shade: int, rng: _Rng) -> None:
    """Draw an ellipse, a star, a rectangle, a stroke or a blob at a random place."""
    kind, (x, y) = int(rng.integers(5)), rng.uniform(20, 92, 2)
    if kind == 0:
        width, height = rng.uniform(8, 50, 2)
        pen.ellipse((x - width, y - height, x + width, y + height), fill=shade)
    elif kind == 1:
        angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 12))))
        pen.polygon(_around(x, y, angles, rng.uniform(10, 55, len(angles))), fill=shade)
    elif kind == 2:
        width, height = rng.uniform(4, 50, 2)
        box = (x - width, y - height, x + width, y + height)
        pen.rounded_rectangle(box, radius=rng.uniform(0, min(width, height)), fill=shade)
    elif kind == 3:
        points = [(float(a), float(b)) for a, b in rng.uniform(5, 107, (int(rng.integers(2, 6)), 2))]
        pen.line(points, fill=shade, width=int(rng.integers(3, 16)), joint="curve")
    else:
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        waves = [rng.normal(0, 12 / k) * np.cos(k * angles + rng.uniform(0, 2 * np.pi)) for k in range(1, 6)]
        radii = np.abs(rng.uniform(15, 45) + np.sum(waves, 0))
        pen.polygon(_around(x, y, angles, radii, rng.uniform(0.4, 1.6)), fill=shade)


def _around(x: float, y: float, angles: _Floats, radii: _Floats, stretch: float = 1.0) -> list[tuple[float, float]]:
    """Return the corners of a polygon around (x, y), `stretch` times as wide as its radii say."""
    right, down = x + stretch * radii * np.cos(angles), y + radii * np.sin(angles)
    return list(zip(right.tolist(), down.tolist(), strict=True))
