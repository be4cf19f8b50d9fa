"""A linear classifier in closed form: ridge regression onto one-hot labels (Rifkin and Klautau 2004, one-vs-all)."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # times the mean eigenvalue's order, the mean of the Gram matrix's diagonal
_COLUMNS = 4096  # features standardised and multiplied at a time: 4,000 rows take 64 MB


def _ridge_scores(
    features: NDArray[np.float16], labels: NDArray[np.int64], scored: NDArray[np.float16], classes: int
) -> dict[float, Tensor]:
    """Class scores (m, K) of the rows `scored` (m, D) for each penalty, fitted on `features` (n, D).

    Features are standardised with the moments of the rows that fit. Solved in the dual, an (n, n) system, which is
    the smaller one for the thousands of features and few thousand rows this is for; memory 4 n (n + m) bytes.
    """
    gram, cross = _products(features, scored)
    targets = torch.nn.functional.one_hot(torch.from_numpy(labels), classes).float()
    prior = targets.mean(0)
    level = gram.diagonal().mean()
    found = {}
    for penalty in _PENALTIES:
        factor = torch.linalg.cholesky(gram + penalty * level * torch.eye(len(gram)))
        found[penalty] = cross @ torch.cholesky_solve(targets - prior, factor) + prior  # (m, K)
    return found


def _products(features: NDArray[np.float16], scored: NDArray[np.float16]) -> tuple[Tensor, Tensor]:
    """(n, n) and (m, n) inner products of standardised rows, over D, a block of columns at a time."""
    n, width = features.shape
    gram, cross = torch.zeros(n, n), torch.zeros(len(scored), n)
    for start in range(0, width, _COLUMNS):
        x = torch.from_numpy(np.ascontiguousarray(features[:, start : start + _COLUMNS])).float()
        other = torch.from_numpy(np.ascontiguousarray(scored[:, start : start + _COLUMNS])).float()
        deviation, mean = torch.std_mean(x, 0)
        scale = deviation + 0.05 * deviation.mean() + 1e-6  # as training standardises
        x, other = (x - mean) / scale, (other - mean) / scale
        gram.addmm_(x, x.T)
        cross.addmm_(other, x.T)
    return gram / width, cross / width


def best_ridge(
    features: NDArray[np.float16],
    labels: NDArray[np.int64],
    scored: NDArray[np.float16],
    truth: Sequence[int] | NDArray[np.int64],
    classes: int,
) -> tuple[int, float]:
    """(right answers, penalty) of the penalty that gets most of `scored` right."""
    answers = torch.from_numpy(np.asarray(truth))
    scores = _ridge_scores(features, labels, scored, classes)
    right = {penalty: int((found.argmax(1) == answers).sum()) for penalty, found in scores.items()}
    penalty = max(right, key=lambda p: right[p])
    return right[penalty], penalty
