"""Who is told how work goes: the terminal, a log, or nobody."""

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
    """Who is told how a run goes: the terminal's bars, or nobody."""

    def note(self, name: str, text: str) -> None:
        """A stage is settled: `Data`, `Weights`, `Recipe` ..."""

    def advance(self, stage: str, done: int, total: int, text: str = "") -> None:
        """`done` of `total` rows of a stage."""

    def epoch(self, line: Epoch) -> None:
        """An epoch is over."""

    def tested(self, accuracy: float, low: float, high: float, epoch: int) -> None:
        """The test set was scored, after this many epochs: a fraction and its 95 % confidence interval."""

    def close(self) -> None:
        """Nothing further is shown."""


def in_parts(images: NDArray[np.uint8], size: int, stage: str, progress: Progress) -> Iterator[NDArray[np.uint8]]:
    """Images (n, ...), so many at a time; the progress is told of each part once the next one is asked for."""
    for start in range(0, len(images), size):
        yield images[start : start + size]
        progress.advance(stage, min(start + size, len(images)), len(images))


class NoProgress:
    """Nobody watches."""

    def note(self, name: str, text: str) -> None: ...

    def advance(self, stage: str, done: int, total: int, text: str = "") -> None: ...

    def epoch(self, line: Epoch) -> None: ...

    def tested(self, accuracy: float, low: float, high: float, epoch: int) -> None: ...

    def close(self) -> None: ...
