"""What a finished training says of its training, validation and test rows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attire.evaluation.metrics import Evaluation
from attire.inference.neighbours import Neighbours
from attire.inference.out_of_distribution import OODDetector
from attire.training.skew import Skew

if TYPE_CHECKING:
    pass


SCORED_ROWS = 10_000  # of training, where blocks are trained: its interval is then 0.2 points at 99 %


@dataclass(frozen=True)
class Outcome:
    """What the trained head says of each set; test probabilities (n, K) are calibrated with `temperature`.

    ood_detector: None where there are too few rows for its threshold; ood: what it does to the test set; neighbours:
    the training images that go into the bundle.
    """

    temperature: float
    test: Evaluation
    train: Evaluation
    val: Evaluation | None
    probabilities: NDArray[np.float64]
    ood_detector: OODDetector | None = None
    ood: dict[str, Any] | None = None
    neighbours: Neighbours | None = None
    skew: Skew | None = None


@dataclass(frozen=True)
class SplitLogits:
    """Logits (n, K) of the trained head for validation, training and test rows, not yet calibrated."""

    val: NDArray[np.float32] | None
    train: NDArray[np.float32]
    test: NDArray[np.float32]
