"""`attire bench`: a bundle and its exports measured side by side, in one run: latency, throughput, memory, accuracy.

Each is opened in a process of its own, so that its memory can be measured. Rounds alternate between them, so that what
slows the machine for a while slows all alike.
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

import matplotlib
import numpy as np
from matplotlib.figure import Figure
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
_SECONDS = 1.0  # least time for each batch size of each candidate in each round
_ROWS = 500  # images for the accuracy between two reports of progress


@dataclass(frozen=True)
class _Candidate:
    """The measurements of one bundle or export.

    size: bytes. p50, p99: latencies in ms over `calls` single images. speeds: images/s of each round at the best batch
    size, `batch`. memory: the peak of its process, in bytes, of which `base` was there before it was opened.
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
    def label(self) -> str:
        return f"{self.kind} {self.precision}"

    @property
    def speed(self) -> float:
        return statistics.median(self.speeds)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "accuracy": self.accuracy.to_json(), "speed": self.speed}


@dataclass(frozen=True)
class BenchmarkResult:
    """All candidates in the order they were named; the others are compared with the first."""

    candidates: tuple[_Candidate, ...]
    environment: dict[str, object]

    def ratio(self, other: _Candidate) -> tuple[float, float, float]:
        """Images/s of `other` over those of the first, round by round: median, lowest, highest."""
        pairs = zip(other.speeds, self.candidates[0].speeds, strict=True)
        ratios = [mine / base for mine, base in pairs]
        return statistics.median(ratios), min(ratios), max(ratios)

    def to_json(self) -> dict[str, Any]:
        rows = [{**candidate.to_json(), "ratio": self.ratio(candidate)} for candidate in self.candidates]
        return {"schema": 1, "candidates": rows, "environment": self.environment}


def bench(
    paths: Sequence[str | Path],
    data: str | Path | None = None,
    *,
    images: int = 0,
    threads: int = 0,
    progress: Progress | None = None,
) -> BenchmarkResult:
    """Measure bundles and exported files on the same test images.

    data: as for `train`; None is the official set. images: how many test images the accuracy is taken on, 0 for all.
    threads: for each candidate, 0 for the machine's. Raises AttireError for what cannot be opened.
    """
    progress = progress or NoProgress()
    if not paths:
        raise UsageError("attire bench", "name a bundle, and the exports to compare with it")
    test = load_dataset(data, part="test")
    if images:
        test = test.subset(np.sort(np.random.default_rng(0).permutation(len(test))[:images]))
    with ExitStack() as stack:
        workers = [_Worker(stack.enter_context(_open_process(Path(path), threads)), Path(path)) for path in paths]
        for worker in workers:
            worker.check_classes(test)
        accuracies = [worker.measure_accuracy(test, progress) for worker in workers]
        for done in range(_ROUNDS):
            progress.advance("Rounds", done, _ROUNDS)
            for worker in workers:
                worker.time_round(test.images)
        progress.advance("Rounds", _ROUNDS, _ROUNDS)
        candidates = [worker.result(accuracy) for worker, accuracy in zip(workers, accuracies, strict=True)]
    return BenchmarkResult(tuple(candidates), devices.environment(devices.choose_device("cpu")))


class _Worker:
    """One candidate, open in a process of its own, and what was measured of it so far."""

    def __init__(self, process: Executor, path: Path) -> None:
        self.process, self.path = process, path
        self.facts: dict[str, Any] = process.submit(_describe_model).result()
        self.latencies: list[float] = []  # seconds, of single images
        self.speeds: dict[int, list[float]] = {batch: [] for batch in _BATCHES}  # images/s, one a round

    def check_classes(self, test: ImageDataset) -> None:
        if tuple(self.facts["classes"]) != test.classes:
            raise AttireError(self.path, f"its classes are not those of {test.source}")

    def measure_accuracy(self, test: ImageDataset, progress: Progress) -> Interval:
        correct = 0
        for start in range(0, len(test), _ROWS):
            part = slice(start, start + _ROWS)
            correct += int((self.process.submit(_predict, test.images[part]).result() == test.labels[part]).sum())
            progress.advance(f"Accuracy  {self.path.name}", min(start + _ROWS, len(test)), len(test))
        return wilson(correct, len(test))

    def time_round(self, images: NDArray[np.uint8]) -> None:
        for batch in _BATCHES:
            seconds = self.process.submit(_time_calls, images, batch).result()
            self.speeds[batch].append(batch / statistics.mean(seconds))
            self.latencies += seconds if batch == 1 else []

    def result(self, accuracy: Interval) -> _Candidate:
        best = max(_BATCHES, key=lambda batch: statistics.median(self.speeds[batch]))
        milliseconds = 1000 * np.array(self.latencies)
        return _Candidate(
            name=str(self.path),
            kind=self.facts["kind"],
            precision=self.facts["precision"],
            size=_size_of(self.path),
            calls=len(milliseconds),
            p50=float(np.percentile(milliseconds, 50)),
            p99=float(np.percentile(milliseconds, 99)),
            batch=best,
            speeds=tuple(self.speeds[best]),
            base=self.facts["base"],
            memory=self.process.submit(peak_memory).result(),
            accuracy=accuracy,
        )


def _size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder except the training images, which no prediction needs."""
    parts = [part for part in path.rglob("*") if part.is_file()] if path.is_dir() else [path]
    return sum(part.stat().st_size for part in parts if part.name != neighbours.NEIGHBOURS)


def write_bench(result: BenchmarkResult, folder: Path) -> Path:
    """Write bench.svg, bench.png and bench.json; returns the path of the second."""
    picture = figures.write_figure(folder / "bench", _speed_figure(result.candidates))
    files.write_json(folder / "bench.json", result.to_json())
    return picture


@matplotlib.rc_context(figures.STYLE)
def _speed_figure(candidates: Sequence[_Candidate]) -> Figure:
    """Bars of images/s, the range over rounds as a line, with latency, size and accuracy in words."""
    figure, plot = figures.new_axes(7.2, 0.9 + 0.5 * len(candidates))
    for i, candidate in enumerate(candidates):
        slowest, fastest = min(candidate.speeds), max(candidate.speeds)
        plot.barh(i, candidate.speed, 0.6, color=figures.BLUE)
        plot.plot([slowest, fastest], [i, i], color=figures.INK, linewidth=1)
        text = f"  {candidate.speed:,.0f}/s   {candidate.p50:.1f} ms   {candidate.size / 1e6:.1f} MB   "
        text += f"{100 * candidate.accuracy.value:.2f} %"
        plot.text(fastest, i, text, va="center", size=8)
    plot.set_yticks(range(len(candidates)), [candidate.label for candidate in candidates])
    plot.invert_yaxis()
    plot.set_xlim(0, 1.75 * max(max(candidate.speeds) for candidate in candidates))
    plot.set(xlabel="images/s at the best batch size; then latency of one image (median), size, accuracy")
    return figure


# What follows runs in the process of one candidate.

_model: Any = None
_base_memory = 0


@contextmanager
def _open_process(path: Path, threads: int) -> Iterator[Executor]:
    """A process in which the model at `path` is open."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        pool.submit(_open_model, path, threads).result()
        yield pool


def _open_model(path: Path, threads: int) -> None:
    global _model, _base_memory
    import torch  # counted in the base memory: a bundle needs it, and an export would not

    from attire.inference.classifier import load_bundle
    from attire.inference.runtimes import format_of, load_export

    if threads:
        torch.set_num_threads(threads)
    _base_memory = peak_memory()
    _model = load_export(path) if format_of(path) else load_bundle(path, "cpu")
    _model.predict_proba(np.zeros((2, 28, 28), np.uint8))  # what happens once is not timed


def _describe_model() -> dict[str, Any]:
    exported = getattr(_model, "format", None)
    precision = _model.metadata["precision"] if exported else "fp32"
    return {"classes": _model.classes, "kind": exported or "bundle", "precision": precision, "base": _base_memory}


def _predict(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    return np.asarray(_model.predict_proba(images).argmax(axis=1))


def _time_calls(images: NDArray[np.uint8], batch: int) -> list[float]:
    """Seconds of each call on `batch` images; at least three calls and _SECONDS in all."""
    times: list[float] = []
    start = 0
    while sum(times) < _SECONDS or len(times) < 3:
        part = images[start : start + batch] if batch <= len(images) else np.resize(images, (batch, 28, 28))
        start = (start + batch) % max(1, len(images) - batch)
        began = time.perf_counter()
        _model.predict_proba(part)
        times.append(time.perf_counter() - began)
    return times
