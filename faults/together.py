"""Processes that want the same thing at the same time: what comes of it, and how long it takes.

    python faults/together.py                  each of the three once, as tests/test_together.py does
    python faults/together.py --times 20       figures for docs/reliability.md

cache     eight `attire train` on one cache that holds nothing, not even weights: how many extracted, and whether all
          bundles are equal
takeover  a process holds the lock of a cache entry and is killed while another waits: seconds until that one computes
refusal   `attire train` into a folder that another one trains into: seconds until it is refused, imports done before
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from attire.data.loading import load_dataset, write_csv
from attire.model import pretrained

PROCESSES = 8
PATIENCE = 300.0  # seconds; whoever is slower is killed, and that is a failure
TINY = "--freeze-to block2 --image-size 16 --hidden 16 --batch-size 16 --precision fp32 --tta 1 --no-flips --epochs"
COMMAND = "from attire.cli.main import main; main()"
EXTRACTS = """
import sys, time
import numpy as np, torch
from attire.features import cache

def backbone(x):
    print("computes", time.monotonic(), flush=True)
    if sys.argv[1] == "holds":
        time.sleep(600)
    return torch.zeros(len(x), 2048)

print("ready", flush=True)
sys.stdin.readline()
images = np.zeros((60, 28, 28), np.uint8)
cache.extract(images, "digest", cache.FeatureSpec("block2", 16, 0, "x"), lambda: backbone)
"""
REFUSED = """
import sys, time
from attire.cli import main as cli
from attire.training import run as runs
print("ready", flush=True)
sys.stdin.readline()
start = time.monotonic()
try:
    cli.main()
finally:
    print("refused", time.monotonic() - start, flush=True)
"""


@contextmanager
def started(code: str, *arguments: str, cache: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with this cache; killed at the end of the block, whatever happens."""
    environment = {**os.environ, "ATTIRE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], text=True, env=environment, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str], word: str) -> str:
    """The rest of the next line, which begins with this word."""
    assert process.stdout
    line = process.stdout.readline()
    if not line.startswith(word):
        process.kill()
        raise SystemExit(f"error: expected {word!r}, found {line!r}: {process.communicate()[1][-500:]}")
    return line.removeprefix(word).strip()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def train(folder: Path, run: str, epochs: int) -> list[str]:
    weights = ["--weights-from", str(folder / "weights.safetensors")]
    data = ["--data", str(folder / "small.csv"), "--out", str(folder / run)]
    return ["train", *data, *weights, *TINY.split(), str(epochs)]


def inputs(folder: Path) -> Path:
    write_csv(load_dataset(part="test").subset(np.arange(60)), folder / "small.csv")
    shutil.copy(pretrained.vgg16_weights(), folder / "weights.safetensors")
    return folder


def cache(folder: Path) -> dict[str, Any]:
    """Eight at once: how many extracted, how many different bundles there are, seconds."""
    began, errors = time.monotonic(), [folder / f"err-{i}" for i in range(PROCESSES)]
    environment = {**os.environ, "ATTIRE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    processes = []
    for i, path in enumerate(errors):
        with path.open("w") as file:
            command = [sys.executable, "-c", COMMAND, *train(folder, f"run-{i}", 2)]
            processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=environment))
    try:
        statuses = [process.wait(PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    told = [path.read_text() for path in errors]
    if any(statuses):
        raise SystemExit(f"error: ended with {statuses}: {next(t for s, t in zip(statuses, told, strict=True) if s)}")
    bundles = {json.loads((folder / f"run-{i}/model/model.json").read_text())["sha256"] for i in range(PROCESSES)}
    return {
        "extracted": sum(bool(re.search(r"^Features .* 60 to do$", text, re.M)) for text in told),
        "cached": sum(bool(re.search(r"^Features .* 60 cached$", text, re.M)) for text in told),
        "bundles": len(bundles),
        "seconds": time.monotonic() - began,
    }


def takeover(folder: Path) -> dict[str, Any]:
    where = folder / "cache"
    with started(EXTRACTS, "holds", cache=where) as first, started(EXTRACTS, "waits", cache=where) as second:
        said(first, "ready"), said(second, "ready")
        go(first)
        said(first, "computes")
        go(second)
        time.sleep(0.5)  # it waits by now; if it were not to, it would have computed before the other was killed
        killed = time.monotonic()
        first.send_signal(signal.SIGKILL)
        return {"seconds": float(said(second, "computes")) - killed}


def refusal(folder: Path) -> dict[str, Any]:
    where = folder / "cache"
    with started(COMMAND, *train(folder, "run", 100_000), cache=where) as first:
        end = time.monotonic() + PATIENCE
        while not list((folder / "run").glob("checkpoints/*.ckpt")) and time.monotonic() < end:
            if first.poll() is not None:
                raise SystemExit(f"error: the first one ended: {first.communicate()[1][-500:]}")
            time.sleep(0.05)
        again = [word for word in train(folder, "run", 1) if "weights" not in word]  # they are in the cache by now
        with started(REFUSED, *again, cache=where) as second:
            said(second, "ready")
            go(second)
            seconds = float(said(second, "refused"))
            return {"seconds": seconds, "line": second.communicate()[1].strip(), "first": first.pid}


WAYS = {"cache": cache, "takeover": takeover, "refusal": refusal}


def several(name: str, times: int) -> list[dict[str, Any]]:
    found = []
    for _ in range(times):
        with tempfile.TemporaryDirectory(prefix="attire-together-") as folder:
            found.append(WAYS[name](inputs(Path(folder).resolve())))
    return found


def summed_up(name: str, found: Sequence[dict[str, Any]]) -> str:
    seconds = [one["seconds"] for one in found]
    text = f"{name:9} {median(seconds):.2f} s ({min(seconds):.2f}-{max(seconds):.2f}, n = {len(found)})"
    if name == "cache":
        text += f"   extracted by {sorted({one['extracted'] for one in found})} of {PROCESSES}"
        text += f", different bundles {sorted({one['bundles'] for one in found})}"
    return text + (f"   {found[0]['line']}" if name == "refusal" else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", help=", ".join(WAYS))
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file of what came of it")
    given = parser.parse_args()
    found = {}
    for name in given.ways or WAYS:
        found[name] = several(name, given.times)
        print(summed_up(name, found[name]), flush=True)
    if given.out:
        given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
