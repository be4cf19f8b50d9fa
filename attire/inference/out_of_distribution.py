"""Reject: how far a picture lies from the training images, and from where on it is none of the classes."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attire.data.dataset import RowIndices, Views
from attire.errors import AttireError
from attire.evaluation.intervals import wilson
from attire.features.sources import Standardiser

_FALSE_REJECTS = 0.05  # share of garments that may be turned away; the threshold is set for it
_SHRINKAGE = 0.1  # 0.01 rejected the same strangers (docs/log.md, Reject); more is safer where training rows are few
_FIT_ROWS = 5000  # with 55,000 rows, or with 200, the shares rejected differed by less than a point
_BATCH = 512  # rows pooled at a time
TENSORS = ("centre", "means", "whiten")
PREFIX = "ood."


class _Source(Protocol):
    """Features in batches (b, D), and what they were standardised with."""

    @property
    def standardise(self) -> Standardiser: ...

    def batches(self, order: RowIndices, batch_size: int, views: Views | None) -> Iterator[Tensor]: ...


@dataclass(frozen=True, eq=False)
class OODDetector:
    """Mahalanobis distance to the nearest class mean (Lee et al. 2018), of pooled backbone features, with its threshold.

    A feature map is averaged over its places, one value a channel, and its square root taken: activations after a
    ReLU are skewed, and under the root their spread depends less on their size (Bartlett 1936). All classes share one
    covariance. A classifier that was trained on strange shapes as well is unsure of what is no garment: `doubt` is
    added for each unit of -ln of its largest probability. Plain products and sums, so that it can be exported with the
    network.

    centre: (C,); whiten: (C, C), maps centred values to unit covariance; means: (K, C), whitened; rows: how many the
    threshold was set on; rate: the share of those that it turns away; doubt: 0 where probabilities do not count.
    """

    centre: Tensor
    whiten: Tensor
    means: Tensor
    threshold: float
    rows: int
    rate: float = _FALSE_REJECTS
    doubt: float = 0.0

    def distances(self, features: Tensor, probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n,) float32, 0 at a class's mean, about the square root of C for a garment, and farther by what the answer's
        doubt adds; features: (n, D) in C, H, W; probabilities: (n, K), calibrated."""
        return self.of(pooled(features.cpu(), len(self.centre)), torch.from_numpy(probabilities))

    def of(self, x: Tensor, probabilities: Tensor) -> NDArray[np.float32]:
        """The same of pooled rows (n, C)."""
        with torch.inference_mode():
            found = nearest(x, self.centre, self.whiten, self.means)
            return doubted(found, probabilities, self.doubt).numpy()

    def tensors(self) -> dict[str, Tensor]:
        """What a bundle stores, by name."""
        return {PREFIX + name: getattr(self, name).contiguous() for name in TENSORS}

    def about(self) -> dict[str, Any]:
        """What `model.json` says of it."""
        told = {"threshold": self.threshold, "rows": self.rows, "rate": self.rate}
        return {**told, "doubt": self.doubt} if self.doubt else told


def restore(tensors: dict[str, Tensor], about: dict[str, Any], channels: int, where: Any) -> OODDetector:
    """The OODDetector of a bundle. Raises AttireError where a tensor is missing, misshapen or not finite."""
    found = [tensors.get(PREFIX + name, torch.empty(0)) for name in TENSORS]
    centre, means, whiten = found
    if centre.shape != (channels,) or whiten.shape != (channels, channels) or means.shape[1:] != (channels,):
        shapes = ", ".join(str(tuple(value.shape)) for value in found)
        raise AttireError(where, f"ood: expected tensors for {channels} channels, found {shapes}")
    if not len(means) or not all(torch.isfinite(value).all() for value in found):
        raise AttireError(where, "ood: no class means, or values that are not finite", do="use a fresh copy")
    try:
        threshold, rows, rate = float(about["threshold"]), int(about["rows"]), float(about["rate"])
        doubt = float(about.get("doubt", 0.0))
        if not (0 <= threshold < math.inf and 0 < rate < 1 and 0 <= doubt < math.inf):
            raise ValueError(f"threshold {threshold}, rate {rate}, doubt {doubt}")
    except (KeyError, TypeError, ValueError) as error:
        told = f"{type(error).__name__} {error}"[:80]
        raise AttireError(where, "ood: not what a bundle holds", told, "use a fresh copy") from error
    return OODDetector(centre, whiten, means, threshold, rows, rate, doubt)


def pooled(features: Tensor, channels: int) -> Tensor:
    """Square roots of the channels' means (n, C) of features (n, C * H * W), which are not negative."""
    return features.float().reshape(-1, channels, features.shape[1] // channels).mean(2).clamp_min(0).sqrt()


def nearest(x: Tensor, centre: Tensor, whiten: Tensor, means: Tensor) -> Tensor:
    """Distance (n,) of pooled rows (n, C) from the nearest of the whitened means (K, C)."""
    z = (x - centre) @ whiten
    squares = z.square().sum(1, keepdim=True) - 2 * z @ means.T + means.square().sum(1)  # (n, K)
    return squares.amin(1).clamp_min(0).sqrt()


def doubted(distances: Tensor, probabilities: Tensor, doubt: float) -> Tensor:
    """Distances (n,) with what the largest of the probabilities (n, K) adds."""
    return distances - doubt * probabilities.amax(1).log() if doubt else distances


def _fit_classes(x: Tensor, labels: Tensor, shrinkage: float = _SHRINKAGE) -> tuple[Tensor, Tensor, Tensor]:
    """Centre (C,), whitening (C, C) and whitened class means (K, C), float32, of pooled rows (n, C) with labels (n,).

    The covariance within classes is shrunk towards a multiple of the identity (Ledoit and Wolf 2004) and inverted by
    its Cholesky factor, in double precision. Classes without a row have no mean.
    """
    x = x.double()
    centre = x.mean(0)
    means = torch.stack([x[labels == k].mean(0) for k in range(int(labels.max()) + 1)])  # (K, C)
    rest = x - means[labels]
    covariance = rest.T @ rest / len(x)
    level = covariance.diagonal().mean()
    shrunk = (1 - shrinkage) * covariance + (shrinkage * level + 1e-12) * torch.eye(len(centre), dtype=torch.double)
    whiten = torch.linalg.inv(torch.linalg.cholesky(shrunk)).T
    means = (means - centre) @ whiten
    return centre.float(), whiten.float(), means[means.isfinite().all(1)].float()


def _find_threshold(distances: NDArray[np.floating[Any]], rate: float = _FALSE_REJECTS) -> float | None:
    """The distance that a further garment exceeds with a probability of at most `rate`; None where rows are too few.

    Split conformal (Vovk et al. 2005): of n distances the one of rank ceil((n + 1)(1 - rate)), which wants 19 rows for
    a rate of 0.05. The rows must be none that the means and the covariance came from.
    """
    rank = math.ceil((len(distances) + 1) * (1 - rate) - 1e-9)
    return float(np.sort(distances)[rank - 1]) if rank <= len(distances) else None


def share_rows(train: RowIndices, val: RowIndices, seed: int) -> tuple[RowIndices, RowIndices]:
    """Rows to fit on and rows to set the threshold on, at most FIT_ROWS of each, in ascending order.

    The threshold takes validation rows; where a recipe has none, a tenth of the training rows, which are then not
    fitted on. That is fair, although the head has seen them: nothing here comes from the head.
    """
    order = np.random.default_rng(seed).permutation(train)
    held = val if len(val) else order[: len(order) // 10]
    rest = order if len(val) else order[len(order) // 10 :]
    return np.sort(rest[:_FIT_ROWS]), np.sort(held[:_FIT_ROWS])


def _pooled_rows(source: _Source, rows: RowIndices, channels: int, view: int = 0) -> Tensor:
    """`pooled` of these rows (n, C) in the view of this number; whatever scaling `fit` uses."""
    parts = []
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        for x in source.batches(part, _BATCH, np.full(len(part), view)):
            parts.append(pooled(source.standardise.undo(x), channels))
    return torch.cat(parts) if parts else torch.empty(0, channels)


@dataclass(frozen=True)
class Fitting:
    """What a OODDetector is fitted to besides its rows: the numbers of the views to fit on, and of those that the
    threshold is set on; whether the largest probability counts; and calibrated probabilities (n, K) of rows in a view.

    Without mirrored views a quarter of mirrored garments were turned away, nearly all of them shoes; without drawn ones
    27 instead of 20 of 33 clear garments in photographs and drawings (docs/log.md).
    """

    views: Sequence[int]
    held: Sequence[int]
    doubts: bool
    answers: Callable[[RowIndices, int], NDArray[np.float32]]


def fit(
    source: _Source, labels: NDArray[np.int64], rows: tuple[RowIndices, RowIndices], channels: int, how: Fitting
) -> OODDetector | None:
    """A OODDetector from `share_rows`' two parts; None where there are too few rows for a threshold."""
    fitted, held = rows
    if not len(fitted):
        return None
    parts = [_pooled_rows(source, fitted, channels, view) for view in how.views]
    told = _fit_classes(torch.cat(parts), torch.from_numpy(np.tile(labels[fitted], len(parts))))
    x = torch.cat([_pooled_rows(source, held, channels, view) for view in how.held])
    sure, doubt = torch.ones(len(x), 1), 0.0
    if how.doubts and len(held):
        sure = torch.from_numpy(np.concatenate([how.answers(held, view) for view in how.held]))
        doubt = _find_doubt(nearest(x, *told), sure)
    ood_detector = OODDetector(*told, 0.0, len(x), doubt=doubt)
    threshold = _find_threshold(ood_detector.of(x, sure))
    return None if threshold is None else replace(ood_detector, threshold=threshold)


def _find_doubt(distances: Tensor, probabilities: Tensor) -> float:
    """The weight that lets distance (n,) and -ln of the largest probability spread alike among garments."""
    surprise = probabilities.amax(1).log()
    return float(distances.std() / surprise.std().clamp_min(1e-3))


def evaluate_ood(
    ood_detector: OODDetector, source: _Source, rows: RowIndices, probabilities: NDArray[np.floating[Any]]
) -> dict[str, Any]:
    """How many of these rows, garments all, are turned away, answered with these probabilities (n, K): the "reject"
    block of metrics.json."""
    x = _pooled_rows(source, rows, len(ood_detector.centre))
    found = ood_detector.of(x, torch.from_numpy(probabilities.astype(np.float32))) > ood_detector.threshold
    return {**ood_detector.about(), "test": wilson(int(found.sum()), len(found)).to_json()}
