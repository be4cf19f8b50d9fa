"""Where `fit` gets its feature rows: from the cache, or on the fly from the images through the frozen trunk."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from attire.features import Features
from attire.training import Rows
from attire.vgg import GarmentDataset

IN_MEMORY = 1_200 * 2**20  # bytes of cached features that are read into memory once; above it rows are read as needed
STREAMED = 4 * 2**30  # bytes; above it the system cannot be expected to keep the files in memory either
STRETCH = 2**19  # bytes that lie together on the disk, so that it need not be searched for each row
WINDOW = 128 * 2**20  # bytes of rows held and drawn from at a time, from 256 such places
SPREAD = 0.05  # of the mean deviation, added to each: features that hardly vary are not blown up


class Standardiser:
    """(x - mean) / scale with the training rows' moments; or, when made from none, no change."""

    def __init__(self, mean: Tensor | None = None, scale: Tensor | None = None) -> None:
        self.mean, self.scale = mean, scale

    def __call__(self, x: Tensor) -> Tensor:
        if self.mean is None or self.scale is None:
            return x
        return x.sub_(self.mean).div_(self.scale)

    def undo(self, x: Tensor) -> Tensor:
        """Features again, of standardised ones (n, D)."""
        return x if self.mean is None or self.scale is None else x * self.scale + self.mean


def measure(blocks: Iterator[Tensor]) -> Standardiser:
    """Mean and deviation of each feature (D,), in float64 over the blocks (n, D), the plain view of training rows."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for block in blocks:
        x = block.double()
        count, total, squares = count + len(x), total + x.sum(0), squares + x.square().sum(0)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
    return Standardiser(mean.float(), (deviation + SPREAD * deviation.mean() + 1e-6).float())


class CachedSource:
    """Rows of finished cache entries: the plain view, and the mirrored one where the recipe uses it."""

    def __init__(self, plain: Features, mirrored: Features | None = None) -> None:
        self.standardise = Standardiser()
        self.views = [plain] + ([mirrored] if mirrored else [])
        self.rows = len(plain)
        small = sum(2 * len(view) * view.shape[1] for view in self.views) <= IN_MEMORY
        self.table = whole(self.views) if small else None  # (views * N, D): view after view
        row = 2 * plain.shape[1]
        large = row * sum(len(view) for view in self.views) > STREAMED
        # Rows that lie together, and rows of a window: what the order of an epoch keeps to, see `training.epoch_order`.
        self.stretch = (max(1, STRETCH // row), max(1, WINDOW // row)) if large else None

    def batches(self, order: Rows, batch_size: int, views: NDArray[np.bool_] | None) -> Iterator[Tensor]:
        """(b, D) float32; see `training.Source`."""
        window = batch_size
        if self.stretch:
            window *= max(1, self.stretch[1] // batch_size)
        # One buffer for all windows: pages that the kernel has to find anew cost more than the rows that fill them.
        buffer = np.empty((min(window, len(order)), self.views[0].shape[1]), np.float16) if self.stretch else None
        for first in range(0, len(order), window):
            held = slice(first, first + window)
            rows, mirrored = order[held], None if views is None else views[held]
            places = None if buffer is None else self._fill(buffer, rows, mirrored)
            for start in range(0, len(rows), batch_size):
                part = slice(start, start + batch_size)
                if buffer is not None and places is not None:
                    yield self.standardise(torch.from_numpy(buffer)[torch.from_numpy(places[part])].float())
                else:
                    yield self.standardise(self._rows(rows[part], None if mirrored is None else mirrored[part]))

    def _fill(self, buffer: NDArray[np.float16], rows: Rows, mirrored: NDArray[np.bool_] | None) -> Rows:
        """Read rows into the buffer in the order of the files; where in it each of them is."""
        places, done = np.empty(len(rows), np.int64), 0
        if mirrored is None or len(self.views) == 1:
            mirrored = np.zeros(len(rows), np.bool_)
        for view, mask in zip(self.views, (~mirrored, mirrored), strict=False):
            own = np.flatnonzero(mask)
            own = own[np.argsort(rows[own])]
            places[own] = np.arange(done, done + len(own))
            view.read(rows[own], buffer[done : done + len(own)])
            done += len(own)
        return places

    def _rows(self, rows: Rows, mirrored: NDArray[np.bool_] | None) -> Tensor:
        if mirrored is None or len(self.views) == 1:
            mirrored = np.zeros(len(rows), np.bool_)
        if self.table is not None:
            return self.table[torch.from_numpy(rows + self.rows * mirrored)].float()
        out = torch.empty(len(rows), self.views[0].shape[1])
        for view, mask in zip(self.views, (~mirrored, mirrored), strict=False):
            if mask.any():
                out[torch.from_numpy(mask)] = torch.from_numpy(view.gather(rows[mask])).float()
        return out


def whole(views: Sequence[Features]) -> Tensor:
    """All rows of all views in memory, (views * N, D) float16."""
    table = torch.empty(sum(len(view) for view in views), views[0].shape[1], dtype=torch.float16)
    start = 0
    for view in views:
        for block in view.blocks():
            table[start : start + len(block)] = torch.from_numpy(block)
            start += len(block)
        view.release()
    return table


class OnTheFlySource:
    """`--no-cache`: each batch goes from rows of pixels through `GarmentDataset` and the frozen trunk, every epoch.

    Features are rounded to 16 bits as the cache rounds them, so that both ways train on the same numbers.
    """

    def __init__(self, dataset: GarmentDataset, trunk: Callable[[Tensor], Tensor], forward_rows: int) -> None:
        self.dataset, self.trunk, self.forward_rows = dataset, trunk, forward_rows
        self.standardise = Standardiser()

    def batches(self, order: Rows, batch_size: int, views: NDArray[np.bool_] | None) -> Iterator[Tensor]:
        """(b, D) float32; see `training.Source`."""
        # A generator of its own: a loader draws from torch's global one, which would shift the dropout that follows.
        own = torch.Generator().manual_seed(0)
        loader: DataLoader[Any] = DataLoader(Subset(self.dataset, order.tolist()), batch_size=batch_size, generator=own)
        start = 0
        for x, _ in loader:
            if views is not None:
                mirrored = torch.from_numpy(views[start : start + len(x)])
                x[mirrored] = x[mirrored].flip(-1)
            start += len(x)
            yield self.standardise(self._features(x))

    def _features(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            parts = [self.trunk(part).half().float().cpu() for part in torch.split(x, self.forward_rows)]
        return torch.cat(parts).clone()
