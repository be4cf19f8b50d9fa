"""Features of VGG16 tapped at several freeze boundaries in one forward pass."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from attire.blocks import BLOCKS, CHANNELS, map_side
from attire.data.dataset import ImageDataset
from attire.features import cache
from attire.features.cache import FeatureSpec
from attire.model import devices, pretrained, vgg
from attire.model.weights import read_weights, tensor_digest
from attire.progress import Progress

BACKGROUNDS = {"black": "plain", "white": "negative"}  # and the view that has it
_POOLS = (1, 2, 4)  # and the whole map, where it has at most _WIDEST features
_WIDEST = 25_088  # features: block5 at 224 px, the classic recipe's
_PASS_SECONDS = 0.5  # a boundary's speed is the best of three passes of at least this long


@dataclass(frozen=True, kw_only=True)
class _TapSpec(FeatureSpec):
    """Features of several taps side by side: (boundary, pooled side), in that order."""

    taps: tuple[tuple[str, int], ...]

    @property
    def width(self) -> int:
        return sum(CHANNELS[boundary] * side**2 for boundary, side in self.taps)

    def columns(self) -> Iterator[tuple[str, int, slice]]:
        """Boundary, pooled side, and the columns that hold its features."""
        start = 0
        for boundary, side in self.taps:
            end = start + CHANNELS[boundary] * side**2
            yield boundary, side, slice(start, end)
            start = end


class _TapBackbone(nn.Module):
    """(n, 3, S, S) normalised pictures to the features of every tap, (n, width) float32."""

    def __init__(self, backbone: vgg.Backbone, taps: Sequence[tuple[str, int]]) -> None:
        super().__init__()
        self.backbone, self.taps = backbone, tuple(taps)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone.run(self.forward_taps, x)

    def forward_taps(self, x: Tensor) -> Tensor:
        maps, end = {}, 0
        for boundary in sorted({boundary for boundary, _ in self.taps}, key=lambda name: BLOCKS[name]):
            x = self.backbone.features[end : BLOCKS[boundary]](x)
            end = BLOCKS[boundary]
            maps[boundary] = x
        return torch.cat([F.adaptive_avg_pool2d(maps[name].float(), side).flatten(1) for name, side in self.taps], 1)


class TapExtractor:
    """Extracts the features of every boundary and pooling of these images, one picture size at a time."""

    def __init__(self, data: ImageDataset, boundaries: Sequence[str], device: torch.device, progress: Progress) -> None:
        self.data, self.progress = data, progress
        self.boundaries = sorted(boundaries, key=lambda name: BLOCKS[name])
        weights = pretrained.vgg16_weights(progress=progress.advance)
        self.weights = tensor_digest(read_weights(weights))
        self.precision = devices.choose_precision("auto", device)
        self.backend = devices.choose_backend("torch", self.precision, device)
        model = vgg.vgg16(weights, self.boundaries[-1], 0, nn.Sequential())
        self.backbone = vgg.Backbone(model, device, self.precision, self.backend == devices.WINOGRAD)

    def taps(self, size: int) -> tuple[tuple[str, int], ...]:
        """Boundaries that this size reaches, each with the sides its map is averaged to, the whole map among them."""
        taps = []
        for name in self.boundaries:
            whole = map_side(name, size)
            sides = {side for side in _POOLS if side < whole}
            sides |= {whole} if whole and CHANNELS[name] * whole**2 <= _WIDEST else set()
            taps += [(name, side) for side in sorted(sides)]
        return tuple(taps)

    def features(self, size: int, background: str) -> Iterator[tuple[str, int, NDArray[np.float16]]]:
        """Boundary, pooled side and features (N, D) of each tap; a stopped extraction resumes where it was.

        The cache entry is deleted at the end: it takes up to 200 kB an image, and nothing else uses it.
        """
        taps, stage = self.taps(size), f"{size} px, {background}"
        spec = _TapSpec(
            "+".join(self.boundaries),
            size,
            0,
            self.weights,
            self.precision,
            BACKGROUNDS[background],
            backend=self.backend,
            taps=taps,
        )
        self._choose_microbatching(size)

        def advance(done: int, total: int) -> None:
            self.progress.advance(stage, done, total)

        entry = cache.extract(
            self.data.images, self.data.image_digest, spec, lambda: _TapBackbone(self.backbone, taps), advance
        )
        table = np.concatenate(list(entry.blocks()))
        for boundary, side, columns in spec.columns():
            yield boundary, side, table[:, columns]
        cache.delete_entry(entry.folder.name)

    def _choose_microbatching(self, size: int) -> None:
        if self.backend == "torch" and self.backbone.device.type == "cpu":
            name = f"{self.boundaries[-1]} {self.precision}"
            self.backbone.microbatching = devices.choose_microbatching(name, self.backbone, size, len(self.data))

    def images_per_second(self, boundary: str, size: int) -> float:
        """The speed of preprocessing and backbone up to this boundary, as extraction runs them: best of three."""
        self._choose_microbatching(size)
        part = np.resize(self.data.images, (min(cache.forward_batch_size(size), 512), 28, 28))
        backbone = _TapBackbone(self.backbone, [(boundary, 1)])
        best = 0.0
        with torch.inference_mode():
            backbone(vgg.preprocess(part, size))  # warms up
            for _ in range(3):
                start, rows = time.perf_counter(), 0
                while (seconds := time.perf_counter() - start) < _PASS_SECONDS:
                    backbone(vgg.preprocess(part, size)).cpu()
                    rows += len(part)
                best = max(best, rows / seconds)
        return best
