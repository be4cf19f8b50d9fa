"""What is wrong with a data set: doubles, leaks between its parts, odd images, labels that are probably wrong."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attire.analysis import duplicates, label_errors
from attire.analysis.duplicates import Advance, Images, NearPairs, Rows
from attire.data.dataset import ImageDataset
from attire.data.loading import find_readers, load_dataset
from attire.errors import AttireError
from attire.evaluation import figures
from attire.evaluation.intervals import Interval, wilson
from attire.evaluation.pages import write_page
from attire.evaluation.run_result import load_result
from attire.features import cache
from attire.features.backbones import choose_backbone, make_backbone
from attire.features.cache import FeatureSpec
from attire.model import devices, pretrained, vgg
from attire.model.weights import read_weights, tensor_digest
from attire.progress import NoProgress, Progress
from attire.recipes import FAST
from attire.storage import memory, url_copies
from attire.storage.files import write_json, write_text

_SHOWN = 48  # pictures in a gallery; the CSV files hold all


@dataclass(frozen=True)
class _Findings:
    """What was found in n images, by row. `suspects` worst first, `far` farthest first, the others ascending.

    first (n,): see `duplicates.first_of`. probabilities (n, K) by a linear classifier that had not seen the row.
    remoteness (n,): see `suspects.remoteness`.
    """

    first: Rows
    near: NearPairs
    probabilities: NDArray[np.float64]
    suspects: Rows
    blank: Rows
    inverted: Rows
    far: Rows
    remoteness: NDArray[np.float64]

    @property
    def groups(self) -> list[Rows]:
        """Rows that hold the same bytes, two or more each."""
        return duplicates.groups_of(self.first)


def _examine(images: Images, labels: Rows, classes: int, blocks: label_errors.Blocks, advance: Advance) -> _Findings:
    """Everything that can be said of images (n, 28, 28), labels (n,) and their features.

    blocks: the features (b, D) float32 of all rows in order, as often as it is called.
    """
    first = duplicates.first_of(images)
    near = duplicates.near_pairs(images, np.unique(first), advance)
    folds = label_errors.assign_folds(labels, _together(first, near))
    reading = label_errors.read_features(blocks, labels, folds, classes, advance)
    found = label_errors.probabilities(reading.scores, labels)
    blank, inverted = label_errors.odd_images(images)
    remote = label_errors.remoteness(reading.places)
    far = np.flatnonzero(remote > label_errors.FAR)
    far = far[np.argsort(-remote[far], kind="stable")]
    return _Findings(first, near, found, label_errors.rank_suspects(labels, found), blank, inverted, far, remote)


def _together(first: Rows, near: NearPairs) -> Rows:
    """`first`, with near duplicates counted as equal too."""
    joined = first.copy()
    for pair in np.argsort(near.second, kind="stable"):
        joined[near.second[pair]] = joined[near.first[pair]]
    return joined[first]


@dataclass(frozen=True)
class _Audit:
    """Findings over the parts of a data set, laid end to end: "train" and "test", or "all".

    accuracies: what is measured on the test part, or on all, and how that changes without the rows in question; `by`
    says whose answers they are.
    """

    parts: Mapping[str, ImageDataset]
    findings: _Findings
    by: str
    accuracies: tuple[tuple[str, Interval], ...]

    @property
    def classes(self) -> tuple[str, ...]:
        return next(iter(self.parts.values())).classes

    def place(self, row: int) -> tuple[str, int]:
        """The part and the row in it, counted from 0."""
        for name, data in self.parts.items():
            if row < len(data):
                return name, int(row)
            row -= len(data)
        raise IndexError(row)

    def image(self, row: int) -> NDArray[np.uint8]:
        name, own = self.place(row)
        return np.asarray(self.parts[name].images[own])

    def label(self, row: int) -> str:
        name, own = self.place(row)
        return str(self.classes[self.parts[name].labels[own]])

    def counts(self) -> dict[str, Any]:
        found, groups = self.findings, self.findings.groups
        pairs = list(zip(found.near.first.tolist(), found.near.second.tolist(), strict=True))
        return {
            "images": {name: len(data) for name, data in self.parts.items()},
            "exact_duplicates": self.by_parts(groups),
            "exact_duplicates_with_different_labels": sum(len({self.label(r) for r in rows}) > 1 for rows in groups),
            "near_duplicates": self.by_parts(pairs),
            "near_duplicates_with_different_labels": sum(self.label(a) != self.label(b) for a, b in pairs),
            "blank": len(found.blank),
            "inverted": len(found.inverted),
            "far_from_the_rest": len(found.far),
            "suspect_labels": self.by_parts([[row] for row in found.suspects]),
        }

    def by_parts(self, groups: Iterable[Sequence[int] | Rows]) -> dict[str, int]:
        """How many of the groups lie in one part or go across: {"train": 43, "train and test": 10}."""
        out = dict.fromkeys(self.parts, 0)
        if len(self.parts) > 1:
            out[" and ".join(self.parts)] = 0
        for rows in groups:
            own = {self.place(int(row))[0] for row in rows}
            out[" and ".join(name for name in self.parts if name in own)] += 1
        return out

    def to_json(self) -> dict[str, Any]:
        measured = {name: interval.to_json() for name, interval in self.accuracies}
        balance = {
            name: dict(zip(self.classes, counts.tolist(), strict=True)) for name, counts in _class_counts(self.parts)
        }
        digests = {name: data.digest for name, data in self.parts.items()}
        about = {"schema": 1, "digests": digests, **self.counts(), "classes": balance}
        return {**about, "accuracy": {"by": self.by, **measured}}


def audit(
    data: str | Path | None = None,
    *,
    test: str | Path | None = None,
    classes: Sequence[str] | None = None,
    run: str | Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> _Audit:
    """Look through a data set, its training and test part together where it has both.

    data, test, classes: as for `train`; None is the official set. Features are those of recipe `fast`, from the cache
    where they are there. run: a finished run on the same test set, whose accuracy is then taken apart; without one,
    that of a linear classifier. Raises AttireError where the optional package cleanlab is missing.
    """
    progress = progress or NoProgress()
    label_errors.cleanlab_filter()
    chosen = devices.choose_device(device)
    url_copies.prefetch(data, test, progress=progress.advance)
    parts = _load_parts(data, test, classes)
    memory.keep_freed_memory()
    images = np.concatenate([part.images for part in parts.values()])
    labels = np.concatenate([part.labels for part in parts.values()])
    known = len(next(iter(parts.values())).classes)
    answers = None if run is None else _run_answers(Path(run), list(parts.values())[-1])
    blocks = _feature_blocks(parts, chosen, progress)
    found = _examine(images, labels, known, blocks, progress.advance)
    start = len(images) - len(list(parts.values())[-1])
    if answers is None:
        answers = found.probabilities[start:].argmax(axis=1)
    by = str(run) if run is not None else "a linear classifier, out of fold"
    return _Audit(parts, found, by, tuple(_accuracies(found, start, answers == labels[start:])))


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


def _run_answers(run: Path, data: ImageDataset) -> Rows:
    """The classes (n,) that a finished run gave the rows of `data`, its test set."""
    result = load_result(run)
    if result.data.get("test", {}).get("digest") != data.digest:
        raise AttireError(run, f"was not tested on {data.source}", do="leave --run out, or name its own data")
    return result.predictions.predicted


def _feature_blocks(parts: Mapping[str, ImageDataset], device: torch.device, progress: Progress) -> label_errors.Blocks:
    """Plain features of all parts, as recipe `fast` has them: after a run of it nothing is extracted."""
    weights = pretrained.vgg16_weights(progress=progress.advance)
    precision, backend = choose_backbone(FAST.freeze_to, FAST.backend, FAST.precision, device)
    digest = tensor_digest(read_weights(weights))
    spec = FeatureSpec(FAST.freeze_to, FAST.image_size, FAST.pool, digest, precision, backend=backend)

    def load_backbone() -> cache.FeatureExtractor:
        backbone = vgg.vgg16(weights, spec.freeze_to, spec.pool, nn.Sequential())
        return make_backbone(backbone, spec, device, sum(map(len, parts.values())))

    cached = []
    for name, data in parts.items():

        def advance(done: int, total: int, name: str = name) -> None:
            progress.advance(f"Features  {name}", done, total)

        cached.append(cache.extract(data.images, data.image_digest, spec, load_backbone, advance))

    def blocks() -> Iterator[Tensor]:
        for entry in cached:
            for block in entry.blocks(8192):
                yield torch.from_numpy(block).float()

    return blocks


def _accuracies(found: _Findings, start: int, right: NDArray[np.bool_]) -> Iterator[tuple[str, Interval]]:
    """Accuracy of the rows from `start` on, with and without those that are leaked or suspect.

    Without a test part (`start` 0) every later copy counts as leaked: a random split would leak it.
    """
    n = len(found.first)
    own = np.arange(start, n)

    def told(name: str, keep: NDArray[np.bool_]) -> Iterator[tuple[str, Interval]]:
        if keep.any():
            yield name, wilson(int(right[keep].sum()), int(keep.sum()))

    copies = found.first[own] < (start or own)
    close = np.zeros(n, dtype=np.bool_)
    close[found.near.second[found.near.first < (start or n)]] = True
    leaked = copies | close[own]
    doubted = np.isin(own, found.suspects)
    yield from told("all", np.ones(len(own), dtype=np.bool_))
    if leaked.any():
        yield from told("without exact copies", ~copies)
        yield from told("without exact and near copies", ~leaked)
        yield from told("copies alone", leaked)
    if doubted.any():
        yield from told("without suspect labels", ~doubted)
        yield from told("suspect labels alone", doubted)


def _class_counts(parts: Mapping[str, ImageDataset]) -> Iterator[tuple[str, NDArray[np.int64]]]:
    for name, data in parts.items():
        yield name, np.bincount(data.labels, minlength=len(data.classes))


def write_audit(found: _Audit, folder: Path) -> Path:
    """audit.html, and every list in full as CSV; the figures in audit.json, written last."""
    tables = _lists(found)
    for name, (header, rows) in tables.items():
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
        write_text(folder / f"{name}.csv", buffer.getvalue())
    sources = " and ".join(dict.fromkeys(data.source for data in found.parts.values()))
    told = {"sources": sources, "counts": found.counts(), "balance": _balance(found), **_galleries(found)}
    page = write_page(folder / "audit.html", "analysis/audit.html", a=found, **told)
    write_json(folder / "audit.json", found.to_json())
    return page


def _lists(found: _Audit) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Name, header and rows of each CSV file."""
    f = found.findings

    def where(row: int) -> list[Any]:
        return [*found.place(row), found.label(row)]

    exact = [[i, *where(row)] for i, rows in enumerate(f.groups) for row in rows]
    near = [
        [*where(a), *where(b), f"{d:.4f}"] for a, b, d in zip(f.near.first, f.near.second, f.near.distance, strict=True)
    ]
    kinds = (("blank", f.blank), ("inverted", f.inverted), ("far from the rest", f.far))
    odd = [[kind, *where(row), f"{f.remoteness[row]:.2f}"] for kind, rows in kinds for row in rows]
    label_of = {name: i for i, name in enumerate(found.classes)}
    doubt = []
    for row in f.suspects:
        p = f.probabilities[row]
        given = p[label_of[found.label(row)]]
        doubt.append([*where(row), found.classes[p.argmax()], f"{given:.4f}", f"{p.max():.4f}"])
    return {
        "exact_duplicates": (["group", "part", "row", "label"], exact),
        "near_duplicates": (["part", "row", "label", "part_2", "row_2", "label_2", "distance"], near),
        "odd": (["kind", "part", "row", "label", "remoteness"], odd),
        "suspects": (["part", "row", "label", "more_likely", "p_label", "p_more_likely"], doubt),
        "classes": (["class", *found.parts], _balance(found)),
    }


def _balance(found: _Audit) -> list[list[Any]]:
    columns = [counts.tolist() for _, counts in _class_counts(found.parts)]
    return [list(line) for line in zip(found.classes, *columns, strict=True)]


def _galleries(found: _Audit) -> dict[str, Any]:
    f = found.findings

    def item(row: int, more: Sequence[str] = ()) -> dict[str, Any]:
        name, own = found.place(row)
        uri = figures.data_uri(figures.grey_png(found.image(row)))
        return {"uri": uri, "where": f"{name} {own:,}", "label": found.label(row), "more": more}

    def likely(row: int) -> list[str]:
        p = f.probabilities[row]
        return [f"{found.classes[p.argmax()]} {p.max():.2f}"]

    odd = [(row, "blank") for row in f.blank] + [(row, "inverted") for row in f.inverted]
    odd += [(row, f"{f.remoteness[row]:.1f} x") for row in f.far]
    groups = sorted(f.groups, key=lambda rows: len({found.place(int(r))[0] for r in rows}), reverse=True)
    pairs = zip(f.near.first, f.near.second, f.near.distance, strict=True)
    return {
        "exact": [[item(row) for row in rows[:6]] for rows in groups[: _SHOWN // 2]],
        "near": [[item(a), item(b, [f"distance {d:.3f}"])] for a, b, d in list(pairs)[: _SHOWN // 2]],
        "suspect": [item(row, likely(row)) for row in f.suspects[:_SHOWN]],
        "odd": [item(row, [why]) for row, why in odd[:_SHOWN]],
        "odd_count": len(odd),
        "exact_count": len(groups),
    }
