"""A linear classifier in closed form: ridge regression onto one-hot labels (Rifkin and Klautau 2004, one-vs-all)."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attire.features.sources import Standardiser

_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # times the mean of the Gram matrix's diagonal
_COLUMNS = 4096  # features standardised and multiplied at a time: 4,000 rows take 64 MB


def _ridge_scores(
    features: NDArray[np.float16], labels: NDArray[np.int64], scored: NDArray[np.float16], classes: int
) -> dict[float, Tensor]:
    """Class scores (m, K) of the rows `scored` (m, D) for each penalty, fitted on `features` (n, D).

    Features are standardised with the moments of the rows that are fitted on. The dual is solved, an (n, n) system: it
    is smaller than the (D, D) one, since there are more features than rows. Memory: 4 n (n + m) bytes.
    """
    gram, cross = _products(features, scored)
    targets = torch.nn.functional.one_hot(torch.from_numpy(labels), classes).float()
    prior = targets.mean(0)
    level = gram.diagonal().mean()
    scores = {}
    for penalty in _PENALTIES:
        factor = torch.linalg.cholesky(gram + penalty * level * torch.eye(len(gram)))
        scores[penalty] = cross @ torch.cholesky_solve(targets - prior, factor) + prior  # (m, K)
    return scores


def _products(features: NDArray[np.float16], scored: NDArray[np.float16]) -> tuple[Tensor, Tensor]:
    """(n, n) and (m, n) inner products of standardised rows, over D, a block of columns at a time."""
    n, width = features.shape
    gram, cross = torch.zeros(n, n), torch.zeros(len(scored), n)
    for start in range(0, width, _COLUMNS):
        part = slice(start, start + _COLUMNS)
        x, other = (torch.from_numpy(np.ascontiguousarray(rows[:, part])).float() for rows in (features, scored))
        standardise = Standardiser.fit(iter([x]))
        x, other = standardise(x), standardise(other)
        gram.addmm_(x, x.T)
        cross.addmm_(other, x.T)
    return gram / width, cross / width


def best_ridge(
    features: NDArray[np.float16],
    labels: NDArray[np.int64],
    scored: NDArray[np.float16],
    scored_labels: NDArray[np.int64],
    classes: int,
) -> tuple[int, float]:
    """(correct predictions, penalty) of the penalty that gets most of the rows `scored` right."""
    truth = torch.from_numpy(scored_labels)
    scores = _ridge_scores(features, labels, scored, classes)
    correct = {penalty: int((score.argmax(1) == truth).sum()) for penalty, score in scores.items()}
    penalty = max(correct, key=lambda p: correct[p])
    return correct[penalty], penalty
