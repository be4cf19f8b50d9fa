"""The audit as a whole: counts, accuracies with and without, the command."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from attire.analysis.audit import Audit, _break_down_accuracy, _join_near_pairs, audit
from attire.analysis.duplicates import NearPairs
from attire.errors import AttireError
from tests.command import TINY, attire

pytest.importorskip("cleanlab")


def test_what_was_planted_is_counted(planted_audit: Audit) -> None:
    counts = planted_audit.counts()
    assert counts["images"] == {"train": 60, "test": 20}
    assert counts["exact_duplicates"] == {"train": 1, "test": 0, "train and test": 1}
    assert counts["exact_duplicates_with_different_labels"] == 2
    assert counts["near_duplicates"] == {"train": 0, "test": 0, "train and test": 1}
    assert (counts["blank"], counts["inverted"]) == (1, 0)


def test_near_copies_share_a_fold() -> None:
    near = NearPairs(np.array([0, 3]), np.array([3, 5]), np.zeros(2))
    assert _join_near_pairs(np.array([0, 1, 1, 3, 4, 5, 5]), near).tolist() == [0, 1, 1, 0, 4, 0, 0]


def test_accuracy_with_and_without(planted_audit: Audit) -> None:
    """Ten of twenty right, the exact copy and the near one among them."""
    right = np.zeros(20, np.bool_)
    right[:10] = True
    accuracies = _break_down_accuracy(planted_audit.findings, 60, right)
    counts = {name: (round(x.value * x.n), x.n) for name, x in accuracies}
    assert counts["all"] == (10, 20)
    assert counts["without exact copies"] == (9, 19)
    assert counts["without exact and near copies"] == (8, 18)
    assert counts["copies alone"] == (2, 2)
    doubted = [row - 60 for row in planted_audit.findings.suspect_labels if row >= 60]
    if doubted:
        assert counts["suspect labels alone"] == (sum(row < 10 for row in doubted), len(doubted))


def test_in_one_file_every_later_copy_counts(planted: Path) -> None:
    result = audit(planted / "x_train.csv")
    assert list(result.parts) == ["all"]
    assert result.counts()["exact_duplicates"] == {"all": 1}
    accuracies = dict(result.accuracies)
    assert (accuracies["all"].n, accuracies["without exact copies"].n, accuracies["copies alone"].n) == (60, 59, 1)


def test_a_run_s_accuracy_is_taken_apart(planted: Path, here: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        done = attire("train", "--data", planted, *TINY, "--out", "run")
    assert "1 of 20 test images also stand in the training set" in done.err
    metrics = json.loads(Path("run/evaluation/metrics.json").read_text())
    result = audit(planted, run="run")
    assert result.predicted_by == "run"
    assert dict(result.accuracies)["all"].value == metrics["test"]["accuracy"]
    with pytest.raises(AttireError, match=r"run: was not tested on x_train.csv"):
        audit(planted / "x_train.csv", run="run")


def test_the_command(planted: Path, here: Path) -> None:
    done = attire("audit", planted, "--out", "found")
    assert done.status == 0
    assert "1 in train, 0 in test, 1 in train and test" in done.out
    assert done.out.rstrip().endswith("found/audit.html")
    again = attire("audit", planted, "--out", "found")
    assert (again.status, again.error) == (1, "found: the folder is not empty; give --out another name")
    metrics = json.loads(attire("audit", planted / "x_train.csv", "--test", planted / "x_test.csv", "--json").out)
    assert metrics["blank"] == 1
    assert metrics["page"] == "audit/audit.html"
