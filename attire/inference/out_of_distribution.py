"""Out-of-distribution detection: how far a picture lies from the training images, and where the threshold is."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attire.data.dataset import RowIndices, ViewIndices
from attire.errors import AttireError
from attire.evaluation.intervals import wilson
from attire.features.sources import Standardiser

_FALSE_ALARM_RATE = 0.05  # fraction of garments that may be called out-of-distribution; it sets the threshold
_SHRINKAGE = 0.1  # 0.01 detected the same outliers (docs/log.md, Reject); more is safer where training rows are few
_FIT_ROWS = 5000  # with 55,000 rows, or with 200, the detected fractions differed by less than a point
_BATCH = 512  # rows pooled at a time
_TENSORS = ("centre", "class_means", "whitening")


class _Source(Protocol):
    """Features in batches (b, D), and what they were standardised with."""

    @property
    def standardise(self) -> Standardiser: ...

    def batches(self, order: RowIndices, batch_size: int, views: ViewIndices | None) -> Iterator[Tensor]: ...


@dataclass(frozen=True, eq=False)
class OODDetector:
    """Mahalanobis distance of pooled backbone features to the nearest class mean (Lee et al. 2018), and its threshold.

    A feature map is averaged over its places, one value a channel, and its square root taken: activations after a
    ReLU are skewed, and under the root their spread depends less on their size (Bartlett 1936). All classes share one
    covariance. A head that was trained with outlier exposure (Hendrycks et al. 2019) is unsure of what is no garment:
    its answer's -ln(largest probability) then adds to the distance. All of it is plain products and sums, so that it
    can be exported with the network.

    centre: (C,); whitening: (C, C), maps centred values to unit covariance; class_means: (K, C), whitened;
    calibration_rows: the number of rows that set the threshold; false_alarm_rate: the fraction of those beyond it;
    confidence_weight: the distance that each unit of -ln(largest probability) adds, 0 where probabilities do not count.
    """

    PREFIX: ClassVar[str] = "ood."  # of the tensors' names in a bundle

    centre: Tensor
    whitening: Tensor
    class_means: Tensor
    threshold: float
    calibration_rows: int
    false_alarm_rate: float = _FALSE_ALARM_RATE
    confidence_weight: float = 0.0

    @classmethod
    def from_bundle(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any], channels: int, where: Any) -> Self:
        """The detector that `tensors` and `to_json` describe.

        channels: C of the features that the bundle's head reads; where: the bundle, for error messages. Raises
        AttireError where a tensor is missing, misshapen or not finite, or a value is impossible.
        """
        values = {name: tensors.get(cls.PREFIX + name, torch.empty(0)) for name in _TENSORS}
        centre, whitening, class_means = values["centre"], values["whitening"], values["class_means"]
        square = (channels, channels)
        if centre.shape != (channels,) or whitening.shape != square or class_means.shape[1:] != (channels,):
            shapes = ", ".join(str(tuple(value.shape)) for value in values.values())
            raise AttireError(where, f"ood: expected tensors for {channels} channels, found {shapes}")
        if not len(class_means) or not all(torch.isfinite(value).all() for value in values.values()):
            raise AttireError(where, "ood: no class means, or values that are not finite", do="use a fresh copy")
        try:
            threshold, rate = float(about["threshold"]), float(about["false_alarm_rate"])
            rows, weight = int(about["calibration_rows"]), float(about.get("confidence_weight", 0.0))
            if not (0 <= threshold < math.inf and 0 < rate < 1 and 0 <= weight < math.inf):
                raise ValueError(f"threshold {threshold}, false_alarm_rate {rate}, confidence_weight {weight}")
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__} {error}"[:80]
            raise AttireError(where, "ood: not what a bundle holds", reason, "use a fresh copy") from error
        return cls(centre, whitening, class_means, threshold, rows, rate, weight)

    def distances(self, features: Tensor, probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
        """The distance of each picture from the training images, (n,) float32.

        It is 0 at a class mean and about the square root of C for a garment. features: (n, D) in C, H, W order;
        probabilities: (n, K), calibrated.
        """
        return self.distances_of_pooled(pool_features(features.cpu(), len(self.centre)), probabilities)

    def distances_of_pooled(self, x: Tensor, probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
        """As `distances`, of features (n, C) that `pool_features` has pooled."""
        with torch.inference_mode():
            distances = mahalanobis_distance(x, self.centre, self.whitening, self.class_means)
            confidence = torch.from_numpy(probabilities)
            return add_confidence_term(distances, confidence, self.confidence_weight).numpy()

    def evaluate(self, source: _Source, rows: RowIndices, probabilities: NDArray[np.floating[Any]]) -> dict[str, Any]:
        """The "ood" block of metrics.json: how many of these rows, garments all, are called out-of-distribution.

        probabilities: the calibrated answers (n, K) for these rows.
        """
        x = _pool_rows(source, rows, len(self.centre))
        outliers = self.distances_of_pooled(x, probabilities.astype(np.float32)) > self.threshold
        return {**self.to_json(), "test": wilson(int(outliers.sum()), len(outliers)).to_json()}

    def tensors(self) -> dict[str, Tensor]:
        """What a bundle stores, by name."""
        return {self.PREFIX + name: getattr(self, name).contiguous() for name in _TENSORS}

    def to_json(self) -> dict[str, Any]:
        """The numbers that `model.json` states."""
        values = {
            "threshold": self.threshold,
            "calibration_rows": self.calibration_rows,
            "false_alarm_rate": self.false_alarm_rate,
        }
        return {**values, "confidence_weight": self.confidence_weight} if self.confidence_weight else values


# The operations, which an export holds too.


def pool_features(features: Tensor, channels: int) -> Tensor:
    """Square roots of the channels' means (n, C) of features (n, C * H * W), which are not negative."""
    return features.float().reshape(-1, channels, features.shape[1] // channels).mean(2).clamp_min(0).sqrt()


def mahalanobis_distance(x: Tensor, centre: Tensor, whitening: Tensor, class_means: Tensor) -> Tensor:
    """Distance (n,) of pooled rows (n, C) from the nearest of the whitened class means (K, C)."""
    z = (x - centre) @ whitening
    squares = z.square().sum(1, keepdim=True) - 2 * z @ class_means.T + class_means.square().sum(1)  # (n, K)
    return squares.amin(1).clamp_min(0).sqrt()


def add_confidence_term(distances: Tensor, probabilities: Tensor, weight: float) -> Tensor:
    """Distances (n,) plus `weight` times -ln of the largest of the probabilities (n, K)."""
    return distances - weight * probabilities.amax(1).log() if weight else distances


# Fitting.


def split_calibration_rows(train: RowIndices, val: RowIndices, seed: int) -> tuple[RowIndices, RowIndices]:
    """Rows to fit the detector on and rows to set its threshold on, at most 5,000 of each, in ascending order.

    Validation rows set the threshold. Where a recipe has none, a tenth of the training rows do, and the detector is
    fitted on the others. That is fair, although the head has seen them: nothing here comes from the head.
    """
    order = np.random.default_rng(seed).permutation(train)
    calibration = val if len(val) else order[: len(order) // 10]
    rest = order if len(val) else order[len(order) // 10 :]
    return np.sort(rest[:_FIT_ROWS]), np.sort(calibration[:_FIT_ROWS])


def fit_detector(
    source: _Source,
    labels: NDArray[np.int64],
    fit_rows: RowIndices,
    calibration_rows: RowIndices,
    *,
    channels: int,
    fit_views: Sequence[int],
    calibration_views: Sequence[int],
    probabilities: Callable[[RowIndices, int], NDArray[np.float32]] | None = None,
) -> OODDetector | None:
    """An OODDetector from `split_calibration_rows`' two parts; None where there are too few rows for a threshold.

    fit_views, calibration_views: numbers of the source's views. Without mirrored views a quarter of mirrored garments
    were false alarms, nearly all of them shoes; without drawn ones 27 instead of 20 of 33 clear garments in photographs
    and drawings (docs/log.md). probabilities: gives calibrated answers (n, K) for rows in a view; None where they shall
    not count.
    """
    if not len(fit_rows):
        return None
    parts = [_pool_rows(source, fit_rows, channels, view) for view in fit_views]
    repeated = torch.from_numpy(np.tile(labels[fit_rows], len(parts)))
    centre, whitening, class_means = _fit_classes(torch.cat(parts), repeated)
    x = torch.cat([_pool_rows(source, calibration_rows, channels, view) for view in calibration_views])
    confidence, weight = np.ones((len(x), 1), np.float32), 0.0
    if probabilities and len(calibration_rows):
        confidence = np.concatenate([probabilities(calibration_rows, view) for view in calibration_views])
        distances = mahalanobis_distance(x, centre, whitening, class_means)
        weight = _find_confidence_weight(distances, torch.from_numpy(confidence))
    detector = OODDetector(centre, whitening, class_means, 0.0, len(x), confidence_weight=weight)
    threshold = _find_threshold(detector.distances_of_pooled(x, confidence))
    return None if threshold is None else replace(detector, threshold=threshold)


def _pool_rows(source: _Source, rows: RowIndices, channels: int, view: int = 0) -> Tensor:
    """`pool_features` of these rows (n, C) in the view of this number; the source's scaling is undone."""
    parts = []
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        for x in source.batches(part, _BATCH, np.full(len(part), view)):
            parts.append(pool_features(source.standardise.undo(x), channels))
    return torch.cat(parts) if parts else torch.empty(0, channels)


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
    whitening = torch.linalg.inv(torch.linalg.cholesky(shrunk)).T
    means = (means - centre) @ whitening
    return centre.float(), whitening.float(), means[means.isfinite().all(1)].float()


def _find_threshold(distances: NDArray[np.floating[Any]], rate: float = _FALSE_ALARM_RATE) -> float | None:
    """The distance that a further garment exceeds with a probability of at most `rate`; None where rows are too few.

    Split conformal prediction (Vovk et al. 2005): of n distances the one of rank ceil((n + 1)(1 - rate)), which needs
    19 rows for a rate of 0.05. The means and the covariance must come from other rows.
    """
    rank = math.ceil((len(distances) + 1) * (1 - rate) - 1e-9)
    return float(np.sort(distances)[rank - 1]) if rank <= len(distances) else None


def _find_confidence_weight(distances: Tensor, probabilities: Tensor) -> float:
    """The weight that lets distance (n,) and -ln of the largest probability spread alike among garments."""
    log_confidence = probabilities.amax(1).log()
    return float(distances.std() / log_confidence.std().clamp_min(1e-3))
