"""How good, and how sure: metrics with 95 % intervals from (probabilities, labels). No torch, no files."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from attire.errors import AttireError
from attire.evaluation.calibration import (
    BINS,
    Bin,
    Floats,
    Ints,
    check_labels,
    reliability_bins,
    row_gaps,
)
from attire.evaluation.intervals import Interval, wilson

_SMALLEST = float(np.finfo(np.float64).eps)  # log loss of a zero probability stays finite; scikit-learn's choice


@dataclass(frozen=True)
class _ClassScore:
    """One class: its rows in the set, and precision, recall (Wilson) and F1 (bootstrap)."""

    name: str
    support: int
    precision: Interval
    recall: Interval
    f1: Interval


@dataclass(frozen=True)
class _Confused:
    """`count` rows of class `true` were called `predicted`: `share` of that class."""

    true: str
    predicted: str
    count: int
    share: float


@dataclass(frozen=True)
class Evaluation:
    """Every figure of one set of rows.

    `confusion` is (K, K), rows the true class. `brier` is the sum over classes (0 to 2, Brier 1950), `log_loss`
    in nats. Averages over classes leave out a class for which the figure is undefined.
    """

    classes: tuple[str, ...]
    n: int
    correct: int
    accuracy: Interval
    balanced_accuracy: Interval
    top2: Interval
    macro_f1: Interval
    log_loss: Interval
    brier: Interval
    calibration_error: Interval
    confusion: Ints
    per_class: tuple[_ClassScore, ...]
    one_vs_rest_accuracy: float
    most_confused: tuple[_Confused, ...]
    reliability: tuple[Bin, ...]

    @property
    def hardest(self) -> _ClassScore:
        """The class with the lowest recall among those that occur."""
        return min((score for score in self.per_class if score.support), key=lambda score: score.recall.value)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, undefined figures as null; `from_json` reads it back."""
        intervals = {name: getattr(self, name).to_json() for name in _INTERVALS}
        return {
            "n": self.n,
            "correct": self.correct,
            "accuracy": self.accuracy.value,
            "accuracy_low": self.accuracy.low,
            "accuracy_high": self.accuracy.high,
            "accuracy_method": self.accuracy.method,
            **intervals,
            "one_vs_rest_accuracy": self.one_vs_rest_accuracy,
            "classes": list(self.classes),
            "per_class": [_without_nan(asdict(score)) for score in self.per_class],
            "most_confused": [asdict(pair) for pair in self.most_confused],
            "reliability": [_without_nan(asdict(bar)) for bar in self.reliability],
            "confusion": self.confusion.tolist(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Evaluation":
        def score(row: dict[str, Any]) -> _ClassScore:
            figures = {name: Interval.from_json(row[name]) for name in ("precision", "recall", "f1")}
            return _ClassScore(row["name"], row["support"], **figures)

        def bar(row: dict[str, Any]) -> Bin:
            confidence, accuracy = (
                float("nan") if row[key] is None else row[key] for key in ("confidence", "accuracy")
            )
            return Bin(row["low"], row["high"], row["count"], confidence, accuracy)

        return cls(
            classes=tuple(value["classes"]),
            n=value["n"],
            correct=value["correct"],
            accuracy=wilson(value["correct"], value["n"]),
            **{name: Interval.from_json(value[name]) for name in _INTERVALS},
            confusion=np.array(value["confusion"], dtype=np.int64),
            per_class=tuple(score(row) for row in value["per_class"]),
            one_vs_rest_accuracy=value["one_vs_rest_accuracy"],
            most_confused=tuple(_Confused(**row) for row in value["most_confused"]),
            reliability=tuple(bar(row) for row in value["reliability"]),
        )


_INTERVALS = ("balanced_accuracy", "top2", "macro_f1", "log_loss", "brier", "calibration_error")


def evaluate(
    probabilities: ArrayLike, labels: ArrayLike, classes: Sequence[str], resamples: int = 1000, seed: int = 0
) -> Evaluation:
    """Score probabilities (n, K) against labels (n,), class indices.

    Proportions get Wilson intervals, everything else a bootstrap over rows. Rows of `probabilities` must sum to 1
    within 0.001 (half precision) and are scaled to sum to it exactly. Raises AttireError for anything else.
    """
    p, y = _checked(probabilities, labels, len(classes))
    n, k = p.shape
    order = np.argsort(-p, axis=1, kind="stable")  # (n, K), the predicted class first; ties go to the lower index
    hit = order[:, 0] == y
    rows = _Rows(y * k + order[:, 0], *_row_losses(p, y), *row_gaps(p.max(axis=1), hit), k)
    confusion = rows.confusion(np.ones(n))
    value, draws = rows.figures(np.ones(n)), np.array(list(rows.resampled(resamples, seed)))
    scores = _bootstrap_intervals(value, draws, n)
    correct = int(hit.sum())
    return Evaluation(
        tuple(classes),
        n,
        correct,
        accuracy=wilson(correct, n),
        top2=wilson(int((order[:, :2] == y[:, None]).any(axis=1).sum()), n),
        **dict(zip(_BOOTSTRAPPED, scores, strict=False)),
        confusion=confusion.astype(np.int64),
        per_class=_class_scores(confusion.astype(np.int64), classes, scores[len(_BOOTSTRAPPED) :]),
        one_vs_rest_accuracy=_one_vs_rest(n - correct, n, k),
        most_confused=_confused_pairs(confusion.astype(np.int64), classes),
        reliability=reliability_bins(p.max(axis=1), hit),
    )


_BOOTSTRAPPED = ("balanced_accuracy", "macro_f1", "log_loss", "brier", "calibration_error")


@dataclass(frozen=True)
class _Rows:
    """What the bootstrap needs of each row, so that a resample is one weight per row and a few sums."""

    cell: Ints  # (n,), true * K + predicted
    log_loss: Floats  # (n,), nats
    brier: Floats  # (n,), 0 to 2
    bin: Ints  # (n,), 0 to BINS - 1
    gap: Floats  # (n,), top probability - (1 if correct else 0)
    k: int

    def confusion(self, weight: Floats) -> Floats:
        return np.bincount(self.cell, weight, self.k**2).astype(np.float64).reshape(self.k, self.k)

    def figures(self, weight: Floats) -> Floats:
        """The figures of BOOTSTRAPPED, then F1 of each class, with row i counted `weight[i]` times: (5 + K,)."""
        table = self.confusion(weight)
        with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that says undefined
            recall = table.diagonal() / table.sum(axis=1)
            f1 = 2 * table.diagonal() / (table.sum(axis=0) + table.sum(axis=1))
        n = weight.sum()
        calibration = np.abs(np.bincount(self.bin, weight * self.gap, BINS)).sum() / n
        # sums, not weight @ loss: the dot product's threads were measured ten times slower on a busy machine
        losses = ((weight * self.log_loss).sum() / n, (weight * self.brier).sum() / n)
        return np.array([np.nanmean(recall), np.nanmean(f1), *losses, calibration, *f1])

    def resampled(self, resamples: int, seed: int) -> Iterator[Floats]:
        rng, n = np.random.default_rng(seed), len(self.cell)
        for _ in range(resamples):
            drawn = np.bincount(rng.integers(n, size=n, dtype=np.int32), minlength=n)
            yield self.figures(drawn.astype(np.float64))


def _bootstrap_intervals(value: Floats, draws: Floats, n: int) -> list[Interval]:
    """Percentile intervals of each column of `draws` (resamples, figures).

    The binned calibration error is a sum of absolute values, so every resample overstates it, and its plain percentile
    interval can lie wholly above the value; its draws are first shifted by their mean excess.
    """
    method, shifted = f"bootstrap 95 % ({len(draws):,} resamples)", _BOOTSTRAPPED.index("calibration_error")
    draws[:, shifted] = np.maximum(0, draws[:, shifted] - (draws[:, shifted].mean() - value[shifted]))
    undefined = np.isnan(value)
    low, high = np.nanquantile(np.where(undefined, 0, draws), (0.025, 0.975), axis=0)
    bounds = np.where(undefined, np.nan, (value, low, high)).T  # (figures, 3)
    return [
        Interval(float(a), float(b), float(c), n, method + ", bias removed" if i == shifted else method)
        for i, (a, b, c) in enumerate(bounds)
    ]


def _checked(probabilities: ArrayLike, labels: ArrayLike, k: int) -> tuple[Floats, Ints]:
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if k < 2:
        raise AttireError("classes", f"expected two or more, found {k}")
    if p.ndim != 2 or p.shape[1] != k:
        raise AttireError("probabilities", f"expected the shape (n, {k}), found {p.shape}")
    if y.shape != p.shape[:1]:
        raise AttireError("labels", f"expected the shape ({len(p)},), found {y.shape}")
    if not len(y):
        raise AttireError("labels", "expected one row or more, found none")
    check_labels(y, k)
    total = p.sum(axis=1)
    wrong = ~(np.isfinite(p).all(axis=1) & (p >= 0).all(axis=1) & (np.abs(total - 1) <= 1e-3))
    if wrong.any():
        row = int(wrong.argmax())
        what = f"expected values from 0 to 1 that sum to 1, found {np.array2string(p[row], precision=3, threshold=4)}"
        raise AttireError("probabilities", what, f"row {row:,}, {int(wrong.sum()):,} such rows")
    return p / total[:, None], y.astype(np.int64)


def _row_losses(p: Floats, y: Ints) -> tuple[Floats, Floats]:
    """Log loss and Brier score of each row: (n,), (n,)."""
    chosen = p[np.arange(len(y)), y]
    return -np.log(np.clip(chosen, _SMALLEST, 1)), np.square(p).sum(axis=1) - 2 * chosen + 1


def _class_scores(confusion: Ints, classes: Sequence[str], f1: Sequence[Interval]) -> tuple[_ClassScore, ...]:
    right, support, called = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    return tuple(
        _ClassScore(name, int(support[c]), wilson(right[c], called[c]), wilson(right[c], support[c]), f1[c])
        for c, name in enumerate(classes)
    )


def _one_vs_rest(errors: int, n: int, k: int) -> float:
    """The mean over classes of the accuracy of "is it this class or not".

    Each error is wrong in two of the K yes-or-no questions and right in the K - 2 others, so this is 1 - 2/K of the
    error rate: with ten classes an accuracy of 90 % reads 98 %, and always answering one class, right once in ten,
    reads 82 %. Shown so that nobody mistakes the one for the other.
    """
    return 1 - 2 * errors / (n * k)


def _confused_pairs(confusion: Ints, classes: Sequence[str], limit: int = 10) -> tuple[_Confused, ...]:
    """The off-diagonal cells with the most rows, largest first; cells with none are left out."""
    wrong, support = confusion - np.diag(confusion.diagonal()), confusion.sum(axis=1)
    ranked = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    cells = [divmod(int(cell), len(classes)) for cell in ranked]
    return tuple(
        _Confused(classes[i], classes[j], int(wrong[i, j]), float(wrong[i, j] / support[i]))
        for i, j in cells
        if wrong[i, j]
    )


def _without_nan(value: Any) -> Any:
    """The same nested dicts with None for NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if value != value else value
