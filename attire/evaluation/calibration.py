"""Logits become probabilities that mean what they say: softmax, temperature scaling, the reliability diagram."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax
from scipy.special import softmax as scipy_softmax

from attire.errors import AttireError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BINS = 15  # equal-width bins on the top probability, as Guo et al. 2017 use
_TEMPERATURES = (0.05, 20.0)  # bounds: a faultless validation set would otherwise drive the temperature to zero


@dataclass(frozen=True)
class ReliabilityBin:
    """One bar of the reliability diagram; confidence and accuracy are NaN where `count` is 0."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def softmax(logits: ArrayLike, temperature: float = 1.0) -> Floats:
    """Probabilities (n, K) float64 of logits (n, K) of any precision."""
    return np.asarray(scipy_softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=-1))


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """The temperature that minimises the log loss of softmax(logits / T): Guo et al. 2017, on validation data only.

    logits (n, K), labels (n,). The loss is convex in 1 / T, so it has one minimum; the search runs over log T between
    0.05 and 20. Raises AttireError for shapes or values that do not fit.
    """
    from scipy.optimize import minimize_scalar  # takes half a second, and only fitting needs it

    z, y = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if z.ndim != 2 or y.shape != z.shape[:1] or not len(y) or not np.isfinite(z).all():
        raise AttireError(
            "logits", f"expected finite values, (n, K) and (n,) with n > 0, found {z.shape} and {y.shape}"
        )
    check_labels(y, z.shape[1])

    def loss(log_temperature: float) -> float:
        return -float(log_softmax(z / np.exp(log_temperature), axis=1)[np.arange(len(y)), y].mean())

    return float(np.exp(minimize_scalar(loss, bounds=np.log(_TEMPERATURES), method="bounded").x))


def calibration_gaps(confidence: Floats, correct: NDArray[np.bool_]) -> tuple[Ints, Floats]:
    """Of each row (n,): its bin b, for confidences in (b / BINS, (b + 1) / BINS], and confidence minus correctness."""
    return np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1), confidence - correct


def reliability_bins(confidence: Floats, correct: NDArray[np.bool_]) -> tuple[ReliabilityBin, ...]:
    """All BINS bars of the diagram. confidence (n,): the top probability of each row; correct (n,)."""
    index, _ = calibration_gaps(confidence, correct)
    count = np.bincount(index, minlength=BINS)
    with np.errstate(invalid="ignore"):
        means = np.bincount(index, confidence, BINS) / count
        accuracies = np.bincount(index, correct, BINS) / count
    bars = zip(count, means, accuracies, strict=True)
    return tuple(
        ReliabilityBin(b / BINS, (b + 1) / BINS, int(c), float(p), float(a)) for b, (c, p, a) in enumerate(bars)
    )


def check_labels(y: NDArray[Any], k: int) -> None:
    """Raise AttireError where labels (n,) are not whole numbers from 0 to k - 1."""
    if not np.issubdtype(y.dtype, np.integer):
        raise AttireError("labels", f"expected whole numbers, found {y.dtype}")
    outside = (y < 0) | (y >= k)
    if outside.any():
        row = int(outside.argmax())
        raise AttireError("labels", f"expected 0 to {k - 1}, found {y[row]}", f"row {row:,}")
