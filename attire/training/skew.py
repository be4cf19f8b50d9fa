"""Train/serve skew: a head trained on one backend's features, evaluated on those that a bundle predicts with."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from attire.data.dataset import RowIndices
from attire.errors import AttireError
from attire.evaluation.intervals import Interval, paired_difference
from attire.features.logits import predict_logits
from attire.features.sources import FeatureSource

_ROWS = 5000  # at most
_PIXELS = 25_000_000  # of pictures, which the fp32 backbone sees once: 500 of 224 px, two minutes on 2 cores
_ALLOWED = -0.003  # of accuracy: a smaller loss, or one that chance explains, is accepted


@dataclass(frozen=True)
class Skew:
    """Accuracy on the same rows with the features of training and with a bundle's own."""

    trained: float
    served: float
    same: float  # fraction of the rows that get the same class
    change: Interval  # served minus trained, paired

    @classmethod
    def measure(
        cls,
        head: nn.Sequential,
        trained: FeatureSource,
        served: FeatureSource,
        labels: NDArray[np.int64],
        rows: RowIndices,
    ) -> "Skew":
        """Compare predictions for `rows` of two sources of the same images; labels: (N,) over all their rows."""
        first, second = (predict_logits(head, source, rows).argmax(1).numpy() for source in (trained, served))
        trained_correct, served_correct = first == labels[rows], second == labels[rows]
        return cls(
            trained=float(trained_correct.mean()),
            served=float(served_correct.mean()),
            same=float((first == second).mean()),
            change=paired_difference(trained_correct, served_correct),
        )

    def check(self, backend: str) -> None:
        """Raises AttireError where what would be served is worse than what was trained."""
        if self.change.value < _ALLOWED and self.change.high < 0:
            raise AttireError(
                f"train/serve skew of {backend}",
                f"a bundle predicts in fp32, where this classifier changes by {self.change.points()}, "
                f"n = {self.change.n:,}",
                do="train with --backend torch --precision fp32",
            )

    def describe(self) -> str:
        change = self.change
        return f"{change.points()} in fp32, as the bundle predicts; {100 * self.same:.1f} % the same class"

    def to_json(self) -> dict[str, Any]:
        about = {"n": self.change.n, "trained": self.trained, "served": self.served, "same_class": self.same}
        return {**about, "change": [self.change.value, self.change.low, self.change.high]}


def sample_rows(rows: RowIndices, size: int, seed: int) -> RowIndices:
    """As many of these rows as can be looked at again at this size, drawn from the seed, in ascending order."""
    count = min(len(rows), _ROWS, max(100, _PIXELS // size**2))
    return np.sort(np.random.default_rng(seed).permutation(rows)[:count])
