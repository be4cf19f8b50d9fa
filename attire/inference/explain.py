"""Explanations: where in a picture an answer comes from, and which training images it is like."""

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

from attire.data.pictures import SIDE
from attire.errors import UsageError
from attire.evaluation import figures
from attire.inference.classifier import Classifier
from attire.inference.neighbours import Neighbour
from attire.inference.prediction import Prediction, as_images
from attire.storage import files

_SQUARE, _STRIDE = 7, 3  # px of 28, of a square and from one to the next; 9 by 4 is as good (docs/results.md)
_METHOD = f"occlusion, black squares of {_SQUARE} x {_SQUARE} px every {_STRIDE} px"
_COLOURS = "viridis"  # its lightness rises all the way: it reads the same for colour-blind people and in grey
_DIM, _LEAST, _MOST = 0.6, 0.15, 0.85  # of the picture's brightness, and of colour over it where heat is 0 and 1


@dataclass(frozen=True, eq=False)
class _Explanation:
    """Why `image` (28, 28) uint8 is taken for `label`, the model's own answer or the class that was asked about.

    heat_map: (28, 28) float32 of 0..1, 1 where hiding the picture speaks most against the label, 0 where it does not;
    all 0 where nothing does. neighbours: the nearest training images, nearest first; none where the bundle has none.
    """

    image: NDArray[np.uint8]
    label: str
    heat_map: NDArray[np.float32]
    method: str
    prediction: Prediction
    neighbours: tuple[Neighbour, ...] = ()

    @property
    def tally(self) -> str:
        """The neighbours' labels counted: '5 of 5 Sneaker', '3 of 5 Shirt, 2 Coat'."""
        counts = Counter(neighbour.label for neighbour in self.neighbours).most_common()
        return ", ".join(
            f"{count} of {len(self.neighbours)} {label}" if not i else f"{count} {label}"
            for i, (label, count) in enumerate(counts)
        )

    def heat_map_png(self, size: int = 224) -> bytes:
        """The image under its heat map as PNG, size x size px."""
        buffer = io.BytesIO()
        _overlay(self.image, self.heat_map, size).save(buffer, "PNG")
        return buffer.getvalue()

    def write_sheet(self, path: Path, original: Image.Image, size: int = 280) -> None:
        """One PNG: the picture, what the model sees, its heat map, and the nearest training images with labels."""
        top_row = [
            ("picture", np.asarray(original.convert("RGB"))),
            ("what the model sees", self.image),
            (f"what speaks for {self.label}", np.asarray(_overlay(self.image, self.heat_map, size))),
        ]
        tiles = [(f"{neighbour.label}\n{neighbour.distance:.2f}", neighbour.image) for neighbour in self.neighbours]
        sheet = figures.explanation(str(self.prediction), top_row, tiles, self.tally)
        files.write_bytes(path, figures.png(sheet))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: the answer, the heat map as 28 rows, the neighbours without their images."""
        return {
            "label": self.prediction.label,
            "probability": self.prediction.probability,
            "out_of_distribution": self.prediction.out_of_distribution,
            "explained_label": self.label,
            "method": self.method,
            "neighbours": [{"label": near.label, "distance": near.distance} for near in self.neighbours],
            "heat_map": np.asarray(self.heat_map, float).round(3).tolist(),
        }


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
    explained = label or prediction.label
    heat_map = _occlusion(classifier, images[0], classifier.classes.index(explained))
    (neighbours,) = classifier.nearest(images)
    return _Explanation(images[0], explained, heat_map, _METHOD, prediction, neighbours)


def _occlusion(classifier: Classifier, image: NDArray[np.uint8], k: int) -> NDArray[np.float32]:
    """Heat map (28, 28) of 0..1 for class k: what the log odds of the class lose while a place is hidden.

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
    starts = range(_STRIDE - _SQUARE, SIDE, _STRIDE)
    squares = np.zeros((len(starts) ** 2, SIDE, SIDE), bool)
    for square, (top, left) in zip(squares, ((y, x) for y in starts for x in starts), strict=True):
        square[max(0, top) : top + _SQUARE, max(0, left) : left + _SQUARE] = True
    return squares


def _log_odds(logits: Tensor, k: int) -> Tensor:
    """ln(p / (1 - p)) of class k, (n,): where p is 0.999, it still tells what moves it."""
    rest = logits.clone()
    rest[:, k] = -np.inf
    return logits[:, k] - rest.logsumexp(1)


def _overlay(image: NDArray[np.uint8], heat_map: NDArray[np.float32], size: int) -> Image.Image:
    """The image under its heat map, (size, size) RGB: dim grey where it is cold, yellow where it is hot."""
    grey = Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST)
    resized = Image.fromarray(heat_map).resize((size, size), Image.Resampling.BICUBIC)
    heat = np.clip(np.asarray(resized), 0, 1)
    colour = matplotlib.colormaps[_COLOURS](heat)[..., :3]  # (size, size, 3), 0..1
    share = (_LEAST + (_MOST - _LEAST) * heat)[..., None]
    mixed = (1 - share) * _DIM * np.asarray(grey)[..., None] / 255 + share * colour
    return Image.fromarray((255 * mixed).round().astype(np.uint8))
