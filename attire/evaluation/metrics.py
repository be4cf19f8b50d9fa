"""Metrics with 95 % confidence intervals, of probabilities and labels. No torch, no files."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from attire.errors import AttireError
from attire.evaluation.calibration import (
    BINS,
    Floats,
    Ints,
    ReliabilityBin,
    calibration_gaps,
    check_labels,
    reliability_bins,
)
from attire.evaluation.intervals import Interval, percent, wilson

_SMALLEST = float(np.finfo(np.float64).eps)  # log loss of a zero probability stays finite; scikit-learn's choice


@dataclass(frozen=True)
class _ClassScore:
    """One class: its rows in the set; precision and recall (Wilson), F1 (bootstrap)."""

    name: str
    support: int
    precision: Interval
    recall: Interval
    f1: Interval


@dataclass(frozen=True)
class _ConfusedPair:
    """`count` rows of class `true` were predicted as `predicted`: the fraction `share` of that class."""

    true: str
    predicted: str
    count: int
    share: float


@dataclass(frozen=True)
class Evaluation:
    """Every figure of n rows and their predictions; each `Interval` is a 95 % confidence interval.

    `confusion` is (K, K), rows the true class. `brier` is the sum over classes (0 to 2, Brier 1950), `log_loss`
    in nats. Averages over classes leave out the classes for which the figure is undefined.
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
    most_confused: tuple[_ConfusedPair, ...]
    reliability: tuple[ReliabilityBin, ...]

    @property
    def hardest(self) -> _ClassScore:
        """The class with the lowest recall among those that occur."""
        return min((score for score in self.per_class if score.support), key=lambda score: score.recall.value)

    def describe_hardest(self) -> str:
        """'Shirt 83.1 % (13.0 % called T-shirt/top)'."""
        score = self.hardest
        errors = self.confusion[self.classes.index(score.name)].copy()
        errors[self.classes.index(score.name)] = 0
        text = f"{score.name} {percent(score.recall.value)}"
        if not errors.any():
            return text
        return f"{text} ({percent(errors.max() / score.support)} called {self.classes[errors.argmax()]})"

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

        return cls(
            classes=tuple(value["classes"]),
            n=value["n"],
            correct=value["correct"],
            accuracy=wilson(value["correct"], value["n"]),
            **{name: Interval.from_json(value[name]) for name in _INTERVALS},
            confusion=np.array(value["confusion"], dtype=np.int64),
            per_class=tuple(score(row) for row in value["per_class"]),
            one_vs_rest_accuracy=value["one_vs_rest_accuracy"],
            most_confused=tuple(_ConfusedPair(**row) for row in value["most_confused"]),
            reliability=tuple(ReliabilityBin(**_with_nan(row)) for row in value["reliability"]),
        )


_INTERVALS = ("balanced_accuracy", "top2", "macro_f1", "log_loss", "brier", "calibration_error")


def evaluate(
    probabilities: ArrayLike, labels: ArrayLike, classes: Sequence[str], resamples: int = 1000, seed: int = 0
) -> Evaluation:
    """Score probabilities (n, K) against labels (n,), the indices of the true classes.

    Proportions get Wilson's interval, all other figures a bootstrap interval over rows, drawn with `seed`. Rows of
    `probabilities` must sum to 1 within 0.001 (half precision) and are scaled to sum to it exactly. Raises AttireError
    for anything else.
    """
    p, y = _checked(probabilities, labels, len(classes))
    n, k = p.shape
    order = np.argsort(-p, axis=1, kind="stable")  # (n, K), the predicted class first; ties go to the lower index
    is_correct = order[:, 0] == y
    rows = _RowStatistics.of(p, y, order[:, 0])
    confusion = rows.confusion(np.ones(n)).astype(np.int64)
    values, draws = rows.figures(np.ones(n)), np.array(list(rows.bootstrap(resamples, seed)))
    intervals = _bootstrap_intervals(values, draws, n)
    correct = int(is_correct.sum())
    return Evaluation(
        classes=tuple(classes),
        n=n,
        correct=correct,
        accuracy=wilson(correct, n),
        top2=wilson(int((order[:, :2] == y[:, None]).any(axis=1).sum()), n),
        **dict(zip(_BOOTSTRAPPED, intervals, strict=False)),
        confusion=confusion,
        per_class=_class_scores(confusion, classes, intervals[len(_BOOTSTRAPPED) :]),
        one_vs_rest_accuracy=_one_vs_rest_accuracy(n - correct, n, k),
        most_confused=_confused_pairs(confusion, classes),
        reliability=reliability_bins(p.max(axis=1), is_correct),
    )


_BOOTSTRAPPED = ("balanced_accuracy", "macro_f1", "log_loss", "brier", "calibration_error")


@dataclass(frozen=True)
class _RowStatistics:
    """What the bootstrap needs of each row, so that a resample is one weight per row and a few sums."""

    cell: Ints  # (n,), true * K + predicted
    log_loss: Floats  # (n,), nats
    brier: Floats  # (n,), 0 to 2
    bin: Ints  # (n,), 0 to BINS - 1
    gap: Floats  # (n,), top probability - (1 if correct else 0)
    k: int

    @classmethod
    def of(cls, p: Floats, y: Ints, predicted: Ints) -> "_RowStatistics":
        """p: probabilities (n, K); y: labels (n,); predicted: classes (n,)."""
        chosen = p[np.arange(len(y)), y]
        log_loss = -np.log(np.clip(chosen, _SMALLEST, 1))
        brier = np.square(p).sum(axis=1) - 2 * chosen + 1
        bins, gap = calibration_gaps(p.max(axis=1), predicted == y)
        return cls(y * p.shape[1] + predicted, log_loss, brier, bins, gap, p.shape[1])

    def confusion(self, weight: Floats) -> Floats:
        return np.bincount(self.cell, weight, self.k**2).astype(np.float64).reshape(self.k, self.k)

    def figures(self, weight: Floats) -> Floats:
        """The figures of _BOOTSTRAPPED, then F1 of each class, (5 + K,), where row i counts `weight[i]` times."""
        table = self.confusion(weight)
        with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that says undefined
            recall = table.diagonal() / table.sum(axis=1)
            f1 = 2 * table.diagonal() / (table.sum(axis=0) + table.sum(axis=1))
        n = weight.sum()
        calibration = np.abs(np.bincount(self.bin, weight * self.gap, BINS)).sum() / n
        # sums, not weight @ loss: the dot product's threads were measured ten times slower on a busy machine
        losses = ((weight * self.log_loss).sum() / n, (weight * self.brier).sum() / n)
        return np.array([np.nanmean(recall), np.nanmean(f1), *losses, calibration, *f1])

    def bootstrap(self, resamples: int, seed: int) -> Iterator[Floats]:
        """The same figures of each resample: n rows drawn with replacement."""
        rng, n = np.random.default_rng(seed), len(self.cell)
        for _ in range(resamples):
            drawn = np.bincount(rng.integers(n, size=n, dtype=np.int32), minlength=n)
            yield self.figures(drawn.astype(np.float64))


def _bootstrap_intervals(values: Floats, draws: Floats, n: int) -> list[Interval]:
    """Percentile intervals of each column of `draws` (resamples, figures).

    The binned calibration error is a sum of absolute values, so every resample overstates it, and its plain percentile
    interval can lie wholly above the value; its draws are first shifted by their mean excess.
    """
    method, shifted = f"bootstrap 95 % ({len(draws):,} resamples)", _BOOTSTRAPPED.index("calibration_error")
    draws[:, shifted] = np.maximum(0, draws[:, shifted] - (draws[:, shifted].mean() - values[shifted]))
    undefined = np.isnan(values)
    low, high = np.nanquantile(np.where(undefined, 0, draws), (0.025, 0.975), axis=0)
    bounds = np.where(undefined, np.nan, (values, low, high)).T  # (figures, 3)
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


def _class_scores(confusion: Ints, classes: Sequence[str], f1: Sequence[Interval]) -> tuple[_ClassScore, ...]:
    right, support, called = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    return tuple(
        _ClassScore(name, int(support[c]), wilson(right[c], called[c]), wilson(right[c], support[c]), f1[c])
        for c, name in enumerate(classes)
    )


def _one_vs_rest_accuracy(errors: int, n: int, k: int) -> float:
    """The mean over classes of the accuracy of "is it this class or not".

    Each error is wrong in two of the K yes-or-no questions and right in the K - 2 others, so this is 1 - 2/K of the
    error rate: with ten classes an accuracy of 90 % reads 98 %, and always answering one class, right once in ten,
    reads 82 %. Shown so that nobody mistakes the one for the other.
    """
    return 1 - 2 * errors / (n * k)


def _confused_pairs(confusion: Ints, classes: Sequence[str], limit: int = 10) -> tuple[_ConfusedPair, ...]:
    """The off-diagonal cells with the most rows, largest first; cells with none are left out."""
    wrong, support = confusion - np.diag(confusion.diagonal()), confusion.sum(axis=1)
    ranked = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    cells = [divmod(int(cell), len(classes)) for cell in ranked]
    return tuple(
        _ConfusedPair(classes[i], classes[j], int(wrong[i, j]), float(wrong[i, j] / support[i]))
        for i, j in cells
        if wrong[i, j]
    )


def _without_nan(value: Any) -> Any:
    """The same nested dicts with None for NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if value != value else value


def _with_nan(value: dict[str, Any]) -> dict[str, Any]:
    """Undoes `_without_nan` for one level."""
    return {key: float("nan") if item is None else item for key, item in value.items()}
