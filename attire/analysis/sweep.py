"""`attire sweep`: every freeze boundary, picture size and pooling on a subset, scored by a closed-form classifier.

One forward pass per size taps VGG16 at every boundary, so a size costs little more than its deepest boundary alone.
Only training rows are used: some to fit, others, called validation, to score.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from attire.analysis.ridge import best_ridge
from attire.analysis.taps import BACKGROUNDS, TapExtractor
from attire.blocks import BLOCKS, feature_shape, map_side
from attire.data.dataset import ImageDataset, split_indices
from attire.data.loading import load_splits
from attire.errors import AttireError, UsageError
from attire.evaluation import figures, run_result
from attire.evaluation.intervals import wilson
from attire.model import devices
from attire.progress import NoProgress, Progress
from attire.recipes import FAST
from attire.storage import files, url_copies
from attire.training.run import lock_run_folder


@dataclass(frozen=True)
class Grid:
    """What a sweep tries: every picture size (px) on every background, tapped at every freeze boundary.

    Raises UsageError for a size, boundary or background that cannot be swept.
    """

    sizes: Sequence[int] = (32, 48, 64, 96, 112, 160, 224)
    boundaries: Sequence[str] = ("block2", "block3", "block4", "block5")
    backgrounds: Sequence[str] = ("black",)

    def __post_init__(self) -> None:
        if not self.sizes or not self.boundaries or not self.backgrounds:
            raise UsageError("sweep", "expected at least one size, boundary and background")
        for size in self.sizes:
            if not 8 <= size <= 1024:
                raise UsageError("--sizes", f"expected 8 to 1024 px, found {size}")
        for boundary in self.boundaries:
            if boundary not in BLOCKS:
                raise UsageError("--boundaries", f"expected some of {', '.join(BLOCKS)}, found {boundary!r}")
            feature_shape(boundary, max(self.sizes), 0)
        for background in self.backgrounds:
            if background not in BACKGROUNDS:
                raise UsageError("--backgrounds", f"expected {' or '.join(BACKGROUNDS)}, found {background!r}")


@dataclass(frozen=True)
class _Cell:
    """One boundary, size and pooling: `correct` of `val` rows; images/s of the backbone up to there, once measured."""

    freeze_to: str
    image_size: int
    pool: int  # as in `--pool`: the side that the map is averaged to, 0 for the whole map
    background: str
    width: int
    penalty: float
    correct: int
    val: int
    images_per_second: float | None = None

    @property
    def accuracy(self) -> float:
        return self.correct / self.val

    @property
    def speed(self) -> float:
        return self.images_per_second or 0.0

    def flags(self) -> str:
        return f"--freeze-to {self.freeze_to} --image-size {self.image_size} --pool {self.pool}"

    def to_json(self) -> dict[str, Any]:
        accuracy = wilson(self.correct, self.val)
        bounds = {"accuracy_low": accuracy.low, "accuracy_high": accuracy.high}
        return {**asdict(self), "accuracy": accuracy.value, **bounds}


@dataclass(frozen=True)
class Sweep:
    """A finished sweep: its cells in the order they were scored, and how many rows fitted and scored them."""

    folder: Path
    cells: tuple[_Cell, ...]
    rows: int
    val: int

    @property
    def front(self) -> list[_Cell]:
        """The Pareto front, fastest first: cells more accurate than every cell at least as fast."""
        best, front = -1, []
        for cell in sorted(self.cells, key=lambda cell: (-cell.speed, -cell.correct)):
            if cell.correct > best:
                best = cell.correct
                front.append(cell)
        return front

    @property
    def proposed(self) -> _Cell:
        """The fastest cell within one standard error of the best (Breiman et al. 1984), on black if there is any."""
        cells = [cell for cell in self.cells if cell.background == "black"] or list(self.cells)
        best = max(cell.accuracy for cell in cells)
        near = [cell for cell in cells if cell.accuracy >= best - math.sqrt(best * (1 - best) / self.val)]
        return max(near, key=lambda cell: (cell.speed, cell.accuracy))

    @property
    def ranked(self) -> list[_Cell]:
        """Best first."""
        return sorted(self.cells, key=lambda cell: (-cell.correct, -cell.speed))

    def command(self) -> str:
        return f"attire train {self.proposed.flags()}"

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "val": self.val,
            "proposed": self.proposed.to_json(),
            "command": self.command(),
            "cells": [cell.to_json() for cell in self.ranked],
        }


def sweep(
    data: str | Path | None = None,
    *,
    classes: Sequence[str] | None = None,
    grid: Grid | None = None,
    rows: int = 4000,
    val: int = 3000,
    out: str | Path = "sweep",
    device: str = "auto",
    progress: Progress | None = None,
) -> Sweep:
    """Score every boundary, size and pooling; resumes where an earlier call with the same folder stopped.

    grid: None for all that it holds by default. rows, val: how many training images to fit on and to score, at most
    what there is, drawn stratified with a fixed seed. Raises AttireError for bad data or a folder of another sweep.
    """
    grid, progress = grid or Grid(), progress or NoProgress()
    chosen = devices.choose_device(device)
    url_copies.prefetch(data, progress=progress.advance)
    images, fit = _draw(load_splits(data, classes=classes, seed=FAST.split_seed).train, rows, val)
    folder = files.make_dir(Path(out))
    with lock_run_folder(folder):
        progress.note("Data", f"{images.source}, {fit:,} training images to fit, {len(images) - fit:,} to score")
        scorer = _Scorer(TapExtractor(images, grid.boundaries, chosen, progress), fit, folder / "sweep.json")
        cells = scorer.stored_cells()
        for size, background in ((size, background) for size in grid.sizes for background in grid.backgrounds):
            if not any((cell.image_size, cell.background) == (size, background) for cell in cells):
                cells += scorer.score(size, background)
                scorer.store(cells)
        cells = scorer.with_speeds(cells)
        scorer.store(cells)
        result = Sweep(folder, tuple(cells), fit, len(images) - fit)
        _write_sweep(result)
    progress.close()
    return result


def _draw(train: ImageDataset, rows: int, val: int) -> tuple[ImageDataset, int]:
    """The images of a sweep and how many of them to fit on; those to score follow. Fewer where there are not enough."""
    if rows < 1 or val < 1:
        raise UsageError("--rows", f"expected 1 or more to fit and to score, found {rows} and {val}")
    share = min(1.0, len(train) / (rows + val))
    rows, val = int(rows * share), max(1, int(val * share))
    rest, scored = split_indices(train.labels, val, FAST.split_seed, name=train.source)
    if share == 1 and len(rest) > rows:
        stratify = min(rows, len(rest) - rows) >= len(train.classes)  # else there are too few rows for it
        rest = rest[split_indices(train.labels[rest], rows, FAST.split_seed, stratify, name=train.source)[1]]
    return train.subset(np.concatenate([rest, scored])), len(rest)


class _Scorer:
    """Scores the taps of an extractor's images, of which the first `fit` are fitted on; keeps its cells in a file."""

    def __init__(self, extractor: TapExtractor, fit: int, path: Path) -> None:
        self.extractor, self.fit, self.path = extractor, fit, path
        self.data, self.progress = extractor.data, extractor.progress

    def score(self, size: int, background: str) -> list[_Cell]:
        """All cells of one size, each by a linear classifier on the features of its tap."""
        cells = []
        for boundary, side, features in self.extractor.features(size, background):
            correct, penalty = self._fit_ridge(features)
            pool, val = 0 if side == map_side(boundary, size) else side, len(self.data) - self.fit
            cell = _Cell(boundary, size, pool, background, features.shape[1], penalty, correct, val)
            name = f"{boundary} {size} px {f'{side}x{side}':5} {background}"
            self.progress.note("Cell", f"{name}   {100 * cell.accuracy:.2f} %")
            cells.append(cell)
        return cells

    def _fit_ridge(self, features: NDArray[np.float16]) -> tuple[int, float]:
        labels, k = self.data.labels, len(self.data.classes)
        return best_ridge(features[: self.fit], labels[: self.fit], features[self.fit :], labels[self.fit :], k)

    def with_speeds(self, cells: Sequence[_Cell]) -> list[_Cell]:
        """The cells with the images/s of their boundary and size, all measured together at the end."""
        taps = list(dict.fromkeys((cell.freeze_to, cell.image_size) for cell in cells))
        speeds: dict[tuple[str, int], float] = {}
        for boundary, size in taps:
            speeds[boundary, size] = self.extractor.images_per_second(boundary, size)
            self.progress.advance("Speed", len(speeds), len(taps))
        return [replace(cell, images_per_second=speeds[cell.freeze_to, cell.image_size]) for cell in cells]

    def _conditions(self) -> dict[str, Any]:
        """What the cells of one file have in common."""
        extractor = self.extractor
        return {
            "images": self.data.digest,
            "fit": self.fit,
            "weights": extractor.weights,
            "boundaries": extractor.boundaries,
            "precision": extractor.precision,
        }

    def stored_cells(self) -> list[_Cell]:
        """Cells of an earlier call. Raises AttireError where they are of another sweep."""
        if not self.path.exists():
            return []
        with run_result.refuse_damage(self.path):
            stored = files.read_json(self.path)
            if stored["about"] != self._conditions():
                do = "give --out another folder"
                raise AttireError(self.path, "it holds a sweep over other images, boundaries or weights", do=do)
            names = {field.name for field in fields(_Cell)}
            return [_Cell(**{key: value for key, value in cell.items() if key in names}) for cell in stored["cells"]]

    def store(self, cells: Sequence[_Cell]) -> None:
        environment = devices.environment(self.extractor.backbone.device)
        about = {"schema": 1, "about": self._conditions(), "environment": environment}
        files.write_json(self.path, {**about, "cells": [cell.to_json() for cell in cells]})


def _write_sweep(sweep: Sweep) -> None:
    """`sweep.csv`, a line for each cell, best first; and the figure as SVG and PNG."""
    header = [field.name for field in fields(_Cell)] + ["accuracy", "accuracy_low", "accuracy_high", "on_front"]
    front, lines = sweep.front, []
    for cell in sweep.ranked:
        values = {**cell.to_json(), "on_front": "yes" if cell in front else ""}
        lines.append([values[name] for name in header])
    files.write_text(sweep.folder / "sweep.csv", run_result.csv_text(header, lines))
    figures.write_figure(sweep.folder / "sweep", _accuracy_by_speed(sweep.cells, front))


@matplotlib.rc_context(figures.STYLE)
def _accuracy_by_speed(cells: Sequence[_Cell], front: Sequence[_Cell]) -> Figure:
    """Validation accuracy against images/s (log), a colour for each boundary; the Pareto front is joined and named."""
    figure, plot = figures.new_axes(6.4, 4.2)
    names = sorted({cell.freeze_to for cell in cells})
    for name, colour, marker in zip(names, figures.COLOURS, "osD^v", strict=False):
        for background, label, face in (("black", name, colour), ("white", f"{name}, white background", "none")):
            series = [cell for cell in cells if (cell.freeze_to, cell.background) == (name, background)]
            if series:
                x, y = [cell.speed for cell in series], [100 * cell.accuracy for cell in series]
                plot.scatter(x, y, 20, marker=marker, label=label, edgecolors=colour, facecolors=face)
    plot.plot([cell.speed for cell in front], [100 * cell.accuracy for cell in front], color=figures.INK, linewidth=0.8)
    for cell in front:
        place = (cell.speed, 100 * cell.accuracy)
        plot.annotate(f"{cell.image_size} px", place, (3, 4), textcoords="offset points", size=7.5)
    plot.set_xscale("log")
    plot.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plot.xaxis.set_major_formatter("{x:,.0f}")
    plot.xaxis.set_minor_locator(NullLocator())
    plot.set(xlabel="images/s through the frozen part", ylabel="validation accuracy, %")
    plot.legend(loc="lower left")
    return figure
