"""`attire sweep`: every freeze boundary, picture size and pooling on a subset, scored by a closed-form classifier.

One forward pass per size taps VGG16 at every boundary, so a size costs little more than its deepest boundary alone.
Only training rows are used: some to fit, others, called validation, to score.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from attire.analysis.ridge import best_ridge
from attire.blocks import BLOCKS, CHANNELS, feature_shape, map_side
from attire.data.dataset import ImageDataset, split_indices
from attire.data.loading import load_splits
from attire.errors import AttireError, UsageError
from attire.evaluation import figures, run_result
from attire.evaluation.intervals import wilson
from attire.features import cache
from attire.features.cache import FeatureSpec
from attire.model import devices, pretrained, vgg
from attire.model.weights import read_weights, tensor_digest
from attire.progress import NoProgress, Progress
from attire.recipes import FAST
from attire.storage import files, url_copies
from attire.training.run import lock_run_folder

_SIZES = (32, 48, 64, 96, 112, 160, 224)  # px
_BOUNDARIES = ("block2", "block3", "block4", "block5")
_POOLS = (1, 2, 4)  # and the whole map, where it is at most WIDEST features
_WIDEST = 25_088  # features: block5 at 224 px, the classic recipe's
_VIEWS = {"black": "plain", "white": "negative"}  # background, and the view that has it
_PASS_SECONDS = 0.5  # a boundary's speed is the best of three passes of at least this long


@dataclass(frozen=True, kw_only=True)
class _TapSpec(FeatureSpec):
    """Features of several taps side by side: (boundary, pooled side), in that order."""

    taps: tuple[tuple[str, int], ...]

    @property
    def width(self) -> int:
        return sum(CHANNELS[boundary] * side**2 for boundary, side in self.taps)

    def columns(self) -> Iterator[tuple[str, int, slice]]:
        """Boundary, pooled side, and the columns that hold its features."""
        start = 0
        for boundary, side in self.taps:
            end = start + CHANNELS[boundary] * side**2
            yield boundary, side, slice(start, end)
            start = end


class _TapBackbone(nn.Module):
    """(n, 3, S, S) normalised pictures to the features of every tap, (n, width) float32."""

    def __init__(self, backbone: vgg.Backbone, taps: Sequence[tuple[str, int]]) -> None:
        super().__init__()
        self.backbone, self.taps = backbone, tuple(taps)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone.run(self.tapped, x)

    def tapped(self, x: Tensor) -> Tensor:
        found, end = {}, 0
        for boundary in sorted({boundary for boundary, _ in self.taps}, key=lambda name: BLOCKS[name]):
            x = self.backbone.features[end : BLOCKS[boundary]](x)
            end = BLOCKS[boundary]
            found[boundary] = x
        return torch.cat([F.adaptive_avg_pool2d(found[name].float(), side).flatten(1) for name, side in self.taps], 1)


@dataclass(frozen=True)
class _Cell:
    """One line of the sweep: `correct` of `val` rows; images/s of the backbone up to this boundary, once measured."""

    freeze_to: str
    image_size: int
    pool: int  # as `--pool` takes it: side the map is averaged to, 0 as it is
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
        found = wilson(self.correct, self.val)
        return {**asdict(self), "accuracy": found.value, "accuracy_low": found.low, "accuracy_high": found.high}


@dataclass(frozen=True)
class _Sweep:
    """A finished sweep: its cells in the order they were scored, and how many rows fitted and scored them."""

    folder: Path
    cells: tuple[_Cell, ...]
    rows: int
    val: int

    @property
    def front(self) -> list[_Cell]:
        """The Pareto front, fastest first: cells more accurate than every cell at least as fast."""
        best, kept = -1, []
        for cell in sorted(self.cells, key=lambda cell: (-cell.speed, -cell.correct)):
            if cell.correct > best:
                best = cell.correct
                kept.append(cell)
        return kept

    @property
    def proposed(self) -> _Cell:
        """The fastest cell within one standard error of the best (Breiman et al. 1984); only what `train` can do."""
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
        told = {"rows": self.rows, "val": self.val, "proposed": self.proposed.to_json(), "command": self.command()}
        return {**told, "cells": [cell.to_json() for cell in self.ranked]}


def sweep(
    data: str | Path | None = None,
    *,
    classes: Sequence[str] | None = None,
    sizes: Sequence[int] = _SIZES,
    boundaries: Sequence[str] = _BOUNDARIES,
    backgrounds: Sequence[str] = ("black",),
    rows: int = 4000,
    val: int = 3000,
    out: str | Path = "sweep",
    device: str = "auto",
    progress: Progress | None = None,
) -> _Sweep:
    """Score every boundary, size and pooling; goes on where an earlier call with the same folder stopped.

    rows, val: how many training images fit and score, at most what there is, drawn stratified with a fixed seed.
    Raises AttireError for bad data or a folder of another sweep, UsageError for a size, boundary or background.
    """
    _check(sizes, boundaries, backgrounds)
    progress, where = progress or NoProgress(), devices.choose_device(device)
    url_copies.prefetch(data, progress=progress.advance)
    data_set, fit = _draw(load_splits(data, classes=classes, seed=FAST.split_seed).train, rows, val)
    folder = files.make_dir(Path(out))
    with lock_run_folder(folder):
        progress.note("Data", f"{data_set.source}, {fit:,} training images to fit, {len(data_set) - fit:,} to score")
        bench = _Bench(data_set, fit, boundaries, where, progress)
        done = bench.stored(folder / "sweep.json")
        for size, background in ((size, background) for size in sizes for background in backgrounds):
            if not any((cell.image_size, cell.background) == (size, background) for cell in done):
                done += bench.score(size, background)
                bench.keep(folder / "sweep.json", done)
        done = bench.timed(done)
        bench.keep(folder / "sweep.json", done)
        found = _Sweep(folder, tuple(done), fit, len(data_set) - fit)
        _write_sweep(found)
    progress.close()
    return found


def _check(sizes: Sequence[int], boundaries: Sequence[str], backgrounds: Sequence[str]) -> None:
    if not sizes or not boundaries or not backgrounds:
        raise UsageError("sweep", "expected at least one size, boundary and background")
    for size in sizes:
        if not 8 <= size <= 1024:
            raise UsageError("--sizes", f"expected 8 to 1024 px, found {size}")
    for boundary in boundaries:
        if boundary not in BLOCKS:
            raise UsageError("--boundaries", f"expected some of {', '.join(BLOCKS)}, found {boundary!r}")
        feature_shape(boundary, max(sizes), 0)
    for background in backgrounds:
        if background not in _VIEWS:
            raise UsageError("--backgrounds", f"expected {' or '.join(_VIEWS)}, found {background!r}")


def _draw(train: ImageDataset, rows: int, val: int) -> tuple[ImageDataset, int]:
    """The images of a sweep, and how many of them fit; the others score. Fewer of both where there are not enough."""
    if rows < 1 or val < 1:
        raise UsageError("--rows", f"expected 1 or more to fit and to score, found {rows} and {val}")
    share = min(1.0, len(train) / (rows + val))
    rows, val = int(rows * share), max(1, int(val * share))
    rest, scored = split_indices(train.labels, val, FAST.split_seed, name=train.source)
    if share == 1 and len(rest) > rows:
        kept = min(rows, len(rest) - rows) >= len(train.classes)  # else there are too few rows to keep the shares
        rest = rest[split_indices(train.labels[rest], rows, FAST.split_seed, kept, name=train.source)[1]]
    return train.subset(np.concatenate([rest, scored])), len(rest)


class _Bench:
    """What all cells share: images, network, device. Finished cells are kept in one JSON file."""

    def __init__(
        self, data: ImageDataset, fit: int, boundaries: Sequence[str], device: torch.device, progress: Progress
    ) -> None:
        self.data, self.fit, self.progress = data, fit, progress
        self.boundaries = sorted(boundaries, key=lambda name: BLOCKS[name])
        weights = pretrained.vgg16_weights(progress=progress.advance)
        self.weights = tensor_digest(read_weights(weights))
        self.precision = devices.choose_precision("auto", device)
        self.backend = devices.choose_backend("torch", self.precision, device)
        model = vgg.vgg16(weights, self.boundaries[-1], 0, nn.Sequential())
        self.backbone = vgg.Backbone(model, device, self.precision, self.backend == devices.WINOGRAD)

    def taps(self, size: int) -> tuple[tuple[str, int], ...]:
        """Boundaries that this size reaches, each with the sides its map is averaged to, the whole map among them."""
        found = []
        for name in self.boundaries:
            whole = map_side(name, size)
            sides = {side for side in _POOLS if side < whole}
            sides |= {whole} if whole and CHANNELS[name] * whole**2 <= _WIDEST else set()
            found += [(name, side) for side in sorted(sides)]
        return tuple(found)

    def score(self, size: int, background: str) -> list[_Cell]:
        """All cells of one size: extract once (a stopped extraction goes on), then a classifier for each tap."""
        taps = self.taps(size)
        where = "+".join(self.boundaries)
        spec = _TapSpec(
            where, size, 0, self.weights, self.precision, _VIEWS[background], backend=self.backend, taps=taps
        )
        stage = f"{size} px, {background}"
        self.lay_out(size)

        def advance(done: int, total: int) -> None:
            self.progress.advance(stage, done, total)

        found = cache.extract(
            self.data.images, self.data.image_digest, spec, lambda: _TapBackbone(self.backbone, taps), advance
        )
        table = np.concatenate(list(found.blocks()))
        cells = [self.cell(table[:, part], name, side, size, background) for name, side, part in spec.columns()]
        cache.delete_entry(found.folder.name)  # up to 200 kB an image, and of no use to anything else
        return cells

    def cell(self, table: NDArray[np.float16], name: str, side: int, size: int, background: str) -> _Cell:
        labels, k = self.data.labels, len(self.data.classes)
        right, penalty = best_ridge(table[: self.fit], labels[: self.fit], table[self.fit :], labels[self.fit :], k)
        pool = 0 if side == map_side(name, size) else side
        found = _Cell(name, size, pool, background, table.shape[1], penalty, right, len(labels) - self.fit)
        self.progress.note("Cell", f"{name} {size} px {f'{side}x{side}':5} {background}   {100 * found.accuracy:.2f} %")
        return found

    def timed(self, cells: Sequence[_Cell]) -> list[_Cell]:
        """Each cell with the images/s of its boundary and size: measured together at the end, best of three passes."""
        speeds: dict[tuple[str, int], float] = {}
        for cell in cells:
            key = (cell.freeze_to, cell.image_size)
            if key not in speeds:
                speeds[key] = self.images_per_second(*key)
                self.progress.advance("Speed", len(speeds), len({(c.freeze_to, c.image_size) for c in cells}))
        return [replace(cell, images_per_second=speeds[cell.freeze_to, cell.image_size]) for cell in cells]

    def lay_out(self, size: int) -> None:
        if self.backend == "torch" and self.backbone.device.type == "cpu":
            name = f"{self.boundaries[-1]} {self.precision}"
            self.backbone.microbatching = devices.choose_microbatching(name, self.backbone, size, len(self.data))

    def images_per_second(self, boundary: str, size: int) -> float:
        """Preprocessing and backbone, as extraction runs them."""
        self.lay_out(size)
        part = np.resize(self.data.images, (min(cache.forward_batch_size(size), 512), 28, 28))
        backbone = _TapBackbone(self.backbone, [(boundary, 1)])
        best = 0.0
        with torch.inference_mode():
            backbone(vgg.preprocess(part, size))  # warms up
            for _ in range(3):
                start, rows = time.perf_counter(), 0
                while (spent := time.perf_counter() - start) < _PASS_SECONDS:
                    backbone(vgg.preprocess(part, size)).cpu()
                    rows += len(part)
                best = max(best, rows / spent)
        return best

    def about(self) -> dict[str, Any]:
        """What the cells of one file have in common."""
        told = {"images": self.data.digest, "fit": self.fit, "weights": self.weights}
        return {**told, "boundaries": self.boundaries, "precision": self.precision}

    def stored(self, path: Path) -> list[_Cell]:
        if not path.exists():
            return []
        with run_result.refuse_damage(path):
            value = files.read_json(path)
            if value["about"] != self.about():
                do = "give --out another folder"
                raise AttireError(path, "it holds a sweep over other images, boundaries or weights", do=do)
            names = {field.name for field in fields(_Cell)}
            return [_Cell(**{key: item for key, item in cell.items() if key in names}) for cell in value["cells"]]

    def keep(self, path: Path, cells: Sequence[_Cell]) -> None:
        told = {"schema": 1, "about": self.about(), "environment": devices.environment(self.backbone.device)}
        files.write_json(path, {**told, "cells": [cell.to_json() for cell in cells]})


def _write_sweep(found: _Sweep) -> None:
    """`sweep.csv`, a line for each cell, best first; and the picture as SVG and PNG."""
    header = [field.name for field in fields(_Cell)] + ["accuracy", "accuracy_low", "accuracy_high", "on_front"]
    front, lines = found.front, []
    for cell in found.ranked:
        value = {**cell.to_json(), "on_front": "yes" if cell in front else ""}
        lines.append([value[name] for name in header])
    files.write_text(found.folder / "sweep.csv", run_result.csv_text(header, lines))
    drawing = figures.accuracy_by_speed(found.cells, found.front)
    files.write_bytes(found.folder / "sweep.svg", figures.svg(drawing))
    files.write_bytes(found.folder / "sweep.png", figures.png(drawing))
