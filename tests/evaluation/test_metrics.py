"""Metrics against scikit-learn and scipy, intervals against simulation."""

import json
import time
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics

from attire.errors import AttireError
from attire.evaluation.calibration import BINS, fit_temperature, softmax
from attire.evaluation.intervals import Claim, Interval, check_claim, mcnemar, paired_difference, wilson
from attire.evaluation.metrics import Evaluation, evaluate

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def table(n: int, k: int, seed: int, signal: float = 2.0) -> tuple[Floats, Ints]:
    """Logits that favour the right class, and labels: (n, k), (n,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(k, size=n)
    logits = rng.normal(size=(n, k))
    logits[np.arange(n), labels] += signal
    return logits, labels


def names(k: int) -> list[str]:
    return [f"class {c}" for c in range(k)]


@pytest.mark.parametrize(("n", "k", "seed"), [(40, 2, 0), (200, 3, 1), (2000, 10, 2)])
def test_figures_equal_those_of_scikit_learn(n: int, k: int, seed: int) -> None:
    logits, labels = table(n, k, seed)
    p = softmax(logits)
    called = p.argmax(axis=1)
    result = evaluate(p, labels, names(k), resamples=20)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(labels, called, labels=range(k))
    assert result.accuracy.value == metrics.accuracy_score(labels, called) == result.correct / n
    assert result.balanced_accuracy.value == pytest.approx(metrics.balanced_accuracy_score(labels, called))
    assert result.macro_f1.value == pytest.approx(metrics.f1_score(labels, called, average="macro"))
    assert result.log_loss.value == pytest.approx(metrics.log_loss(labels, p))
    assert result.brier.value == pytest.approx(np.square(p - np.eye(k)[labels]).sum(axis=1).mean())
    assert (result.confusion == metrics.confusion_matrix(labels, called)).all()
    assert [s.precision.value for s in result.per_class] == pytest.approx(list(precision))
    assert [s.recall.value for s in result.per_class] == pytest.approx(list(recall))
    assert [s.f1.value for s in result.per_class] == pytest.approx(list(f1))
    assert [s.support for s in result.per_class] == list(support)
    if k > 2:
        assert result.top2.value == metrics.top_k_accuracy_score(labels, p, k=2)
    binary = [((labels == c) == (called == c)).mean() for c in range(k)]
    assert result.one_vs_rest_accuracy == pytest.approx(np.mean(binary))


def test_nine_in_ten_reads_as_98_percent_one_vs_rest() -> None:
    labels = np.repeat(np.arange(10), 10)
    called = np.where(np.arange(100) % 10, labels, (labels + 1) % 10)
    result = evaluate(np.eye(10)[called], labels, names(10), resamples=10)
    assert result.accuracy.value == 0.9
    assert result.one_vs_rest_accuracy == pytest.approx(0.98)


def test_calibration_error_is_the_textbook_loop() -> None:
    logits, labels = table(3000, 10, 3)
    p = softmax(logits, 0.5)
    top, hit = p.max(axis=1), p.argmax(axis=1) == labels
    edges, expected = np.linspace(0, 1, BINS + 1), 0.0
    for low, high in pairwise(edges):
        inside = (top > low) & (top <= high)
        if inside.any():
            expected += inside.mean() * abs(hit[inside].mean() - top[inside].mean())
    result = evaluate(p, labels, names(10), resamples=200)
    assert result.calibration_error.value == pytest.approx(expected)
    assert sum(bar.count for bar in result.reliability) == 3000
    assert result.calibration_error.low <= expected <= result.calibration_error.high
    assert result.calibration_error.method == "bootstrap 95 % (200 resamples), bias removed"


def test_most_confused_pairs_come_largest_first() -> None:
    labels = np.array([0] * 10 + [1] * 10 + [2] * 10)
    called = np.array([0] * 6 + [1] * 4 + [1] * 9 + [2] + [2] * 10)
    pairs = evaluate(np.eye(3)[called], labels, ["Shirt", "Coat", "Bag"], resamples=10).most_confused
    assert [(p.true, p.predicted, p.count, p.share) for p in pairs] == [
        ("Shirt", "Coat", 4, 0.4),
        ("Coat", "Bag", 1, 0.1),
    ]


def test_wilson_intervals_cover_what_they_promise() -> None:
    rng, covered = np.random.default_rng(0), []
    for true in (0.90, 0.945, 0.99):
        for correct in rng.binomial(10_000, true, size=2000):
            interval = wilson(int(correct), 10_000)
            covered.append(interval.low <= true <= interval.high)
    shares = np.array(covered).reshape(3, 2000).mean(axis=1)
    assert ((shares >= 0.935) & (shares <= 0.965)).all(), shares


def test_bootstrap_intervals_cover_what_they_promise() -> None:
    """250 test sets of 400 rows drawn from one large table whose figures stand for the truth."""
    logits, labels = table(100_000, 5, 4)
    p = softmax(logits, 0.7)
    truth = evaluate(p, labels, names(5), resamples=2)
    rng, figures = np.random.default_rng(1), ("log_loss", "brier", "macro_f1", "balanced_accuracy")
    covered = np.zeros(len(figures))
    for seed in range(250):
        rows = rng.integers(len(p), size=400)
        drawn = evaluate(p[rows], labels[rows], names(5), resamples=150, seed=seed)
        pairs = [(getattr(drawn, name), getattr(truth, name).value) for name in figures]
        covered += [interval.low <= value <= interval.high for interval, value in pairs]
    assert ((covered / 250 >= 0.9) & (covered / 250 <= 0.985)).all(), covered / 250


def test_a_class_without_rows_is_undefined_and_leaves_the_averages_alone() -> None:
    logits, labels = table(300, 3, 5)
    p = np.pad(softmax(logits), ((0, 0), (0, 1)))
    result = evaluate(p, labels, names(4), resamples=50)
    empty = result.per_class[3]
    assert empty.support == 0
    assert np.isnan([empty.recall.value, empty.precision.value, empty.f1.low]).all()
    assert str(empty.recall) == "undefined   (n = 0)"
    assert result.balanced_accuracy.value == pytest.approx(np.mean([s.recall.value for s in result.per_class[:3]]))
    assert result.hardest.name != "class 3"
    assert result.to_json()["per_class"][3]["recall"]["value"] is None


def test_json_is_plain_and_reads_back_equal() -> None:
    logits, labels = table(200, 3, 6)
    result = evaluate(np.pad(softmax(logits), ((0, 0), (0, 1))), labels, names(4), resamples=50)
    text = json.dumps(result.to_json(), allow_nan=False)
    again = Evaluation.from_json(json.loads(text))
    assert json.dumps(again.to_json(), allow_nan=False) == text
    assert (again.confusion == result.confusion).all()
    assert {"n", "correct", "accuracy", "accuracy_low", "accuracy_high"} <= set(result.to_json())


def test_the_same_seed_gives_the_same_intervals() -> None:
    logits, labels = table(200, 3, 7)
    p = softmax(logits)
    assert evaluate(p, labels, names(3), 50, seed=1).log_loss == evaluate(p, labels, names(3), 50, seed=1).log_loss
    assert evaluate(p, labels, names(3), 50, seed=1).log_loss != evaluate(p, labels, names(3), 50, seed=2).log_loss


def test_ten_thousand_rows_take_no_time_to_speak_of() -> None:
    logits, labels = table(10_000, 10, 8)
    start = time.process_time()
    evaluate(softmax(logits), labels, names(10))
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("p", "labels", "message"),
    [
        ([[0.5, 0.5]], [0, 1], r"labels: expected the shape \(1,\), found \(2,\)"),
        ([[0.5, 0.2, 0.3]], [0], r"probabilities: expected the shape \(n, 2\), found \(1, 3\)"),
        ([[0.5, 0.5], [float("nan"), 1]], [0, 1], r"probabilities: .*\[nan  1.\] \(row 1, 1 such rows\)"),
        ([[0.5, 0.2]], [0], r"probabilities: .*sum to 1, found \[0.5 0.2\]"),
        ([[-0.5, 1.5]], [0], "probabilities: expected values from 0 to 1"),
        ([[0.5, 0.5], [0.5, 0.5]], [0, 2], r"labels: expected 0 to 1, found 2 \(row 1\)"),
        ([[0.5, 0.5]], [-1], "labels: expected 0 to 1, found -1"),
        ([[0.5, 0.5]], [0.0], "labels: expected whole numbers, found float64"),
        (np.zeros((0, 2)), np.zeros(0, int), "labels: expected one row or more, found none"),
    ],
)
def test_bad_input_is_refused_by_name(p: Floats, labels: Ints, message: str) -> None:
    with pytest.raises(AttireError, match=message):
        evaluate(p, labels, ["a", "b"])


def test_one_class_cannot_be_classified() -> None:
    with pytest.raises(AttireError, match="classes: expected two or more, found 1"):
        evaluate([[1.0]], [0], ["a"])


def test_half_precision_probabilities_are_welcome() -> None:
    logits, labels = table(500, 10, 9)
    half = softmax(logits).astype(np.float16)
    whole = evaluate(softmax(logits), labels, names(10), resamples=10)
    assert evaluate(half, labels, names(10), resamples=10).log_loss.value == pytest.approx(
        whole.log_loss.value, abs=1e-3
    )


def test_intervals_print_the_way_people_read_them() -> None:
    assert str(wilson(9450, 10_000)) == "94.5 %   (94.0-94.9, n = 10,000)"
    difference = Interval(0.009, 0.005, 0.013, 10, "x")
    assert difference.points() == "+0.9 points (+0.5 to +1.3)"
    assert (-difference).points() == "-0.9 points (-1.3 to -0.5)"
    with pytest.raises(AttireError, match="expected 0 <= correct <= n, found 3 of 2"):
        wilson(3, 2)


def test_wilson_equals_the_published_example() -> None:
    """Newcombe 1998, table I, method 3: 81 of 263 is 0.2553 to 0.3662; 0 of 20 is 0.0000 to 0.1611."""
    assert (wilson(81, 263).low, wilson(81, 263).high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert (wilson(0, 20).low, wilson(0, 20).high) == pytest.approx((0, 0.1611), abs=5e-5)


@pytest.mark.parametrize(
    ("correct", "n", "verdict"),
    [(9450, 10_000, "not confirmed"), (9795, 10_000, "confirmed"), (9900, 10_000, "exceeded"), (39, 40, "undecided")],
)
def test_claims_get_the_verdict_they_earn(correct: int, n: int, verdict: str) -> None:
    claim = check_claim(correct, n)
    assert claim.verdict == verdict
    assert claim.p_value == stats.binomtest(correct, n, 0.98).pvalue
    assert Claim.from_json(json.loads(json.dumps(claim.to_json()))) == claim


def test_a_claim_reads_as_one_sentence() -> None:
    text = "claimed 98.0 %, measured 94.5 % (94.0-94.9): not confirmed (p < 0.001)"
    assert str(check_claim(9450, 10_000)) == text
    with pytest.raises(AttireError, match="claim: expected an accuracy from 0 to 1"):
        check_claim(1, 2, claimed=98)


def test_temperature_is_recovered() -> None:
    rng = np.random.default_rng(10)
    honest = 3 * rng.normal(size=(20_000, 10))
    labels = (softmax(honest).cumsum(axis=1) > rng.random((20_000, 1))).argmax(axis=1)
    assert fit_temperature(honest, labels) == pytest.approx(1, abs=0.03)
    assert fit_temperature(2.5 * honest, labels) == pytest.approx(2.5, abs=0.08)
    scaled = softmax(2.5 * honest, fit_temperature(2.5 * honest, labels))
    assert evaluate(scaled, labels, names(10), resamples=2).calibration_error.value < 0.01


def test_temperature_of_a_faultless_set_stays_finite() -> None:
    assert 0.05 <= fit_temperature(10 * np.eye(4), np.arange(4)) <= 20
    with pytest.raises(AttireError, match="logits: expected finite values"):
        fit_temperature([[np.inf, 0]], [0])


def test_softmax_is_safe_and_leaves_float32_behind() -> None:
    p = softmax(np.array([[1e4, 0, -1e4]], dtype=np.float32))
    assert p.dtype == np.float64
    assert p.tolist() == [[1, 0, 0]]
    assert softmax([[0.0, np.log(4)]], temperature=2).tolist() == [pytest.approx([1 / 3, 2 / 3])]


def paired(both: int, only_a: int, only_b: int, neither: int) -> tuple[Ints, Ints]:
    a = np.repeat([1, 1, 0, 0], [both, only_a, only_b, neither])
    return a, np.repeat([1, 0, 1, 0], [both, only_a, only_b, neither])


def test_mcnemar_equals_the_binomial_and_the_published_tables() -> None:
    for only_a, only_b in np.random.default_rng(11).integers(0, 60, size=(20, 2)):
        expected = stats.binomtest(int(only_a), int(only_a + only_b), 0.5).pvalue
        assert mcnemar(*paired(100, only_a, only_b, 20)) == pytest.approx(expected)
    # Agresti, Categorical Data Analysis, approval ratings of 1,600 people: 150 against 86 changed their mind
    assert mcnemar(*paired(794, 150, 86, 570)) == pytest.approx(3.7e-5, rel=0.02)
    # two-sided exact p of 1 against 7 discordant pairs: 2 * (1 + 8) / 2^8
    assert mcnemar(*paired(5, 1, 7, 5)) == pytest.approx(18 / 256)
    assert mcnemar(*paired(5, 0, 0, 5)) == 1


def test_paired_difference_equals_the_bootstrap_over_rows() -> None:
    a, b = paired(9000, 160, 250, 590)
    difference = paired_difference(a, b, resamples=20_000)
    assert difference.value == pytest.approx(0.009)
    slow = stats.bootstrap(((b - a).astype(float),), np.mean, n_resamples=2000, batch=100, method="percentile", rng=0)
    assert (difference.low, difference.high) == pytest.approx(tuple(slow.confidence_interval), abs=3e-4)
    assert paired_difference(b, a).value == -difference.value
    with pytest.raises(AttireError, match=r"compare: expected the same rows twice, found \(3,\) and \(2,\)"):
        paired_difference([1, 1, 0], [1, 0])
