"""What one run trains on, prepared: images and their split, verified weights, chosen precision and backend."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attire.blocks import BLOCK_ENDS, WEIGHT_SHAPES
from attire.data.dataset import FASHION_MNIST, ImageDataset, RowIndices, Splits, split_indices
from attire.data.loading import DataChoice
from attire.errors import one_line
from attire.features import cache
from attire.features.backbones import choose_backbone, load_backbone
from attire.features.cache import FeatureSpec
from attire.features.sources import WINDOW_BYTES
from attire.features.views import augmentation_views
from attire.inference.classifier import Architecture
from attire.model import devices, distributed, heads, pretrained
from attire.model.weights import read_weights, tensor_digest
from attire.progress import Progress
from attire.recipes import Recipe
from attire.storage import files, memory, url_copies
from attire.training.checkpoints import KEPT_CHECKPOINTS

_REPORT_BYTES = 12 * 2**20  # of a run besides checkpoints and weights: report, tables, neighbours


@dataclass(frozen=True, eq=False)
class Experiment:
    """What one run trains on, complete and immutable; `prepare` makes it.

    train, val: rows of `splits.data`; weights: file of VGG16's verified weights; spec: of the plain view's features,
    `spec.weights` is the digest of those weights.
    """

    recipe: Recipe
    splits: Splits
    train: RowIndices
    val: RowIndices
    weights: Path
    spec: FeatureSpec
    train_precision: str
    device: torch.device

    @classmethod
    def prepare(cls, recipe: Recipe, choice: DataChoice, device: torch.device, progress: Progress) -> "Experiment":
        """Fetch and read images and weights, split the rows, and choose precision and backend, measuring where needed.

        Raises AttireError for data or weights that cannot be used, UsageError for what this machine does not have.
        """
        main_process_first = distributed.main_process_first
        main_process_first(lambda: url_copies.prefetch(choice.data, choice.test, progress=progress.advance))
        splits = main_process_first(lambda: choice.load(recipe))
        progress.note("Data", _describe_splits(splits))
        train, val = validation_rows(splits.data, splits.train_rows, recipe)
        weights = main_process_first(lambda: pretrained.vgg16_weights(progress=progress.advance))
        progress.note("Weights", "VGG16 ImageNet, 13 convolutions   verified")
        progress.note("Recipe", recipe.describe())
        if recipe.tta > 1:
            cost = f"an answer takes {recipe.tta} times the forward passes"
            progress.note("Views", f"{recipe.tta} of each picture averaged: {cost}")
        precision, backend = distributed.from_main_process(
            lambda: choose_backbone(recipe.freeze_to, recipe.backend, recipe.precision, device)
        )
        train_precision = distributed.from_main_process(
            lambda: devices.choose_train_precision(recipe.precision, device)
        )
        spec = FeatureSpec(
            freeze_to=recipe.freeze_to,
            image_size=recipe.image_size,
            pool=0 if recipe.finetune_blocks else recipe.pool,
            weights=tensor_digest(read_weights(weights)),
            precision=precision,
            backend=backend,
        )
        return cls(recipe, splits, train, val, weights, spec, train_precision, device)

    @property
    def architecture(self) -> Architecture:
        return Architecture(**{field.name: getattr(self.recipe, field.name) for field in fields(Architecture)})

    @property
    def augmentation_views(self) -> tuple[str, ...]:
        """The views that training draws from, in the order of their numbers."""
        recipe = self.recipe
        return augmentation_views(recipe.flips, recipe.shifts, recipe.synthetic_drawings, recipe.outlier_exposure)

    @property
    def views(self) -> tuple[str, ...]:
        """The augmentation views, then those that only test-time augmentation uses."""
        return tuple(dict.fromkeys((*self.augmentation_views, *self.architecture.views)))

    @property
    def load_backbone(self) -> Callable[[], cache.FeatureExtractor]:
        """Opens the frozen part alone, on the device and in the precision of the run; it can be sent to a process."""
        return partial(load_backbone, self.weights, self.spec, self.device, len(self.splits.data))

    def describe_data(self, teacher: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """`data.json`; teacher: what it records of the teacher, see `Teacher.soft_targets`."""
        rows = {"train": len(self.train), "val": len(self.val), "test": len(self.splits.test_rows)}
        name = self.splits.data.source
        name = "Fashion-MNIST" if name == FASHION_MNIST else name
        return {"name": name, "rows": rows, **self.splits.describe(), **({"teacher": teacher} if teacher else {})}

    def environment(self) -> dict[str, Any]:
        """`environment.json`."""
        chosen: dict[str, Any] = {"precision": self.spec.precision, "backend": self.spec.backend}
        chosen |= {"processes": distributed.world_size()} if distributed.world_size() > 1 else {}
        return {**devices.environment(self.device), **chosen, "train_precision": self.train_precision}

    def with_choices_of(self, environment: Mapping[str, Any]) -> "Experiment":
        """With precision and backend of the environment that the run began in, if that was on the same kind of device.

        Measured again, on another machine or beside other work, they may come out otherwise.
        """
        known = all(isinstance(environment.get(name), str) for name in ("precision", "backend", "train_precision"))
        if not known or environment.get("device") != self.environment()["device"]:
            return self
        spec = replace(self.spec, precision=environment["precision"], backend=environment["backend"])
        return replace(self, spec=spec, train_precision=environment["train_precision"])

    def check_resources(self, folder: Path, runs: int = 1) -> None:
        """Raise AttireError, before long work, where disk or memory are too small for `runs` runs in `folder`."""
        recipe, classes = self.recipe, len(self.splits.data.classes)
        weights = 4 * heads.parameter_count(recipe, classes)
        checkpoint = (4 if recipe.ema else 3) * weights
        present = sum(path.stat().st_size for path in folder.rglob("*.ckpt"))
        need = (runs * KEPT_CHECKPOINTS + 1) * checkpoint - present
        need += weights + _frozen_bytes(recipe.freeze_to) + _REPORT_BYTES
        files.check_room(folder, need, "checkpoints and bundle", "make room, or give --out a folder on another disk")
        one_picture = 2 * cache.FORWARD_BYTES_PER_PIXEL * recipe.image_size**2
        need = max(WINDOW_BYTES + heads.training_bytes(recipe, classes), one_picture)
        memory.reserve(need, f"recipe {recipe.name}")


def validation_rows(data: ImageDataset, rows: RowIndices, recipe: Recipe) -> tuple[RowIndices, RowIndices]:
    """The rows that train, and those held out of them for validation: as many as the recipe says, at most a tenth.

    A tenth of a small set may be too few for a row of each class: then that many, where the split is stratified.
    """
    if not recipe.val_size:
        return rows, np.empty(0, np.int64)
    labels = data.labels[rows]
    least = len(np.unique(labels)) if recipe.stratify else 1
    count = min(recipe.val_size, max(least, len(labels) // 10))
    train, val = split_indices(labels, count, recipe.split_seed, recipe.stratify, name=data.source)
    return rows[train], rows[val]


def _describe_splits(splits: Splits) -> str:
    name = splits.data.source
    name = "Fashion-MNIST" if name == FASHION_MNIST else one_line(name)
    return f"{name}, {len(splits.train_rows):,} + {len(splits.test_rows):,} images   verified"


def _frozen_bytes(freeze_to: str) -> int:
    """Bytes of the frozen backbone in a bundle, in 32 bits."""
    end = BLOCK_ENDS[freeze_to]
    return 4 * sum(prod(shape) for name, shape in WEIGHT_SHAPES.items() if int(name.split(".")[1]) < end)
