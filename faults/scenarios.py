"""What is ended and failed: the commands that write something, each on a set so small that it takes a second.

Imported here, before any fork, is also what a command imports only where it is used: it would be most of its time.
"""

import shutil
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
from runner import Scenario, attire

from attire.data import fashion_mnist
from attire.data.loading import load_dataset, write_csv
from attire.export import export
from attire.features import cache as feature_cache
from attire.model import devices, pretrained
from attire.storage import files
from attire.training import checkpoints

for name in (
    "matplotlib.backends.backend_svg",
    "scipy.stats",
    "sklearn.model_selection",
    "torch._dynamo",
    "torchvision",
    "attire.cli.main",
    "attire.training.run",
):
    import_module(name)

ROWS = 60
TINY = "--freeze-to block2 --image-size 16 --hidden 16 --epochs 2 --batch-size 16 --precision fp32 --tta 1"
TUNED = "--freeze-to block1 --finetune-blocks 1 --batch-norm --ema 0.9 --head-epochs 1 --no-standardise --pool 1"


def small_shards() -> None:
    """Sixteen rows a shard, and a checkpoint after every step."""
    feature_cache._SHARD_BYTES = 2**16
    checkpoints.CHECKPOINT_SECONDS = -1.0


def official(root: Path) -> Path:
    """A cache that has the real data and weights, which lie elsewhere, and what was measured of this machine."""
    data, weights = fashion_mnist.official_data(), pretrained.vgg16_weights()
    cache = root / "cache"
    cache.mkdir()
    (cache / "data").symlink_to(data.parent)
    (cache / "weights").symlink_to(weights.parent)
    path = cache / "convolutions.json"
    _, here = devices._read_measurements(path)
    files.write_json(path, {here: {"direct": 1.0, "winograd": 2.0, "bf16": 2.0}})
    return cache


def with_images(root: Path) -> None:
    official(root)
    write_csv(load_dataset(part="test").subset(np.arange(ROWS)), root / "small.csv")


def train(root: Path, more: str = "") -> list[str]:
    return ["train", "--data", "small.csv", *TINY.split(), *more.split(), "--out", "run"]


def go_on(root: Path, more: str = "") -> list[str]:
    """What the program itself says: a run that has begun is resumed."""
    return ["train", "--resume", "run"] if (root / "run" / "config.json").exists() else train(root, more)


def finished(root: Path) -> None:
    with_images(root)
    done = attire(root, train(root), setting=small_shards)
    if done.status:
        raise SystemExit(f"error: cannot prepare a run: {done.err}")
    shutil.rmtree(root / "run" / "checkpoints")
    write_csv(load_dataset(part="test").subset(np.arange(ROWS, 2 * ROWS)), root / "other.csv")


def nothing(root: Path) -> None:
    """Inputs for `attire fetch`, outside of what is counted."""
    beside = root.parent / "inputs"
    if not beside.exists():
        beside.mkdir()
        for path in fashion_mnist.official_data().iterdir():
            if path.suffix != ".lock" and path.name != ".lock":
                shutil.copy(path, beside)
        shutil.copy(pretrained.vgg16_weights(), beside / "weights.safetensors")


def fetched(root: Path) -> list[str]:
    beside = root.parent / "inputs"
    return ["fetch", "--data-from", str(beside), "--weights-from", str(beside / "weights.safetensors")]


def evaluated(root: Path) -> list[str]:
    """On images whose features are not in the cache, with all that it can write."""
    return ["evaluate", "run/model", "--data", "other.csv", "--out", "measured"]


def exported(kind: str, root: Path) -> list[str]:
    return ["export", "run/model", "--format", kind, "--out", f"network{export.SUFFIXES[kind]}"]


SCENARIOS = {
    found.name: found
    for found in (
        Scenario("fetch", fetched, nothing),
        Scenario("train", train, with_images, go_on, small_shards),
        Scenario("tune", partial(train, more=TUNED), with_images, partial(go_on, more=TUNED), small_shards),
        Scenario("report", lambda root: ["report", "run"], finished),
        Scenario("evaluate", evaluated, finished, setting=small_shards),
        Scenario("export-onnx", partial(exported, "onnx"), finished),
    )
}
