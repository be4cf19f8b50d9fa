"""What an answer is, and the pictures that are asked about; no torch, since an exported file answers without."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attire.data.photos import prepare
from attire.errors import AttireError

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NO_OOD_DETECTOR = "this bundle cannot tell what is none of its classes; train it again, with 200 images or more"


@dataclass(frozen=True)
class Prediction:
    """The answer for one image: the likeliest class first, with its calibrated probability, then the others.

    distance: from the training images, see `Classifier.distances`. out_of_distribution: whether it is farther than all
    but 5 % of garments, and so probably none of the classes; label and probabilities are those of the closest classes
    all the same. Both are None where the model has no OODDetector.
    """

    label: str
    probability: float
    ranking: tuple[tuple[str, float], ...]
    distance: float | None = None
    out_of_distribution: bool | None = None

    @classmethod
    def from_probabilities(
        cls,
        classes: Sequence[str],
        probabilities: NDArray[np.floating[Any]],
        distance: float | None = None,
        threshold: float | None = None,
    ) -> Self:
        """From one row of probabilities (K,); threshold: the distance above which it is out-of-distribution."""
        order = np.argsort(-probabilities, kind="stable")
        ranking = tuple((classes[i], float(probabilities[i])) for i in order)
        label, probability = ranking[0]
        verdict = None if distance is None or threshold is None else distance > threshold
        return cls(label, probability, ranking, distance, verdict)

    def __str__(self) -> str:
        if self.out_of_distribution:
            count = len(self.ranking)
            known = _NUMBERS[count] if count < len(_NUMBERS) else count
            return f"none of the {known} (closest: {self.label} {self.probability:.2f})"
        return f"{self.label} {self.probability:.3f}"


def as_images(images: ArrayLike) -> NDArray[np.uint8]:
    """(n, 28, 28) uint8 of (n, 28, 28) or (n, 784) uint8; other types are refused, never silently scaled."""
    array = np.asarray(images)
    if array.ndim == 2 and array.shape[1] == 784:
        array = array.reshape(-1, 28, 28)
    if array.dtype != np.uint8 or array.shape[1:] != (28, 28):
        what = f"expected (n, 28, 28) or (n, 784) uint8 from 0 to 255, found {array.shape} {array.dtype}"
        raise AttireError("images", what)
    return array


def read_picture(source: str | Path | bytes, name: str = "picture") -> NDArray[np.uint8]:
    """A picture file, or its bytes, as the (28, 28) uint8 that a model sees: the one way in for Python and shell."""
    return prepare(source, name).image
