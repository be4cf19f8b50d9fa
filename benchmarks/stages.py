"""Every stage as a fraction of what the machine could do, limit and stage in turn, in one run.

    python benchmarks/stages.py --bundle runs/1/model
    python benchmarks/stages.py --quick               a few seconds, to see that it works

The limits of each stage (the machine's own are measured anew in every round, beside the stage):

- extraction, prediction: direct convolutions at the rate of a large matrix product of the same precision
- head epoch: the greater of its products at the matrix rate and its bytes at the memory's copy rate; see `head_bytes`
- CSV: the file at the disk's reading rate; its binary copy: the SHA-256 of the file and of the copy, without which
  neither is known to be what it was
- cold start: a bare Python; for a prediction, a Python that imports torch
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import head_epoch
import machine
import measuring
import numpy as np
import torch
from machine import Machine
from measuring import ROUNDS, flop_per_image, seconds, spread, told
from torch import nn

from attire.data import csv_table, loading, table_cache
from attire.features import cache, sources
from attire.features.backbones import make_backbone
from attire.features.cache import FeatureSpec
from attire.model import devices, heads, pretrained, vgg
from attire.recipes import RECIPES, Recipe
from attire.storage import files, memory

TAPS = (("block3", 32, 1660), ("block3", 64, 415), ("block5", 224, 33))  # boundary, px, images: one forward pass each
MANY = 0 if "--quick" in sys.argv else 10**6  # rows to come: enough that a layout is measured before, as in a long run
CACHED = 64 * 2**20  # bytes of weights and moments that a processor's cache may hold: those do not count as memory


@dataclass
class Stage:
    """work: does it once; limit: the least seconds it could take, from the limits measured in the same round."""

    name: str
    limit: str
    work: Callable[[], object]
    least: Callable[[dict[str, float]], float]
    rows: int = 1


def measured(stages: list[Stage], limits: Callable[[], dict[str, float]], rounds: int) -> list[dict[str, Any]]:
    for stage in stages:
        stage.work()  # what is done once is not timed
    times: list[list[float]] = [[] for _ in stages]
    shares: list[list[float]] = [[] for _ in stages]
    for _ in range(rounds):
        for stage, taken, share in zip(stages, times, shares, strict=True):
            found = limits()
            taken.append(seconds(stage.work))
            share.append(stage.least(found) / taken[-1])
    lines = []
    for stage, taken, share in zip(stages, times, shares, strict=True):
        line = {"name": stage.name, "limit": stage.limit, "rows": stage.rows, "seconds": spread(taken)}
        lines.append({**line, "fraction": spread(share)})
        rate = f"{stage.rows / line['seconds']['median']:,.1f}/s" if stage.rows > 1 else ""
        print(f"{stage.name:44}{told(line['seconds'])} s  {rate:12}{told(lines[-1]['fraction'])} of {stage.limit}")
        sys.stdout.flush()
    return lines


def round_limits(found: Machine, names: tuple[str, ...], quick: bool) -> Callable[[], dict[str, float]]:
    """FLOP/s or bytes/s of one trial each, the way that was best over all rounds of `found`."""
    cpu, best = torch.device("cpu"), {limit.name: limit.how for limit in found.limits}
    size, sides = (2**22, (128,)) if quick else (machine.memory_bytes(), machine.SIDES)
    trials = [*machine.memory_trials(size, cpu), *machine.matrix_trials(sides, cpu)]
    works = {name: work for name, _, how, work in trials if name in names and best[name] == how}
    return lambda: {name: machine.per_second(works[name], cpu) for name in names}


# The stages.


def extractions(quick: bool, precision: str, scratch: Path) -> Iterator[Stage]:
    images = loading.load_dataset().images
    weights = pretrained.vgg16_weights()
    for freeze_to, size, count in TAPS:
        count = max(2, count // 16) if quick else count
        spec = FeatureSpec(freeze_to, size, 0, "", precision)
        backbone = make_backbone(
            vgg.vgg16(weights, freeze_to, 0, nn.Sequential()), spec, torch.device("cpu"), rows=MANY
        )
        part, flop = images[:count], count * flop_per_image(freeze_to, size)
        pictures = vgg.preprocess(part, size)

        def extract(part: Any = part, spec: FeatureSpec = spec, backbone: Any = backbone) -> None:
            key = os.urandom(16).hex()  # never in the cache
            cache.extract(part, key, spec, lambda: backbone)
            cache.delete_entry(spec.key(key))

        def forward(pictures: Any = pictures, backbone: Any = backbone) -> None:
            with torch.inference_mode():
                backbone(pictures)

        def least(found: dict[str, float], flop: float = flop) -> float:
            return flop / found[precision]

        name, limit = f"{freeze_to}, {size} px, {precision}", f"{precision} matrix rate"
        yield Stage(f"extraction, {name}", limit, extract, least, count)
        yield Stage(f"forward pass alone, {name}", limit, forward, least, count)


def head_bytes(head: nn.Sequential, rows: int, width: int, batch: int) -> float:
    """Bytes that an epoch cannot help moving: each row read in 16 bits; for each batch the weights read, the gradient
    written, and Adam's seven passes (weights, gradient and two moments read, all but the gradient written), unless all
    of those stay in the processor's cache."""
    weights = 4 * sum(parameter.numel() for parameter in head.parameters())
    steps = -(-rows // batch)
    return 2.0 * rows * width + (9.0 * weights * steps if 4 * weights > CACHED else 0.0)


def head_flop(head: nn.Sequential, rows: int) -> float:
    sizes = [layer.in_features * layer.out_features for layer in head if isinstance(layer, nn.Linear)]
    return 2.0 * rows * (3 * sum(sizes) - sizes[0])  # no gradient is needed for the features


def head_epochs(quick: bool, scratch: Path, found: Machine) -> Iterator[Stage]:
    jobs = (("fast", 60_000, 4096, 60_000), ("classic", 48_000, 25_088, 6_400))
    for name, rows, width, timed in jobs:
        rows, timed = (512, 512) if quick else (rows, timed)
        precision = devices.choose_train_precision("auto", torch.device("cpu"))
        recipe: Recipe = replace(RECIPES[name], flips=False, precision=precision)
        torch.manual_seed(0)
        source = sources.CachedSource([head_epoch.synthetic_features(scratch / f"{name}-rows", rows, width)])
        head = heads.build_head((width, 1, 1), (), recipe.hidden, 10, recipe.dropout)
        labels = np.random.default_rng(1).integers(0, 10, rows)
        chosen = np.sort(np.random.default_rng(2).permutation(rows)[:timed])
        flop, moved = head_flop(head, timed), head_bytes(head, timed, width, recipe.batch_size)

        def work(*given: Any) -> Callable[[], object]:
            return lambda: head_epoch.epoch_seconds(*given)

        def least(
            limits: dict[str, float], flop: float = flop, moved: float = moved, precision: str = precision
        ) -> float:
            return max(flop / limits[precision], moved / limits["memory copy"])

        by_memory = moved / found.rate("memory copy") > flop / found.rate(precision)
        limit = "memory copy rate" if by_memory else f"{precision} matrix rate"
        yield Stage(
            f"head epoch, {name}, {rows:,} x {width:,}", limit, work(head, source, labels, chosen, recipe), least, timed
        )


def csvs(quick: bool, scratch: Path, found: Machine) -> Iterator[Stage]:
    table_cache._MIN_BYTES = 0  # a small file too
    train = loading.load_dataset()
    rows = 600 if quick else len(train)
    path = scratch / "rows.csv"
    csv_table.write_table(path, train.images[:rows], train.labels[:rows])
    size = path.stat().st_size

    def parse() -> None:
        table_cache.delete_copies()
        loading._read_csv(path)

    def digests() -> None:
        for file in (path, *table_cache._folder().iterdir()):
            with file.open("rb") as opened:
                hashlib.file_digest(opened, "sha256")

    yield Stage("CSV, parsed and kept", "disk read rate", parse, lambda limits: size / limits["disk read"], rows)
    yield Stage(
        "CSV, from its copy", "SHA-256 of both", lambda: loading._read_csv(path), lambda limits: seconds(digests), rows
    )


def cold_starts(bundle: Path | None, exports: list[Path], scratch: Path) -> Iterator[Stage]:
    def run(*arguments: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    main = "from attire.cli.main import main; main()"
    yield Stage(
        "attire --help, cold", "a bare Python", run("-c", main, "--help"), lambda limits: seconds(run("-c", "pass"))
    )
    picture = scratch / "picture.png"
    files.write_bytes(picture, one_picture())
    for model in [*([bundle] if bundle else []), *exports]:
        yield Stage(
            f"attire predict of one picture, cold, {model.name}",
            "a Python that imports torch",
            run("-c", main, "predict", str(model), str(picture)),
            lambda limits: seconds(run("-c", "import torch")),
        )


def one_picture() -> bytes:
    from attire.evaluation.png import grey_png

    return grey_png(np.asarray(loading.load_dataset(part="test").images[0]))


def predictions(bundle: Path, quick: bool) -> Iterator[Stage]:
    from attire.inference.classifier import load_bundle

    classifier = load_bundle(bundle, "cpu")
    images = loading.load_dataset(part="test").images
    about = classifier.architecture
    flop = len(about.views) * flop_per_image(about.end, about.image_size)
    for count, calls in ((1, 3 if quick else 100), (256, 1 if quick else 8)):

        def work(count: int = count, calls: int = calls) -> None:
            for i in range(calls):
                classifier.predict_proba(images[i * count : (i + 1) * count])

        yield Stage(
            f"prediction, {count} image{'s' if count > 1 else ''} a call",
            "fp32 matrix rate",
            work,
            lambda limits, n=count * calls: n * flop / limits["fp32"],  # type: ignore[misc]
            count * calls,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="without one, predictions are left out")
    parser.add_argument("--export", type=Path, action="append", default=[], help="also started cold; may be repeated")
    parser.add_argument("--out", type=Path, help="folder for stages.json; default: benchmarks/results")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    memory.keep_freed_memory()
    rounds = 2 if given.quick else ROUNDS
    precision = devices.choose_precision()
    with measuring.scratch_cache(), tempfile.TemporaryDirectory(dir=files.cache_dir()) as folder:
        scratch = Path(folder)
        found = machine.measure(quick=given.quick)
        for limit in found.limits:
            print(f"limit: {limit.name:14}{told(limit.to_json())} {limit.unit}, {limit.how}")
        print(flush=True)
        lines = measured(
            list(extractions(given.quick, precision, scratch)), round_limits(found, (precision,), given.quick), rounds
        )
        matrix = round_limits(
            found, (devices.choose_train_precision("auto", torch.device("cpu")), "memory copy"), given.quick
        )
        lines += measured(list(head_epochs(given.quick, scratch, found)), matrix, rounds)
        disk = {"disk read": 1e9 * found.rate("disk read")}
        lines += measured(list(csvs(given.quick, scratch, found)), lambda: disk, rounds)
        lines += measured(list(cold_starts(given.bundle, given.export, scratch)), dict, rounds)
        if given.bundle:
            lines += measured(
                list(predictions(given.bundle, given.quick)), round_limits(found, ("fp32",), given.quick), rounds
            )
    folder_out = measuring.results_folder(given.quick, given.out)
    measuring.save(folder_out / "stages.json", {"machine": found.to_json(), "stages": lines})


if __name__ == "__main__":
    main()
