"""Labels that the rest of the data contradicts, and images that stand apart from it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree
from torch import Tensor

from attire.analysis.duplicates import Advance, Images, Rows, contrast_of
from attire.errors import AttireError
from attire.evaluation.calibration import fit_temperature, softmax
from attire.features.sources import Standardiser

_FOLDS = 5
# On the diagonal of the Gram matrix of standardised features: worth so many rows. The log loss of 600, 3,000, 10,000
# and 70,000 rows is lowest at 1,800, 3,000, 3,000 and 700.
_PENALTY = 3000.0
_AXES = 12  # principal axes of the features that say how far an image is from others
_NEIGHBOURS = 5
FAR = 2.75  # times the median distance to the fifth neighbour
_PANEL = 1024  # columns of a Gram matrix at a time
_BLANK = 5.0  # grey levels of contrast; the flattest of the 70,000 images of Fashion-MNIST has 16.5

Blocks = Callable[[], Iterator[Tensor]]  # features (b, D) of all rows in order, made anew at every call


@dataclass(frozen=True)
class _Reading:
    """What features say of every row: class scores (n, K) by a classifier that had not seen it; its place (n, AXES)."""

    scores: NDArray[np.float32]
    places: NDArray[np.float32]


def assign_folds(labels: Rows, first: Rows, seed: int = 0) -> Rows:
    """(n,) of 0 .. FOLDS - 1, drawn by `seed`, each class spread evenly; equal images (see `first_of`) stay together.

    Together, since a copy in another fold would vouch for a wrong label.
    """
    folds = np.empty(len(labels), dtype=np.int64)
    folds[np.lexsort((np.random.default_rng(seed).random(len(labels)), labels))] = np.arange(len(labels)) % _FOLDS
    return folds[first]


def read_features(
    blocks: Blocks, labels: Rows, folds: Rows, classes: int, advance: Advance = lambda *_: None
) -> _Reading:
    """Out-of-fold scores by ridge regression onto one-hot labels, in closed form, and principal components.

    Three passes over the features: moments, the Gram matrix of each fold, scores. A fold's classifier is fitted on
    all rows' Gram matrix less the fold's own, so that each row is multiplied once. Memory: FOLDS * D * D * 4 bytes.
    """
    n = len(labels)
    scale = Standardiser.fit(_followed(blocks(), "Moments", n, advance))
    targets = torch.nn.functional.one_hot(torch.from_numpy(labels), classes).float()
    gram, cross = _fold_products(_followed(blocks(), "Folds", n, advance), scale, targets, folds)
    priors = torch.stack([targets[torch.from_numpy(folds != fold)].mean(0) for fold in range(_FOLDS)])  # (FOLDS, K)
    maps = torch.cat([*_solve(gram, cross, priors, advance), _principal_axes(gram.sum(0))], dim=1)
    scores, places = np.empty((n, classes), np.float32), np.empty((n, maps.shape[1] - _FOLDS * classes), np.float32)
    start = 0
    for block in _followed(blocks(), "Scores", n, advance):
        found = scale(block) @ maps  # (b, FOLDS * K + AXES)
        rows = slice(start, start + len(block))
        own = torch.from_numpy(folds[rows])
        by_fold = found[:, : _FOLDS * classes].reshape(-1, _FOLDS, classes)
        scores[rows] = (by_fold[torch.arange(len(block)), own] + priors[own]).numpy()
        places[rows] = found[:, _FOLDS * classes :].numpy()
        start += len(block)
    return _Reading(scores, places)


def _followed(blocks: Iterator[Tensor], stage: str, total: int, advance: Advance) -> Iterator[Tensor]:
    done = 0
    for block in blocks:
        advance(stage, done, total)
        yield block
        done += len(block)
    advance(stage, done, total)


def _fold_products(
    blocks: Iterator[Tensor], scale: Standardiser, targets: Tensor, folds: Rows
) -> tuple[Tensor, Tensor]:
    """Of each fold's rows: features times features (FOLDS, D, D), features times targets (FOLDS, D, K)."""
    gram, cross, start = torch.empty(0), torch.empty(0), 0
    for block in blocks:
        x = scale(block)
        if not len(gram):
            gram = torch.zeros(_FOLDS, x.shape[1], x.shape[1])
            cross = torch.zeros(_FOLDS, x.shape[1], targets.shape[1])
        here = torch.from_numpy(folds[start : start + len(x)])
        for fold in range(_FOLDS):
            mine = here == fold
            own = x[mine]
            for column in range(0, x.shape[1], _PANEL):  # what lies above the panels on the diagonal is a mirror image
                part = slice(column, column + _PANEL)
                gram[fold, column:, part].addmm_(own[:, column:].T, own[:, part])
            cross[fold].addmm_(own.T, targets[start : start + len(x)][mine])
        start += len(x)
    return gram.tril() + gram.tril(-1).mT, cross


def _solve(gram: Tensor, cross: Tensor, priors: Tensor, advance: Advance) -> Iterator[Tensor]:
    """For each fold the map (D, K) from standardised features to scores less their prior, fitted on the others."""
    whole, answers = gram.sum(0), cross.sum(0)
    for fold in range(_FOLDS):
        advance("Classifiers", fold, _FOLDS)
        rest = whole - gram[fold]
        rest.diagonal().add_(_PENALTY)
        yield torch.cholesky_solve(answers - cross[fold], torch.linalg.cholesky(rest))
    advance("Classifiers", _FOLDS, _FOLDS)


def _principal_axes(gram: Tensor, passes: int = 6) -> Tensor:
    """(D, AXES): leading eigenvectors by subspace iteration (Halko et al. 2011), from a fixed start."""
    width = min(4 * _AXES, len(gram))
    basis = torch.randn(len(gram), width, generator=torch.Generator().manual_seed(0))
    for _ in range(passes):
        basis, _ = torch.linalg.qr(gram @ basis)
    turn: Tensor = torch.linalg.eigh(basis.T @ gram @ basis)[1]
    return basis.matmul(turn[:, -_AXES:].flip(1))


def probabilities(scores: NDArray[np.float32], labels: Rows) -> NDArray[np.float64]:
    """(n, K): softmax of the scores, with the temperature that suits the labels as they stand."""
    return softmax(scores, fit_temperature(scores, labels))


def rank_suspects(labels: Rows, found: NDArray[np.float64]) -> Rows:
    """Rows whose label is probably wrong by confident learning (Northcutt et al. 2021), the least likely label first.

    found: out-of-fold probabilities (n, K). cleanlab's `find_label_issues` with its defaults, ranked by the
    probability of the given label: of 300 planted errors in 70,000 rows the first 600 held 262 so, 217 by margin.
    """
    if len(np.unique(labels)) < 2:
        return np.empty(0, dtype=np.int64)
    search = cleanlab_filter().find_label_issues
    return np.asarray(search(labels, found, return_indices_ranked_by="self_confidence", n_jobs=1), dtype=np.int64)


def cleanlab_filter() -> Any:
    """The module, or an AttireError where the extra is not installed."""
    try:
        from cleanlab import filter as module
    except ImportError as error:
        raise AttireError("cleanlab", "not installed", do="pip install 'attire[audit]'") from error
    return module


def remoteness(places: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n,): the distance to the fifth nearest neighbour, in medians of it; above `FAR` an image stands apart."""
    if len(places) <= _NEIGHBOURS:
        return np.ones(len(places))
    distance, _ = KDTree(places).query(places, [_NEIGHBOURS + 1], workers=-1)  # the first is the row itself
    return np.asarray(distance[:, 0] / max(float(np.median(distance)), 1e-12))


def odd_images(images: Images) -> tuple[Rows, Rows]:
    """(blank, inverted) rows: hardly any contrast; a bright frame, most of it, around something darker.

    Of the 70,000 images of Fashion-MNIST none is called either; of their negatives 99.98 % are called inverted.
    """
    blank = contrast_of(images) < _BLANK
    inside = np.zeros((28, 28), dtype=np.bool_)
    inside[1:-1, 1:-1] = True
    frame, middle = images[:, ~inside], images[:, inside]  # (n, 108), (n, 676)
    inverted = (np.median(frame, axis=1) > 127) & (frame.mean(axis=1) > middle.mean(axis=1)) & ~blank
    return np.flatnonzero(blank), np.flatnonzero(inverted)
