"""Sources of feature rows for `training.loop.fit`: the cache, or the frozen backbone on the fly."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from attire.data.dataset import RowIndices, ViewIndices
from attire.features.cache import Features
from attire.features.views import apply_view
from attire.model import heads
from attire.model.vgg import preprocess
from attire.storage import memory

_IN_MEMORY_BYTES = 1_200 * 2**20  # cached features up to here are read into memory once, larger ones as needed
_STREAMED_BYTES = 4 * 2**30  # above it the system cannot be expected to keep the files in memory either
_STRETCH_BYTES = 2**19  # neighbouring rows that are read together, so that a disk need not seek for each row
WINDOW_BYTES = 128 * 2**20  # rows in memory to draw batches from: 256 stretches
_LEAST_DEVIATION = 0.05  # of the mean deviation, added to each: features that hardly vary are not blown up


class FeatureSource(Protocol):
    """Gives feature rows in batches."""

    def batches(self, order: RowIndices, batch_size: int, views: ViewIndices | None) -> Iterator[Tensor]:
        """Feature rows (b, D) float32 in this order, each in the view of this number, see `augmentation_views`."""


class GarmentDataset(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """The on-the-fly path: a row of 784 pixels becomes a normalised picture when it is asked for.

    rows: (N, 784) or (N, 28, 28) uint8, labels: (N,) integers. Item i is ((3, size, size) float32, label).
    """

    def __init__(self, rows: NDArray[np.uint8], labels: NDArray[np.int64], size: int = 224) -> None:
        self.rows, self.labels, self.size = rows, labels, size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = np.array(self.rows[index]).reshape(1, 28, 28)
        return preprocess(image, self.size)[0], int(self.labels[index])


class Standardiser:
    """(x - mean) / scale with the training rows' moments (D,); without moments it changes nothing."""

    def __init__(self, mean: Tensor | None = None, scale: Tensor | None = None) -> None:
        self.mean, self.scale = mean, scale

    @classmethod
    def fit(cls, blocks: Iterator[Tensor]) -> "Standardiser":
        """Mean and deviation of each feature, in float64 over the blocks (n, D), the plain view of training rows."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for part in (part for block in blocks for part in torch.split(block, 256)):
            x = part.double()
            count, total, squares = count + len(x), total + x.sum(0), squares + x.square().sum(0)
        mean = total / count
        deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
        return cls(mean.float(), (deviation + _LEAST_DEVIATION * deviation.mean() + 1e-6).float())

    def __call__(self, x: Tensor) -> Tensor:
        """Standardises (n, D) in place."""
        if self.mean is None or self.scale is None:
            return x
        return x.sub_(self.mean).div_(self.scale)

    def undo(self, x: Tensor) -> Tensor:
        """The features (n, D) that gave these standardised ones."""
        return x if self.mean is None or self.scale is None else x * self.scale + self.mean


class CachedSource:
    """Rows of finished cache entries of the same images, one entry a view; names: of the views, in their order."""

    def __init__(self, views: Sequence[Features], names: Sequence[str] = ("plain",)) -> None:
        self.standardise = Standardiser()
        self.views, self.names = list(views), tuple(names)
        self.rows = len(views[0])
        row_bytes = 2 * views[0].shape[1]
        size = row_bytes * sum(len(view) for view in self.views)
        in_memory = size <= min(_IN_MEMORY_BYTES, memory.row_budget())
        self.table = _read_all(self.views) if in_memory else None  # (views * N, D) float16, view after view
        # Neighbouring rows that are drawn together, and rows of a window, see `training.loop`; None: rows are drawn
        # from all. Whatever the limit on memory, since the order of an epoch is the recipe's.
        streamed = size > _STREAMED_BYTES
        self.stretch = (max(1, _STRETCH_BYTES // row_bytes), max(1, WINDOW_BYTES // row_bytes)) if streamed else None

    def batches(self, order: RowIndices, batch_size: int, views: ViewIndices | None) -> Iterator[Tensor]:
        """See `FeatureSource`."""
        window = batch_size
        if self.stretch:
            window *= max(1, self.stretch[1] // batch_size)
        # One buffer for all windows: pages that the kernel has to find anew cost more than the rows that fill them.
        buffer = np.empty((min(window, len(order)), self.views[0].shape[1]), np.float16) if self.stretch else None
        for first in range(0, len(order), window):
            part = slice(first, first + window)
            rows, numbers = order[part], self._view_numbers(order[part], None if views is None else views[part])
            places = None if buffer is None else self._fill(buffer, rows, numbers)
            for start in range(0, len(rows), batch_size):
                batch = slice(start, start + batch_size)
                if buffer is not None and places is not None:
                    x = torch.from_numpy(buffer)[torch.from_numpy(places[batch])].float()
                else:
                    x = self._gather(rows[batch], numbers[batch])
                yield self.standardise(x)

    def _view_numbers(self, rows: RowIndices, views: ViewIndices | None) -> RowIndices:
        return np.zeros(len(rows), np.int64) if views is None or len(self.views) == 1 else views.astype(np.int64)

    def _fill(self, buffer: NDArray[np.float16], rows: RowIndices, numbers: RowIndices) -> RowIndices:
        """Read rows into the buffer in the order of the files; returns the place of each in the buffer."""
        places, done = np.empty(len(rows), np.int64), 0
        for i, view in enumerate(self.views):
            own = np.flatnonzero(numbers == i)
            own = own[np.argsort(rows[own])]
            places[own] = np.arange(done, done + len(own))
            view.read(rows[own], buffer[done : done + len(own)])
            done += len(own)
        return places

    def _gather(self, rows: RowIndices, numbers: RowIndices) -> Tensor:
        if self.table is not None:
            return self.table[torch.from_numpy(rows + self.rows * numbers)].float()
        out = torch.empty(len(rows), self.views[0].shape[1])
        for i, view in enumerate(self.views):
            if (mask := numbers == i).any():
                out[torch.from_numpy(mask)] = torch.from_numpy(view.gather(rows[mask])).float()
        return out


def _read_all(views: Sequence[Features]) -> Tensor:
    """All rows of all views in memory, (views * N, D) float16."""
    table = torch.empty(sum(len(view) for view in views), views[0].shape[1], dtype=torch.float16)
    start = 0
    for view in views:
        for block in view.blocks():
            table[start : start + len(block)] = torch.from_numpy(block)
            start += len(block)
    return table


class _ViewDataset(Dataset[Tensor]):
    """Rows of a GarmentDataset in this order, each in its view; all of them plain where `names` is None."""

    def __init__(self, dataset: GarmentDataset, order: RowIndices, names: Sequence[str] | None) -> None:
        self.dataset, self.order, self.names = dataset, order, names

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Tensor:
        row = int(self.order[index])
        if self.names is None or self.names[index] == "plain":
            return self.dataset[row][0]
        image = np.array(self.dataset.rows[row]).reshape(1, 28, 28)
        return preprocess(apply_view(image, self.names[index]), self.dataset.size)[0]


class OnTheFlySource:
    """`--no-cache`: each batch goes from rows of pixels through `GarmentDataset` and the frozen backbone, every epoch.

    Features are rounded to 16 bits as the cache rounds them, so that both ways train on the same numbers.
    forward_rows: pictures of one forward pass; names: of the views, in their order.
    """

    def __init__(
        self,
        dataset: GarmentDataset,
        backbone: Callable[[Tensor], Tensor],
        forward_rows: int,
        names: Sequence[str] = ("plain", "flip"),
    ) -> None:
        self.dataset, self.backbone, self.forward_rows, self.names = dataset, backbone, forward_rows, names
        self.standardise = Standardiser()

    def batches(self, order: RowIndices, batch_size: int, views: ViewIndices | None) -> Iterator[Tensor]:
        """See `FeatureSource`."""
        # A generator of its own: a loader draws from torch's global one, which would shift the dropout that follows.
        own = torch.Generator().manual_seed(0)
        names = None if views is None else [self.names[int(view)] for view in views]
        dataset = _ViewDataset(self.dataset, order, names)
        loader: DataLoader[Any] = DataLoader(dataset, batch_size=batch_size, generator=own)
        for x in loader:
            yield self.standardise(self._features(x))

    def _features(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            parts = [self.backbone(part).half().float().cpu() for part in torch.split(x, self.forward_rows)]
        return torch.cat(parts).clone()


class FineTunedSource:
    """Features behind the fine-tuned blocks, which the bundle's `classifier` will get: for the OODDetector."""

    def __init__(self, source: FeatureSource, head: heads.FineTunedHead) -> None:
        self.source, self.head, self.standardise = source, head.eval(), Standardiser()

    def batches(self, order: RowIndices, batch_size: int, views: ViewIndices | None) -> Iterator[Tensor]:
        """See `FeatureSource`."""
        device = next(self.head.parameters()).device
        for x in self.source.batches(order, batch_size, views):
            with torch.inference_mode():
                features = self.head.forward_features(x.to(device)).cpu()
            yield features
