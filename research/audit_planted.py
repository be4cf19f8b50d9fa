"""How many planted errors `attire audit` finds in the official 70,000 images.

    python research/audit_planted.py

Planted, with a fixed seed: 25 exact copies, 25 copies shifted by one pixel, 300 labels changed to another class drawn
evenly. The 70,000 images' features are those of recipe `fast`, from the cache.
"""

import os
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from attire.analysis.audit import _examine
from attire.data.loading import load_dataset
from attire.evaluation.intervals import wilson
from attire.features import cache
from attire.features.backbones import make_backbone
from attire.features.cache import FeatureSpec
from attire.model import devices, pretrained, vgg
from attire.model.weights import read_weights, tensor_digest
from attire.progress import NoProgress
from attire.recipes import FAST

COPIES, FLIPS, LOOKED_AT = 25, 300, 600


def main() -> None:
    device = torch.device("cpu")
    rng = np.random.default_rng(0)
    parts = [load_dataset(part=part) for part in ("train", "test")]
    images = np.concatenate([part.images for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    weights = pretrained.vgg16_weights()
    spec = FeatureSpec(
        FAST.freeze_to, FAST.image_size, FAST.pool, tensor_digest(read_weights(weights)),
        devices.choose_precision(FAST.precision, device),
    )  # fmt: skip
    backbone = make_backbone(vgg.vgg16(weights, spec.freeze_to, spec.pool, nn.Sequential()), spec, device)
    cached = [cache.extract(part.images, part.image_digest, spec, lambda: backbone) for part in parts]

    originals = rng.choice(len(images), 2 * COPIES, replace=False)
    copied, moved = originals[:COPIES], originals[COPIES:]
    steps = rng.choice([(0, 1), (1, 0), (0, -1), (-1, 0)], COPIES)
    shifted = np.stack([shift(images[row], *step) for row, step in zip(moved, steps, strict=True)])
    more = np.concatenate([images[copied], shifted])
    everything, all_labels = np.concatenate([images, more]), np.concatenate([labels, labels[originals]])
    fresh = torch.from_numpy(cache.compute_features(more, spec, backbone)).float()
    flipped = rng.choice(len(images), FLIPS, replace=False)
    all_labels[flipped] = (all_labels[flipped] + rng.integers(1, 10, FLIPS)) % 10

    def blocks() -> Iterator[Tensor]:
        for entry in cached:
            yield from (torch.from_numpy(block).float() for block in entry.blocks(8192))
        yield fresh

    began = time.perf_counter()
    found = _examine(everything, all_labels, 10, blocks, NoProgress())
    seconds = time.perf_counter() - began

    exact = sum(found.first[len(images) + i] == row for i, row in enumerate(copied))
    pairs = set(zip(found.near.first.tolist(), found.near.second.tolist(), strict=True))
    near = sum((int(row), len(images) + COPIES + i) in pairs for i, row in enumerate(moved))
    caught = int(np.isin(flipped, found.suspect_labels[:LOOKED_AT]).sum())
    print(f"{devices.processor_name()}, {os.cpu_count()} cores, torch {torch.__version__}; {seconds:.0f} s")
    print(f"exact copies          {exact} of {COPIES}")
    print(f"shifted by one pixel  {near} of {COPIES}")
    print(f"flipped labels        {wilson(caught, FLIPS).percent()} within the first {LOOKED_AT} suspects")
    print(f"                      {len(found.suspect_labels):,} suspects in all")


def shift(image: np.ndarray, down: int, across: int) -> np.ndarray:
    """The image moved by a pixel; what enters is black."""
    out = np.zeros_like(image)
    wide = np.pad(image, 1)
    out[:] = wide[1 - down : 29 - down, 1 - across : 29 - across]
    return out


if __name__ == "__main__":
    main()
