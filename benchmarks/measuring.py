"""What the benchmarks share: rounds summed up, arithmetic of VGG16, a scratch cache, results as files."""

import os
import re
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attire.blocks import BLOCK_ENDS, BLOCKS, CONVOLUTIONS
from attire.data import fashion_mnist
from attire.data.loading import load_dataset
from attire.evaluation.intervals import mcnemar, p_text, paired_difference
from attire.evaluation.run_result import RunResult, load_result
from attire.model import pretrained
from attire.recipes import named
from attire.storage import files

ROUNDS = 5
RESULTS = Path(__file__).parent / "results"
QUICK = Path("bench") / "quick"  # ignored by git: the figures of --quick mean nothing


def results_folder(quick: bool, out: Path | None = None) -> Path:
    return files.make_dir(out or (QUICK if quick else RESULTS))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest, highest, n."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def told(values: Mapping[str, float], digits: int = 3) -> str:
    """`4.21 (4.05-4.40, n = 5)` to so many significant digits."""
    middle, low, high = (significant(values[key], digits) for key in ("median", "low", "high"))
    return f"{middle} ({low}-{high}, n = {values['n']:.0f})"


def significant(value: float, digits: int = 3) -> str:
    """Plain digits: 1,234, 12.3, 0.0123."""
    if not value:
        return "0"
    magnitude = len(str(int(abs(value)))) if abs(value) >= 1 else -int(f"{abs(value):e}".partition("e-")[2] or 0) + 1
    return f"{value:,.{max(0, digits - magnitude)}f}"


def official_result(run: Path, digest: str) -> RunResult:
    """The finished run in this folder; SystemExit unless `digest`, the official test set's, is that of its test set."""
    result = load_result(run)
    if result.data["test"]["digest"] != digest:
        raise SystemExit(f"error: {run} was not tested on the official test set")
    return result


def other_length(recipe: str, epochs: int) -> str:
    """` --epochs 24` for a run of another length than its recipe's, else nothing."""
    return f" --epochs {epochs}" if epochs != named(recipe).epochs else ""


def gained(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> str:
    """`+0.10 points (-0.03 to +0.24), McNemar p = 0.16`, of what each has right on the same rows."""
    found = paired_difference(before, after)
    value, low, high = (f"{100 * share:+.2f}" for share in (found.value, found.low, found.high))
    return f"{value} points ({low} to {high}), McNemar {p_text(mcnemar(before, after))}"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def memory_line(name: str) -> int:
    """Bytes of a line of proc(5)'s status: VmRSS is what is resident, VmHWM the most that was."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    return 1024 * int(found[1]) if found else 0


def forget_peak() -> int:
    """Count the peak from here; bytes resident now. Linux alone can."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_line("VmRSS")


def peak_memory() -> int:
    return memory_line("VmHWM")


@contextmanager
def scratch_cache() -> Iterator[Path]:
    """A cache with data and weights and nothing else, inside the real one, for this process and its children."""
    fashion_mnist.official_data(), pretrained.vgg16_weights()
    real, before = files.cache_dir(), os.environ.get("ATTIRE_CACHE")
    with tempfile.TemporaryDirectory(dir=real, prefix="bench-") as folder:
        for name in ("data", "weights", "precision.json", "backends"):
            if (real / name).exists():
                (Path(folder) / name).symlink_to(real / name)
        os.environ["ATTIRE_CACHE"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["ATTIRE_CACHE"]
            else:
                os.environ["ATTIRE_CACHE"] = before


def more_images(rows: int, block: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """The official 70,000 over and over, training images first, past the first time with noise of -3 to 3 levels.

    A block at a time: (n,) which of them, and (n, 28, 28).
    """
    official = np.concatenate([load_dataset(part="train").images, load_dataset(part="test").images])
    rng = np.random.default_rng(0)
    for start in range(0, rows, block):
        numbers = np.arange(start, min(start + block, rows))
        images = official[numbers % len(official)].astype(np.int16)
        again = numbers >= len(official)
        images[again] += rng.integers(-3, 4, (int(again.sum()), 28, 28), np.int16)
        yield numbers % len(official), images.clip(0, 255).astype(np.uint8)


def command() -> str:
    """As it was typed, for the document: the program by its folder and name."""
    program = Path(sys.argv[0]).resolve()
    return " ".join(["python", f"{program.parent.name}/{program.name}", *sys.argv[1:]])


def wrapped(block: str) -> str:
    """Prose in lines of 120; tables, lists, headings and pictures as they are."""
    return block if block[0] in "|-#!" else textwrap.fill(block, 120, break_long_words=False, break_on_hyphens=False)


def environment() -> dict[str, Any]:
    from attire.model import devices

    return {**devices.environment(devices.choose_device("cpu")), "load": os.getloadavg()[0]}


def save(path: Path, value: Mapping[str, Any]) -> None:
    files.write_json(path, {"schema": 1, "command": command(), "environment": environment(), **value})
    print(f"\n{path}")


def flop_per_image(freeze_to: str, size: int) -> float:
    """Of the convolutions up to the boundary, each multiplication and each addition as one; as done directly."""
    total = 0.0
    for index, (outputs, inputs) in CONVOLUTIONS.items():
        if index < BLOCK_ENDS[freeze_to]:
            block = next(i for i, end in enumerate(BLOCKS.values()) if index < end)
            total += 2 * 9 * outputs * inputs * (size >> block) ** 2
    return total
