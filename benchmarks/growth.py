"""Time and memory as the rows grow: reading a CSV file, extraction at 16 px, an epoch of the head; each in a process.

    python benchmarks/growth.py                          1,000, 10,000, 70,000 and 700,000 rows: half an hour, 16 GB
    python benchmarks/growth.py --rows 1000,10000        fewer
    python benchmarks/growth.py --quick                  a minute, to see that it works

Up to 70,000 the rows are the official images; past that they come again with noise of -3 to 3 levels, so that no row
is like another. 16 px instead of the 32 of `fast`: VGG16 then takes a quarter of the time, so that whatever else grows
with the rows weighs four times as much. Features for the epoch are synthetic (half zeros), plain views only. Peak
memory is the process's own (VmHWM), mapped files included; `base` is what it held before the stage, libraries loaded.
A stage that takes less than a quarter of a minute is run five times, in five processes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import measuring
import numpy as np
from measuring import ROUNDS, forget_peak, peak_memory, seconds, spread, told

from attire.data import csv_table, dataset, loading
from attire.storage import files, memory

ROWS = (1_000, 10_000, 70_000, 700_000)
STAGES = ("csv", "csv copy", "extraction", "epoch")
SHORT = 15.0  # seconds
WIDTH = 4096
SIZE = 16  # px
BLOCK = 8192  # rows made at a time


# In a process of its own: one stage, and what it took.


def write_rows(path: Path, rows: int) -> None:
    """The CSV file, made in pieces."""
    labels = np.concatenate([loading.load_dataset(part="train").labels, loading.load_dataset(part="test").labels])
    piece = path.with_suffix(".piece")
    with path.open("wb") as out:
        for chosen, images in measuring.more_images(rows, BLOCK):
            csv_table.write_table(piece, images, labels[chosen])
            with piece.open("rb") as text:
                text.seek(len(csv_table._HEADER) + 1 if out.tell() else 0)
                out.write(text.read())
            piece.unlink()
    os.sync()


def stage_csv(path: Path, rows: int) -> dict[str, float]:
    from attire.data import table_cache

    table_cache._MIN_BYTES = 0
    base = forget_peak()
    found: list[dataset.ImageDataset] = []
    took = seconds(lambda: found.append(loading._read_csv(path)))
    assert len(found[0]) == rows
    return {"seconds": took, "base": base, "peak": peak_memory()}


def stage_extraction(path: Path, rows: int) -> dict[str, float]:
    import torch
    from torch import nn

    from attire.data import table_cache
    from attire.features import cache as feature_cache
    from attire.model import devices, pretrained, vgg

    table_cache._MIN_BYTES = 0
    precision = devices.choose_precision()
    backbone = vgg.Backbone(
        vgg.vgg16(pretrained.vgg16_weights(), "block3", 0, nn.Sequential()), torch.device("cpu"), precision
    )
    images = loading._read_csv(path)
    feature_cache.compute_features(
        images.images[:64], feature_cache.FeatureSpec("block3", SIZE, 0, "", precision), backbone
    )
    spec, base = feature_cache.FeatureSpec("block3", SIZE, 0, "growth", precision), forget_peak()
    took = seconds(lambda: feature_cache.extract(images.images, images.image_digest, spec, lambda: backbone))
    assert feature_cache.delete_entry(spec.key(images.image_digest)) > rows
    return {"seconds": took, "base": base, "peak": peak_memory()}


def stage_epoch(folder: Path, rows: int) -> dict[str, float]:
    import head_epoch
    import torch

    from attire.features import cache as feature_cache
    from attire.features import sources
    from attire.model import heads
    from attire.recipes import FAST

    memory.keep_freed_memory()
    base = forget_peak()
    shard_rows = feature_cache.FeatureSpec("block3", 32, 0, "").shard_rows
    source = sources.CachedSource([feature_cache.Features(folder, rows, WIDTH, shard_rows)])
    torch.manual_seed(0)
    head = heads.build_head((WIDTH, 1, 1), (), FAST.hidden, 10, FAST.dropout)
    labels = np.random.default_rng(1).integers(0, 10, rows)
    recipe = replace(FAST, flips=False)
    took = head_epoch.epoch_seconds(head, source, labels, np.arange(rows), recipe)
    return {"seconds": took, "base": base, "peak": peak_memory()}


def make_features(folder: Path, rows: int) -> None:
    import head_epoch

    head_epoch.synthetic_features(folder, rows, WIDTH)
    os.sync()  # writing them back is not part of what is timed


CHILDREN = {
    "make csv": write_rows,
    "make features": make_features,
    "csv": stage_csv,
    "csv copy": stage_csv,
    "extraction": stage_extraction,
    "epoch": stage_epoch,
}


# The parent.


def child(stage: str, path: Path, rows: int) -> dict[str, float]:
    arguments = [sys.executable, __file__, "--child", stage, "--path", str(path), "--rows", str(rows)]
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def repeated(stage: str, path: Path, rows: int, cache: Path, times: int) -> dict[str, Any]:
    """Once, or five times where it is short; a CSV file that is to be parsed has no copy yet."""
    found: list[dict[str, float]] = []
    while not found or (found[0]["seconds"] < SHORT and len(found) < times):
        if stage == "csv":
            for copy in (cache / "tables").glob("*"):
                copy.unlink()
        found.append(child(stage, path, rows))
    line = {"stage": stage, "rows": rows, **{key: spread([x[key] for x in found]) for key in found[0]}}
    each = line["seconds"]["median"] / rows * 1e6
    peak = f"{line['peak']['median'] / 2**20:,.0f} MiB peak, {line['base']['median'] / 2**20:,.0f} before"
    print(f"{stage:11}{rows:>9,} rows  {told(line['seconds'])} s   {each:,.1f} us a row   {peak}", flush=True)
    return line


def grown(rows: int, cache: Path, times: int, stages: Sequence[str]) -> list[dict[str, Any]]:
    """All stages for so many rows; what they need is made before and removed after."""
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        path = Path(folder) / "rows.csv"
        child("make csv", path, rows)
        lines = [repeated(stage, path, rows, cache, times) for stage in stages if stage != "epoch"]
        path.unlink()
        if "epoch" not in stages:
            return lines
        child("make features", Path(folder) / "features", rows)
        return [*lines, repeated("epoch", Path(folder) / "features", rows, cache, times)]


def compare(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """From each size to the next: how much longer a row takes (1 is in proportion), how much the peak grows."""
    pairs = []
    for stage in STAGES:
        own = [line for line in lines if line["stage"] == stage]
        for small, large in pairwise(own):
            times = (large["seconds"]["median"] / large["rows"]) / (small["seconds"]["median"] / small["rows"])
            more = large["peak"]["median"] - small["peak"]["median"]
            pairs.append({"stage": stage, "from": small["rows"], "to": large["rows"], "time": times, "memory": more})
            step = f"{small['rows']:,} to {large['rows']:,}"
            print(f"{stage:11}{step:20}a row takes {times:.2f} times as long; peak {more / 2**20:+,.0f} MiB")
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="numbers of rows, separated by commas")
    parser.add_argument("--stages", default=",".join(STAGES), help="only these, separated by commas")
    parser.add_argument("--out", type=Path, help="folder for growth.json; default: benchmarks/results")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        found = CHILDREN[given.child](given.path, int(given.rows))
        print(json.dumps(found or {"seconds": 0.0}))
        return
    sizes = [int(part) for part in given.rows.split(",")] if given.rows else (200, 2_000) if given.quick else ROWS
    stages = given.stages.split(",")
    if unknown := sorted(set(stages) - set(STAGES)):
        raise SystemExit(f"error: --stages: expected some of {', '.join(STAGES)}, found {unknown[0]}")
    times = 1 if given.quick else ROUNDS
    with measuring.scratch_cache() as cache:
        room = 2.0 * WIDTH * max(sizes) * 1.5 + 3_000.0 * max(sizes)
        free = os.statvfs(cache).f_bavail * os.statvfs(cache).f_frsize
        if free < room:
            raise SystemExit(f"error: {cache}: {files.human_size(free)} free, {files.human_size(room)} needed")
        lines = [line for rows in sorted(sizes) for line in grown(rows, cache, times, stages)]
        print()
        pairs = compare(lines)
    out = measuring.results_folder(given.quick, given.out)
    measuring.save(out / "growth.json", {"stages": lines, "steps": pairs})


if __name__ == "__main__":
    main()
