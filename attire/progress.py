"""Progress of long work: what a terminal, a log, or nobody shows of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Epoch:
    """One line of `history.csv`. Losses are averages over rows; seconds exclude validation."""

    epoch: int
    train_loss: float
    val_loss: float | None
    val_accuracy: float | None
    seconds: float


class Progress(Protocol):
    """Shows how long work goes; `terminal.Terminal`, `NoProgress` and TensorBoard's writer implement it."""

    def note(self, name: str, text: str) -> None:
        """One line about the run: `Data`, `Weights`, `Recipe` ..."""

    def advance(self, stage: str, done: int, total: int, text: str = "") -> None:
        """`done` of `total` rows of a stage are done."""

    def epoch(self, line: Epoch) -> None:
        """An epoch has ended."""

    def tested(self, accuracy: float, low: float, high: float, epoch: int) -> None:
        """The test set was scored, after this many epochs: a fraction and its 95 % confidence interval."""

    def close(self) -> None:
        """Stop showing anything."""


def in_batches(images: NDArray[np.uint8], size: int, stage: str, progress: Progress) -> Iterator[NDArray[np.uint8]]:
    """Images (n, ...) in batches of `size`; each batch counts as done once the next one is asked for."""
    for start in range(0, len(images), size):
        yield images[start : start + size]
        progress.advance(stage, min(start + size, len(images)), len(images))


class NoProgress:
    """Shows nothing."""

    def note(self, name: str, text: str) -> None: ...

    def advance(self, stage: str, done: int, total: int, text: str = "") -> None: ...

    def epoch(self, line: Epoch) -> None: ...

    def tested(self, accuracy: float, low: float, high: float, epoch: int) -> None: ...

    def close(self) -> None: ...
