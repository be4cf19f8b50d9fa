"""The cost model, held against what was measured and against what the code does; and the table it prints."""

import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import attire

from attire import plan
from attire.errors import UsageError
from attire.plan import DEVICES, INPUTS, Asked, epoch_seconds, extraction_seconds, flop_per_image, layers
from attire.recipes import CLASSIC, FAST, RECIPES

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "plan"  # of the machines that the rates were fitted on
STAGES = 0.10  # of a measured median, on the machine that the rates were fitted on, by two numbers for six points
GROWTH = 0.30  # on the older machine, over rows from 10,000 to 700,000: the measurements themselves scatter by 20 %


def results(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def stage(name: str) -> tuple[int, float]:
    """Rows and seconds."""
    (found,) = [line for line in results("stages.json")["stages"] if line["name"] == name]
    return found["rows"], found["seconds"]["median"]


def near(predicted: float, measured: float, tolerance: float) -> bool:
    return abs(predicted - measured) <= tolerance * measured


@pytest.mark.parametrize(("freeze_to", "size"), [("block3", 32), ("block3", 64), ("block5", 224)])
def test_extraction_is_what_was_measured(freeze_to: str, size: int) -> None:
    """Eighty times the arithmetic a picture, one rate."""
    rows, seconds = stage(f"extraction, {freeze_to}, {size} px, bf16")
    predicted = extraction_seconds(rows, flop_per_image(freeze_to, size), DEVICES["cpu2"], "bf16")
    assert near(predicted, seconds, STAGES), (predicted, seconds)


@pytest.mark.parametrize(
    ("what", "precision"),
    [
        ("Attire, extraction, torch", "fp32"),
        ("Attire, extraction, openvino", "bf16"),
        ("Attire, extraction, openvino-int8", "int8"),
    ],
)
def test_extraction_in_other_precisions_is_what_was_measured(what: str, precision: str) -> None:
    lines = [json.loads(line) for line in (RESULTS / "rates.jsonl").read_text().splitlines()]
    (rate,) = [line["rate"]["median"] for line in lines if line.get("what") == what]
    predicted = 1 / extraction_seconds(1, flop_per_image("block5", 224), DEVICES["cpu2"], precision)
    assert near(predicted, rate, STAGES), (predicted, rate)


@pytest.mark.parametrize(
    ("name", "recipe"), [("head epoch, fast, 60,000 x 4,096", FAST), ("head epoch, classic, 48,000 x 25,088", CLASSIC)]
)
def test_an_epoch_is_what_was_measured(name: str, recipe: Any) -> None:
    rows, seconds = stage(name)
    predicted = epoch_seconds(rows, layers(recipe), recipe.batch_size, DEVICES["cpu2"])
    assert near(predicted, seconds, STAGES), (predicted, seconds)


def test_answers_are_what_was_measured() -> None:
    rows, seconds = stage("prediction, 256 images a call")
    predicted = extraction_seconds(rows, flop_per_image("block3", 32), DEVICES["cpu2"], "fp32")
    assert near(predicted, seconds, STAGES), (predicted, seconds)


@pytest.mark.parametrize("rows", [10_000, 70_000, 700_000])
@pytest.mark.parametrize("what", ["extraction", "epoch"])
def test_time_grows_with_the_rows_as_was_measured(what: str, rows: int) -> None:
    """One rate for seventy times as many rows. The features of block3 at 16 px; classifier 4096-512-10."""
    lines = results("growth.json")["stages"]
    (seconds,) = [line["seconds"]["median"] for line in lines if (line["stage"], line["rows"]) == (what, rows)]
    device = DEVICES["cpu2-old"]
    if what == "extraction":
        predicted = extraction_seconds(rows, flop_per_image("block3", 16), device, "fp32")
    else:
        predicted = epoch_seconds(rows, layers(FAST), FAST.batch_size, device)
    assert near(predicted, seconds, GROWTH), (predicted, seconds)


def test_measured_devices_are_the_machines_that_were_measured() -> None:
    for name, file in (("cpu2", "stages.json"), ("cpu2-old", "growth.json")):
        assert results(file)["environment"]["processor"] in DEVICES[name].source
        assert results(file)["environment"]["cores"] == DEVICES[name].cores
    assert {name for name, device in DEVICES.items() if device.source.startswith("measured")} == {"cpu2", "cpu2-old"}
    assert all("assumed" in device.source for device in DEVICES.values())


def test_pictures_are_decoded_as_fast_as_was_measured() -> None:
    for line in results("decoding.json")["kinds"]:
        assert near(INPUTS[line["kind"]].rate, line["rate"]["median"], 0.15)
    (png,) = [line for line in results("decoding.json")["kinds"] if line["kind"] == "png"]
    assert INPUTS["png"].bytes == round(png["bytes"])


@pytest.mark.real
def test_a_digest_is_as_fast_as_was_measured(tmp_path: Path) -> None:
    """What "CSV, from its copy" reads: the text of 60,000 rows, and the copy of 792 bytes a row."""
    from attire import tables
    from attire.data import load_dataset

    rows, seconds = stage("CSV, from its copy")
    official = load_dataset(part="train").subset(range(2000))
    tables.write_table(tmp_path / "a.csv", official.images, official.labels)
    text = (tmp_path / "a.csv").stat().st_size / 2000 * rows
    assert near(plan.HASH, (text + 792 * rows) / seconds, STAGES)


# What is counted, held against the code.


def test_shards_and_manifests_are_those_of_the_cache(tmp_path: Path) -> None:
    from attire import features

    assert plan.SHARD_BYTES == features.SHARD_BYTES
    spec = features.FeatureSpec("block3", 32, 0, "w")
    assert spec.width == plan.width(FAST)
    asked = Asked(10_000_000, 1, DEVICES["cpu2"], FAST)
    made = plan.make(asked)
    assert made.shards == 2 * math.ceil(10_000_000 / spec.shard_rows)
    assert made.features == 10_000_000 * 2 * spec.width * 2
    assert plan.views(FAST) == len(features.view_names(FAST.flips, FAST.shifts))
    line = {"rows": 2048, "sha256": "0" * 64}
    sizes = []
    for count in (1, 1001):
        features.write_manifest(tmp_path, "d", spec, dict.fromkeys(range(count), line))
        sizes.append((tmp_path / "MANIFEST.json").stat().st_size)
    assert (sizes[1] - sizes[0]) / 1000 == pytest.approx(plan.LINE_BYTES, abs=2)


@pytest.mark.parametrize("stretch", [None, (64, 16_384)])
def test_the_order_of_an_epoch_takes_the_memory_that_is_planned(stretch: tuple[int, int] | None) -> None:
    from attire.training import epoch_order

    rows = np.arange(500_000)
    tracemalloc.start()
    epoch_order(rows, replace(FAST, flips=False), 1, stretch)
    peak = tracemalloc.get_traced_memory()[1] / len(rows) + 16  # the rows themselves, and their labels
    tracemalloc.stop()
    assert 0.5 * plan.ORDER_BYTES < peak <= 1.1 * plan.ORDER_BYTES, peak


# The plan.


def make(images: float = 1e8, devices: str = "64xh100", recipe: str = "fast", **more: Any) -> plan.Plan:
    count, device = plan.parse_devices(devices)
    return plan.make(Asked(int(images), count, device, RECIPES[recipe], **more))


def hours_of(made: plan.Plan) -> list[float]:
    return [phase.hours for phase in made.phases]


def test_twice_the_images_take_twice_as_long() -> None:
    assert hours_of(make(2e8)) == pytest.approx([2 * one for one in hours_of(make(1e8))], rel=0.01)


def test_more_devices_help_until_something_else_binds() -> None:
    small, large = make(1e10, "64xcpu2", "classic"), make(1e10, "640xcpu2", "classic")
    assert small.phases[0].bound == large.phases[0].bound == "compute"
    assert small.phases[0].hours == pytest.approx(10 * large.phases[0].hours, rel=0.01)
    huge = make(1e10, "100000xh100")
    assert huge.phases[0].bound in ("driver", "store bandwidth")
    assert huge.phases[0].hours == pytest.approx(make(1e10, "50000xh100").phases[0].hours, rel=0.01)


def test_a_faster_store_helps_only_who_waits_for_it() -> None:
    assert make(1e10, "64xh100", batch_size=65_536).phases[1].bound == "store bandwidth"
    assert make(1e10, "64xh100", batch_size=65_536, store=1e12).phases[1].bound != "store bandwidth"
    assert hours_of(make(1e8, "8xcpu2", store=1e12)) == pytest.approx(hours_of(make(1e8, "8xcpu2")))


def test_pictures_that_must_be_looked_at_cost_more_than_the_network() -> None:
    photo, png, rows = (make(1e9, "64xcpu2", input=kind) for kind in ("photo", "png", "rows"))
    assert (photo.phases[0].bound, png.phases[0].bound) == ("picture decoding", "compute")
    assert photo.phases[0].hours > 5 * png.phases[0].hours
    assert rows.phases[0].loads["picture decoding"] == 0


def test_failures_that_come_faster_than_epochs_end_no_training() -> None:
    steady, shaky = (make(1e9, "512xcpu2", batch_size=2**17, mtbf=hours) for hours in (50_000.0, 50.0))
    assert steady.phases[1].wasted < 1.1
    assert math.isinf(shaky.phases[1].hours)
    assert shaky.phases[0].wasted < 1.01
    assert " never " in plan.text(shaky)
    assert json.loads(json.dumps(shaky.to_json()))["phases"][1]["hours"] is None


def test_what_breaks_first_stands_first() -> None:
    made = make(1e10, "64xcpu2")
    assert [limit.images for limit in made.limits] == sorted(limit.images for limit in made.limits)
    assert made.broken[0].name == "order of an epoch"
    assert not make(1e7).broken


@pytest.mark.parametrize(("text", "images"), [("1e8", 10**8), ("100M", 10**8), ("10B", 10**10), ("70,000", 70_000)])
def test_images_may_be_written_as_people_do(text: str, images: int) -> None:
    assert plan.parse_images(text) == images


@pytest.mark.parametrize("text", ["", "x", "-5", "0", "nan", "1e30", "M"])
def test_a_number_of_images_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--images: expected a number such as 1e8 or 100M"):
        plan.parse_images(text)


def test_devices_may_be_one_or_many() -> None:
    assert plan.parse_devices("64xh100") == (64, DEVICES["h100"])
    assert plan.parse_devices("c7i.8xlarge") == (1, DEVICES["c7i.8xlarge"])
    assert plan.parse_devices("3xc7i.8xlarge") == (3, DEVICES["c7i.8xlarge"])
    for text in ("0xh100", "h200", "8x", "1.5xh100"):
        with pytest.raises(UsageError, match=r"^--devices: expected such as 8xh100, of cpu2, "):
            plan.parse_devices(text)


def test_what_is_not_modelled_is_refused() -> None:
    with pytest.raises(UsageError, match="best trains convolutions, which are not planned for"):
        make(recipe="best")
    for name, more in (("--store", {"store": 0.0}), ("--mtbf", {"mtbf": -1.0}), ("--price", {"price": math.nan})):
        with pytest.raises(UsageError, match=f"^{name}: expected a number above 0"):
            make(**more)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--input: expected rows, png, photo, found 'x'"):
        make(input="x")
    with pytest.raises(UsageError, match="--precision: expected fp32, bf16, int8, found 'fp8'"):
        make(precision="fp8")


def test_figures_are_told_as_people_say_them() -> None:
    told = [plan.time_of(hours) for hours in (0.001, 0.05, 5, 80, 24 * 400, math.inf)]
    assert told == ["3.6 s", "3.0 min", "5.0 h", "3.3 d", "400 d", "never"]
    assert [plan.size_of(n) for n in (12, 8192, 1.6e12, 164e12)] == ["12 bytes", "8.2 kB", "1.6 TB", "164 TB"]
    assert [plan.money_of(n) for n in (0.5, 1234.5, math.inf)] == ["$0.50", "$1,234", "-"]


def test_the_command_prints_the_plan_or_json() -> None:
    done = attire("plan", "--images", "1e8", "--devices", "8xh100", "--price", "2.5")
    assert (done.status, done.err) == (0, "")
    assert "8 x h100 at $20.00 an hour" in done.out
    assert max(len(line) for line in done.out.splitlines()) <= 120
    found = json.loads(attire("plan", "--images", "1e8", "--json").out)
    assert (found["images"], found["device"]["name"], len(found["phases"])) == (10**8, "cpu2", 3)


def test_the_plans_in_the_documents_are_what_the_program_says() -> None:
    """Each block of docs/scale.md that begins with `$ attire plan`, whole."""
    blocks = [block for block in (ROOT / "docs" / "scale.md").read_text().split("```") if "$ attire plan" in block]
    assert len(blocks) >= 2
    for block in blocks:
        command, _, printed = block.partition("$ attire ")[2].partition("\n")
        assert attire(*command.split()).out == printed, command
