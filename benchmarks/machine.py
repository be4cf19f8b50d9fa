"""What this machine can do at most: matrix products in each precision, memory and disk. What speeds are fractions of.

Rounds alternate over all limits, so that what slows the machine for a while slows all alike.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attire.errors import AttireError
from attire.model import devices
from attire.progress import NoProgress, Progress
from attire.storage import files
from attire.terminal import Terminal

ROUNDS = 5
SIDES = (1024, 2048, 4096)  # of square matrices; the best counts
MEMORY_BYTES = 2**30  # of each array; four times the largest cache of a processor that is rented out in slices
DISK_BYTES = 2**29
CHUNK = 2**24  # bytes of one read or write

Work = Callable[[], float]  # does it once, and says how much that was: FLOP or bytes


@dataclass(frozen=True)
class Limit:
    """The rates of one kind of work over the rounds, each in `unit` (GFLOP/s or GB/s); how: the best way found."""

    name: str
    unit: str
    how: str
    rates: tuple[float, ...]

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def to_json(self) -> dict[str, Any]:
        spread = {"median": self.rate, "low": min(self.rates), "high": max(self.rates), "n": len(self.rates)}
        return {"unit": self.unit, "how": self.how, **spread}


@dataclass(frozen=True)
class Machine:
    """All limits of one run, and what they depend on."""

    limits: tuple[Limit, ...]
    environment: dict[str, object]

    def rate(self, name: str) -> float:
        """GFLOP/s or GB/s, the median. Raises KeyError for what could not be measured here."""
        return {limit.name: limit.rate for limit in self.limits}[name]

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, "limits": {x.name: x.to_json() for x in self.limits}, "environment": self.environment}


def measure(device: str = "cpu", *, threads: int = 0, quick: bool = False, progress: Progress | None = None) -> Machine:
    """Measure every limit, `ROUNDS` times each.

    threads: for PyTorch, 0 for the machine's. quick: small matrices and arrays, to see that it works; their figures are
    no limits. Raises AttireError where the cache folder's disk has no room for the trial.
    """
    if threads:
        torch.set_num_threads(threads)
    where, progress = devices.choose_device(device), progress or NoProgress()
    sides, memory, disk = ((128,), 2**22, 2**22) if quick else (SIDES, memory_bytes(), DISK_BYTES)
    with disk_trials(disk) as trials:
        works = [*matrix_trials(sides, where), *memory_trials(memory, where), *trials]
        rates: list[list[float]] = [[] for _ in works]
        for _, _, _, work in works:
            work()  # what is done once is not timed
        for done in range(ROUNDS):
            progress.advance("Limits", done, ROUNDS)
            for (_, _, _, work), found in zip(works, rates, strict=True):
                found.append(per_second(work, where) / 1e9)
        progress.advance("Limits", ROUNDS, ROUNDS)
    best: dict[str, Limit] = {}
    for (name, unit, how, _), found in zip(works, rates, strict=True):
        limit = Limit(name, unit, how, tuple(found))
        if name not in best or limit.rate > best[name].rate:
            best[name] = limit
    return Machine(tuple(best.values()), devices.environment(where))


def per_second(work: Work, device: torch.device) -> float:
    """FLOP/s or bytes/s of one call."""
    wait(device)
    start = time.perf_counter()
    amount = work()
    wait(device)
    return amount / (time.perf_counter() - start)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory_bytes() -> int:
    """A sixteenth of the machine's memory, at most MEMORY_BYTES."""
    try:
        return min(MEMORY_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 16)
    except (AttributeError, ValueError, OSError):  # not POSIX
        return MEMORY_BYTES // 4


Trial = tuple[str, str, str, Work]  # (name of the limit, its unit, how, the work)


def matrix_trials(sides: tuple[int, ...], device: torch.device) -> Iterator[Trial]:
    """2 n^3 operations each, into a buffer that is there already where the kernel takes one.

    bf16 that a processor only emulates is tried at the smallest side alone: a product of 4,096 took two minutes.
    """
    emulated = device.type == "cpu" and not devices.has_bf16()
    for n in sides:
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            if name == "bf16" and emulated and n > min(sides):
                continue
            a, b = (torch.rand(n, n, device=device).to(dtype) for _ in range(2))
            yield name, "GFLOP/s", f"torch.mm, {n:,} square", product(torch.mm, n, a, b, out=torch.empty_like(a))
            if device.type == "cpu" and (work := usable(onednn_linear, a, b)):
                yield name, "GFLOP/s", f"oneDNN's linear layer, {n:,} square", work
        x, y = (torch.randint(-128, 128, (n, n), dtype=torch.int8, device=device) for _ in range(2))
        for how, kernel in (("torch._int_mm", plain_int8), ("oneDNN's linear layer", onednn_int8)):
            if work := usable(kernel, x, y):
                yield "int8", "GFLOP/s", f"{how}, {n:,} square", work


def usable(kernel: Callable[[Tensor, Tensor], Callable[[], Tensor]], x: Tensor, y: Tensor) -> Work | None:
    """The product of x and y by this kernel, once tried; None where this build or device has no such kernel."""
    try:
        work = product(kernel(x, y), len(x))
        work()
    except (RuntimeError, AttributeError, NotImplementedError):
        return None
    return work


def product(multiply: Callable[..., Tensor], n: int, *given: Tensor, **more: Tensor) -> Work:
    def work() -> float:
        multiply(*given, **more)
        return 2.0 * n**3

    return work


def plain_int8(x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: torch._int_mm(x, y)


def onednn_linear(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """With weights that were packed before: in bf16 twice the rate of torch.mm (AMD EPYC, family 25 model 17)."""
    packed = torch.ops.mkldnn._reorder_linear_weight(b.to_mkldnn(), len(a))
    return lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")


def onednn_int8(x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """What PyTorch's own quantised networks call: uint8 rows by int8 weights that were packed before."""
    n = len(x)
    rows, ones, zeros = x.view(torch.uint8), torch.ones(n), torch.zeros(n, dtype=torch.int64)
    packed = torch.ops.onednn.qlinear_prepack(y, [n, n])
    fixed: tuple[Any, ...] = (ones, zeros, None, 1.0, 0, torch.uint8, "none", [], "")
    return lambda: torch.ops.onednn.qlinear_pointwise(rows, 1.0, 0, packed, *fixed)


def memory_trials(size: int, device: torch.device) -> Iterator[Trial]:
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)

    def read() -> float:
        source.sum()
        return float(size)

    def copy() -> float:
        target.copy_(source)
        return 2.0 * size

    text = files.human_size(size)
    yield "memory read", "GB/s", f"sum of {text}", read
    yield "memory copy", "GB/s", f"{text} read and as much written", copy


@contextmanager
def disk_trials(size: int) -> Iterator[list[Trial]]:
    """On the cache folder's disk, in a file that is gone afterwards."""
    folder = files.cache_dir()
    if shutil.disk_usage(folder).free < 4 * size:
        raise AttireError(folder, f"less than {files.human_size(4 * size)} free", do="make room, and measure again")
    chunk = os.urandom(CHUNK if size >= CHUNK else size)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:

        def write() -> float:
            file.seek(0)
            for _ in range(size // len(chunk)):
                file.write(chunk)
            os.fsync(file.fileno())
            return float(size // len(chunk) * len(chunk))

        def read() -> float:
            if hasattr(os, "posix_fadvise"):  # out of the system's page cache
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            done, buffer = 0, bytearray(len(chunk))
            while count := file.readinto(buffer):
                done += count
            return float(done)

        text = files.human_size(size)
        yield [("disk write", "GB/s", f"{text} and fsync", write), ("disk read", "GB/s", f"{text}, not cached", read)]


def table(machine: Machine) -> str:
    """A line for each limit: its median, its range, the unit, by what and in how many rounds it was measured."""
    lines = [f"{'Limit':16} {'median':>10} {'range':>16}"]
    for limit in machine.limits:
        digits = 0 if limit.rate >= 100 else 2
        low, middle, high = (f"{x:,.{digits}f}" for x in (min(limit.rates), limit.rate, max(limit.rates)))
        lines.append(
            f"{limit.name:16} {middle:>10} {f'{low}-{high}':>16} {limit.unit}  {limit.how}, n = {len(limit.rates)}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it works; the figures are no limits")
    given = parser.parse_args()
    progress = Terminal()
    try:
        measured = measure(threads=given.threads, quick=given.quick, progress=progress)
    finally:
        progress.close()
    print(table(measured))


if __name__ == "__main__":
    main()
