"""A race against the clock on the same images: what every peer is given, and what it tells.

Only work counts: the clock stands still while the test images are scored (and, for a peer that keeps features, while
those of the test images are computed). The test set is watched here to compare speeds; nothing is chosen by it.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from attire.data import loading
from attire.data.dataset import ImageDataset
from attire.model import pretrained
from attire.model.vgg import IMAGENET_MEAN, IMAGENET_STD


class OverError(Exception):
    """The time is up."""


@dataclass
class Race:
    """The images, the cap in seconds, and the clock."""

    train: ImageDataset
    test: ImageDataset
    cap: float
    quick: bool
    classic_cache: Path
    scratch: Path
    worked: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return self.worked + time.perf_counter() - self.since

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.worked = self.seconds
        try:
            yield
        finally:
            self.since = time.perf_counter()

    def start(self) -> None:
        self.worked, self.since = 0.0, time.perf_counter()

    def point(self, images: int, right: Callable[[], tuple[int, int]], kind: str = "point", **more: Any) -> None:
        """Score the test images and tell: seconds of work so far, images trained on so far. Raises OverError."""
        with self.paused():
            correct, n = right()
            at = {"seconds": round(self.worked, 3), "images": images, "accuracy": correct / n, "n": n}
            tell(kind, **at, **more)
        if self.seconds > self.cap:
            raise OverError

    def point_from(self, images: int, answers: Callable[[], NDArray[Any]], kind: str = "point", **more: Any) -> None:
        def right() -> tuple[int, int]:
            return int((np.asarray(answers()) == self.test.labels).sum()), len(self.test)

        self.point(images, right, kind, **more)


def tell(kind: str, **values: Any) -> None:
    """One JSON line."""
    print(json.dumps({"kind": kind, **values}), flush=True)


def start(cap: float, quick: bool, classic_cache: Path, scratch: Path) -> Race:
    train, test = (loading.load_dataset(part=part) for part in ("train", "test"))  # type: ignore[arg-type]
    if quick:
        train, test = train.subset(np.arange(320)), test.subset(np.arange(100))
    return Race(train, test, cap, quick, classic_cache, scratch)


class Pictures(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """(3, size, size) normalised as the weights want it, and the label."""

    def __init__(self, dataset: ImageDataset, size: int, rows: NDArray[np.int64] | None = None) -> None:
        self.dataset, self.size = dataset, size
        self.rows = np.arange(len(dataset)) if rows is None else rows
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]
        return self.prepared(self.dataset.images[row : row + 1])[0], int(self.dataset.labels[row])

    def prepared(self, images: NDArray[np.uint8]) -> Tensor:
        grey = torch.tensor(images)[:, None].float() / 255
        grey = F.interpolate(grey, size=(self.size, self.size), mode="bilinear", antialias=True)
        return (grey.expand(-1, 3, -1, -1) - self.mean) / self.std


def vgg_tensors() -> dict[str, Tensor]:
    """The thirteen convolutions with torchvision's names, without `features.`: the same for every peer."""
    from safetensors.torch import load_file

    return {
        name.removeprefix("features."): value.float() for name, value in load_file(pretrained.vgg16_weights()).items()
    }


def vgg_features() -> torch.nn.Sequential:
    import torchvision

    with torch.device("meta"):
        model = torchvision.models.vgg16(weights=None)
    model.features.load_state_dict(vgg_tensors(), assign=True)
    features: torch.nn.Sequential = model.features
    return features
