"""Augmentation of feature maps before a training step: random erasing and CutMix, drawn from seed and step."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attire.recipes import Recipe

_ERASED_AREA = (0.02, 0.25)  # fraction of the map, uniform; the paper goes to 0.4 on pictures of 32 px
_ASPECT = (0.3, 3.3)  # height over width, uniform in the logarithm


@dataclass(frozen=True)
class Target:
    """What a batch is trained towards: labels (b,), and in a batch that CutMix mixed `other_labels` (b,).

    label_weight: weight of `labels`, the rest is that of `other_labels`. soft_targets: a teacher's probabilities
    (b, K), mixed likewise. outliers: mask (b,) of the rows that show no garment.
    """

    labels: Tensor
    other_labels: Tensor | None = None
    label_weight: float = 1.0
    soft_targets: Tensor | None = None
    outliers: Tensor | None = None

    def select(self, rows: slice | Tensor) -> "Target":
        """The target of these rows of the batch alone."""
        optional = (self.other_labels, self.soft_targets, self.outliers)
        other_labels, soft_targets, outliers = (None if value is None else value[rows] for value in optional)
        return Target(self.labels[rows], other_labels, self.label_weight, soft_targets, outliers)


def needs_whole_batches(recipe: Recipe) -> bool:
    """Whether `augment` changes anything: then it must see whole batches, since it draws for all of their rows."""
    return bool(recipe.random_erasing or recipe.cutmix)


def augment(x: Tensor, target: Target, recipe: Recipe, epoch: int, step: int) -> tuple[Tensor, Target]:
    """Feature rows (b, D), erased and mixed in place as the recipe asks in this step, and their target."""
    if not needs_whole_batches(recipe):
        return x, target
    rng = np.random.default_rng([recipe.seed, epoch, step, 1])
    maps = x.view(len(x), *recipe.map_shape)
    if recipe.random_erasing:
        _erase(maps, recipe.random_erasing, rng)
    if len(x) < 2 or rng.random() >= recipe.cutmix:
        return x, target
    return x, _cutmix(maps, target, rng)


def _erase(maps: Tensor, probability: float, rng: np.random.Generator) -> None:
    """Random erasing (Zhong et al. 2017): a rectangle of (b, C, H, W) becomes 0 with this probability, in place."""
    count, side = len(maps), maps.shape[-1]
    area = rng.uniform(_ERASED_AREA[0], _ERASED_AREA[1], count) * side * side
    aspect = np.exp(rng.uniform(np.log(_ASPECT[0]), np.log(_ASPECT[1]), count))
    heights, widths = np.sqrt(area * aspect), np.sqrt(area / aspect)
    mask = _boxes(heights, widths, side, rng) & (rng.random(count) < probability)[:, None, None]
    maps.masked_fill_(torch.from_numpy(mask)[:, None].to(maps.device), 0)


def _boxes(
    heights: NDArray[np.float64], widths: NDArray[np.float64], side: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """(b, side, side): true inside one rectangle each, rounded to at least one cell, at a uniform place."""
    inside = []
    for length in (heights, widths):
        cells = np.clip(np.round(length), 1, side)
        start = np.floor(rng.random(len(cells)) * (side - cells + 1))
        at = np.arange(side)[None]
        inside.append((at >= start[:, None]) & (at < (start + cells)[:, None]))
    return inside[0][:, :, None] & inside[1][:, None, :]


def _cutmix(maps: Tensor, target: Target, rng: np.random.Generator) -> Target:
    """CutMix (Yun et al. 2019, alpha 1): one rectangle of each map is another row's, in place."""
    order = torch.from_numpy(rng.permutation(len(maps))).to(maps.device)
    length = np.array([np.sqrt(1 - rng.random()) * maps.shape[-1]])
    mask = torch.from_numpy(_boxes(length, length, maps.shape[-1], rng)[0])
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    top, bottom, left, right = (int(v) for v in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1))
    maps[:, :, top:bottom, left:right] = maps[order, :, top:bottom, left:right]
    weight, soft = 1 - float(mask.float().mean()), target.soft_targets
    mixed = None if soft is None else weight * soft + (1 - weight) * soft[order]
    return Target(target.labels, target.labels[order], weight, mixed)
