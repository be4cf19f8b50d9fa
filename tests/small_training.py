"""A training in small: a table of features that can be learnt, a head for it, and both trained in a folder."""

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from attire.data.dataset import RowIndices
from attire.model.heads import build_head
from attire.progress import Epoch
from attire.recipes import FAST, Recipe
from attire.training import loop
from attire.training.checkpoints import TrainingState
from attire.training.loop import TrainingData

RECIPE = replace(FAST, epochs=3, batch_size=16, hidden=(8,), lr=0.01, flips=True)
LABELS = np.arange(100) % 10
TRAIN, VAL = np.arange(76), np.arange(80, 100)  # five steps an epoch, the last of them smaller


class Table:
    """Feature rows from a table of 100 x 12 that can be learnt; the mirrored view is its negative."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        rows = 2 * np.eye(10, 12)[LABELS] + rng.normal(size=(100, 12)) / 4
        self.rows = torch.from_numpy(rows).float()
        self.seen: list[int] = []

    def batches(self, order: RowIndices, batch_size: int, views: np.ndarray | None) -> Iterator[Tensor]:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            self.seen += part.tolist()
            x = self.rows[part].clone()
            if views is not None:
                x[torch.from_numpy(views.astype(bool)[start : start + batch_size])] *= 0.9
            yield x


def data(table: Table | None = None, train: RowIndices = TRAIN, val: RowIndices = VAL) -> TrainingData:
    return TrainingData(table or Table(), LABELS, train, val)


def new_head() -> nn.Sequential:
    torch.manual_seed(0)
    return build_head((12, 1, 1), (), (8,), 10, 0.5)


def train(folder: Path, recipe: Recipe = RECIPE, stop_at: int = 0) -> tuple[nn.Sequential, list[Epoch]]:
    """Train in `folder`, from its checkpoint where it has one; Ctrl-C comes while step `stop_at` is reported."""
    head, steps = new_head(), 0

    def report(state: TrainingState, done: int, total: int) -> None:
        nonlocal steps
        steps += bool(done)
        if done and steps == stop_at:
            signal.raise_signal(signal.SIGINT)

    history = loop.fit(head, data(), recipe, folder / "checkpoints", report)
    return head, history


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def without_seconds(history: list[Epoch]) -> list[Epoch]:
    return [replace(epoch, seconds=0.0) for epoch in history]
