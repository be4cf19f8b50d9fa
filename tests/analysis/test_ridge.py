"""The closed-form classifier against scikit-learn's, and what it makes of hard cases."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from attire.analysis import ridge


@pytest.fixture
def table() -> tuple[np.ndarray, np.ndarray]:
    """Ninety rows of 30 features in three classes that differ in their means."""
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    return (rng.normal(size=(90, 30)) + 1.2 * np.eye(3, 30)[labels]).astype(np.float16), labels


def test_scores_are_those_of_scikit_learns_ridge(table: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = table
    by_penalty = ridge._ridge_scores(x[:60], y[:60], x[60:], 3)
    wide = torch.from_numpy(x).float()
    deviation, mean = torch.std_mean(wide[:60], 0)
    scaled = ((wide - mean) / (deviation + 0.05 * deviation.mean() + 1e-6)).numpy()
    level = float((scaled[:60] ** 2).sum(1).mean() / 30)
    for penalty, scores in by_penalty.items():
        peer = Ridge(alpha=penalty * level * 30).fit(scaled[:60], np.eye(3)[y[:60]])
        assert np.allclose(scores.numpy(), peer.predict(scaled[60:]), atol=2e-3)


def test_columns_may_be_taken_in_blocks(table: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = table
    whole = ridge._products(x[:60], x[60:])
    monkeypatch.setattr(ridge, "_COLUMNS", 15)
    halves = ridge._products(x[:60], x[60:])
    assert torch.allclose(whole[0], halves[0], atol=0.05)  # each block is softened by its own mean deviation
    assert torch.allclose(whole[1], halves[1], atol=0.05)


def test_the_penalty_that_gets_most_right_is_chosen(table: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = table
    right, penalty = ridge.best_ridge(x[:60], y[:60], x[60:], y[60:], 3)
    scores = ridge._ridge_scores(x[:60], y[:60], x[60:], 3)
    counts = {p: int((s.argmax(1).numpy() == y[60:]).sum()) for p, s in scores.items()}
    assert right == max(counts.values()) == counts[penalty]
    assert right > 15  # ten of thirty by chance


def test_constant_features_do_no_harm(table: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = table
    x[:, 5:10] = 7
    assert all(torch.isfinite(s).all() for s in ridge._ridge_scores(x[:60], y[:60], x[60:], 3).values())
