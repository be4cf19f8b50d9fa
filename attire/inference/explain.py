"""Explain: where in a picture an answer comes from, and which training images it is like.

`from attire.explain import explain` - the package's attribute of that name is this module.
"""

import io
from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from attire.data import photos
from attire.data.pictures import SIDE as SEEN
from attire.errors import UsageError
from attire.evaluation import figures
from attire.inference.classifier import Classifier
from attire.inference.neighbours import Neighbour
from attire.inference.prediction import Prediction, as_images
from attire.storage import files

_SIDE, _STRIDE = 7, 3  # px of 28, of a square and from one to the next; 9 by 4 is as good (docs/results.md)
_METHOD = f"occlusion, black squares of {_SIDE} x {_SIDE} px every {_STRIDE} px"
_COLOURS = "viridis"  # its lightness rises all the way: it reads the same for colour-blind people and in grey
_DIM, _LEAST, _MOST = 0.6, 0.15, 0.85  # of the picture's brightness, and of colour over it where heat is 0 and 1
NO_NEIGHBOURS = "this bundle holds no training images to show beside the answer"


@dataclass(frozen=True, eq=False)
class _Explanation:
    """Why a picture is taken for `label`, the model's own answer or the class that was asked about.

    heat: (28, 28) float32 of 0..1, 1 where hiding the picture speaks most against the label, 0 where it does not;
    all 0 where nothing does. neighbours: the nearest training images, nearest first; none where the bundle has none.
    """

    label: str
    heat: NDArray[np.float32]
    method: str
    prediction: Prediction
    neighbours: tuple[Neighbour, ...] = ()

    @property
    def tally(self) -> str:
        """The neighbours' labels counted: '5 of 5 Sneaker', '3 of 5 Shirt, 2 Coat'."""
        counts = Counter(one.label for one in self.neighbours).most_common()
        return ", ".join(
            f"{count} of {len(self.neighbours)} {label}" if not i else f"{count} {label}"
            for i, (label, count) in enumerate(counts)
        )


def explain(classifier: Classifier, image: ArrayLike, label: str | None = None) -> _Explanation:
    """Explain the answer for one image (28, 28) or (784,) uint8, or how it comes to be like the class `label`.

    Raises UsageError where `label` is no class, AttireError where the image is none.
    """
    images = as_images(np.asarray(image)[None])
    if label is not None and label not in classifier.classes:
        near = get_close_matches(label, classifier.classes, n=1)
        do = f"did you mean {near[0]!r}" if near else f"the classes are {', '.join(classifier.classes)}"
        raise UsageError("--label", f"{label!r} is none of the {len(classifier.classes)} classes", do=do)
    prediction = classifier.predict(images)[0]
    chosen = label or prediction.label
    heat = _occlusion(classifier, images[0], classifier.classes.index(chosen))
    return _Explanation(chosen, heat, _METHOD, prediction, *classifier.nearest(images))


def _occlusion(classifier: Classifier, image: NDArray[np.uint8], k: int) -> NDArray[np.float32]:
    """Heat (28, 28) of 0..1 for class k: what the log odds of the class lose while a place is hidden.

    Black squares, the colour of the background, are laid over the image one after the other (Zeiler and Fergus 2014);
    a pixel gets the mean loss of the squares that cover it, gains count as 0, the largest is 1. At most 122 forward
    passes an image, and no gradient, so that every architecture can be explained.
    """
    covered = _squares()
    hides = (covered & (image > 0)).any((1, 2))  # a square on black alone changes nothing
    copies = np.concatenate([image[None], np.where(covered[hides], 0, image)]).astype(np.uint8)
    odds = _log_odds(classifier.logits(copies), k).numpy()
    losses = np.tensordot(odds[0] - odds[1:], covered[hides], 1) / covered.sum(0)  # (28, 28)
    return np.asarray(np.maximum(losses, 0) / max(losses.max(), 1e-12), np.float32)


@cache
def _squares() -> NDArray[np.bool_]:
    """(m, 28, 28): True where each square lies; those at the edges are cut off there, every pixel is covered."""
    starts = range(_STRIDE - _SIDE, SEEN, _STRIDE)
    found = np.zeros((len(starts) ** 2, SEEN, SEEN), bool)
    for square, (top, left) in zip(found, ((y, x) for y in starts for x in starts), strict=True):
        square[max(0, top) : top + _SIDE, max(0, left) : left + _SIDE] = True
    return found


def _log_odds(logits: Tensor, k: int) -> Tensor:
    """ln(p / (1 - p)) of class k, (n,): where p is 0.999, it still tells what moves it."""
    rest = logits.clone()
    rest[:, k] = -np.inf
    return logits[:, k] - rest.logsumexp(1)


def _overlay(image: NDArray[np.uint8], heat: NDArray[np.float32], size: int) -> Image.Image:
    """The image under its heat, (size, size) RGB: dim grey where it is cold, yellow where it is hot."""
    grey = Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST)
    warm = Image.fromarray(heat).resize((size, size), Image.Resampling.BICUBIC)
    heat = np.clip(np.asarray(warm), 0, 1)
    colour = matplotlib.colormaps[_COLOURS](heat)[..., :3]  # (size, size, 3), 0..1
    share = (_LEAST + (_MOST - _LEAST) * heat)[..., None]
    mixed = (1 - share) * _DIM * np.asarray(grey)[..., None] / 255 + share * colour
    return Image.fromarray((255 * mixed).round().astype(np.uint8))


def heat_png(image: NDArray[np.uint8], heat: NDArray[np.float32], size: int = 224) -> bytes:
    """`overlay` of an image (28, 28) and its heat (28, 28), as PNG."""
    buffer = io.BytesIO()
    _overlay(image, heat, size).save(buffer, "PNG")
    return buffer.getvalue()


def open_picture(path: Path) -> tuple[Image.Image, NDArray[np.uint8]]:
    """A picture file as it is, upright, and as the model sees it, (28, 28)."""
    photo = photos.prepare(path)
    return photo.original, photo.image


def write_sheet(
    path: Path, original: Image.Image, image: NDArray[np.uint8], found: _Explanation, size: int = 280
) -> None:
    """One PNG: the picture, what the model sees, its heat, and the nearest training images with their labels."""
    tops = [
        ("picture", np.asarray(original.convert("RGB"))),
        ("what the model sees", image),
        (f"what speaks for {found.label}", np.asarray(_overlay(image, found.heat, size))),
    ]
    tiles = [(f"{one.label}\n{one.distance:.2f}", one.image) for one in found.neighbours]
    drawing = figures.explanation(str(found.prediction), tops, tiles, found.tally)
    files.write_bytes(path, figures.png(drawing))


def to_json(found: _Explanation) -> dict[str, Any]:
    """Plain JSON: the answer, the heat as 28 rows, the neighbours without their images."""
    return {
        "label": found.prediction.label,
        "probability": found.prediction.probability,
        "out_of_distribution": found.prediction.out_of_distribution,
        "explained": found.label,
        "method": found.method,
        "neighbours": [{"label": one.label, "distance": one.distance} for one in found.neighbours],
        "heat": np.asarray(found.heat, float).round(3).tolist(),
    }
