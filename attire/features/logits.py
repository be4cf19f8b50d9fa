"""Logits of a head over feature rows."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attire.data.dataset import RowIndices, ViewIndices
from attire.features.sources import FeatureSource
from attire.model import distributed


def teacher_targets(
    soft: NDArray[np.float32] | None, order: RowIndices, views: ViewIndices | None, part: slice, device: torch.device
) -> Tensor | None:
    """The teacher's probabilities (b, K) for this part of an epoch's order, each row in its view; None without one.

    soft: (views, N, K); order, views: (n,).
    """
    if soft is None:
        return None
    rows = order[part]
    numbers = np.zeros(len(rows), np.int64) if views is None else views[part].astype(np.int64)
    return torch.from_numpy(soft[numbers, rows]).to(device)


def predict_logits(
    head: nn.Module, source: FeatureSource, rows: RowIndices, batch_size: int = 1024, views: Sequence[int] = (0,)
) -> Tensor:
    """Logits (n, K) float32 on the CPU of these rows, in their order, without dropout: the mean over these views."""
    head.eval()
    device = next(head.parameters()).device
    with torch.inference_mode():
        per_view = []
        for view in views:
            numbers = np.full(len(rows), view) if view else None
            batches = source.batches(rows, batch_size, numbers)
            per_view.append(torch.cat([head(x.to(device)).float().cpu() for x in batches]))
    return torch.stack(per_view).mean(0)


def distributed_logits(
    head: nn.Module, source: FeatureSource, rows: RowIndices, batch_size: int = 1024, views: Sequence[int] = (0,)
) -> Tensor:
    """`predict_logits`, with the rows divided among the processes that train together; all get all logits."""
    own = distributed.own_rows(len(rows))
    count = own.stop - own.start
    some = rows[own] if count else rows[:1]  # a process without rows predicts one, to learn the number of classes
    return distributed.gather_rows(predict_logits(head, source, some, batch_size, views)[:count], len(rows))
