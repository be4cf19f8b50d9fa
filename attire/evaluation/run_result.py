"""A finished run as a value and as files: everything that the report, the model card and `compare` need."""

import csv
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import UnidentifiedImageError

from attire.errors import AttireError
from attire.evaluation import figures
from attire.evaluation.intervals import Claim, check_claim
from attire.evaluation.metrics import Evaluation
from attire.evaluation.png import read_sheet, write_sheet
from attire.storage.files import io_error, read_json, sha256_file, write_bytes, write_json, write_text

_HISTORY = ("epoch", "train_loss", "val_loss", "val_accuracy", "seconds")
_DIGESTS_FILE = "evaluation/digests.json"  # written last: SHA-256 of each file of a finished run that a report needs
_DIGESTED_FILES = ("config.json", "environment.json", "data.json", "history.csv")  # and all in evaluation/
_SHOWN = 24  # images in each gallery: three lines on a desktop screen, eight on a telephone


@dataclass(frozen=True)
class Predictions:
    """Labels (n,) and probabilities (n, K) of the test rows, and some or all of their images.

    `images` is (m, 28, 28) uint8; image i is test row `image_rows[i]`. A run folder keeps only the images that its
    galleries show.
    """

    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    images: NDArray[np.uint8]
    image_rows: NDArray[np.int64]

    @classmethod
    def of_test_set(cls, labels: Any, probabilities: Any, images: NDArray[np.uint8]) -> "Predictions":
        """All test rows with all their images (n, 28, 28). Raises AttireError for images of another shape or type."""
        if images.dtype != np.uint8 or images.shape[1:] != (28, 28) or len(images) != len(labels):
            expected = f"({len(labels)}, 28, 28) uint8"
            raise AttireError("test images", f"expected {expected}, found {images.shape} {images.dtype}")
        rows = np.arange(len(labels), dtype=np.int64)
        return cls(np.asarray(labels, np.int64), _as_float32(probabilities), images, rows)

    @property
    def predicted(self) -> NDArray[np.int64]:
        return np.asarray(self.probabilities.argmax(axis=1))

    @property
    def correct(self) -> NDArray[np.bool_]:
        return np.asarray(self.predicted == self.labels)

    def images_of(self, rows: Sequence[int]) -> NDArray[np.uint8]:
        """The images (m, 28, 28) of these test rows."""
        places = {int(row): i for i, row in enumerate(self.image_rows)}
        return self.images[np.array([places[row] for row in rows], dtype=np.int64)]


@dataclass(frozen=True)
class RunResult:
    """The results of a run, and what its report says about how it was made.

    `history` holds a mapping for each line of history.csv. `seconds` maps a stage to its duration, and "total" to the
    whole run's. `config`, `environment` and `data` are plain JSON and are shown as they are; `data["name"]` names the
    data set. `ood` is what `OODDetector.evaluate` returned, None without a detector. `galleries` maps a title to test
    rows; when left out, they are chosen here.
    """

    title: str
    recipe: str
    seed: int
    command: str
    test: Evaluation
    predictions: Predictions
    train: Evaluation | None = None
    val: Evaluation | None = None
    ood: Mapping[str, Any] | None = None
    history: Sequence[Mapping[str, Any]] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    claimed: float = 0.98
    galleries: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.galleries:
            object.__setattr__(self, "galleries", _choose_galleries(self.predictions))

    @property
    def classes(self) -> tuple[str, ...]:
        return self.test.classes

    @property
    def claim(self) -> Claim:
        return check_claim(self.test.correct, self.test.n, self.claimed)

    def metrics(self) -> dict[str, Any]:
        """What metrics.json holds."""
        return {
            "title": self.title,
            "recipe": self.recipe,
            "seed": self.seed,
            "command": self.command,
            "seconds": dict(self.seconds),
            "claim": self.claim.to_json(),
            "ood": None if self.ood is None else dict(self.ood),
            "test": self.test.to_json(),
            "train": self.train.to_json() if self.train else None,
            "val": self.val.to_json() if self.val else None,
        }


def _as_float32(probabilities: Any) -> NDArray[np.float64]:
    """Probabilities rounded as predictions.csv rounds them, so that a stored run equals the one just made."""
    return np.asarray(probabilities, np.float32).astype(np.float64)


def _choose_galleries(predictions: Predictions) -> dict[str, list[int]]:
    """The test rows worth a look. Ties keep the order of the rows, the sample has a fixed seed: same run, same page."""
    top_two = np.sort(predictions.probabilities, axis=1)[:, -2:]
    wrong = np.flatnonzero(~predictions.correct)
    sample = np.random.default_rng(0).permutation(len(predictions.labels))[:_SHOWN]
    return {
        "Most confident errors": wrong[np.argsort(-top_two[wrong, 1], kind="stable")][:_SHOWN].tolist(),
        "Least certain": np.argsort(top_two[:, 1] - top_two[:, 0], kind="stable")[:_SHOWN].tolist(),
        "A random sample": sorted(sample.tolist()),
    }


def run_seconds(began: float, extract: float, fit: float) -> dict[str, float]:
    """`RunResult.seconds` of a run that was started, or last resumed, at `began` (`time.perf_counter`).

    fit: seconds of all epochs; those of earlier starts count in the total too.
    """
    return {"extract": extract, "fit": fit, "total": max(time.perf_counter() - began, extract + fit)}


def save_result(run_dir: Path, result: RunResult) -> None:
    """Write every file that `load_result` reads, and last their digests."""
    delete_digests(run_dir)
    write_json(run_dir / "config.json", dict(result.config))
    write_json(run_dir / "environment.json", dict(result.environment))
    write_json(run_dir / "data.json", dict(result.data))
    write_text(run_dir / "history.csv", csv_text(_HISTORY, [[row[key] for key in _HISTORY] for row in result.history]))
    _write_evaluation(run_dir / "evaluation", result)
    _write_digests(run_dir)


def delete_digests(run_dir: Path) -> None:
    """To be called before files of a finished run are written again: the old digests no longer describe them."""
    (run_dir / _DIGESTS_FILE).unlink(missing_ok=True)


def _write_digests(run_dir: Path) -> None:
    names = [*_DIGESTED_FILES, *(f"evaluation/{path.name}" for path in sorted((run_dir / "evaluation").glob("[!.]*")))]
    digests = {name: sha256_file(run_dir / name) for name in names if name != _DIGESTS_FILE}
    write_json(run_dir / _DIGESTS_FILE, {"schema": 1, "sha256": digests})


def _check_digests(run_dir: Path) -> None:
    """Raise AttireError where a file is not what was written. A folder without digests passes."""
    if not (run_dir / _DIGESTS_FILE).exists():
        return
    with refuse_damage(run_dir / _DIGESTS_FILE) as path:
        stored = read_json(path)
        if stored["schema"] != 1 or not set(_DIGESTED_FILES) < set(stored["sha256"]):
            raise ValueError("not the digests of a run")
        expected = dict(stored["sha256"])
    for name, digest in expected.items():
        with refuse_damage(run_dir / name) as path:
            if sha256_file(path) != digest:
                do = "restore it, or measure the bundle again with: attire evaluate"
                raise AttireError(path, f"damaged: its digest is not the one in {_DIGESTS_FILE}", do=do)


def _write_evaluation(folder: Path, result: RunResult) -> None:
    """predictions.csv, the galleries, per_class.csv, confusion.csv/.svg/.png, the other drawings; metrics.json last."""
    test = result.test
    _write_predictions(folder / "predictions.csv", result)
    _write_gallery(folder, result)
    write_text(folder / "per_class.csv", _per_class_csv(test))
    rows = [[name, *counts] for name, counts in zip(test.classes, test.confusion.tolist(), strict=True)]
    write_text(folder / "confusion.csv", csv_text(["true / predicted", *test.classes], rows))
    drawings = {
        "confusion": figures.confusion_matrix(test.confusion, test.classes),
        "reliability": figures.reliability_diagram(test.reliability),
    }
    if result.history:
        drawings["loss"] = figures.loss_curve(result.history)
        drawings["accuracy"] = figures.accuracy_curve(result.history)
    for name, figure in drawings.items():
        figures.write_figure(folder / name, figure)
    write_json(folder / "metrics.json", result.metrics())


def _per_class_csv(evaluation: Evaluation) -> str:
    names = ("precision", "recall", "f1")
    header = ["class", "support", *(f"{name}{part}" for name in names for part in ("", "_low", "_high"))]
    rows = []
    for score in evaluation.per_class:
        intervals = (score.precision, score.recall, score.f1)
        values = [value for interval in intervals for value in (interval.value, interval.low, interval.high)]
        rows.append([score.name, score.support, *("" if value != value else value for value in values)])
    return csv_text(header, rows)


def _write_predictions(path: Path, result: RunResult) -> None:
    """One line per test row. Nine digits: a float32 probability survives the journey exactly."""
    predictions, names = result.predictions, np.array(result.classes, dtype=object)
    table = pd.DataFrame({f"p_{name}": p for name, p in zip(names, predictions.probabilities.T, strict=True)})
    table.insert(0, "row", np.arange(len(predictions.labels)))
    table.insert(1, "label", names[predictions.labels])
    table.insert(2, "predicted", names[predictions.predicted])
    table.insert(3, "probability", predictions.probabilities.max(axis=1))
    write_text(path, table.to_csv(index=False, float_format="%.9g", lineterminator="\n"))


def _write_gallery(folder: Path, result: RunResult) -> None:
    """gallery.png, one 28x28 cell for each line of gallery.csv, in that order from left to right, top to bottom."""
    images = result.predictions.images_of([row for rows in result.galleries.values() for row in rows])
    write_bytes(folder / "gallery.png", write_sheet(images, _SHOWN))
    lines: list[tuple[str, int | str]] = []
    for title, rows in result.galleries.items():
        lines += [(title, row) for row in rows] or [(title, "")]  # an empty gallery keeps its line
    write_text(folder / "gallery.csv", csv_text(["gallery", "row"], lines))


def load_result(run_dir: Path) -> RunResult:
    """Read a finished run from its folder alone. Raises AttireError where a file is missing or damaged."""
    _check_digests(run_dir)
    folder = run_dir / "evaluation"
    with refuse_damage(folder / "metrics.json") as path:
        stored = read_json(path)
        test = Evaluation.from_json(stored["test"])
        train, val = (Evaluation.from_json(stored[name]) if stored[name] else None for name in ("train", "val"))
        claim = Claim.from_json(stored["claim"])
        facts: dict[str, Any] = {name: stored[name] for name in ("title", "recipe", "seed", "command", "seconds")}
    galleries = _read_galleries(folder / "gallery.csv")
    return RunResult(
        **facts,
        test=test,
        train=train,
        val=val,
        ood=stored.get("ood"),
        claimed=claim.claimed,
        galleries=galleries,
        predictions=_read_predictions(folder, test.classes, [row for rows in galleries.values() for row in rows]),
        history=read_history(run_dir / "history.csv"),
        config=read_json(run_dir / "config.json"),
        environment=read_json(run_dir / "environment.json"),
        data=read_json(run_dir / "data.json"),
    )


def _read_predictions(folder: Path, classes: Sequence[str], rows: Sequence[int]) -> Predictions:
    with refuse_damage(folder / "predictions.csv") as path:
        table = pd.read_csv(path, keep_default_na=False)
        index = {name: c for c, name in enumerate(classes)}
        labels = np.array([index[str(name)] for name in table["label"]], dtype=np.int64)
        probabilities = _as_float32(table[[f"p_{name}" for name in classes]])
    with refuse_damage(folder / "gallery.png") as path:
        cells, _ = read_sheet(path.read_bytes())
    return Predictions(labels, probabilities, cells[: len(rows)], np.array(rows, dtype=np.int64))


def _read_galleries(path: Path) -> dict[str, list[int]]:
    galleries: dict[str, list[int]] = {}
    with refuse_damage(path), path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            rows = galleries.setdefault(line["gallery"], [])
            rows += [int(line["row"])] if line["row"] else []
    return galleries


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of history.csv; an empty cell is None. Raises AttireError where it is missing or damaged."""
    with refuse_damage(path), path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
        rows = [{key: float(line[key]) if line[key] else None for key in _HISTORY} for line in lines]
        return [{**row, "epoch": int(line["epoch"])} for row, line in zip(rows, lines, strict=True)]


@contextmanager
def refuse_damage(path: Path) -> Iterator[Path]:
    """Turn any error that reading the file raises inside the block into one AttireError that names the file."""
    try:
        yield path
    except (KeyError, TypeError, ValueError, UnidentifiedImageError) as error:
        what = f"not what a finished run writes: {type(error).__name__} {error}"
        raise AttireError(path, what[:120], do="run `attire train` again") from error
    except OSError as error:
        raise io_error("read", path, error) from error


def csv_text(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    return buffer.getvalue()
