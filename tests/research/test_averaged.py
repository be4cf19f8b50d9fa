"""Kept answers of finished runs, and which of them are averaged."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attire.data.loading import load_dataset

FOLDER = Path(__file__).parents[2] / "research"


@pytest.fixture
def averaged(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return import_module("averaged")


@pytest.mark.real
def test_kept_answers_are_what_their_runs_read(averaged: Any) -> None:
    """On the official labels; a probability that went to 16 bits may change no answer."""
    labels = {part: load_dataset(part=part).labels for part in ("train", "test")}
    paths = sorted(averaged.ANSWERS.glob("*.npz"))
    assert paths
    for path in paths:
        about, found = averaged.read(path)
        assert (found["test"].argmax(1) == labels["test"]).sum() == about["correct"]
        assert len(np.unique(found["rows"])) == 5_000
        assert 0.95 < (found["val"].argmax(1) == labels["train"][found["rows"]]).mean() < 1


def test_the_members_of_an_average_are_all_sets_and_scored_by_log_loss(averaged: Any) -> None:
    assert list(averaged.sets(["a", "b"])) == [("a",), ("b",), ("a", "b")]
    probabilities = np.array([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]])
    assert averaged.log_loss(probabilities, np.array([0, 0, 0])) == pytest.approx((np.log(2) + np.log(4)) / 3)
    assert averaged.log_loss(probabilities[2:], np.array([1])) < 14  # certain and wrong: much, not infinite
