"""A finished run as a value, and as files: everything the report, the model card and `compare` need."""

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
from attire.storage.files import io_error, read_json, sha256_file, write_bytes, write_json, write_text

_HISTORY = ("epoch", "train_loss", "val_loss", "val_accuracy", "seconds")
_SETS = ("test", "train", "val")
_DIGESTS = "evaluation/digests.json"  # written last: SHA-256 of every file of a finished run that a report is made from
_TOLD = ("config.json", "environment.json", "data.json", "history.csv")  # those of them outside of evaluation/
_SHOWN = 24  # images in each gallery: three lines on a desktop screen, eight on a telephone


@dataclass(frozen=True)
class _Predictions:
    """The test set as the model saw it: labels (n,), probabilities (n, K), and some or all of the images.

    `images` is (m, 28, 28) uint8; image i is test row `image_rows[i]`. A run folder keeps only the images that its
    galleries show.
    """

    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    images: NDArray[np.uint8]
    image_rows: NDArray[np.int64]

    @property
    def predicted(self) -> NDArray[np.int64]:
        return np.asarray(self.probabilities.argmax(axis=1))

    @property
    def correct(self) -> NDArray[np.bool_]:
        return np.asarray(self.predicted == self.labels)


@dataclass(frozen=True)
class RunResult:
    """What a run found. `history` holds rows of HISTORY; `seconds` where the time went, with a "total".

    `config`, `environment` and `data` are plain JSON and are shown as they are; `data["name"]` names the data set.
    `reject` is what `reject.measure` found, None without one. `galleries` maps a title to test rows and is chosen here
    when left out.
    """

    title: str
    recipe: str
    seed: int
    command: str
    test: Evaluation
    predictions: _Predictions
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


def predictions(labels: Any, probabilities: Any, images: NDArray[np.uint8]) -> _Predictions:
    """All test rows with all their images (n, 28, 28), as training has them."""
    if images.dtype != np.uint8 or images.shape[1:] != (28, 28) or len(images) != len(labels):
        expected = f"({len(labels)}, 28, 28) uint8"
        raise AttireError("test images", f"expected {expected}, found {images.shape} {images.dtype}")
    rows = np.arange(len(labels), dtype=np.int64)
    return _Predictions(np.asarray(labels, np.int64), _single(probabilities), images, rows)


def _single(probabilities: Any) -> NDArray[np.float64]:
    """Probabilities to the precision that predictions.csv keeps, so that a stored run equals the one just made."""
    return np.asarray(probabilities, np.float32).astype(np.float64)


def _choose_galleries(found: _Predictions) -> dict[str, list[int]]:
    """The test rows worth a look. Ties keep the order of the rows, the sample has a fixed seed: same run, same page."""
    top_two = np.sort(found.probabilities, axis=1)[:, -2:]
    wrong = np.flatnonzero(~found.correct)
    n = len(found.labels)
    sample = np.random.default_rng(0).permutation(n)[:_SHOWN]
    return {
        "Most confident errors": wrong[np.argsort(-top_two[wrong, 1], kind="stable")][:_SHOWN].tolist(),
        "Least certain": np.argsort(top_two[:, 1] - top_two[:, 0], kind="stable")[:_SHOWN].tolist(),
        "A random sample": sorted(sample.tolist()),
    }


def spent(began: float, extract: float, fit: float) -> dict[str, float]:
    """`RunResult.seconds` of a run whose clock (`time.perf_counter`) `began` with its last start.

    fit: of all epochs; those of earlier starts count in the total too.
    """
    return {"extract": extract, "fit": fit, "total": max(time.perf_counter() - began, extract + fit)}


def save_result(run_dir: Path, result: RunResult) -> None:
    """Every file that `load_result` reads, and last their digests."""
    reopen(run_dir)
    write_json(run_dir / "config.json", dict(result.config))
    write_json(run_dir / "environment.json", dict(result.environment))
    write_json(run_dir / "data.json", dict(result.data))
    write_text(
        run_dir / "history.csv", table_text(_HISTORY, [[row[key] for key in _HISTORY] for row in result.history])
    )
    _write_evaluation(run_dir / "evaluation", result)
    _write_digests(run_dir)


def reopen(run_dir: Path) -> None:
    """Files of a finished run are about to be written again: until all are, no digest speaks of them."""
    (run_dir / _DIGESTS).unlink(missing_ok=True)


def _write_digests(run_dir: Path) -> None:
    names = [*_TOLD, *(f"evaluation/{path.name}" for path in sorted((run_dir / "evaluation").glob("[!.]*")))]
    found = {name: sha256_file(run_dir / name) for name in names if name != _DIGESTS}
    write_json(run_dir / _DIGESTS, {"schema": 1, "sha256": found})


def _check_digests(run_dir: Path) -> None:
    """Raise AttireError where a file is not what was written. A run that was finished before there were digests has
    none, and passes."""
    if not (run_dir / _DIGESTS).exists():
        return
    with reading(run_dir / _DIGESTS) as path:
        stored = read_json(path)
        if stored["schema"] != 1 or not set(_TOLD) < set(stored["sha256"]):
            raise ValueError("not the digests of a run")
        expected = dict(stored["sha256"])
    for name, digest in expected.items():
        with reading(run_dir / name) as path:
            if sha256_file(path) != digest:
                do = "restore it, or measure the bundle again with: attire evaluate"
                raise AttireError(path, f"damaged: its digest is not the one in {_DIGESTS}", do=do)


def _write_evaluation(folder: Path, result: RunResult) -> None:
    """predictions.csv, the galleries, per_class.csv, confusion.csv/.svg/.png, the other drawings; metrics.json last."""
    test = result.test
    _write_predictions(folder / "predictions.csv", result)
    _write_gallery(folder, result)
    write_text(folder / "per_class.csv", _per_class_csv(test))
    rows = [[name, *counts] for name, counts in zip(test.classes, test.confusion.tolist(), strict=True)]
    write_text(folder / "confusion.csv", table_text(["true / predicted", *test.classes], rows))
    drawings = {"confusion": figures.confusion_matrix(test.confusion, test.classes)}
    drawings["reliability"] = figures.reliability_diagram(test.reliability)
    if result.history:
        drawings["loss"] = figures.loss_curve(result.history)
        drawings["accuracy"] = figures.accuracy_curve(result.history)
    for name, figure in drawings.items():
        write_bytes(folder / f"{name}.svg", figures.svg(figure))
        write_bytes(folder / f"{name}.png", figures.png(figure))
    write_json(folder / "metrics.json", metrics(result))


def metrics(result: RunResult) -> dict[str, Any]:
    return {
        "title": result.title,
        "recipe": result.recipe,
        "seed": result.seed,
        "command": result.command,
        "seconds": dict(result.seconds),
        "claim": result.claim.to_json(),
        "ood": None if result.ood is None else dict(result.ood),
        **{name: found.to_json() if (found := getattr(result, name)) else None for name in _SETS},
    }


def _per_class_csv(found: Evaluation) -> str:
    names = ("precision", "recall", "f1")
    header = ["class", "support", *(f"{name}{part}" for name in names for part in ("", "_low", "_high"))]
    rows = []
    for score in found.per_class:
        figures_of = (getattr(score, name) for name in names)
        rows.append([score.name, score.support, *(v for f in figures_of for v in (f.value, f.low, f.high))])
    return table_text(header, [["" if value != value else value for value in row] for row in rows])


def _write_predictions(path: Path, result: RunResult) -> None:
    """One line per test row. Nine digits: a float32 probability survives the journey exactly."""
    found, names = result.predictions, np.array(result.classes, dtype=object)
    columns = {"row": np.arange(len(found.labels)), "label": names[found.labels], "predicted": names[found.predicted]}
    columns["probability"] = found.probabilities.max(axis=1)
    columns |= {f"p_{name}": found.probabilities[:, c] for c, name in enumerate(result.classes)}
    write_text(path, pd.DataFrame(columns).to_csv(index=False, float_format="%.9g", lineterminator="\n"))


def _write_gallery(folder: Path, result: RunResult) -> None:
    """gallery.png, one 28x28 tile for each line of gallery.csv, in that order from left to right, top to bottom."""
    rows = [row for rows in result.galleries.values() for row in rows]
    write_bytes(folder / "gallery.png", figures.tile(shown_images(result, rows), _SHOWN))
    lines: list[tuple[str, int | str]] = []
    for title, found in result.galleries.items():
        lines += [(title, row) for row in found] or [(title, "")]  # an empty gallery keeps its line
    write_text(folder / "gallery.csv", table_text(["gallery", "row"], lines))


def shown_images(result: RunResult, rows: Sequence[int]) -> NDArray[np.uint8]:
    """The images (m, 28, 28) of these test rows."""
    place = {int(row): i for i, row in enumerate(result.predictions.image_rows)}
    return result.predictions.images[np.array([place[row] for row in rows], dtype=np.int64)]


def load_result(run_dir: Path) -> RunResult:
    """A finished run from its folder alone. Raises AttireError where a file is missing or damaged."""
    _check_digests(run_dir)
    folder = run_dir / "evaluation"
    with reading(folder / "metrics.json") as path:
        stored = read_json(path)
        test = Evaluation.from_json(stored["test"])
        train, val = (Evaluation.from_json(stored[name]) if stored[name] else None for name in ("train", "val"))
        claim = Claim.from_json(stored["claim"])
        told: dict[str, Any] = {name: stored[name] for name in ("title", "recipe", "seed", "command", "seconds")}
    galleries = _read_galleries(folder / "gallery.csv")
    return RunResult(
        **told,
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


def _read_predictions(folder: Path, classes: Sequence[str], rows: Sequence[int]) -> _Predictions:
    with reading(folder / "predictions.csv") as path:
        table = pd.read_csv(path, keep_default_na=False)
        index = {name: c for c, name in enumerate(classes)}
        labels = np.array([index[str(name)] for name in table["label"]], dtype=np.int64)
        probabilities = _single(table[[f"p_{name}" for name in classes]])
    with reading(folder / "gallery.png") as path:
        images = figures.untile(path.read_bytes(), len(rows))
    return _Predictions(labels, probabilities, images, np.array(rows, dtype=np.int64))


def _read_galleries(path: Path) -> dict[str, list[int]]:
    galleries: dict[str, list[int]] = {}
    with reading(path), path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            rows = galleries.setdefault(line["gallery"], [])
            rows += [int(line["row"])] if line["row"] else []
    return galleries


def read_history(path: Path) -> list[dict[str, Any]]:
    with reading(path), path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
        rows = [{key: float(line[key]) if line[key] else None for key in _HISTORY} for line in lines]
        return [{**row, "epoch": int(line["epoch"])} for row, line in zip(rows, lines, strict=True)]


@contextmanager
def reading(path: Path) -> Iterator[Path]:
    """Whatever is wrong with the file inside the block becomes one AttireError that names it."""
    try:
        yield path
    except (KeyError, TypeError, ValueError, UnidentifiedImageError) as error:
        what = f"not what a finished run writes: {type(error).__name__} {error}"
        raise AttireError(path, what[:120], do="run `attire train` again") from error
    except OSError as error:
        raise io_error("read", path, error) from error


def table_text(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    return buffer.getvalue()
