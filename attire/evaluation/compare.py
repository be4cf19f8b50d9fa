"""Runs compared on the same test rows: which is better, by how much, at what cost, and where they disagree."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attire.data.dataset import ImageDataset
from attire.data.loading import load_dataset, load_splits
from attire.errors import AttireError, one_line
from attire.evaluation.intervals import Interval, discordant, mcnemar, p_text, paired_difference
from attire.evaluation.pages import render
from attire.evaluation.png import data_uri, grey_png
from attire.evaluation.run_result import Predictions, RunResult, load_result
from attire.storage.files import write_json, write_text

_SHOWN = 48  # disagreements in a gallery


@dataclass(frozen=True)
class Pair:
    """Two models on the same test rows: accuracy of `second` minus that of `first`, and McNemar's exact p-value."""

    first: str
    second: str
    difference: Interval
    p_value: float
    only_first: int  # rows that only the first has right
    only_second: int
    changed: int  # rows that the two give different answers, right or wrong

    @classmethod
    def of(cls, first: str, second: str, a: Predictions, b: Predictions) -> "Pair":
        """a, b: predictions of the models named `first` and `second`, of the same rows."""
        only_first, only_second, _ = discordant(a.correct, b.correct)
        difference, p_value = paired_difference(a.correct, b.correct), mcnemar(a.correct, b.correct)
        changed = int((a.predicted != b.predicted).sum())
        return cls(first, second, difference, p_value, only_first, only_second, changed)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "difference": self.difference.to_json(), "text": str(self)}

    def __str__(self) -> str:
        better, worse, gain = self.second, self.first, self.difference
        if gain.value < 0:
            better, worse, gain = worse, better, -gain
        points = f"{100 * gain.value:.1f} points ({100 * gain.low:.1f} to {100 * gain.high:.1f})"
        verdict = f"{better} is better than {worse} by {points}"
        if self.p_value >= 0.05:
            verdict = f"{better} and {worse} cannot be told apart: {points} between them"
        return f"{verdict}, McNemar {p_text(self.p_value)}; {self.changed:,} images changed sides"


@dataclass(frozen=True)
class _Comparison:
    """Two or more runs by name, every pair of them, and the rows where the first pair disagrees."""

    names: tuple[str, ...]
    results: tuple[RunResult, ...]
    pairs: tuple[Pair, ...]

    def to_json(self) -> dict[str, Any]:
        rows = zip(self.names, self.results, strict=True)
        runs = [{"run": name, "accuracy": r.test.accuracy.to_json(), "seconds": dict(r.seconds)} for name, r in rows]
        pairs = [pair.to_json() for pair in self.pairs]
        return {"schema": 1, "n": self.results[0].test.n, "runs": runs, "pairs": pairs}


def compare(runs: Sequence[str | Path]) -> _Comparison:
    """Compare two or more finished runs, or evaluations that `attire evaluate --out` wrote, on their common test rows.

    Raises AttireError where the digests say that the runs were not tested on the same images, labels and classes.
    """
    folders = [Path(run) for run in runs]
    if len(folders) < 2:
        raise AttireError("compare", f"expected two runs or more, found {len(folders)}")
    results = [load_result(folder) for folder in folders]
    digests = [_test_digest(folder, result) for folder, result in zip(folders, results, strict=True)]
    for folder, digest in zip(folders, digests, strict=True):
        if digest != digests[0]:
            what = f"its test set is not the one of {folders[0]}: digest {digest[:12]}, expected {digests[0][:12]}"
            do = "measure both on one file with: attire evaluate BUNDLE --data FILE --out FOLDER"
            raise AttireError(folder, what, do=do)
    names = tuple(one_line(str(folder)) for folder in folders)
    pairs = [
        Pair.of(names[i], names[j], results[i].predictions, results[j].predictions)
        for i, j in combinations(range(len(names)), 2)
    ]
    return _Comparison(names, tuple(results), tuple(pairs))


def _test_digest(folder: Path, result: RunResult) -> str:
    try:
        return str(result.data["test"]["digest"])
    except (KeyError, TypeError) as error:
        raise AttireError(folder / "data.json", "does not say which test set it was", do="run it again") from error


def _disagreements(first: RunResult, second: RunResult) -> list[tuple[str, NDArray[np.int64]]]:
    """Titles and test rows: right only in the first, only in the second, wrong in both but differently.

    Each gallery begins with the rows where the two answers are given with the most confidence.
    """
    a, b = first.predictions, second.predictions
    confidence = a.probabilities.max(axis=1) + b.probabilities.max(axis=1)
    kinds = (
        ("Only the first is right", a.correct & ~b.correct),
        ("Only the second is right", ~a.correct & b.correct),
        ("Both are wrong, with different answers", ~a.correct & ~b.correct & (a.predicted != b.predicted)),
    )
    galleries = []
    for title, mask in kinds:
        rows = np.flatnonzero(mask)
        galleries.append((f"{title}: {len(rows):,}", rows[np.argsort(-confidence[rows], kind="stable")][:_SHOWN]))
    return galleries


def write_comparison(comparison: _Comparison, path: Path) -> Path:
    """Write the page `path`, with the same figures as JSON beside it."""
    images = _test_images(comparison.results)
    first, second = comparison.results[:2]
    galleries = [
        (title, [_gallery_item(first, second, row, images) for row in rows])
        for title, rows in _disagreements(first, second)
    ]
    page = render(
        "evaluation/compare.html",
        c=comparison,
        galleries=galleries,
        shown=_SHOWN,
        has_images=images is not None,
        runs=list(zip(comparison.names, comparison.results, strict=True)),
    )
    write_text(path, page)
    write_json(path.with_suffix(".json"), comparison.to_json())
    return path


def _test_images(results: Sequence[RunResult]) -> NDArray[np.uint8] | None:
    """The common test set's images (n, 28, 28), read again from where a run found them; None where they are gone."""
    digest = results[0].data["test"]["digest"]
    for result in results:
        try:
            data = _test_set(result)
        except (AttireError, OSError, KeyError, TypeError):
            continue
        if data.digest == digest:
            return data.images
    return None


def _test_set(result: RunResult) -> ImageDataset:
    choice, recipe = dict(result.config["data"]), result.config.get("recipe", {})
    if "part" in choice:
        return load_dataset(choice["data"], part=choice["part"], classes=choice["classes"] or None)
    if choice["test"]:
        return load_dataset(choice["test"], part="test", classes=result.classes)
    choice["classes"] = choice["classes"] or None
    return load_splits(**choice, seed=recipe["split_seed"], stratify=recipe["stratify"]).test


def _gallery_item(first: RunResult, second: RunResult, row: int, images: NDArray[np.uint8] | None) -> dict[str, Any]:
    answers = []
    for result in (first, second):
        predictions = result.predictions
        name, p = result.classes[predictions.predicted[row]], predictions.probabilities[row].max()
        answers.append({"name": name, "p": f"{p:.2f}", "wrong": not predictions.correct[row]})
    label = first.classes[first.predictions.labels[row]]
    uri = data_uri(grey_png(images[row])) if images is not None else ""
    return {"row": int(row), "uri": uri, "true": label, "answers": answers}
