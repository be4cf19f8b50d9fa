"""An epoch of head training from the cache against its bare matrix products, same precision, in one run.

    python benchmarks/head_epoch.py            60,000 x 4,096 (fast), then 48,000 x 25,088 (classic, 6,400 rows timed)

The bare products are, for each batch and each Linear: x W^T, dy^T x and (but for the first) dy W, into buffers that
are allocated once: no reading, no copying, no Adam. Rounds alternate; medians and ranges are printed.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from attire.features import cache as feature_cache
from attire.features.sources import CachedSource, Standardiser
from attire.model import devices, heads
from attire.recipes import RECIPES, Recipe
from attire.storage import files, memory
from attire.training import loop

ROUNDS = 5


def synthetic_features(folder: Path, rows: int, width: int) -> feature_cache.Features:
    """Half zeros, as after a ReLU; written as the cache writes them."""
    shard_rows = feature_cache.FeatureSpec("block3", 32, 0, "").shard_rows * 4096 // width or 1
    rng = np.random.default_rng(0)
    block = rng.standard_normal((shard_rows, width), np.float32).clip(0).astype(np.float16)
    files.make_dir(folder)
    for i, start in enumerate(range(0, rows, shard_rows)):
        np.save(feature_cache._shard_path(folder, i), block[: min(shard_rows, rows - start)])
    return feature_cache.Features(folder, rows, width, shard_rows)


def products(head: nn.Sequential, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    for i, layer in enumerate(layer for layer in head if isinstance(layer, nn.Linear)):
        x, dy = torch.rand(batch, layer.in_features), torch.rand(batch, layer.out_features)
        weight = layer.weight.detach()
        yield x, weight.t(), torch.empty(batch, layer.out_features)
        yield dy.t(), x, torch.empty(layer.out_features, layer.in_features)
        if i:
            yield dy, weight, torch.empty(batch, layer.in_features)


def bare_seconds(head: nn.Sequential, batch: int, steps: int) -> float:
    pieces = list(products(head, batch))
    start = time.perf_counter()
    for _ in range(steps):
        for a, b, out in pieces:
            torch.mm(a, b, out=out)
    return time.perf_counter() - start


def epoch_seconds(
    head: nn.Sequential, source: CachedSource, labels: np.ndarray, rows: np.ndarray, recipe: Recipe
) -> float:
    data = loop.TrainingData(source, labels, rows, rows[:0])
    head.train()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        loop._Trainer(head, data, recipe, Path(folder), lambda state, done, total: None).train_steps([])
        return time.perf_counter() - start


def compare(recipe: Recipe, rows: int, width: int, timed: int, cache: Path) -> None:
    torch.manual_seed(0)
    source = CachedSource([synthetic_features(cache / f"{rows}x{width}", rows, width)])
    head = heads.build_head((width, 1, 1), (), recipe.hidden, 10, recipe.dropout)
    labels = np.random.default_rng(1).integers(0, 10, rows)
    chosen = np.sort(np.random.default_rng(2).permutation(rows)[:timed])
    if recipe.standardise:
        source.standardise = Standardiser.fit(
            torch.from_numpy(source.views[0].gather(part)) for part in np.array_split(chosen, 30)
        )
    pairs = []
    for _ in range(ROUNDS + 1):  # the first warms up
        bare = bare_seconds(head, recipe.batch_size, -(-timed // recipe.batch_size))
        pairs.append((epoch_seconds(head, source, labels, chosen, recipe), bare))
    ratios = sorted(epoch / bare for epoch, bare in pairs[1:])
    epochs, bares = zip(*pairs[1:], strict=True)
    print(
        f"{recipe.name:8} {timed:,} of {rows:,} x {width:,}, batch {recipe.batch_size}: "
        f"epoch {statistics.median(epochs):.2f} s, bare products {statistics.median(bares):.2f} s, "
        f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}, n = {ROUNDS})",
        flush=True,
    )


def main(jobs: Sequence[tuple[str, int, int, int]]) -> None:
    memory.keep_freed_memory()
    print(f"{devices.processor_name()}, {os.cpu_count()} cores, torch {torch.__version__}, fp32")
    with tempfile.TemporaryDirectory(dir=files.cache_dir()) as folder:
        for name, rows, width, timed in jobs:
            compare(replace(RECIPES[name], flips=False), rows, width, timed, Path(folder))


if __name__ == "__main__":
    main([("fast", 60_000, 4096, 60_000), ("classic", 48_000, 25_088, 6_400)])
