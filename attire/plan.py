"""The plan past our machines: hours, dollars and what binds, for images and devices that nobody here has.

Arithmetic alone, no torch. Rates of `cpu2` and `cpu2-old` are measured and held against benchmarks/results/plan by
tests/test_plan.py; whatever else is assumed says so in `Device.source`. See docs/scale.md.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from attire.blocks import BLOCKS, ENDS, feature_shape
from attire.errors import UsageError
from attire.recipes import Recipe
from attire.weights import CONVOLUTIONS

HOUR = 3600.0
SHARD_BYTES = 16 * 2**20  # `features.SHARD_BYTES`
LINE_BYTES = 117  # of a manifest, for each shard
ROW_BYTES = 784  # of a picture made ready
ORDER_BYTES = 48  # a row and process at the most while an epoch's order is drawn; a test counts them
ANSWER_BYTES = 60  # a row of answers, compressed
HASH = 1.58e9  # bytes a second of SHA-256, one core: "CSV, from its copy" in benchmarks/results/plan/stages.json
STEP_SECONDS = 100e-6  # that one all-reduce waits besides its bytes: assumed
TASKS = 1000.0  # shards a second that one driver hands out: assumed
REQUESTS = 3500.0  # writes a second under one prefix of S3: Amazon's documentation
MONTH = 0.023e-9  # dollars for a byte kept a month: S3's list price, assumed (2025)
DISK = 64e12  # bytes of the largest one disk one would buy: assumed


@dataclass(frozen=True)
class Device:
    """A processor or an accelerator with its share of the machine around it.

    forward: FLOP/s that convolutions reach, a multiplication and an addition two, as if done directly; train: that a
    classifier's training reaches; copy: bytes/s of memory; network: bytes/s to the store and to other devices.
    """

    name: str
    forward: dict[str, float]
    train: float
    copy: float
    cores: int
    memory: float  # bytes of the host
    network: float
    price: float  # dollars an hour
    source: str


ASSUMED = "assumed: 0.35 (training 0.2) of a peak of"
DEVICES = {
    device.name: device
    for device in (
        Device(
            "cpu2",
            {"fp32": 210e9, "bf16": 430e9, "int8": 870e9},
            240e9, 31e9, 2, 8e9, 98e6, 0.116,
            "measured: AMD EPYC (family 25 model 17), 2 cores; assumed: network, memory, price of m7a.large, 2025",
        ),
        Device(
            "cpu2-old",
            {"fp32": 114e9, "bf16": 114e9, "int8": 114e9},
            100e9, 31e9, 2, 8e9, 98e6, 0.0864,
            "measured: AMD EPYC (family 25 model 1), 2 cores; assumed: network, memory, price of m6a.large, 2025",
        ),
        Device(
            "c7i.8xlarge",
            {"fp32": 1.7e12, "bf16": 3.4e12, "int8": 7e12},
            1.9e12, 150e9, 16, 64e9, 1.56e9, 1.428,
            "assumed: eight times cpu2, as it has 16 cores; c7i.8xlarge at its list price of 2025",
        ),
        Device(
            "l4",
            {"fp32": 21e12, "bf16": 42e12, "int8": 85e12},
            24e12, 0.2e12, 2, 16e9, 0.3e9, 0.805,
            f"{ASSUMED} 121 TFLOP/s; g6.xlarge at its list price of 2025",
        ),
        Device(
            "a100",
            {"fp32": 55e12, "bf16": 109e12, "int8": 218e12},
            62e12, 1.1e12, 6, 144e9, 6.25e9, 1.84,
            f"{ASSUMED} 312 TFLOP/s; 1/8 of p4d.24xlarge at its capacity-block price of 2025",
        ),
        Device(
            "h100",
            {"fp32": 173e12, "bf16": 346e12, "int8": 692e12},
            198e12, 2.3e12, 12, 256e9, 50e9, 4.92,
            f"{ASSUMED} 989 TFLOP/s; 1/8 of p5.48xlarge at its capacity-block price of 2025",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Input:
    """A picture as it comes: its bytes in the store, and how many a core makes ready in a second (0: it is ready)."""

    bytes: float
    rate: float


# Rates: benchmarks/results/plan/decoding.json, one core of cpu2.
INPUTS = {"rows": Input(ROW_BYTES, 0), "png": Input(507, 4800), "photo": Input(100e3, 13)}


@dataclass(frozen=True)
class Asked:
    """What is planned."""

    images: int
    count: int
    device: Device
    recipe: Recipe
    input: str = "png"
    precision: str = "bf16"
    batch_size: int | None = None  # rows a step, over all devices; None: the recipe's
    store: float = 100e9  # bytes a second of the whole store: assumed
    price: float | None = None  # dollars an hour and device; None: the device's
    mtbf: float = 50_000.0  # hours a device runs between failures: 419 in 54 days on 16,384 GPUs (Llama 3 report, 2024)
    restart: float = 600.0  # seconds until a failed device's work goes on elsewhere: assumed

    @property
    def dollars(self) -> float:
        """An hour of all devices."""
        return self.count * (self.device.price if self.price is None else self.price)


@dataclass(frozen=True)
class Phase:
    """One stage: what it would take of each resource alone, in hours; they work side by side, so the longest counts."""

    name: str
    loads: dict[str, float]
    wasted: float  # factor >= 1 for what failures make do again; infinite where it never ends

    @property
    def hours(self) -> float:
        return max(self.loads.values()) * self.wasted

    @property
    def bound(self) -> str:
        return max(self.loads, key=lambda name: self.loads[name])

    def to_json(self, dollars: float) -> dict[str, Any]:
        hours = None if math.isinf(self.hours) else self.hours
        cost = None if hours is None else hours * dollars
        told = {"name": self.name, "hours": hours, "dollars": cost, "bound": self.bound, "loads": self.loads}
        return {**told, "wasted": None if math.isinf(self.wasted) else self.wasted}


@dataclass(frozen=True)
class Limit:
    """Something that is no longer sensible from so many images on, however many devices there are."""

    name: str
    images: float
    why: str


@dataclass(frozen=True)
class Plan:
    asked: Asked
    phases: Sequence[Phase]
    limits: Sequence[Limit]  # those that come first, first
    features: float  # bytes
    shards: int

    @property
    def broken(self) -> list[Limit]:
        return [limit for limit in self.limits if limit.images <= self.asked.images]

    def to_json(self) -> dict[str, Any]:
        asked, device = self.asked, self.asked.device
        about = {"images": asked.images, "count": asked.count, "recipe": asked.recipe.name, "input": asked.input}
        about |= {"precision": asked.precision, "device": asdict(device), "dollars_an_hour": asked.dollars}
        return {
            **about,
            "features_bytes": self.features,
            "shards": self.shards,
            "phases": [phase.to_json(asked.dollars) for phase in self.phases],
            "limits": [{**asdict(limit), "broken": limit in self.broken} for limit in self.limits],
        }


# The model.


def flop_per_image(freeze_to: str, size: int) -> float:
    """Of the convolutions up to the boundary, each multiplication and each addition as one; as done directly."""
    total = 0.0
    for index, (outputs, inputs) in CONVOLUTIONS.items():
        if index < ENDS[freeze_to]:
            block = next(i for i, end in enumerate(BLOCKS.values()) if index < end)
            total += 2 * 9 * outputs * inputs * (size >> block) ** 2
    return total


def width(recipe: Recipe) -> int:
    """Features of one view of one picture."""
    return math.prod(feature_shape(recipe.freeze_to, recipe.image_size, 0 if recipe.train_blocks else recipe.pool))


def views(recipe: Recipe) -> int:
    """Views that are cached of a training picture."""
    return recipe.training_views


def layers(recipe: Recipe, classes: int = 10) -> list[int]:
    """Weights of each linear layer of the classifier. UsageError where convolutions are trained: not modelled."""
    if recipe.train_blocks or recipe.conv:
        raise UsageError("--recipe", f"{recipe.name} trains convolutions, which are not planned for", do="try fast")
    sizes = [width(recipe), *recipe.hidden, classes]
    return [a * b for a, b in pairwise(sizes)]


def extraction_seconds(images: float, flop: float, device: Device, precision: str, count: int = 1) -> float:
    """Forward passes alone."""
    return images * flop / device.forward[precision] / count


def epoch_seconds(rows: float, weights: Sequence[int], batch: int, device: Device, count: int = 1) -> float:
    """Matrix products (forward, and twice backward but for the features) and Adam's nine passes over fp32 weights.

    batch: rows a step. Several devices share each batch, as `torchrun` does, and each steps all weights.
    """
    products = 2 * rows * (3 * sum(weights) - weights[0]) / device.train / count
    return products + math.ceil(rows / batch) * 9 * 4 * sum(weights) / device.copy


def make(asked: Asked) -> Plan:
    """Three phases - extraction of every view once, training, answering as many pictures - and what breaks first."""
    check(asked)
    recipe = asked.recipe
    size = 2.0 * width(recipe) * views(recipe) * asked.images
    shard_rows = 1 << max(0, (SHARD_BYTES // (2 * width(recipe))).bit_length() - 1)
    shards = views(recipe) * math.ceil(asked.images / shard_rows)
    phases = (extraction(asked, size, shards), training(asked, size), prediction(asked))
    return Plan(asked, phases, limits(asked, shard_rows), size, shards)


def extraction(asked: Asked, size: float, shards: int) -> Phase:
    work, moved = views(asked.recipe) * asked.images, asked.images * INPUTS[asked.input].bytes + size
    flop = flop_per_image(asked.recipe.freeze_to, asked.recipe.image_size)
    loads = {
        "compute": extraction_seconds(work, flop, asked.device, asked.precision, asked.count),
        "picture decoding": decoding(asked),
        "network of the devices": moved / asked.device.network / asked.count,
        "store bandwidth": moved / asked.store,
        "store requests": shards / REQUESTS,
        "driver": shards / TASKS,
    }
    lost = asked.restart + loads["compute"] / shards * asked.count / 2  # of one device, while the others go on
    return Phase("features, once", hours(loads), 1 + lost / HOUR / asked.mtbf)


def training(asked: Asked, size: float) -> Phase:
    """All epochs. The features are read anew in each, unless they fit into half of all machines' memory."""
    recipe, device, count = asked.recipe, asked.device, asked.count
    weights = layers(recipe)
    batch = asked.batch_size or recipe.batch_size
    epoch = epoch_seconds(asked.images, weights, batch, device, count)
    steps = math.ceil(asked.images / batch)
    gradient = 2 * 4 * sum(weights) * (count - 1) / count
    passes = 1 if size <= count * device.memory / 2 else recipe.epochs
    read = passes * size / views(recipe)
    loads = {
        "compute": recipe.epochs * epoch,
        "network of the devices": read / device.network / count,
        "store bandwidth": read / asked.store,
    }
    if count > 1:
        summed = recipe.epochs * steps * (gradient / device.network + STEP_SECONDS * math.log2(count))
        loads["compute, then gradients"] = loads["compute"] + summed
    spent = max(loads.values())
    lost = asked.restart + spent / recipe.epochs / 2  # of all devices: they wait for one another
    share = count * lost / HOUR / asked.mtbf
    return Phase(f"training, {recipe.epochs} epochs", hours(loads), 1 / (1 - share) if share < 1 else math.inf)


def prediction(asked: Asked) -> Phase:
    flop = asked.recipe.test_views * flop_per_image(asked.recipe.freeze_to, asked.recipe.image_size)
    moved = asked.images * (INPUTS[asked.input].bytes + ANSWER_BYTES)
    loads = {
        "compute": extraction_seconds(asked.images, flop, asked.device, "fp32", asked.count),
        "picture decoding": decoding(asked),
        "network of the devices": moved / asked.device.network / asked.count,
        "store bandwidth": moved / asked.store,
    }
    return Phase("answers for all", hours(loads), 1 + asked.restart / HOUR / asked.mtbf)


def decoding(asked: Asked) -> float:
    rate = INPUTS[asked.input].rate
    return asked.images / rate / asked.device.cores / asked.count if rate else 0.0


def hours(loads: dict[str, float]) -> dict[str, float]:
    return {name: seconds / HOUR for name, seconds in loads.items()}


def limits(asked: Asked, shard_rows: int) -> list[Limit]:
    """What no number of devices helps against, each with the images from which on; see docs/scale.md."""
    a_row = 2.0 * width(asked.recipe) * views(asked.recipe)
    memory = asked.device.memory
    found = [
        Limit("order of an epoch", memory / ORDER_BYTES, f"{ORDER_BYTES} bytes a row and process of {size_of(memory)}"),
        Limit("opening the features", HOUR * HASH / a_row, "one process verifies every shard, an hour at 1.58 GB/s"),
        Limit("one manifest", 100e6 / LINE_BYTES * shard_rows, "100 MB of JSON for a view"),
        Limit("one disk for features", DISK / a_row, f"{size_of(DISK)}; beyond it the cache must lie in a store"),
        Limit("one disk for pictures", DISK / ROW_BYTES, f"{size_of(DISK)} of {ROW_BYTES} bytes each, memory-mapped"),
    ]
    return sorted(found, key=lambda limit: limit.images)


def check(asked: Asked) -> None:
    if asked.input not in INPUTS:
        raise UsageError("--input", f"expected {', '.join(INPUTS)}, found {asked.input!r}")
    if asked.precision not in asked.device.forward:
        raise UsageError("--precision", f"expected {', '.join(asked.device.forward)}, found {asked.precision!r}")
    numbers = {"--store": asked.store, "--mtbf": asked.mtbf, "--price": asked.price, "--batch-size": asked.batch_size}
    for flag, value in numbers.items():
        if value is not None and not (math.isfinite(value) and (value > 0 or (flag == "--price" and value == 0))):
            raise UsageError(flag, f"expected a number above 0, found {value:g}")


# What is asked, and what is told.


def parse_images(text: str) -> int:
    """`1e8`, `100M`, `10B` or plain digits."""
    factor = {"k": 1e3, "M": 1e6, "B": 1e9}.get(text[-1:], 0)
    try:
        value = float(text[:-1].replace(",", "")) * factor if factor else float(text.replace(",", ""))
    except ValueError:
        value = 0
    if not 1 <= value <= 1e15:
        raise UsageError("--images", f"expected a number such as 1e8 or 100M, found {text!r}")
    return round(value)


def parse_devices(text: str) -> tuple[int, Device]:
    """`64xh100`: how many of what; a name alone is one."""
    count, _, name = text.partition("x") if text.partition("x")[0].isdigit() else ("1", "", text)
    if name not in DEVICES or not 1 <= int(count) <= 1_000_000:
        raise UsageError("--devices", f"expected such as 8xh100, of {', '.join(DEVICES)}, found {text!r}")
    return int(count), DEVICES[name]


def size_of(count: float) -> str:
    """`82 TB`, in powers of a thousand."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if count >= 10 or unit == "bytes" else f"{count:.1f} {unit}"


def time_of(hours: float) -> str:
    """`3.2 min`, `5.1 h`, `12 d`; `never` where failures come faster than work is done."""
    if math.isinf(hours):
        return "never"
    for unit, length in (("s", 1 / HOUR), ("min", 1 / 60), ("h", 1.0), ("d", 24.0)):
        value = hours / length
        if value < {"s": 100, "min": 100, "h": 72}.get(unit, math.inf):
            break
    return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"


def money_of(dollars: float) -> str:
    return "-" if math.isinf(dollars) else f"${dollars:,.2f}" if dollars < 10 else f"${dollars:,.0f}"


def count_of(images: float) -> str:
    """`2.0e8`."""
    digits, _, power = f"{images:.1e}".partition("e+")
    return f"{digits}e{int(power)}"


def text(plan: Plan) -> str:
    """The plan as a short table."""
    asked = plan.asked
    lines = [
        f"{asked.images:,} images ({asked.input}), recipe {asked.recipe.name}, {asked.precision}, "
        f"{asked.batch_size or asked.recipe.batch_size:,} rows a step",
        f"{asked.count} x {asked.device.name} at ${asked.dollars:,.2f} an hour in all",
        f"Rates {asked.device.source}",
        f"Features {size_of(plan.features)} in {plan.shards:,} shards, {money_of(plan.features * MONTH)} a month in S3",
        "",
        f"{'':20} {'time':>8} {'cost':>10}   bound by, and what would be next",
    ]
    for phase in plan.phases:
        ranked = sorted(phase.loads.items(), key=lambda item: -item[1])
        told = f"{phase.bound}; {ranked[1][0]} {time_of(ranked[1][1])}"
        told += f"; failures x {phase.wasted:.2f}" if 1.005 < phase.wasted < math.inf else ""
        cost = money_of(phase.hours * asked.dollars)
        lines.append(f"{phase.name:20} {time_of(phase.hours):>8} {cost:>10}   {told}")
    lines += ["", "Breaks first        from images   however many devices there are"]
    for limit in plan.limits:
        mark = "  <- here" if limit in plan.broken else ""
        lines.append(f"{limit.name:22} {count_of(limit.images):>8}   {limit.why}{mark}")
    return "\n".join(lines)
