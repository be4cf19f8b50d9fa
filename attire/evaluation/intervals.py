"""95 % confidence intervals of proportions, a claim tested against a measurement, two models on the same rows."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from attire.errors import AttireError

_WILSON = "Wilson 95 %"


@dataclass(frozen=True)
class Interval:
    """A measured value and the bounds of its 95 % confidence interval; all NaN where it is undefined (n = 0)."""

    value: float
    low: float
    high: float
    n: int
    method: str

    def __str__(self) -> str:
        return self.percent()

    def percent(self) -> str:
        """
        >>> wilson(9450, 10_000).percent()
        '94.5 %   (94.0-94.9, n = 10,000)'
        """
        if np.isnan(self.value):
            return f"undefined   (n = {self.n:,})"
        return f"{self.value:.1%}".replace("%", " %") + f"   ({self.span()}, n = {self.n:,})"

    def span(self) -> str:
        """The bounds alone, in percent: '94.0-94.9'."""
        return "-" if np.isnan(self.low) else f"{100 * self.low:.1f}-{100 * self.high:.1f}"

    def __neg__(self) -> "Interval":
        """A difference seen from the other side."""
        return Interval(-self.value, -self.high, -self.low, self.n, self.method)

    def points(self) -> str:
        """A difference of two proportions: '+0.9 points (+0.5 to +1.3)'."""
        return f"{100 * self.value:+.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f})"

    def to_json(self) -> dict[str, Any]:
        """Undefined values as null, which `from_json` reads back."""
        return {key: None if value != value else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Interval":
        figures: dict[str, Any] = {key: float("nan") if item is None else item for key, item in value.items()}
        return cls(**figures)


@dataclass(frozen=True)
class Claim:
    """A claimed accuracy beside the measured one, and the p-value of the two-sided exact binomial test.

    The verdict is "not confirmed" (measured below, p < 0.05), "exceeded" (measured above, p < 0.05), "confirmed", or
    "undecided" where the rows are too few to tell the claim from a percentage point more or less.
    """

    claimed: float
    measured: Interval
    p_value: float
    verdict: str

    def __str__(self) -> str:
        measured = f"measured {100 * self.measured.value:.1f} % ({self.measured.span()})"
        return f"claimed {100 * self.claimed:.1f} %, {measured}: {self.verdict} ({p_text(self.p_value)})"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "text": str(self)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Claim":
        return cls(value["claimed"], Interval.from_json(value["measured"]), value["p_value"], value["verdict"])


def _binomial(correct: int, n: int, expected: float = 0.5) -> Any:
    from scipy.stats import binomtest  # takes a third of a second to import, and predicting needs none of it

    return binomtest(int(correct), int(n), expected)


def wilson(correct: int, n: int) -> Interval:
    """The proportion `correct` / `n` with Wilson's score interval (1927); undefined (NaN) for n = 0."""
    if not 0 <= correct <= n:
        raise AttireError("wilson", f"expected 0 <= correct <= n, found {correct} of {n}")
    if n == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0, _WILSON)
    bounds = _binomial(correct, n).proportion_ci(0.95, method="wilson")
    return Interval(correct / n, float(bounds.low), float(bounds.high), int(n), _WILSON)


def check_claim(correct: int, n: int, claimed: float = 0.98) -> Claim:
    """Test a claimed accuracy against `correct` of `n` rows with the two-sided exact binomial test."""
    if n < 1 or not 0 <= claimed <= 1:
        raise AttireError("claim", f"expected an accuracy from 0 to 1 and one row or more, found {claimed} and {n}")
    measured, p_value = wilson(correct, n), float(_binomial(correct, n, claimed).pvalue)
    if p_value < 0.05:
        verdict = "not confirmed" if measured.value < claimed else "exceeded"
    else:  # claims are made in whole percent: an interval wider than a point either way cannot confirm one
        verdict = "confirmed" if measured.high - measured.low <= 0.02 else "undecided"
    return Claim(claimed, measured, p_value, verdict)


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> float:
    """The exact two-sided p-value of McNemar's test (1947) that a and b are right equally often.

    correct_a, correct_b: (n,), whether each model is right on each of the same rows.
    """
    only_a, only_b, _ = discordant(correct_a, correct_b)
    return float(_binomial(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_difference(correct_a: ArrayLike, correct_b: ArrayLike, resamples: int = 1000, seed: int = 0) -> Interval:
    """Accuracy of b minus accuracy of a on the same rows (n,), with a bootstrap interval over rows.

    A row contributes +1, -1 or 0, so resampling rows is one multinomial draw of those three counts.
    """
    only_a, only_b, n = discordant(correct_a, correct_b)
    shares = np.array([only_a, only_b, n - only_a - only_b]) / n
    draws = np.random.default_rng(seed).multinomial(n, shares, size=resamples)  # (resamples, 3)
    low, high = np.quantile((draws[:, 1] - draws[:, 0]) / n, (0.025, 0.975))
    return Interval((only_b - only_a) / n, float(low), float(high), n, f"bootstrap 95 % ({resamples:,} resamples)")


def discordant(correct_a: ArrayLike, correct_b: ArrayLike) -> tuple[int, int, int]:
    """Rows that only a has right, that only b has right, and all rows."""
    a, b = np.asarray(correct_a).astype(bool), np.asarray(correct_b).astype(bool)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise AttireError("compare", f"expected the same rows twice, found {a.shape} and {b.shape}")
    return int((a & ~b).sum()), int((~a & b).sum()), len(a)


def percent(share: float) -> str:
    """'94.5 %', or 'undefined' for NaN."""
    return "undefined" if share != share else f"{100 * share:.1f} %"


def p_text(p_value: float) -> str:
    """'p < 0.001', or 'p = ' and two digits that matter."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"
