"""A million images extracted at 32 px: whether memory stays bounded and the rate constant.

    python faults/million.py                     a quarter of an hour to an hour, 9 GB of disk, freed at the end
    python faults/million.py --rows 20000        fewer; rates are told for each tenth
    python faults/million.py --quick             to see that it works

The backbone and the precision are those of `fast`: block3, 8 KB of features an image. Images: the official 70,000 over
and over, past the first time with noise of -3 to 3 levels, made in blocks in a file that is then mapped into memory, as
a CSV file's copy is. Resident: VmRSS of proc(5) as each tenth is done, mapped pages included; peak: VmHWM from the
start.
"""

import argparse
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from attire.features import cache as feature_cache
from attire.storage import files

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import measuring
from measuring import forget_peak, memory_line, more_images, peak_memory

ROWS, QUICK = 1_000_000, 2_000
SIZE = 32  # px
BLOCK = 8192  # images made at a time
PARTS = 10


def make_images(path: Path, rows: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(rows, 28, 28) uint8, mapped from a file."""
    with path.open("wb") as file:
        for _, images in more_images(rows, BLOCK):
            file.write(images.tobytes())
    return np.memmap(path, np.uint8, "r", shape=(rows, 28, 28))


def extract(images: np.ndarray[Any, np.dtype[np.uint8]]) -> dict[str, Any]:
    """Seconds and memory as each tenth is done, and the peak."""
    import torch
    from torch import nn

    from attire.model import devices, pretrained, vgg

    precision = devices.choose_precision()
    backend = devices.choose_backend("torch", precision, torch.device("cpu"))
    spec = feature_cache.FeatureSpec("block3", SIZE, 0, "million", precision, backend=backend)
    model = vgg.vgg16(pretrained.vgg16_weights(), "block3", 0, nn.Sequential())
    backbone = vgg.Backbone(model, torch.device("cpu"), precision, backend == devices.WINOGRAD)
    if backend == "torch":
        backbone.microbatching = devices.choose_microbatching(f"block3 {precision}", backbone, SIZE, len(images))
    feature_cache.compute_features(images[:64], spec, backbone)
    base, began = forget_peak(), time.perf_counter()
    marks, wanted = [(0, 0.0, base)], [round(len(images) * part / PARTS) for part in range(1, PARTS + 1)]

    def progress(done: int, total: int) -> None:
        while wanted and done >= wanted[0]:
            wanted.pop(0)
            marks.append((done, time.perf_counter() - began, memory_line("VmRSS")))
            print(f"{done:>9,} of {total:,}   {rate(marks[-2], marks[-1]):,.0f} images/s", flush=True)

    made = feature_cache.extract(images, "million", spec, lambda: backbone, progress)
    seconds = time.perf_counter() - began
    parts = [
        {"rows": b[0], "seconds": b[1], "rate": rate(a, b), "resident": b[2]} for a, b in pairwise(marks) if b[0] > a[0]
    ]
    size = sum(path.stat().st_size for path in made.folder.iterdir())
    facts = {"precision": precision, "backend": backend, "features_bytes": size}
    return {**facts, "rows": len(images), "seconds": seconds, "base": base, "peak": peak_memory(), "parts": parts}


def rate(before: tuple[int, float, int], after: tuple[int, float, int]) -> float:
    return (after[0] - before[0]) / max(1e-9, after[1] - before[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="how many images; default: 1,000,000")
    parser.add_argument("--out", type=Path, help="folder for million.json; default: benchmarks/results")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    rows = given.rows or (QUICK if given.quick else ROWS)
    with measuring.scratch_cache() as cache:
        files.check_room(cache, rows * (784 + 2 * 4096) + 10**9, f"{rows:,} images and their features")
        images = make_images(cache / "images.bin", rows)
        os.sync()  # writing them back is not part of what is timed
        found = extract(images)
    rates, kept = [part["rate"] for part in found["parts"]], [part["resident"] for part in found["parts"]]
    print(f"\n{rows / found['seconds']:,.0f} images/s; by tenths {min(rates):,.0f} to {max(rates):,.0f}")
    told = f"{files.human_size(found['base'])} before, {files.human_size(max(kept))} at most between tenths"
    print(f"peak {files.human_size(found['peak'])}; {told}; features {files.human_size(found['features_bytes'])}")
    out = measuring.results_folder(given.quick or rows < ROWS, given.out)
    measuring.save(out / "million.json", found)


if __name__ == "__main__":
    main()
