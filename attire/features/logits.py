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
    """What the teacher says of this part of the epoch's order, (b, K), of each row in its view."""
    if soft is None:
        return None
    rows = order[part]
    numbers = np.zeros(len(rows), np.int64) if views is None else views[part].astype(np.int64)
    return torch.from_numpy(soft[numbers, rows]).to(device)


def predict_logits(
    classifier: nn.Module, source: FeatureSource, rows: RowIndices, batch_size: int = 1024, views: Sequence[int] = (0,)
) -> Tensor:
    """Logits (n, K) float32 on the CPU of these rows, in their order, without dropout: the mean over these views."""
    classifier.eval()
    device = next(classifier.parameters()).device
    with torch.inference_mode():
        found = []
        for view in views:
            numbers = np.full(len(rows), view) if view else None
            batches = source.batches(rows, batch_size, numbers)
            found.append(torch.cat([classifier(x.to(device)).float().cpu() for x in batches]))
    return torch.stack(found).mean(0)


def distributed_logits(
    classifier: nn.Module, source: FeatureSource, rows: RowIndices, batch_size: int = 1024, views: Sequence[int] = (0,)
) -> Tensor:
    """As `predict_logits`, each process answering its share of the rows and none twice; all get all of them."""
    own = distributed.own_rows(len(rows))
    count = own.stop - own.start
    some = rows[own] if count else rows[:1]  # who has too few rows answers one, so as to know of how many classes
    return distributed.gather_rows(predict_logits(classifier, source, some, batch_size, views)[:count], len(rows))
