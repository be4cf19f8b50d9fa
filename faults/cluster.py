"""Who works on a cluster is killed (SIGKILL), at random times: a worker, a node, the head, the driver, a replica.

    python faults/cluster.py worker node driver head --times 20
    python faults/cluster.py replica update --times 3

Two nodes of one core each, real processes on this machine (`tests/nodes.py`). Extraction: 64 shards; after each kill,
and where the driver is gone after the same command once more, the cache entry must be the one that a single process
makes, byte for byte, and no shard that was committed when the kill came may have been made again. Serving: two replicas
under closed loops; a replica is killed, or the model is replaced. A line of JSON for each trial.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from load import Run, connect  # noqa: E402

from attire import cluster  # noqa: E402
from attire.features import backbones, cache  # noqa: E402
from attire.inference import bundle_files  # noqa: E402
from attire.model import pretrained  # noqa: E402
from attire.storage import files  # noqa: E402
from tests.nodes import Nodes, command, free_port, nodes  # noqa: E402

SHARDS, ROWS = 64, 48  # a shard takes a core a fifth of a second
EXTRACTIONS = ("worker", "node", "driver", "head")
PATIENCE = 300.0  # seconds for a driver to end
CLIENTS, BEFORE, AFTER = 8, 6.0, 40.0  # closed loops; seconds under load before the kill and after it
WINDOW = 2.0  # seconds that a rate is taken over


def extract(address: str, weights: Path) -> cache.Features:
    """What the driver does: SHARDS shards of ROWS pictures; on one machine where no address is given."""
    spec = cache.FeatureSpec("block2", 32, 0, "official", "fp32")
    cache._SHARD_BYTES = 2 * spec.width * ROWS  # rows are rounded down to a power of two
    images = np.random.default_rng(0).integers(0, 256, (SHARDS * spec.shard_rows, 28, 28), np.uint8)
    load = partial(backbones.load_backbone, weights, spec, torch.device("cpu"), len(images))
    asked = (images, "random", spec, load, None)
    if not address:
        return cache.extract(*asked)
    with cluster.connect(address) as found:
        return cache.extract(*asked, found.extract_shards)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def measured_before() -> dict[str, bytes]:
    """What the cache folder knows of this machine's speed: it is not to be measured in each trial."""
    known = (files.cache_dir() / name for name in ("microbatching.json", "convolutions.json"))
    return {path.name: path.read_bytes() for path in known if path.exists()}


class Trial:
    """One extraction in a cache of its own, and who is killed in it."""

    def __init__(self, nodes: Nodes, weights: Path, folder: Path) -> None:
        self.nodes, self.weights, self.cache = nodes, weights, folder
        folder.mkdir()
        for name, data in measured_before().items():
            (folder / name).write_bytes(data)

    def drive(self) -> "subprocess.Popen[str]":
        run = [sys.executable, __file__, "--drive", self.nodes.address, "--weights", str(self.weights)]
        environment = {**self.nodes.environment, "ATTIRE_CACHE": str(self.cache)}
        return subprocess.Popen(run, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    @property
    def entry(self) -> Path | None:
        return next((path for path in self.cache.glob("features/*") if path.is_dir()), None)

    def committed(self) -> dict[str, int]:
        """Shards whose ledger line is there, and the file that each is in."""
        if self.entry is None:
            return {}
        lines = [path.with_suffix(".npy") for path in self.entry.glob("shard-*.json")]
        return {path.name: path.stat().st_ino for path in lines}

    def wait_for(self, count: int, driver: "subprocess.Popen[str]") -> None:
        while len(self.committed()) < count and driver.poll() is None:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.2))

    def kill(self, who: str, driver: "subprocess.Popen[str]") -> None:
        if who == "worker":
            while not (busy := [pid for pid in self.nodes.workers() if "make_shard" in " ".join(command(pid))]):
                time.sleep(0.01)
            os.kill(random.choice(busy), signal.SIGKILL)
        elif who == "driver":
            driver.kill()
        else:
            self.nodes.kill("other" if who == "node" else "head")

    def run(self, who: str, expected: dict[str, str]) -> dict[str, Any]:
        """Kill at a random moment, go on where the driver is gone, compare."""
        at = random.randint(1, SHARDS - 8)
        start, driver = time.perf_counter(), self.drive()
        self.wait_for(at, driver)
        assert driver.poll() is None, driver.communicate()
        self.kill(who, driver)
        before, killed = self.committed(), time.perf_counter()
        _, err = driver.communicate(timeout=PATIENCE)
        again = driver.returncode != 0
        ended = time.perf_counter() - killed
        if who == "head":
            with suppress(KeyError):
                self.nodes.kill("other")
            self.nodes.start("head")
        if who in ("head", "node"):
            self.nodes.start("other")
        if again:
            driver = self.drive()
            _, more = driver.communicate(timeout=PATIENCE)
            assert driver.returncode == 0, more
        assert self.entry
        now = {path.name: path.stat().st_ino for path in self.entry.glob("*.npy")}
        return {
            "killed": who,
            "committed": len(before),
            "made again": sum(now[name] != inode for name, inode in before.items()),
            "equal": digests(self.entry) == expected,
            "driver ended by itself": who == "driver" or not again,
            "seconds to its end": round(ended, 1),
            "seconds": round(time.perf_counter() - start, 1),
            "said": err.strip().splitlines()[-1][:200] if err.strip() else "",
        }


def extractions(kinds: list[str], times: int) -> Iterator[dict[str, Any]]:
    weights = pretrained.vgg16_weights()
    with tempfile.TemporaryDirectory(prefix="attire-faults-") as name:
        folder = Path(name)
        with cache_of(folder / "alone"):
            start = time.perf_counter()
            expected = digests(extract("", weights).folder)
            yield {"killed": None, "files": len(expected), "seconds alone": round(time.perf_counter() - start, 1)}
        with nodes(folder) as found:
            for i in range(times):
                for who in kinds:
                    trial = Trial(found, weights, folder / f"{who}-{i}")
                    yield trial.run(who, expected)
                    shutil.rmtree(trial.cache)


@contextmanager
def cache_of(folder: Path) -> Iterator[None]:
    before = os.environ.get("ATTIRE_CACHE")
    os.environ["ATTIRE_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["ATTIRE_CACHE"]
        if before is not None:
            os.environ["ATTIRE_CACHE"] = before


class Timed(Run):
    """Clients in a thread of their own; when each answer came."""

    def __init__(self, port: int, seconds: float) -> None:
        super().__init__(port, seconds)
        self.came: list[tuple[float, int]] = []

    async def loop(self, number: int) -> None:
        i, client = number, await connect(self.port)
        while not self.over():
            status = await client.ask(self.requests[i % len(self.requests)])
            self.came.append((time.perf_counter(), status))
            i += 31
            if client.last:
                client = await connect(self.port)

    async def loops(self) -> None:
        await asyncio.gather(*(self.loop(i) for i in range(CLIENTS)))

    def run(self) -> None:
        asyncio.run(self.loops())

    def rate(self, start: float, seconds: float) -> float:
        """Good answers a second."""
        return sum(start <= when < start + seconds and status == 200 for when, status in self.came) / seconds


def servings(kinds: list[str], times: int) -> Iterator[dict[str, Any]]:
    """A replica killed under load, and a model replaced under load."""
    bundle, port = bundle_files.find_bundle(None), free_port()
    settings = {"max_queue": 128, "workers": 0, "threads": 0, "hosts": ("localhost", "127.0.0.1")}
    with tempfile.TemporaryDirectory(prefix="attire-faults-") as name, nodes(Path(name)) as found:
        os.environ.update({key: found.environment[key] for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")})
        with cluster.connect(found.address) as there:
            there.serve(bundle, "cpu", "127.0.0.1", port, 2, settings)
            for i in range(times):
                for what in kinds:
                    clients = Timed(port, BEFORE + AFTER)
                    thread = threading.Thread(target=clients.run)
                    thread.start()
                    time.sleep(BEFORE)
                    at = time.perf_counter()
                    if what == "replica":
                        os.kill(random.choice(replicas(found)), signal.SIGKILL)
                    else:
                        other = Path(name) / f"model-{i}"
                        shutil.copytree(bundle, other)
                        there.serve(other, "cpu", "127.0.0.1", port, 2, settings)
                    seconds = time.perf_counter() - at
                    thread.join()
                    yield {"killed": what, **told(clients, at), "seconds to replace": round(seconds, 1)}
            there.stop_serving()


def replicas(found: Nodes) -> list[int]:
    return [pid for pid in found.workers() if "ServeReplica" in command(pid)[0]]


def told(clients: Timed, at: float) -> dict[str, Any]:
    """Answers by status, and when the rate was 90 % of what it had been again."""
    usual = clients.rate(at - BEFORE + WINDOW, BEFORE - WINDOW)
    steps = np.arange(at, at + AFTER - WINDOW, WINDOW / 4)
    low = [step for step in steps if clients.rate(step, WINDOW) < 0.9 * usual]
    return {
        "answers": dict(Counter(status for _, status in clients.came)),
        "rate before": round(usual, 1),
        "rate at the end": round(clients.rate(at + AFTER - 10, 10), 1),
        "full rate after": round(max(low) + WINDOW - at, 1) if low else 0.0,
    }


def kind(text: str) -> str:
    if text not in (*EXTRACTIONS, "replica", "update"):
        raise argparse.ArgumentTypeError(f"not one of those: {text}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", type=kind, metavar="worker|node|driver|head|replica|update")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drive", metavar="ADDRESS", help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.drive is not None:
        extract(given.drive, given.weights)
        return
    random.seed(given.seed)
    made = [name for name in given.kinds if name in EXTRACTIONS]
    served = [name for name in given.kinds if name not in EXTRACTIONS]
    for kinds, trials in ((made, extractions), (served, servings)):
        for line in trials(kinds, given.times) if kinds else ():
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
