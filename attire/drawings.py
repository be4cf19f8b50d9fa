"""Pictures that training makes for itself: a garment as a drawing would show it, and shapes that are no garment.

Photographs and drawings reach a model cut out, flat and stretched to full contrast (`photos.prepare`), as no training
image is. Classifiers that also learn to answer "each class alike" for other things are rarely sure of what they were
never shown (outlier exposure, Hendrycks et al. 2019); here the other things are made of random shapes and of the
garments' own pieces, so that no further data is needed. What is drawn depends on the image alone.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from attire.photos import Grey, bounds, centred, stretched, within
from attire.pictures import SIDE

Floats = NDArray[np.floating[Any]]
Rng = np.random.Generator

CANVAS = 112  # px a side, on which shapes are drawn before they are shrunk
CLOTH = 20  # grey value above which a pixel is the garment's
LEAST = 20  # pixels of a garment; less is left as it is


def drawn(images: Grey) -> Grey:
    """Each of (n, 28, 28) in another manner: turned a little, in one to three shades, lined, lit from a side."""
    return np.stack([draw(image, generator(image, b"drawn")) for image in images])


def strange(images: Grey) -> Grey:
    """For each of (n, 28, 28) something that is none of the classes: its pieces in wrong places, or random shapes."""
    return np.stack([estrange(image, generator(image, b"strange")) for image in images])


def generator(image: Grey, kind: bytes) -> Rng:
    """The same numbers for the same image, wherever it stands."""
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8, person=kind).digest()))


def draw(image: Grey, rng: Rng) -> Grey:
    from scipy import ndimage  # here and below: whoever only reads a cache does not wait for it

    values = turned(image.astype(float), rng) if rng.random() < 0.7 else image.astype(float)
    cloth = values > CLOTH
    if rng.random() < 0.5:
        cloth = ndimage.binary_fill_holes(cloth)
    if cloth.sum() < LEAST:
        return image
    found = lined(shaded(values, cloth, rng), values, cloth, rng)
    if rng.random() < 0.3:
        found = found * lit(rng, SIDE)
    if rng.random() < 0.4:
        found = ndimage.gaussian_filter(found, rng.uniform(0.2, 0.6)) * cloth
    return centred(stretched(found))


def turned(values: Floats, rng: Rng) -> Floats:
    """By a few degrees, sheared, a little narrower or wider, moved by less than a pixel."""
    from scipy import ndimage

    angle, scale, shear = np.deg2rad(rng.normal(0, 6)), rng.uniform(0.88, 1.08, 2), rng.normal(0, 0.06)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1, shear], [0, 1]]) @ np.diag(1 / scale)
    middle = np.full(2, (SIDE - 1) / 2)
    found: Floats = ndimage.affine_transform(values, matrix, middle - matrix @ middle + rng.normal(0, 0.5, 2), order=1)
    return found


def shaded(values: Floats, cloth: NDArray[np.bool_], rng: Rng) -> Floats:
    """In one shade, in two or three, with another contrast, or as it was."""
    from scipy import ndimage

    way = rng.random()
    if way < 0.3:
        return cloth * rng.uniform(90, 255)
    if way < 0.6:
        count = int(rng.integers(2, 4))
        ends = np.quantile(values[cloth], np.linspace(0, 1, count + 1)[1:-1])
        smooth = ndimage.gaussian_filter(values, rng.uniform(0.4, 1.2))
        shades: Floats = np.sort(rng.uniform(60, 255, count))[np.digitize(smooth, ends)]
        return cloth * shades
    if way < 0.8:
        floor = rng.uniform(0, 120)
        light = (values.clip(0) / max(1.0, float(values.max()))) ** rng.uniform(0.4, 2.2)
        return cloth * (floor + (255 - floor) * light)
    return values


def lined(found: Floats, values: Floats, cloth: NDArray[np.bool_], rng: Rng) -> Floats:
    """Dark lines where the garment changes, in a third of the pictures."""
    from scipy import ndimage

    if rng.random() >= 0.35:
        return found
    edges = ndimage.gaussian_gradient_magnitude(values, 0.6)
    lines = cloth & (edges > rng.uniform(0.35, 0.6) * max(1.0, float(edges[cloth].max())))
    return np.where(lines, found * rng.uniform(0, 0.6), found)


def lit(rng: Rng, side: int) -> Floats:
    """(side, 1) or (1, side): light that changes from one side to the other."""
    light = np.linspace(rng.uniform(0.5, 1), rng.uniform(0.5, 1), side)
    return light[:, None] if rng.random() < 0.5 else light[None]


def estrange(image: Grey, rng: Rng) -> Grey:
    for _ in range(8):
        found = fitted(pieces(image, rng) if rng.random() < 0.25 else shapes(image, rng))
        if found is not None:
            return found
    return 255 - image  # never seen: eight empty canvases in a row


def pieces(image: Grey, rng: Rng) -> Floats:
    """(56, 56): its quarters or sixteenths, each turned, in another order."""
    count = int(rng.choice([2, 4]))
    step = SIDE // count
    corners = [(i * step, j * step) for i in range(count) for j in range(count)]
    parts = [np.rot90(image[i : i + step, j : j + step], int(rng.integers(4))) for i, j in corners]
    order = rng.permutation(len(parts))
    rows = [[parts[order[i * count + j]] for j in range(count)] for i in range(count)]
    return np.kron(np.block(rows), np.ones((2, 2)))


def shapes(image: Grey, rng: Rng) -> Floats:
    """(CANVAS, CANVAS): some shapes over each other, some mirrored, some of the garment's cloth, some lit or rough."""
    from scipy import ndimage

    canvas = Image.new("L", (CANVAS, CANVAS))
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(1, 7))):
        add_shape(pen, int(rng.choice([255, int(rng.integers(40, 255)), 0], p=[0.35, 0.5, 0.15])), rng)
    found = np.asarray(canvas, float)
    if rng.random() < 0.3:
        found = np.maximum(found, found[:, ::-1])
    if rng.random() < 0.35:
        cloth = np.kron(image, np.ones((CANVAS // SIDE,) * 2)) / 255
        found = found * (cloth * rng.uniform(0.6, 1) + rng.uniform(0, 0.5))
    if rng.random() < 0.3:
        found = found * lit(rng, CANVAS)
    if rng.random() < 0.3:
        rough = ndimage.gaussian_filter(rng.uniform(0, 2, found.shape), rng.uniform(0.5, 4))
        found = found * rough.clip(0, 1.5)
    return found.clip(0, 255)


def add_shape(pen: ImageDraw.ImageDraw, shade: int, rng: Rng) -> None:
    """An ellipse, a star, a rectangle, a stroke or a blob somewhere."""
    kind, (x, y) = int(rng.integers(5)), rng.uniform(20, 92, 2)
    if kind == 0:
        width, height = rng.uniform(8, 50, 2)
        pen.ellipse((x - width, y - height, x + width, y + height), fill=shade)
    elif kind == 1:
        angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 12))))
        pen.polygon(around(x, y, angles, rng.uniform(10, 55, len(angles))), fill=shade)
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
            around(x, y, angles, np.abs(rng.uniform(15, 45) + np.sum(waves, 0)), rng.uniform(0.4, 1.6)), fill=shade
        )


def around(x: float, y: float, angles: Floats, radii: Floats, stretch: float = 1.0) -> list[tuple[float, float]]:
    return list(
        zip((x + stretch * radii * np.cos(angles)).tolist(), (y + radii * np.sin(angles)).tolist(), strict=True)
    )


def fitted(values: Floats) -> Grey | None:
    """(28, 28): cut to what is not black, its longer side 28, centred and stretched; None where next to nothing is."""
    seen = values > 8
    if seen.sum() < LEAST:
        return None
    left, top, right, bottom = bounds(seen)
    part = Image.fromarray(values[top:bottom, left:right].astype(np.float32))
    small = part.resize(within(*part.size, SIDE), Image.Resampling.BOX)
    return centred(stretched(np.asarray(small, float)))
