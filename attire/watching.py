"""Who is told how work goes: the terminal, a log, or nobody."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from attire.intervals import Interval
from attire.training import Epoch


class Watcher(Protocol):
    """Who is told how a run goes: the terminal's bars, or nobody."""

    def note(self, name: str, text: str) -> None:
        """A stage is settled: `Data`, `Weights`, `Recipe` ..."""

    def advance(self, stage: str, done: int, total: int, text: str = "") -> None:
        """`done` of `total` rows of a stage."""

    def epoch(self, line: Epoch) -> None:
        """An epoch is over."""

    def tested(self, accuracy: Interval, epoch: int) -> None:
        """The test set was scored, after this many epochs."""

    def close(self) -> None:
        """Nothing further is shown."""


def in_parts(images: NDArray[np.uint8], size: int, stage: str, watcher: Watcher) -> Iterator[NDArray[np.uint8]]:
    """Images (n, ...), so many at a time; the watcher is told of each part once the next one is asked for."""
    for start in range(0, len(images), size):
        yield images[start : start + size]
        watcher.advance(stage, min(start + size, len(images)), len(images))


class Silent:
    """Nobody watches."""

    def note(self, name: str, text: str) -> None: ...

    def advance(self, stage: str, done: int, total: int, text: str = "") -> None: ...

    def epoch(self, line: Epoch) -> None: ...

    def tested(self, accuracy: Interval, epoch: int) -> None: ...

    def close(self) -> None: ...
