"""Pictures that training makes for itself: a garment as a drawing would show it, and shapes that are no garment.

Photographs and drawings reach a model cut out, flat and stretched to full contrast (`photos.prepare`), as no
training image is; so what is drawn here goes through the same steps. Classifiers that also learn to answer "each class
alike" for other things are rarely sure of what they were never shown (outlier exposure, Hendrycks et al. 2019); here
the other things are made of random shapes and of the garments' own pieces, so that no further data is needed. What is
drawn depends on the image alone.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from attire.data.photos import Grey, Steps, render
from attire.data.pictures import SIDE

_Floats = NDArray[np.floating[Any]]
_Rng = np.random.Generator

VERSION = 2  # of what is drawn: part of the views' names, and so of the cache key; see `features.DRAWN`
_CANVAS = 112  # px a side, on which shapes are drawn before they are shrunk
_SHEET = 84  # px a side, on which garments are drawn
_CLOTH = 20  # grey value above which a pixel is the garment's
_LEAST = 20  # pixels of a garment; less is left as it is
_STEPS = Steps()


def draw_garments(images: Grey) -> Grey:
    """Each of (n, 28, 28) in another manner: turned, wider, flared, in one to three shades, lined, lit from a side."""
    return np.stack([_draw(image, _generator(image, b"drawn")) for image in images])


def draw_outliers(images: Grey) -> Grey:
    """For each of (n, 28, 28) something that is none of the classes: its pieces in wrong places, or random shapes."""
    return np.stack([_estrange(image, _generator(image, b"strange")) for image in images])


def _generator(image: Grey, kind: bytes) -> _Rng:
    """The same numbers for the same image, wherever it stands."""
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8, person=kind).digest()))


def _draw(image: Grey, rng: _Rng) -> Grey:
    from scipy import ndimage  # here and below: whoever only reads a cache does not wait for it

    values = _enlarged(image, rng)
    cloth = values > _CLOTH
    if cloth.any():  # higher up the gap between a sleeve and the body stays
        cloth = values > max(_CLOTH, rng.uniform(0.1, 0.45) * float(np.median(values[cloth])))
    if rng.random() < 0.35:
        cloth = ndimage.binary_fill_holes(cloth)
    if cloth.sum() < _LEAST * (_SHEET / SIDE) ** 2:
        return image
    found = _shaded(values, cloth, rng)
    if rng.random() < 0.25:
        found = _banded(found, cloth, rng)
    found = _lined(found, values, cloth, rng)
    if rng.random() < 0.3:
        found = found * _lit(rng, _SHEET)
    return render(found.clip(0, 255), cloth, _STEPS)[1]


def _enlarged(image: Grey, rng: _Rng) -> _Floats:
    """(SHEET, SHEET): turned by some degrees, sheared, narrower or wider, sometimes flared to the bottom or top."""
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
    found: _Floats = ndimage.gaussian_filter(large, rng.uniform(0.6, 1.4))
    return found


def _shaded(values: _Floats, cloth: NDArray[np.bool_], rng: _Rng) -> _Floats:
    """In one shade, in two or three, with another contrast, or as it was."""
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


def _banded(found: _Floats, cloth: NDArray[np.bool_], rng: _Rng) -> _Floats:
    """With a sole, a hem or a waistband: a strip at the bottom, or at the top, in a shade of its own."""
    rows = np.flatnonzero(cloth.any(1))
    high = max(1, round(len(rows) * rng.uniform(0.06, 0.22)))
    strip = rows[-high:] if rng.random() < 0.7 else rows[:high]
    found = found.copy()
    found[strip] = cloth[strip] * rng.uniform(40, 255)
    return found


def _lined(found: _Floats, values: _Floats, cloth: NDArray[np.bool_], rng: _Rng) -> _Floats:
    """With an outline in half of the pictures, thin or thick, dark on white as pens are; with seams in a third."""
    from scipy import ndimage

    pen = rng.uniform(180, 255)
    if rng.random() < 0.35:
        edges = ndimage.gaussian_gradient_magnitude(values, 1.5)
        seams = cloth & (edges > rng.uniform(0.35, 0.6) * max(1.0, float(edges[cloth].max())))
        found = np.where(seams, pen if rng.random() < 0.7 else rng.uniform(0, 40), found)
    if rng.random() < 0.5:
        inner = ndimage.binary_erosion(cloth, iterations=int(rng.integers(1, 4)))
        found = np.where(cloth & ~inner, pen, found)
    return found


def _lit(rng: _Rng, side: int) -> _Floats:
    """(side, 1) or (1, side): light that changes from one side to the other."""
    light = np.linspace(rng.uniform(0.5, 1), rng.uniform(0.5, 1), side)
    return light[:, None] if rng.random() < 0.5 else light[None]


def _estrange(image: Grey, rng: _Rng) -> Grey:
    for _ in range(8):
        found = _pieces(image, rng) if rng.random() < 0.25 else _shapes(image, rng)
        if (found > 8).any():  # with pens' lines as garments have them: those are no sign of cloth
            found = _lined(found, found, found > 8, rng)
        if (small := _fitted(found)) is not None:
            return small
    return 255 - image  # never seen: eight empty canvases in a row


def _pieces(image: Grey, rng: _Rng) -> _Floats:
    """(84, 84): its quarters or sixteenths, each turned, in another order."""
    count = int(rng.choice([2, 4]))
    step = SIDE // count
    corners = [(i * step, j * step) for i in range(count) for j in range(count)]
    parts = [np.rot90(image[i : i + step, j : j + step], int(rng.integers(4))) for i, j in corners]
    order = rng.permutation(len(parts))
    rows = [[parts[order[i * count + j]] for j in range(count)] for i in range(count)]
    return np.kron(np.block(rows), np.ones((3, 3)))


def _shapes(image: Grey, rng: _Rng) -> _Floats:
    """(CANVAS, CANVAS): some shapes over each other, some mirrored, some of the garment's cloth, some lit or rough."""
    from scipy import ndimage

    canvas = Image.new("L", (_CANVAS, _CANVAS))
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(1, 7))):
        _add_shape(pen, int(rng.choice([255, int(rng.integers(40, 255)), 0], p=[0.35, 0.5, 0.15])), rng)
    found = np.asarray(canvas, float)
    if rng.random() < 0.3:
        found = np.maximum(found, found[:, ::-1])
    if rng.random() < 0.35:
        cloth = np.kron(image, np.ones((_CANVAS // SIDE,) * 2)) / 255
        found = found * (cloth * rng.uniform(0.6, 1) + rng.uniform(0, 0.5))
    if rng.random() < 0.3:
        found = found * _lit(rng, _CANVAS)
    if rng.random() < 0.3:
        rough = ndimage.gaussian_filter(rng.uniform(0, 2, found.shape), rng.uniform(0.5, 4))
        found = found * rough.clip(0, 1.5)
    return found.clip(0, 255)


def _add_shape(pen: ImageDraw.ImageDraw, shade: int, rng: _Rng) -> None:
    """An ellipse, a star, a rectangle, a stroke or a blob somewhere."""
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
        pen.polygon(
            _around(x, y, angles, np.abs(rng.uniform(15, 45) + np.sum(waves, 0)), rng.uniform(0.4, 1.6)), fill=shade
        )


def _around(x: float, y: float, angles: _Floats, radii: _Floats, stretch: float = 1.0) -> list[tuple[float, float]]:
    return list(
        zip((x + stretch * radii * np.cos(angles)).tolist(), (y + radii * np.sin(angles)).tolist(), strict=True)
    )


def _fitted(values: _Floats) -> Grey | None:
    """(28, 28) as predictions see it; None where next to nothing is."""
    seen = values > 8
    return render(values.astype(float), seen, _STEPS)[1] if seen.sum() >= _LEAST else None
