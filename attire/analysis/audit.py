"""What is wrong with a data set: duplicates, leaks between its parts, odd images, labels that are probably wrong."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attire.analysis import duplicates, label_errors
from attire.analysis.duplicates import Images, NearPairs
from attire.data.dataset import ImageDataset, RowIndices
from attire.data.loading import find_readers, load_dataset
from attire.errors import AttireError
from attire.evaluation.intervals import Interval, wilson
from attire.evaluation.run_result import load_result
from attire.features import cache
from attire.features.backbones import choose_backbone, load_backbone
from attire.features.cache import FeatureSpec
from attire.model import devices, pretrained
from attire.model.weights import read_weights, tensor_digest
from attire.progress import NoProgress, Progress
from attire.recipes import FAST
from attire.storage import memory, url_copies


@dataclass(frozen=True)
class _Findings:
    """What was found in n images, by row.

    first (n,): see `duplicates.first_occurrences`. probabilities (n, K): out of fold, by a linear classifier.
    suspect_labels: the least likely label first; outliers: the farthest first; blank, inverted: ascending.
    outlier_scores (n,): see `label_errors.outlier_scores`.
    """

    first: RowIndices
    near: NearPairs
    probabilities: NDArray[np.float64]
    suspect_labels: RowIndices
    blank: RowIndices
    inverted: RowIndices
    outliers: RowIndices
    outlier_scores: NDArray[np.float64]

    @property
    def groups(self) -> list[RowIndices]:
        """Rows that hold the same bytes, two or more each."""
        return duplicates.duplicate_groups(self.first)


def _examine(
    images: Images, labels: RowIndices, classes: int, blocks: label_errors.FeatureBlocks, progress: Progress
) -> _Findings:
    """Findings in images (n, 28, 28) with labels (n,) and their features.

    blocks: makes the features (b, D) float32 of all rows in order, each time it is called.
    """
    first = duplicates.first_occurrences(images)
    near = duplicates.find_near_pairs(images, np.unique(first), progress)
    folds = label_errors.assign_folds(labels, _join_near_pairs(first, near))
    features = label_errors.score_features(blocks, labels, folds, classes, progress)
    probabilities = label_errors.calibrate_scores(features.scores, labels)
    blank, inverted = label_errors.find_odd_images(images)
    scores = label_errors.outlier_scores(features.components)
    return _Findings(
        first=first,
        near=near,
        probabilities=probabilities,
        suspect_labels=label_errors.find_suspect_labels(labels, probabilities),
        blank=blank,
        inverted=inverted,
        outliers=label_errors.find_outliers(scores),
        outlier_scores=scores,
    )


def _join_near_pairs(first: RowIndices, near: NearPairs) -> RowIndices:
    """`first`, with near duplicates counted as equal too."""
    joined = first.copy()
    for pair in np.argsort(near.second, kind="stable"):
        joined[near.second[pair]] = joined[near.first[pair]]
    return joined[first]


@dataclass(frozen=True)
class Audit:
    """Findings over the parts of a data set, laid end to end: "train" and "test", or "all".

    accuracies: by name, of the test part, or of all, with and without the rows in question; `predicted_by` says whose
    predictions they measure.
    """

    parts: Mapping[str, ImageDataset]
    findings: _Findings
    predicted_by: str
    accuracies: tuple[tuple[str, Interval], ...]

    @property
    def classes(self) -> tuple[str, ...]:
        return next(iter(self.parts.values())).classes

    def locate(self, row: int) -> tuple[str, int]:
        """The part that holds this row, and the row in that part, counted from 0."""
        for name, data in self.parts.items():
            if row < len(data):
                return name, int(row)
            row -= len(data)
        raise IndexError(row)

    def image(self, row: int) -> NDArray[np.uint8]:
        part, own_row = self.locate(row)
        return np.asarray(self.parts[part].images[own_row])

    def label(self, row: int) -> str:
        part, own_row = self.locate(row)
        return str(self.classes[self.parts[part].labels[own_row]])

    def counts(self) -> dict[str, Any]:
        findings, groups = self.findings, self.findings.groups
        pairs = list(zip(findings.near.first.tolist(), findings.near.second.tolist(), strict=True))
        return {
            "images": {name: len(data) for name, data in self.parts.items()},
            "exact_duplicates": self._count_by_parts(groups),
            "exact_duplicates_with_different_labels": sum(len({self.label(r) for r in rows}) > 1 for rows in groups),
            "near_duplicates": self._count_by_parts(pairs),
            "near_duplicates_with_different_labels": sum(self.label(a) != self.label(b) for a, b in pairs),
            "blank": len(findings.blank),
            "inverted": len(findings.inverted),
            "outliers": len(findings.outliers),
            "suspect_labels": self._count_by_parts([[row] for row in findings.suspect_labels]),
        }

    def _count_by_parts(self, groups: Iterable[Sequence[int] | RowIndices]) -> dict[str, int]:
        """How many of the groups lie in one part or in several: {"train": 43, "train and test": 10}."""
        counts = dict.fromkeys(self.parts, 0)
        if len(self.parts) > 1:
            counts[" and ".join(self.parts)] = 0
        for rows in groups:
            touched = {self.locate(int(row))[0] for row in rows}
            counts[" and ".join(name for name in self.parts if name in touched)] += 1
        return counts

    def class_counts(self) -> dict[str, list[int]]:
        """Of each part, the rows of each class."""
        return {
            name: np.bincount(data.labels, minlength=len(self.classes)).tolist() for name, data in self.parts.items()
        }

    def to_json(self) -> dict[str, Any]:
        counts = self.class_counts()
        return {
            "schema": 1,
            "digests": {name: data.digest for name, data in self.parts.items()},
            **self.counts(),
            "classes": {name: dict(zip(self.classes, counts[name], strict=True)) for name in self.parts},
            "accuracy": {"by": self.predicted_by, **{name: value.to_json() for name, value in self.accuracies}},
        }


def audit(
    data: str | Path | None = None,
    *,
    test: str | Path | None = None,
    classes: Sequence[str] | None = None,
    run: str | Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Audit:
    """Examine a data set, its training and test part together where it has both.

    data, test, classes: as for `train`; None is the official set. Features are those of recipe `fast`, from the cache
    where they are there. run: a finished run on the same test set, whose accuracy is then broken
    down; without one, that of a linear classifier. Raises AttireError where the optional package cleanlab is missing.
    """
    progress = progress or NoProgress()
    label_errors.import_cleanlab()  # before the work that is of no use without it
    chosen = devices.choose_device(device)
    url_copies.prefetch(data, test, progress=progress.advance)
    parts = _load_parts(data, test, classes)
    memory.keep_freed_memory()
    last = list(parts.values())[-1]
    predicted = None if run is None else _predictions_of(Path(run), last)
    images = np.concatenate([part.images for part in parts.values()])
    labels = np.concatenate([part.labels for part in parts.values()])
    findings = _examine(images, labels, len(last.classes), _feature_blocks(parts, chosen, progress), progress)
    start = len(images) - len(last)
    if predicted is None:
        predicted = findings.probabilities[start:].argmax(axis=1)
    accuracies = tuple(_break_down_accuracy(findings, start, predicted == labels[start:]))
    return Audit(parts, findings, "a linear classifier, out of fold" if run is None else str(run), accuracies)


def _load_parts(
    data: str | Path | None, test: str | Path | None, classes: Sequence[str] | None
) -> dict[str, ImageDataset]:
    readers = find_readers(data)
    if test is not None:
        train = readers.get("train", next(iter(readers.values())))(classes)
        return {"train": train, "test": load_dataset(test, part="test", classes=train.classes)}
    if len(readers) == 1:
        return {"all": next(iter(readers.values()))(classes)}
    train = readers["train"](classes)
    return {"train": train, "test": readers["test"](train.classes)}


def _predictions_of(run: Path, data: ImageDataset) -> RowIndices:
    """The classes (n,) that a finished run predicted for the rows of `data`, its test set."""
    result = load_result(run)
    if result.data.get("test", {}).get("digest") != data.digest:
        raise AttireError(run, f"was not tested on {data.source}", do="leave --run out, or name its own data")
    return result.predictions.predicted


def _feature_blocks(
    parts: Mapping[str, ImageDataset], device: torch.device, progress: Progress
) -> label_errors.FeatureBlocks:
    """Plain features of all parts, as recipe `fast` has them: after a run of it nothing is extracted."""
    weights = pretrained.vgg16_weights(progress=progress.advance)
    precision, backend = choose_backbone(FAST.freeze_to, FAST.backend, FAST.precision, device)
    digest = tensor_digest(read_weights(weights))
    spec = FeatureSpec(FAST.freeze_to, FAST.image_size, FAST.pool, digest, precision, backend=backend)
    rows = sum(map(len, parts.values()))
    cached = []
    for name, data in parts.items():

        def advance(done: int, total: int, stage: str = f"Features  {name}") -> None:
            progress.advance(stage, done, total)

        backbone = partial(load_backbone, weights, spec, device, rows)
        cached.append(cache.extract(data.images, data.image_digest, spec, backbone, advance))

    def blocks() -> Iterator[Tensor]:
        for entry in cached:
            for block in entry.blocks(8192):
                yield torch.from_numpy(block).float()

    return blocks


def _break_down_accuracy(findings: _Findings, start: int, correct: NDArray[np.bool_]) -> Iterator[tuple[str, Interval]]:
    """Accuracy of the rows from `start` on, with and without those that are leaked or suspect.

    correct (n - start,): of each of those rows. Without a test part (`start` 0) every later copy counts as leaked: a
    random split would leak it.
    """
    n = len(findings.first)
    rows = np.arange(start, n)
    is_copy = findings.first[rows] < (start or rows)
    near_copy = np.zeros(n, dtype=np.bool_)
    near_copy[findings.near.second[findings.near.first < (start or n)]] = True
    leaked = is_copy | near_copy[rows]
    suspect = np.isin(rows, findings.suspect_labels)
    subsets = {"all": np.ones(len(rows), dtype=np.bool_)}
    if leaked.any():
        subsets |= {"without exact copies": ~is_copy, "without exact and near copies": ~leaked, "copies alone": leaked}
    if suspect.any():
        subsets |= {"without suspect labels": ~suspect, "suspect labels alone": suspect}
    for name, subset in subsets.items():
        if subset.any():
            yield name, wilson(int(correct[subset].sum()), int(subset.sum()))
