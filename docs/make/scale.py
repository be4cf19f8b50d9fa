"""The plans and the checked points in docs/scale.md, written again: `python docs/make/scale.py`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attire import plan
from attire.recipes import FAST, _CLASSIC

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "scale.md"
HEAD = "| what | measured | predicted |\n|---|---:|---:|\n"


def printed(command: str) -> str:
    """What `attire plan ...` says."""
    from click.testing import CliRunner

    from attire.cli.main import cli

    return CliRunner().invoke(cli, command.split()[1:], catch_exceptions=False).output


def points() -> Iterator[tuple[str, float, float]]:
    """(what, measured, predicted), in seconds."""
    results = ROOT / "benchmarks" / "results" / "plan"
    found: Any = {line["name"]: line for line in json.loads((results / "stages.json").read_text())["stages"]}
    device, older = plan.DEVICES["cpu2"], plan.DEVICES["cpu2-old"]
    for freeze_to, size in (("block3", 32), ("block3", 64), ("block5", 224)):
        line = found[f"extraction, {freeze_to}, {size} px, bf16"]
        flop = plan.flop_per_image(freeze_to, size)
        told = f"cpu2, extraction, {freeze_to}, {size} px, bf16, {line['rows']:,} images"
        yield told, line["seconds"]["median"], plan.extraction_seconds(line["rows"], flop, device, "bf16")
    for name, recipe in (
        ("head epoch, fast, 60,000 x 4,096", FAST),
        ("head epoch, classic, 48,000 x 25,088", _CLASSIC),
    ):
        line = found[name]
        predicted = plan.epoch_seconds(line["rows"], plan.layers(recipe), recipe.batch_size, device)
        yield f"cpu2, epoch, {recipe.name}, {line['rows']:,} rows", line["seconds"]["median"], predicted
    line, flop = found["prediction, 256 images a call"], plan.flop_per_image("block3", 32)
    predicted = plan.extraction_seconds(line["rows"], flop, device, "fp32")
    yield f"cpu2, answers, {line['rows']:,} images", line["seconds"]["median"], predicted
    rates = [json.loads(line) for line in (results / "rates.jsonl").read_text().splitlines()]
    kinds = {"torch": "fp32", "openvino": "bf16", "openvino-int8": "int8"}
    for rate in rates:
        if (kind := rate.get("what", "").removeprefix("Attire, extraction, ")) in kinds:
            flop = 1000 * plan.flop_per_image("block5", 224)
            predicted = plan.extraction_seconds(1, flop, device, kinds[kind])
            yield f"cpu2, block5, 224 px, {kind}, 1,000 images", 1000 / rate["rate"]["median"], predicted
    for line in json.loads((results / "growth.json").read_text())["stages"]:
        rows, seconds = line["rows"], line["seconds"]["median"]
        if line["stage"] == "extraction" and rows >= 10_000:
            predicted = plan.extraction_seconds(rows, plan.flop_per_image("block3", 16), older, "fp32")
            yield f"cpu2-old, extraction, block3, 16 px, {rows:,} images", seconds, predicted
        elif line["stage"] == "epoch" and rows >= 10_000:
            predicted = plan.epoch_seconds(rows, plan.layers(FAST), FAST.batch_size, older)
            yield f"cpu2-old, epoch, fast, {rows:,} rows", seconds, predicted


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def page(text: str) -> str:
    """The page with everything that the program says put in anew."""
    lines = "".join(f"| {what} | {seconds(a)} | {seconds(b)} ({b / a - 1:+.0%}) |\n" for what, a, b in points())
    head, _, rest = text.partition(HEAD)
    text = head + HEAD + lines + rest[rest.index("\n\n") + 1 :] if rest else text
    return re.sub(
        r"```\n\$ (attire plan [^\n]*)\n.*?```",
        lambda found: f"```\n$ {found[1]}\n{printed(found[1])}```",
        text,
        flags=re.S,
    )


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
