"""Runs side by side: the verdict, the refusal of other test sets, the page with and without the images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attire.data.dataset import ImageDataset
from attire.data.loading import write_csv
from attire.errors import AttireError
from attire.evaluation.compare import _disagreements, compare, write_comparison
from attire.evaluation.metrics import evaluate
from attire.evaluation.run_result import Predictions, RunResult, _write_digests, save_result


def finished(data: ImageDataset, right: Any, folder: Path, csv: Path | None = None, **changes: Any) -> RunResult:
    """An evaluation on all of `data` that has exactly the rows `right` right; the others are called the next class."""
    mask = np.isin(np.arange(len(data)), right)
    answers = np.where(mask, data.labels, (data.labels + 1) % len(data.classes))
    probabilities = np.full((len(data), len(data.classes)), 0.02)
    probabilities[np.arange(len(data)), answers] = 1 - 0.02 * (len(data.classes) - 1)
    result = RunResult(
        title="A run",
        recipe="tiny",
        seed=0,
        command="attire train",
        test=evaluate(probabilities, data.labels, data.classes, resamples=20),
        predictions=Predictions.of_test_set(data.labels, probabilities, data.images),
        seconds={"extract": 2.0, "fit": 1.0, "total": 3.5},
        config={"data": {"data": str(csv), "part": "test", "classes": None}},
        data={"name": "small", "test": data.describe()},
        **changes,
    )
    save_result(folder, result)
    return result


def test_the_better_run_is_named_with_interval_and_p_value(synthetic: ImageDataset, tmp_path: Path) -> None:
    finished(synthetic, range(10, 40), tmp_path / "a")
    finished(synthetic, range(55), tmp_path / "b")
    pair = compare([tmp_path / "a", tmp_path / "b"]).pairs[0]
    assert (pair.only_first, pair.only_second, pair.changed) == (0, 25, 25)
    assert pair.difference.value == pytest.approx(25 / 60)
    assert pair.p_value == pytest.approx(2 * 0.5**25)
    assert str(pair).startswith(f"{tmp_path}/b is better than {tmp_path}/a by 41.7 points (")
    other_way = compare([tmp_path / "b", tmp_path / "a"]).pairs[0]
    assert str(other_way).startswith(f"{tmp_path}/b is better than {tmp_path}/a by 41.7 points (")


def test_a_small_difference_is_no_verdict(synthetic: ImageDataset, tmp_path: Path) -> None:
    finished(synthetic, range(50), tmp_path / "a")
    finished(synthetic, range(52), tmp_path / "b")
    comparison = compare([tmp_path / "a", tmp_path / "b"])
    assert "cannot be told apart" in str(comparison.pairs[0])
    assert "p = 0.5;" in str(comparison.pairs[0])


def test_three_runs_make_three_pairs(synthetic: ImageDataset, tmp_path: Path) -> None:
    for name, right in (("a", 40), ("b", 50), ("c", 60)):
        finished(synthetic, range(right), tmp_path / name)
    comparison = compare([tmp_path / name for name in "abc"])
    pairs = [(Path(pair.first).name, Path(pair.second).name, pair.only_second) for pair in comparison.pairs]
    assert pairs == [("a", "b", 10), ("a", "c", 20), ("b", "c", 10)]
    assert "3 pairs are compared" in write_comparison(comparison, tmp_path / "page.html").read_text()


def test_another_test_set_is_refused_by_its_digest(synthetic: ImageDataset, tmp_path: Path) -> None:
    finished(synthetic, range(40), tmp_path / "a")
    relabelled = ImageDataset(synthetic.images, np.roll(synthetic.labels, 1), synthetic.classes, "same images")
    finished(relabelled, range(40), tmp_path / "b")
    with pytest.raises(AttireError, match=r"b: its test set is not the one of .*a: digest"):
        compare([tmp_path / "a", tmp_path / "b"])


def test_one_run_alone_is_refused(synthetic: ImageDataset, tmp_path: Path) -> None:
    finished(synthetic, range(40), tmp_path / "a")
    with pytest.raises(AttireError, match="expected two runs or more, found 1"):
        compare([tmp_path / "a"])


def test_a_run_that_does_not_say_its_test_set_is_refused(synthetic: ImageDataset, tmp_path: Path) -> None:
    finished(synthetic, range(40), tmp_path / "a")
    (tmp_path / "a" / "data.json").write_text("{}")
    _write_digests(tmp_path / "a")
    with pytest.raises(AttireError, match="does not say which test set it was"):
        compare([tmp_path / "a", tmp_path / "a"])


def test_disagreements_are_sorted_by_who_is_right(synthetic: ImageDataset, tmp_path: Path) -> None:
    first = finished(synthetic, range(30), tmp_path / "a")
    second = finished(synthetic, range(20, 60), tmp_path / "b")
    titles, rows = zip(*_disagreements(first, second), strict=True)
    assert [sorted(numbers.tolist()) for numbers in rows] == [list(range(20)), list(range(30, 60)), []]
    assert titles[1] == "Only the second is right: 30"


def test_the_page_shows_the_images_where_they_still_are(synthetic: ImageDataset, tmp_path: Path) -> None:
    csv = tmp_path / "test.csv"
    write_csv(synthetic, csv)
    named = ImageDataset(synthetic.images, synthetic.labels, synthetic.classes, csv.name)
    finished(named, range(50), tmp_path / "a", csv)
    finished(named, range(10, 60), tmp_path / "b", csv)
    comparison = compare([tmp_path / "a", tmp_path / "b"])
    page = write_comparison(comparison, tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 20
    assert "no longer where" not in page
    assert json.loads((tmp_path / "page.json").read_text())["pairs"][0]["changed"] == 20
    csv.unlink()
    page = write_comparison(comparison, tmp_path / "page.html").read_text()
    assert "no longer where these runs found them" in page
    assert "data:image" not in page
