"""What happens to feature maps before a training step: moved by a place, erased, mixed. Drawn from seed and step."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from attire.recipes import Recipe

_ERASED = (0.02, 0.25)  # share of the map, uniform; the paper goes to 0.4 on pictures of 32 px
_ASPECT = (0.3, 3.3)  # height over width, uniform in the logarithm


@dataclass(frozen=True)
class Target:
    """What a batch is to be answered: labels (b,); of a mixed one `share` of each row, and `others` for the rest.

    soft: a teacher's answers (b, K), of mixed rows mixed likewise. none: (b,), the rows that are none of the classes.
    """

    labels: Tensor
    others: Tensor | None = None
    share: float = 1.0
    soft: Tensor | None = None
    none: Tensor | None = None

    def part(self, rows: slice | Tensor) -> "Target":
        """Of these rows of the batch alone."""
        others, soft, none = (None if value is None else value[rows] for value in (self.others, self.soft, self.none))
        return Target(self.labels[rows], others, self.share, soft, none)


def is_drawn_for_batches(recipe: Recipe) -> bool:
    """Whether `augment` does anything: then it must see whole batches, since what it draws is drawn for their rows."""
    return bool(recipe.jitter or recipe.random_erasing or recipe.cutmix)


def augment(x: Tensor, target: Target, recipe: Recipe, epoch: int, step: int) -> tuple[Tensor, Target]:
    """Rows (b, D) as the recipe wants them in this step, changed in place, and their targets."""
    if not is_drawn_for_batches(recipe):
        return x, target
    rng = np.random.default_rng([recipe.seed, epoch, step, 1])
    maps = x.view(len(x), *recipe.map_shape)
    if recipe.jitter:
        _jitter(maps, recipe.jitter, rng)
    if recipe.random_erasing:
        _erase(maps, recipe.random_erasing, rng)
    if len(x) < 2 or rng.random() >= recipe.cutmix:
        return x, target
    return x, _cutmix(maps, target, rng)


def _jitter(maps: Tensor, probability: float, rng: np.random.Generator) -> None:
    """Each of (b, C, H, W) with this probability moved by one place, up or down and left or right or not, in place.

    A convolution's map of a moved picture is its map, moved: a place of block2 is 4 px of the picture that VGG16 sees,
    2.3 of 28 at 48 px. So every stored view counts nine times. What comes in at the edge is the edge, repeated.
    """
    count, height, width = len(maps), *maps.shape[2:]
    steps = rng.integers(-1, 2, (count, 2)) * (rng.random(count) < probability)[:, None]  # (down, right)
    for down, right in np.unique(steps, axis=0):
        if not (down or right):
            continue
        rows = torch.from_numpy(np.flatnonzero((steps == (down, right)).all(1))).to(maps.device)
        wide = F.pad(maps[rows], (1, 1, 1, 1), mode="replicate")
        maps[rows] = wide[:, :, 1 - down : 1 - down + height, 1 - right : 1 - right + width]


def _erase(maps: Tensor, probability: float, rng: np.random.Generator) -> None:
    """Random erasing (Zhong et al. 2017): a rectangle of (b, C, H, W) becomes 0 with this probability, in place."""
    count, side = len(maps), maps.shape[-1]
    area = rng.uniform(*_ERASED, count) * side * side
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
    share, soft = 1 - float(mask.float().mean()), target.soft
    mixed = None if soft is None else share * soft + (1 - share) * soft[order]
    return Target(target.labels, target.labels[order], share, mixed)
