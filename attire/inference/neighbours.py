"""Neighbours: training images that a bundle carries, found again by what the head makes of a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from attire.data.dataset import RowIndices, split_indices
from attire.errors import AttireError
from attire.storage import files

NEIGHBOURS = "neighbours.safetensors"
_ROWS = 5000  # training images; 3.9 MB of pixels. docs/results.md, Explanations, has fewer and more beside them
_WIDTH = 64  # components kept of the hidden layer, 16 bits each
_DTYPES = {
    "images": torch.uint8,
    "labels": torch.int32,
    "points": torch.float16,
    "centre": torch.float32,
    "axes": torch.float32,
}


@dataclass(frozen=True, eq=False)
class Neighbour:
    """A training image (28, 28) uint8 with its label; distance 0 for the same picture, 1.4 for unrelated, at most 2."""

    label: str
    distance: float
    image: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Stored training images as directions in the principal components of the head's last hidden layer.

    images: (n, 28, 28) uint8; labels: (n,) int32, as the data set gives them; points: (n, d) float16, of length 1;
    centre: (D,); axes: (D, d), which map a hidden layer to a point. The hidden layer finds images of the class that the
    model answers more often than the backbone's features do, 64 components as often as all 512, and directions a little
    more often than places (docs/results.md, Explanations).
    """

    images: Tensor
    labels: Tensor
    points: Tensor
    centre: Tensor
    axes: Tensor

    @classmethod
    def fit(cls, hidden: Tensor, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Self:
        """From hidden layers (n, D) of images (n, 28, 28) with labels (n,)."""
        hidden = hidden.float()
        centre = hidden.mean(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the components are found from random directions
            _, _, axes = torch.pca_lowrank(hidden - centre, min(_WIDTH, *hidden.shape), center=False, niter=4)  # (D, d)
        points = _project(hidden, centre, axes).half()
        pixels, numbers = torch.from_numpy(np.array(images)), torch.from_numpy(labels.astype(np.int32))
        return cls(pixels, numbers, points, centre, axes.contiguous())

    def nearest(self, hidden: Tensor, classes: Sequence[str], count: int) -> list[tuple[Neighbour, ...]]:
        """For each hidden layer (m, D) the nearest stored images, nearest first; fewer where fewer are stored."""
        with torch.inference_mode():
            distances = torch.cdist(
                _project(hidden.cpu(), self.centre, self.axes),
                self.points.float(),
                compute_mode="donot_use_mm_for_euclid_dist",  # the product's rounding would hide a distance of 0
            )
            order = distances.sort(dim=1, stable=True)
        ranked = zip(order.indices[:, :count].tolist(), order.values[:, :count].tolist(), strict=True)
        return [
            tuple(self._neighbour(row, distance, classes) for row, distance in zip(rows, nearest, strict=True))
            for rows, nearest in ranked
        ]

    def _neighbour(self, row: int, distance: float, classes: Sequence[str]) -> Neighbour:
        return Neighbour(classes[int(self.labels[row])], distance, self.images[row].numpy())

    def encoded(self) -> bytes:
        """The bytes of `neighbours.safetensors`."""
        return save({name: getattr(self, name).contiguous() for name in _DTYPES})


def _project(hidden: Tensor, centre: Tensor, axes: Tensor) -> Tensor:
    """Points (m, d) of hidden layers (m, D), rounded to the 16 bits that are stored."""
    return F.normalize((hidden.float() - centre) @ axes).half().float()


def choose_neighbour_rows(rows: RowIndices, labels: NDArray[np.int64], seed: int) -> RowIndices:
    """Which of the training rows are stored: 5,000 of them, each class with its share; all where there are no more."""
    if len(rows) <= _ROWS:
        return rows
    counts = np.unique(labels[rows], return_counts=True)[1]
    stratify = counts.min() >= 2 and len(counts) <= min(_ROWS, len(rows) - _ROWS)
    _, part = split_indices(labels[rows], _ROWS, seed, bool(stratify))
    return rows[part]


def write_neighbours(folder: Path, body: bytes | None) -> None:
    """Write what `Neighbours.encoded` gave into a bundle's folder; None removes the file of an earlier bundle."""
    if body is None:
        (folder / NEIGHBOURS).unlink(missing_ok=True)
    else:
        files.write_bytes(folder / NEIGHBOURS, body)


def read_neighbours(folder: Path, about: Any, classes: int, width: int) -> Neighbours | None:
    """The Neighbours of a bundle; None where it has none.

    about: what `model.json` says of them. The result is None too where the file is missing: whoever will not pass
    training images on deletes it, and all but explanations stays as it is. width: D of the hidden layer. Raises
    AttireError where the file is there and not sound.
    """
    path = folder / NEIGHBOURS
    if not about or not path.exists():
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise files.io_error("read", path, error) from error
    if not isinstance(about, dict) or files.sha256(data) != about.get("sha256"):
        do = "use a fresh copy, or delete this file"
        raise AttireError(path, "damaged: its digest is not the one in model.json", do=do)
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise AttireError(path, "not a safetensors file", str(error)[:80]) from error
    return _checked(tensors, classes, width, path)


def _checked(tensors: dict[str, Tensor], classes: int, width: int, path: Path) -> Neighbours:
    """Raises AttireError for a tensor that is missing, extra, misshapen, of another type or not finite, or for a label
    of no class."""
    for name in sorted(set(_DTYPES) ^ set(tensors)):
        raise AttireError(path, f"tensor {name} is {'missing' if name in _DTYPES else 'not part of this file'}")
    count, depth = [*tensors["images"].shape, 0][0], [*tensors["points"].shape, 0, 0][1]
    shapes = {
        "images": (count, 28, 28),
        "labels": (count,),
        "points": (count, depth),
        "centre": (width,),
        "axes": (width, depth),
    }
    for name, value in sorted(tensors.items()):
        if tuple(value.shape) != shapes[name] or value.dtype != _DTYPES[name]:
            actual = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
            expected = f"{shapes[name]} {str(_DTYPES[name]).removeprefix('torch.')}"
            raise AttireError(path, f"tensor {name} is {actual}, expected {expected}")
        if not torch.isfinite(value).all():
            raise AttireError(path, f"tensor {name} holds NaN or infinity", do="use a fresh copy")
    if not count or tensors["labels"].min() < 0 or tensors["labels"].max() >= classes:
        raise AttireError(path, f"no images, or a label that is none of the {classes} classes", do="use a fresh copy")
    return Neighbours(**tensors)
