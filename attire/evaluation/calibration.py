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
_TEMPERATURES = (0.05, 20.0)  # a faultless validation set would otherwise drive the temperature to zero


@dataclass(frozen=True)
class Bin:
    """One bar of the reliability diagram; confidence and accuracy are NaN where `count` is 0."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def softmax(logits: ArrayLike, temperature: float = 1.0) -> Floats:
    """Probabilities (n, K) of logits (n, K), in double precision whatever came in."""
    return np.asarray(scipy_softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=-1))


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """The temperature that minimises the log loss of softmax(logits / T): Guo et al. 2017, on validation data only.

    The loss is convex in 1 / T, so it has one minimum; it is sought in log T between 0.05 and 20.
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


def row_gaps(top: Floats, hit: NDArray[np.bool_]) -> tuple[Ints, Floats]:
    """The calibration bin of each row, ((b) / BINS, (b + 1) / BINS], and its confidence minus its correctness."""
    return np.clip(np.ceil(top * BINS).astype(np.int64) - 1, 0, BINS - 1), top - hit


def reliability_bins(top: Floats, hit: NDArray[np.bool_]) -> tuple[Bin, ...]:
    index, _ = row_gaps(top, hit)
    count = np.bincount(index, minlength=BINS)
    with np.errstate(invalid="ignore"):
        confidence, accuracy = np.bincount(index, top, BINS) / count, np.bincount(index, hit, BINS) / count
    bars = zip(count, confidence, accuracy, strict=True)
    return tuple(Bin(b / BINS, (b + 1) / BINS, int(c), float(p), float(a)) for b, (c, p, a) in enumerate(bars))


def check_labels(y: NDArray[Any], k: int) -> None:
    if not np.issubdtype(y.dtype, np.integer):
        raise AttireError("labels", f"expected whole numbers, found {y.dtype}")
    outside = (y < 0) | (y >= k)
    if outside.any():
        row = int(outside.argmax())
        raise AttireError("labels", f"expected 0 to {k - 1}, found {y[row]}", f"row {row:,}")
