"""What an answer is, and the pictures that are asked about; no torch, since an exported file answers without."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attire.data.photos import prepare
from attire.errors import AttireError

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@dataclass(frozen=True)
class Prediction:
    """The answer for one image: the likeliest class first, with its calibrated probability, then the others.

    distance: from the training images, see `Classifier.distances`; out_of_distribution: whether it is farther than all but
    5 % of garments, and so rather none of the classes. Both are None where the bundle cannot tell. Label and probabilities
    are those of the closest classes all the same.
    """

    label: str
    probability: float
    ranking: tuple[tuple[str, float], ...]
    distance: float | None = None
    out_of_distribution: bool | None = None

    def __str__(self) -> str:
        if self.out_of_distribution:
            count = len(self.ranking)
            known = _NUMBERS[count] if count < len(_NUMBERS) else count
            return f"none of the {known} (closest: {self.label} {self.probability:.2f})"
        return f"{self.label} {self.probability:.3f}"


def ranked(
    classes: Sequence[str],
    probabilities: NDArray[np.floating[Any]],
    distance: float | None = None,
    threshold: float | None = None,
) -> Prediction:
    """One row of probabilities (K,) as a Prediction; with a distance and the threshold beyond which it is rejected."""
    order = np.argsort(-probabilities, kind="stable")
    ranking = tuple((classes[i], float(probabilities[i])) for i in order)
    out_of_distribution = None if distance is None or threshold is None else distance > threshold
    return Prediction(*ranking[0], ranking, distance, out_of_distribution)


def as_images(images: ArrayLike) -> NDArray[np.uint8]:
    """(n, 28, 28) uint8 of (n, 28, 28) or (n, 784) uint8; other types are refused, never silently scaled."""
    found = np.asarray(images)
    if found.ndim == 2 and found.shape[1] == 784:
        found = found.reshape(-1, 28, 28)
    if found.dtype != np.uint8 or found.shape[1:] != (28, 28):
        what = f"expected (n, 28, 28) or (n, 784) uint8 from 0 to 255, found {found.shape} {found.dtype}"
        raise AttireError("images", what)
    return found


def read_picture(source: str | Path | bytes, name: str = "picture") -> NDArray[np.uint8]:
    """A picture file, or its bytes, as the (28, 28) uint8 that a model sees: the one way in for Python and shell."""
    return prepare(source, name).image
