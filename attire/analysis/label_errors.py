"""Labels that are probably wrong, images unlike all others, and blank or inverted images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree
from torch import Tensor

from attire.analysis.duplicates import Images, contrasts
from attire.data.dataset import RowIndices
from attire.errors import AttireError
from attire.evaluation.calibration import fit_temperature, softmax
from attire.features.sources import Standardiser
from attire.progress import NoProgress, Progress

_FOLDS = 5
# On the diagonal of the Gram matrix of standardised features: worth so many rows. The log loss of 600, 3,000, 10,000
# and 70,000 rows is lowest at 1,800, 3,000, 3,000 and 700.
_PENALTY = 3000.0
_AXES = 12  # principal components of the features in which an image's distance from others is taken
_NEIGHBOURS = 5
_OUTLIER = 2.75  # times the median distance to the fifth neighbour
_PANEL = 1024  # columns of a Gram matrix at a time
_BLANK = 5.0  # grey levels of contrast; the flattest of the 70,000 images of Fashion-MNIST has 16.5

FeatureBlocks = Callable[[], Iterator[Tensor]]  # features (b, D) of all rows in order, made anew at every call


@dataclass(frozen=True)
class _FeatureScores:
    """Of each row, out-of-fold class scores (n, K) and the principal components (n, _AXES) of its features."""

    scores: NDArray[np.float32]
    components: NDArray[np.float32]


def assign_folds(labels: RowIndices, first: RowIndices, seed: int = 0) -> RowIndices:
    """(n,) of 0 .. _FOLDS - 1, drawn by `seed`, each class spread evenly.

    first: see `duplicates.first_occurrences`. Equal images share a fold, since a copy in another fold would confirm a
    wrong label.
    """
    folds = np.empty(len(labels), dtype=np.int64)
    folds[np.lexsort((np.random.default_rng(seed).random(len(labels)), labels))] = np.arange(len(labels)) % _FOLDS
    return folds[first]


def score_features(
    blocks: FeatureBlocks, labels: RowIndices, folds: RowIndices, classes: int, progress: Progress | None = None
) -> _FeatureScores:
    """Out-of-fold scores by ridge regression onto one-hot labels, in closed form, and principal components.

    Three passes over the features: moments, the Gram matrix of each fold, scores. A fold's classifier is fitted on
    all rows' Gram matrix less the fold's own, so that each row is multiplied once. Memory: _FOLDS * D * D * 4 bytes.
    """
    progress = progress or NoProgress()
    n = len(labels)
    scale = Standardiser.fit(_with_progress(blocks(), "Moments", n, progress))
    targets = torch.nn.functional.one_hot(torch.from_numpy(labels), classes).float()
    gram, cross = _fold_products(_with_progress(blocks(), "Folds", n, progress), scale, targets, folds)
    priors = torch.stack([targets[torch.from_numpy(folds != fold)].mean(0) for fold in range(_FOLDS)])  # (_FOLDS, K)
    maps = torch.cat([*_solve(gram, cross, priors, progress), _principal_axes(gram.sum(0))], dim=1)
    width = _FOLDS * classes
    scores, components = np.empty((n, classes), np.float32), np.empty((n, maps.shape[1] - width), np.float32)
    start = 0
    for block in _with_progress(blocks(), "Scores", n, progress):
        mapped = scale(block) @ maps  # (b, _FOLDS * K + _AXES)
        rows = slice(start, start + len(block))
        own = torch.from_numpy(folds[rows])
        by_fold = mapped[:, :width].reshape(-1, _FOLDS, classes)
        scores[rows] = (by_fold[torch.arange(len(block)), own] + priors[own]).numpy()
        components[rows] = mapped[:, width:].numpy()
        start += len(block)
    return _FeatureScores(scores, components)


def _with_progress(blocks: Iterator[Tensor], stage: str, total: int, progress: Progress) -> Iterator[Tensor]:
    done = 0
    for block in blocks:
        progress.advance(stage, done, total)
        yield block
        done += len(block)
    progress.advance(stage, done, total)


def _fold_products(
    blocks: Iterator[Tensor], scale: Standardiser, targets: Tensor, folds: RowIndices
) -> tuple[Tensor, Tensor]:
    """Of each fold's rows: features times features (_FOLDS, D, D), features times targets (_FOLDS, D, K)."""
    gram, cross, start = torch.empty(0), torch.empty(0), 0
    for block in blocks:
        x = scale(block)
        if not len(gram):
            gram = torch.zeros(_FOLDS, x.shape[1], x.shape[1])
            cross = torch.zeros(_FOLDS, x.shape[1], targets.shape[1])
        block_folds = torch.from_numpy(folds[start : start + len(x)])
        for fold in range(_FOLDS):
            in_fold = block_folds == fold
            own = x[in_fold]
            for column in range(0, x.shape[1], _PANEL):  # what lies above the panels on the diagonal is a mirror image
                part = slice(column, column + _PANEL)
                gram[fold, column:, part].addmm_(own[:, column:].T, own[:, part])
            cross[fold].addmm_(own.T, targets[start : start + len(x)][in_fold])
        start += len(x)
    return gram.tril() + gram.tril(-1).mT, cross


def _solve(gram: Tensor, cross: Tensor, priors: Tensor, progress: Progress) -> Iterator[Tensor]:
    """For each fold the map (D, K) from standardised features to scores less their prior, fitted on the others."""
    all_gram, all_cross = gram.sum(0), cross.sum(0)
    for fold in range(_FOLDS):
        progress.advance("Classifiers", fold, _FOLDS)
        rest = all_gram - gram[fold]
        rest.diagonal().add_(_PENALTY)
        yield torch.cholesky_solve(all_cross - cross[fold], torch.linalg.cholesky(rest))
    progress.advance("Classifiers", _FOLDS, _FOLDS)


def _principal_axes(gram: Tensor, passes: int = 6) -> Tensor:
    """(D, _AXES): leading eigenvectors by subspace iteration (Halko et al. 2011), from a fixed start."""
    width = min(4 * _AXES, len(gram))
    basis = torch.randn(len(gram), width, generator=torch.Generator().manual_seed(0))
    for _ in range(passes):
        basis, _ = torch.linalg.qr(gram @ basis)
    turn: Tensor = torch.linalg.eigh(basis.T @ gram @ basis)[1]
    return basis.matmul(turn[:, -_AXES:].flip(1))


def calibrate_scores(scores: NDArray[np.float32], labels: RowIndices) -> NDArray[np.float64]:
    """Probabilities (n, K) of scores (n, K), with the temperature that fits the labels as they are."""
    return softmax(scores, fit_temperature(scores, labels))


def find_suspect_labels(labels: RowIndices, probabilities: NDArray[np.float64]) -> RowIndices:
    """Rows whose label is probably wrong by confident learning (Northcutt et al. 2021), the least likely first.

    probabilities: (n, K), out of fold. cleanlab's `find_label_issues` with its defaults, ranked by the
    probability of the given label: of 300 planted errors in 70,000 rows the first 600 held 262 so, 217 by margin.
    """
    if len(np.unique(labels)) < 2:
        return np.empty(0, dtype=np.int64)
    search = import_cleanlab().find_label_issues
    return np.asarray(
        search(labels, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1), dtype=np.int64
    )


def import_cleanlab() -> Any:
    """The module `cleanlab.filter`. Raises AttireError where the optional package is not installed."""
    try:
        from cleanlab import filter as module
    except ImportError as error:
        raise AttireError("cleanlab", "not installed", do="pip install 'attire[audit]'") from error
    return module


def outlier_scores(components: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n,): the distance to the fifth nearest neighbour, in medians of it, of rows (n, D)."""
    if len(components) <= _NEIGHBOURS:
        return np.ones(len(components))
    distance, _ = KDTree(components).query(components, [_NEIGHBOURS + 1], workers=-1)  # the first is the row itself
    return np.asarray(distance[:, 0] / max(float(np.median(distance)), 1e-12))


def find_outliers(scores: NDArray[np.float64]) -> RowIndices:
    """The rows that are unlike all others by `outlier_scores`, the farthest first."""
    rows = np.flatnonzero(scores > _OUTLIER)
    return rows[np.argsort(-scores[rows], kind="stable")]


def find_odd_images(images: Images) -> tuple[RowIndices, RowIndices]:
    """Blank rows, with hardly any contrast, and inverted rows: a mostly bright frame around something darker.

    Of the 70,000 images of Fashion-MNIST none is called either; of their negatives 99.98 % are called inverted.
    """
    blank = contrasts(images) < _BLANK
    inside = np.zeros((28, 28), dtype=np.bool_)
    inside[1:-1, 1:-1] = True
    frame, middle = images[:, ~inside], images[:, inside]  # (n, 108), (n, 676)
    inverted = (np.median(frame, axis=1) > 127) & (frame.mean(axis=1) > middle.mean(axis=1)) & ~blank
    return np.flatnonzero(blank), np.flatnonzero(inverted)
