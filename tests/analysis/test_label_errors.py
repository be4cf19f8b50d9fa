"""Suspect labels, folds, odd images."""

import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from attire.analysis import label_errors
from attire.analysis.label_errors import (
    _FOLDS,
    assign_folds,
    calibrate_scores,
    find_odd_images,
    find_outliers,
    find_suspect_labels,
    outlier_scores,
    score_features,
)
from attire.errors import AttireError
from attire.features.sources import Standardiser
from tests.conftest import blocks_and_noise


def features_of(labels: np.ndarray, width: int = 24, seed: int = 0) -> Tensor:
    """Rows that a linear classifier can tell apart by their label."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(3 * np.eye(10, width)[labels] + rng.normal(size=(len(labels), width)) / 2).float()


def in_blocks(rows: Tensor) -> label_errors.FeatureBlocks:
    def blocks() -> Iterator[Tensor]:
        yield from (part.clone() for part in torch.split(rows, 70))  # they are scaled in place

    return blocks


LABELS = np.arange(600) % 10


def test_folds_are_even_in_each_class_and_equal_images_stay_together() -> None:
    first = np.arange(600)
    first[[30, 450]] = 7
    folds = assign_folds(LABELS, first)
    assert folds[30] == folds[450] == folds[7]
    for label in range(10):
        counts = np.bincount(assign_folds(LABELS, np.arange(600))[label == LABELS], minlength=_FOLDS)
        assert counts.tolist() == [12] * _FOLDS


def test_scores_are_out_of_fold() -> None:
    """A row's own label has no say: features that are noise answer no better than chance."""
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=(600, 300))).float()
    features = score_features(in_blocks(noise), LABELS, assign_folds(LABELS, np.arange(600)), 10)
    assert (features.scores.argmax(1) == LABELS).mean() < 0.2


def test_scores_equal_a_ridge_regression_on_the_other_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_errors, "_PANEL", 7)
    rows, folds = features_of(LABELS), assign_folds(LABELS, np.arange(600))
    features = score_features(in_blocks(rows), LABELS, folds, 10)
    x = Standardiser.fit(iter([rows]))(rows.clone()).double()
    targets = torch.eye(10, dtype=torch.float64)[LABELS]
    rest = torch.from_numpy(folds != 2)
    prior = targets[rest].mean(0)
    gram = x[rest].T @ x[rest] + label_errors._PENALTY * torch.eye(24, dtype=torch.float64)
    expected = x[~rest] @ torch.linalg.solve(gram, x[rest].T @ targets[rest]) + prior
    assert np.abs(features.scores[folds == 2] - expected.numpy()).max() < 1e-5


def test_planted_errors_are_the_first_suspects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_errors, "_PENALTY", 1.0)
    wrong = np.array([5, 123, 377, 590])
    labels = LABELS.copy()
    labels[wrong] = (labels[wrong] + 3) % 10
    scores = score_features(in_blocks(features_of(LABELS)), labels, assign_folds(labels, np.arange(600)), 10).scores
    p = calibrate_scores(scores, labels)
    assert np.allclose(p.sum(axis=1), 1)
    assert set(wrong.tolist()) <= set(find_suspect_labels(labels, p)[:6].tolist())


def test_one_class_alone_has_no_suspects() -> None:
    assert len(find_suspect_labels(np.zeros(5, np.int64), np.full((5, 2), 0.5))) == 0


def test_without_cleanlab_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    with pytest.raises(AttireError, match=r"cleanlab: not installed; pip install 'attire\[audit\]'"):
        label_errors.import_cleanlab()


def test_what_stands_apart_is_far() -> None:
    components = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    components[11] += 20
    assert outlier_scores(components).argmax() == 11
    assert find_outliers(outlier_scores(components)).tolist()[0] == 11
    assert np.median(outlier_scores(components)) == pytest.approx(1)
    assert outlier_scores(components[:4]).tolist() == [1, 1, 1, 1]


def test_blank_and_inverted_images() -> None:
    images = blocks_and_noise(20).images
    images[:, [0, -1]] = images[:, :, [0, -1]] = 0
    images[3], images[5] = 90, 255 - images[5]
    blank, inverted = find_odd_images(images)
    assert (blank.tolist(), inverted.tolist()) == ([3], [5])
