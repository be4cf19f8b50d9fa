"""The parity check: an export against its bundle on the same labelled images, which decides whether it is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from attire.data.dataset import ImageDataset
from attire.errors import AttireError
from attire.evaluation.intervals import Interval, paired_difference, wilson
from attire.inference.classifier import Classifier
from attire.inference.runtimes import ExportedModel
from attire.progress import NoProgress, Progress, in_batches

_MAX_DIFFERENCE = 1e-4  # of a probability in fp32
_MAX_DISTANCE_DIFFERENCE = 1e-3  # relative: roots of a difference of squares; 5e-6 for `fast`, 1e-4 with 60 images
_PART = 250  # images answered between two signs of progress


@dataclass(frozen=True)
class BundleAnswers:
    """The bundle's probabilities (n, K), and its distances (n,) where it has an OODDetector."""

    probabilities: NDArray[np.float32]
    distances: NDArray[np.float32] | None

    @classmethod
    def of(cls, classifier: Classifier, images: NDArray[np.uint8], progress: Progress | None = None) -> Self:
        progress = progress or NoProgress()
        probabilities = [classifier.predict_proba(part) for part in in_batches(images, _PART, "Bundle", progress)]
        if classifier.ood_detector is None:
            return cls(np.concatenate(probabilities), None)
        distances = [classifier.distances(part) for part in in_batches(images, _PART, "Distances", progress)]
        return cls(np.concatenate(probabilities), np.concatenate(distances))


@dataclass(frozen=True)
class ParityCheck:
    """How an export compares with its bundle on n labelled images.

    agreement: fraction of images given the same class; max_difference: of a probability; accuracy: of the export;
    accuracy_change: the export's accuracy minus the bundle's, paired; max_distance_difference: relative, None where the
    export gives no distances; changed_verdicts: images that one calls out-of-distribution and the other does not.
    """

    n: int
    agreement: Interval
    max_difference: float
    accuracy: Interval
    accuracy_change: Interval
    max_distance_difference: float | None = None
    changed_verdicts: int = 0

    @classmethod
    def measure(
        cls, exported: ExportedModel, bundle: BundleAnswers, data: ImageDataset, progress: Progress | None = None
    ) -> Self:
        """Run the export in its own runtime over all images of `data`."""
        parts = in_batches(data.images, _PART, "Export", progress or NoProgress())
        answers = [exported.probabilities_and_distances(part) for part in parts]
        probabilities = np.concatenate([part for part, _ in answers])
        expected = bundle.probabilities
        if probabilities.shape != expected.shape or not np.isfinite(probabilities).all():
            what = f"its answers are {probabilities.shape}, expected {expected.shape} finite values"
            raise AttireError(exported.path, what)
        distance_difference, changed_verdicts = None, 0
        distances = [part for _, part in answers if part is not None]
        if distances and bundle.distances is not None and exported.threshold is not None:
            measured, wanted = np.concatenate(distances), bundle.distances
            distance_difference = float((np.abs(measured - wanted) / np.maximum(wanted, 1)).max())
            changed_verdicts = int(((measured > exported.threshold) != (wanted > exported.threshold)).sum())
        same = probabilities.argmax(1) == expected.argmax(1)
        right, right_before = probabilities.argmax(1) == data.labels, expected.argmax(1) == data.labels
        return cls(
            len(data),
            agreement=wilson(int(same.sum()), len(data)),
            max_difference=float(np.abs(probabilities - expected).max()),
            accuracy=wilson(int(right.sum()), len(data)),
            accuracy_change=paired_difference(right_before, right),
            max_distance_difference=distance_difference,
            changed_verdicts=changed_verdicts,
        )

    def require(self, precision: str, max_drop: float, path: Path) -> None:
        """Raises AttireError where the export is not as good as its bundle. max_drop: of accuracy, a fraction."""
        unequal = (
            self.agreement.value < 1
            or self.max_difference > _MAX_DIFFERENCE
            or self.changed_verdicts
            or (self.max_distance_difference or 0) > _MAX_DISTANCE_DIFFERENCE
        )
        if precision == "fp32" and unequal:
            raise AttireError(path, f"not written, since it is not equal to the bundle: {self}")
        if -self.accuracy_change.value > max_drop:
            loss = -100 * self.accuracy_change.value
            what = f"not written: {precision} loses {loss:.2f} points, allowed {100 * max_drop:g}"
            raise AttireError(path, what, str(self), "give --max-drop, or another --precision")

    def to_json(self) -> dict[str, Any]:
        values = {
            "n": self.n,
            "max_difference": self.max_difference,
            "agreement": self.agreement.to_json(),
            "accuracy": self.accuracy.to_json(),
            "accuracy_change": self.accuracy_change.to_json(),
        }
        if self.max_distance_difference is None:
            return values
        distance = {"max_distance_difference": self.max_distance_difference, "changed_verdicts": self.changed_verdicts}
        return {**values, **distance}

    def __str__(self) -> str:
        same = f"same class on {100 * self.agreement.value:.2f} % ({self.agreement.span()}, n = {self.n:,})"
        accuracy = f"accuracy {self.accuracy.percent()}, change {self.accuracy_change.points()}"
        distances = ""
        if self.max_distance_difference is not None:
            distances = f", distances within {self.max_distance_difference:.1e}, {self.changed_verdicts} other verdicts"
        return f"{same}, probabilities within {self.max_difference:.1e}{distances}, {accuracy}"
