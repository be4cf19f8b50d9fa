"""`attire bench`: a bundle and its exports measured side by side, in one run: latency, throughput, memory, accuracy.

Each is opened in a process of its own, so that its memory is its own; rounds alternate, so that what slows the machine
for a while slows all alike.
"""

import multiprocessing
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attire.data.dataset import ImageDataset
from attire.data.loading import load_dataset
from attire.errors import AttireError, UsageError
from attire.evaluation import figures
from attire.evaluation.intervals import Interval, wilson
from attire.inference import neighbours
from attire.model import devices
from attire.progress import NoProgress, Progress
from attire.storage import files
from attire.storage.memory import peak_memory

_BATCHES = (1, 8, 32, 128, 256)
_ROUNDS = 5
_SECONDS = 1.0  # at least, for each batch size of each candidate in each round
_ROWS = 500  # images for the accuracy between two lines of progress


@dataclass(frozen=True)
class _Measured:
    """One candidate. Latencies in ms over `calls` single images; speed in images/s at the best batch size.

    speeds: one for each round, at that batch size. memory: the peak of its own process, in bytes, of which `base` was
    there before it was opened.
    """

    name: str
    kind: str
    precision: str
    size: int
    calls: int
    p50: float
    p99: float
    batch: int
    speeds: tuple[float, ...]
    base: int
    memory: int
    accuracy: Interval

    @property
    def speed(self) -> float:
        return statistics.median(self.speeds)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "accuracy": self.accuracy.to_json(), "speed": self.speed}


@dataclass(frozen=True)
class _Bench:
    """All candidates of one run, in the order they were named; the first is what the others are compared with."""

    candidates: tuple[_Measured, ...]
    environment: dict[str, object]

    def ratio(self, other: _Measured) -> tuple[float, float, float]:
        """Images/s of `other` over those of the first, round by round: median, lowest, highest."""
        pairs = zip(other.speeds, self.candidates[0].speeds, strict=True)
        ratios = [mine / base for mine, base in pairs]
        return statistics.median(ratios), min(ratios), max(ratios)

    def to_json(self) -> dict[str, Any]:
        rows = [{**found.to_json(), "ratio": self.ratio(found)} for found in self.candidates]
        return {"schema": 1, "candidates": rows, "environment": self.environment}


def bench(
    paths: Sequence[str | Path],
    data: str | Path | None = None,
    *,
    images: int = 0,
    threads: int = 0,
    progress: Progress | None = None,
) -> _Bench:
    """Measure bundles and exported files on the same test images.

    data: as for `train`; None is the official set. images: how many test images the accuracy is taken on, 0 for all.
    threads: for each candidate, 0 for the machine's. Raises AttireError for what cannot be opened.
    """
    progress = progress or NoProgress()
    candidates = [Path(path) for path in paths]
    if not candidates:
        raise UsageError("attire bench", "name a bundle, and the exports to compare with it, or give --machine")
    test = load_dataset(data, part="test")
    if images:
        test = test.subset(np.sort(np.random.default_rng(0).permutation(len(test))[:images]))
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker(path, threads)) for path in candidates]
        facts = [pool.submit(_facts_of).result() for pool in workers]
        for path, found in zip(candidates, facts, strict=True):
            if tuple(found["classes"]) != test.classes:
                raise AttireError(path, f"its classes are not those of {test.source}")
        right = [_accuracy(pool, test, path, progress) for pool, path in zip(workers, candidates, strict=True)]
        latencies: list[list[float]] = [[] for _ in workers]
        speeds: list[dict[int, list[float]]] = [{batch: [] for batch in _BATCHES} for _ in workers]
        for done in range(_ROUNDS):
            progress.advance("Rounds", done, _ROUNDS)
            for i, pool in enumerate(workers):
                for batch in _BATCHES:
                    took = pool.submit(_time_calls, test.images, batch).result()
                    speeds[i][batch].append(batch / statistics.mean(took))
                    latencies[i] += took if batch == 1 else []
        progress.advance("Rounds", _ROUNDS, _ROUNDS)
        peaks = [pool.submit(peak_memory).result() for pool in workers]
    measured = []
    for i, path in enumerate(candidates):
        best = max(_BATCHES, key=lambda batch: statistics.median(speeds[i][batch]))
        about, times = facts[i], 1000 * np.array(latencies[i])
        p50, p99 = (float(np.percentile(times, q)) for q in (50, 99))
        sides = (about["kind"], about["precision"], _size_of(path), len(times), p50, p99)
        cost = (best, tuple(speeds[i][best]), about["base"], peaks[i])
        measured.append(_Measured(str(path), *sides, *cost, right[i]))
    return _Bench(tuple(measured), devices.environment(devices.choose_device("cpu")))


def _accuracy(pool: Executor, test: ImageDataset, path: Path, progress: Progress) -> Interval:
    right = 0
    for start in range(0, len(test), _ROWS):
        part = slice(start, start + _ROWS)
        right += int((pool.submit(_answers, test.images[part]).result() == test.labels[part]).sum())
        progress.advance(f"Accuracy  {path.name}", min(start + _ROWS, len(test)), len(test))
    return wilson(right, len(test))


def _size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder but the training images, which no answer needs."""
    parts = [part for part in path.rglob("*") if part.is_file()] if path.is_dir() else [path]
    return sum(part.stat().st_size for part in parts if part.name != neighbours.NEIGHBOURS)


def write_bench(found: _Bench, folder: Path) -> Path:
    """bench.png and bench.svg, and bench.json."""
    drawing = figures.speeds(found.candidates)
    files.write_bytes(folder / "bench.svg", figures.svg(drawing))
    files.write_bytes(folder / "bench.png", figures.png(drawing))
    files.write_json(folder / "bench.json", found.to_json())
    return folder / "bench.png"


# In the process of one candidate.

_opened: Any = None
_base = 0


@contextmanager
def _worker(path: Path, threads: int) -> Iterator[Executor]:
    """A process of its own in which `path` is open."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        pool.submit(_open_model, path, threads).result()
        yield pool


def _open_model(path: Path, threads: int) -> None:
    global _opened, _base
    import torch  # counted to the base: a bundle needs it, and an export would not

    from attire.inference.classifier import load_bundle
    from attire.inference.runtimes import format_of, load_export

    if threads:
        torch.set_num_threads(threads)
    _base = peak_memory()
    _opened = load_export(path) if format_of(path) else load_bundle(path, "cpu")
    _opened.predict_proba(np.zeros((2, 28, 28), np.uint8))  # what is done once is not timed


def _facts_of() -> dict[str, Any]:
    exported = getattr(_opened, "format", None)
    precision = _opened.metadata["precision"] if exported else "fp32"
    return {"classes": _opened.classes, "kind": exported or "bundle", "precision": precision, "base": _base}


def _answers(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    return np.asarray(_opened.predict_proba(images).argmax(axis=1))


def _time_calls(images: NDArray[np.uint8], batch: int) -> list[float]:
    """Seconds of each call on `batch` images, for SECONDS in all, three calls at least."""
    times: list[float] = []
    start = 0
    while sum(times) < _SECONDS or len(times) < 3:
        part = images[start : start + batch] if batch <= len(images) else np.resize(images, (batch, 28, 28))
        start = (start + batch) % max(1, len(images) - batch)
        began = time.perf_counter()
        _opened.predict_proba(part)
        times.append(time.perf_counter() - began)
    return times
