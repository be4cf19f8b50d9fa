"""docs/performance.md and its picture, from the results of stages.py, growth.py and peers.py.

    python benchmarks/performance.py                 from benchmarks/results
    python benchmarks/performance.py --results bench/quick --out bench/quick/performance.md

What is missing is left out and said. No figure is written by hand.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
from measuring import significant, told

from attire.evaluation import figures
from attire.evaluation.intervals import wilson
from attire.storage import files

MARKS = (0.90, 0.92, 0.93, 0.94, 0.945)
NAMES = {
    "attire-fast": "Attire, `fast`",
    "attire-classic": "Attire, `classic`",
    "plain-script": "plain script, 224 px",
    "fastai-224": "fastai `vision_learner`, 224 px",
    "fastai-64": "fastai `vision_learner`, 64 px",
    "keras-224": "Keras feature extraction, 224 px",
    "keras-64": "Keras feature extraction, 64 px",
    "hog-svm": "HOG + linear SVM",
    "small-cnn": "small CNN from scratch",
}
RATES = {
    "attire-classic": "Attire, extraction, torch",
    "plain-script": "plain script, a training epoch",
    "fastai-224": "fastai, a training epoch",
    "keras-224": "Keras, extraction",
}
ONCE = ("attire-classic", "keras-224")  # VGG16 sees each image once, not in every epoch
CLASSIC = (10, 480_000)  # epochs, and images of all of them
Lines = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Curve:
    """(seconds, accuracy, n) of one peer, in order; measured, or extrapolated from a rate."""

    name: str
    points: tuple[tuple[float, float, int], ...]
    extrapolated: bool
    how: str = ""
    peak: float = 0.0

    @property
    def best(self) -> tuple[float, float, int]:
        return max(self.points, key=lambda point: point[1])

    def reached(self, mark: float) -> float | None:
        """Seconds of the first evaluation at this accuracy or above."""
        return next((seconds for seconds, accuracy, _ in self.points if accuracy >= mark), None)


def read_lines(folder: Path) -> Lines:
    found: Lines = {}
    for path in sorted(folder.glob("*.jsonl")):
        found[path.stem] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


def of_kind(lines: Lines, name: str, kind: str) -> list[dict[str, Any]]:
    return [line for line in lines.get(name, []) if line["kind"] == kind]


def curves(lines: Lines) -> Iterator[Curve]:
    for name in NAMES:
        ended = of_kind(lines, name, "finished")
        peak = ended[-1]["peak"] if ended else 0.0
        if points := of_kind(lines, name, "point"):
            yield Curve(name, tuple((x["seconds"], x["accuracy"], x["n"]) for x in points), False, "", peak)
        elif found := extrapolated(lines, name):
            yield found


def extrapolated(lines: Lines, name: str) -> Curve | None:
    """Seconds of an epoch = its images / the rate; accuracies of the same protocol, measured on cached features."""
    head = of_kind(lines, "attire-classic" if name == "plain-script" else name, "head")
    speed = next((x["rate"]["median"] for x in of_kind(lines, "rates", "rate") if x["what"] == RATES.get(name)), 0.0)
    if not head or not speed:
        return None
    rows = head[0]["images"] / head[0]["epoch"]
    if name in ONCE:
        points = tuple((rows / speed + x["seconds"], x["accuracy"], x["n"]) for x in head)
        how = f"{rows:,.0f} images / {significant(speed)} images/s = {duration(rows / speed)}, then the classifier"
    else:
        points = tuple((x["epoch"] * rows / speed, x["accuracy"], x["n"]) for x in head)
        how = f"{rows:,.0f} images / {significant(speed)} images/s = {duration(rows / speed)} an epoch"
    return Curve(name, points, True, f"{how}; epochs: {len(head)}")


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{significant(seconds, 2)} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def race_table(found: list[Curve]) -> Iterator[str]:
    yield "| | " + " | ".join(f"{100 * mark:g} %" for mark in MARKS) + " | best (Wilson 95 %) | after | peak memory |"
    yield "|---|" + "---:|" * (len(MARKS) + 3)
    for curve in sorted(found, key=lambda curve: (curve.extrapolated, -curve.best[1])):
        cells = [None if (at := curve.reached(mark)) is None else duration(at) for mark in MARKS]
        shown = ["-" if cell is None else f"*~ {cell}*" if curve.extrapolated else cell for cell in cells]
        seconds, accuracy, n = curve.best
        best = f"{100 * accuracy:.2f} % ({wilson(round(accuracy * n), n).span()}), n = {n:,}"
        after = f"*~ {duration(seconds)}*" if curve.extrapolated else duration(seconds)
        peak = f"{curve.peak / 2**20:,.0f} MiB" if curve.peak and not curve.extrapolated else ""
        yield f"| {NAMES[curve.name]} | {' | '.join(shown)} | {best} | {after} | {peak} |"


def draw(found: list[Curve]) -> Any:
    """Accuracy against seconds (log); dashed and hollow: extrapolated."""
    import matplotlib

    with matplotlib.rc_context(figures.STYLE):
        figure, plot = figures.new_axes(7.2, 4.4)
        colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
        for i, curve in enumerate(found):
            x, y = [point[0] for point in curve.points], [100 * point[1] for point in curve.points]
            dashes, fill = ("--", "none") if curve.extrapolated else ("-", colours[i])
            label = NAMES[curve.name].replace("`", "") + (" (extrapolated)" if curve.extrapolated else "")
            plot.plot(x, y, dashes, color=colours[i], marker="o", markersize=3.5, markerfacecolor=fill, label=label)
        plot.axhline(94.5, color=figures.INK, linewidth=0.6, linestyle=":")
        plot.set_xscale("log")
        plot.set_ylim(min(80, *(100 * curve.best[1] - 2 for curve in found)), 96)
        plot.set(xlabel="seconds of work", ylabel="accuracy on the test images, %")
        plot.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7.5)
    return figure


def about(result: Mapping[str, Any]) -> str:
    env = result["environment"]
    machine = f"{env['processor']}, {env['cores']} cores, {env['device']}; Python {env['python']}, torch {env['torch']}"
    command = f"`{result['command']}`; " if "command" in result else ""
    return f"{command}{machine}, {env['threads']} threads, load {env['load']:.1f} at the end."


def race_part(
    lines: Lines, picture: str, stages: Mapping[str, Any] | None, whole: Mapping[str, Any] | None = None
) -> Iterator[str]:
    found = list(curves(lines))
    yield "## Seconds to an accuracy\n"
    if not found:
        yield "Not measured yet: `python benchmarks/peers.py`.\n"
        return
    yield (
        "`python benchmarks/peers.py`: the same images for all, one after another, each in a process of its own. The "
        "clock counts work: preprocessing, VGG16, training, and for Attire reading too; it stands still while the test "
        "images are scored. The table has the first evaluation at each accuracy. The test set is watched here to "
        "compare speeds; nothing is chosen by it, and its accuracies are not results.\n"
    )
    yield from race_table(found)
    yield f"\n![Accuracy against seconds of work]({picture})\n"
    if any(curve.extrapolated for curve in found):
        yield (
            "*~ in italics, dashed in the picture: extrapolated.* Nobody finishes with VGG16 at 224 px in the time "
            "given. Measured are images/s, in alternating rounds in one process, and the accuracy after each epoch on "
            "cached features of the same frozen network (all layers below are a pure function of the image); time is "
            "images over images/s. In the classic protocol 48,000 of the 60,000 rows train:\n"
        )
        yield from (f"- {NAMES[curve.name]}: {curve.how}." for curve in found if curve.extrapolated)
        yield ""
    if rates := of_kind(lines, "rates", "rate"):
        yield "| VGG16 at 224 px | images/s | times the plain script |\n|---|---:|---:|"
        yield from (f"| {x['what']} | {told(x['rate'])} | {told(x['ratio'])} |" for x in rates)
        yield ""
        yield from classic_part(lines, rates, stages)
        yield from whole_part(rates, whole)
    missing = [NAMES[name] for name in NAMES if name not in {curve.name for curve in found}]
    if missing:
        yield f"Not measured: {', '.join(missing)}.\n"
    notes = [
        f"- {NAMES.get(name, name)}: {x['text']}{', ' + duration(x['seconds']) if 'seconds' in x else ''}."
        for name in lines
        for x in of_kind(lines, name, "note")
    ]
    yield "\n".join(notes) + "\n" if notes else ""
    ended = {name: of_kind(lines, name, "finished")[-1] for name in lines if of_kind(lines, name, "finished")}
    if ended:
        caps: dict[float, list[str]] = {}
        for name, line in ended.items():
            caps.setdefault(line["cap"], []).append(NAMES.get(name, name))
        allowed = "; ".join(f"{cap:.0f} s for {', '.join(names)}" for cap, names in sorted(caps.items()))
        last = next(iter(ended.values()))
        yield f"{about(last)} {last['train']:,} + {last['test']:,} images. Work allowed: {allowed}.\n"


def plain_rate(rates: list[dict[str, Any]]) -> dict[str, float]:
    """Images/s of the plain script's training, see `measuring.spread`; empty where it was not measured."""
    return next((x["rate"] for x in rates if x["what"] == RATES["plain-script"]), {})


def classic_part(lines: Lines, rates: list[dict[str, Any]], stages: Mapping[str, Any] | None) -> Iterator[str]:
    """The whole of recipe `classic` against the plain script: extrapolated from the rates, and from the measured epochs
    or the rate of a part of one."""
    head = of_kind(lines, "attire-classic", "head")
    plain = plain_rate(rates).get("median", 0.0)
    part = [x for x in (stages or {"stages": ()})["stages"] if x["name"].startswith("head epoch, classic")]
    if not plain or not (head or part):
        return
    epochs, images = (head[-1]["epoch"], head[-1]["images"]) if head else CLASSIC
    trained = head[-1]["seconds"] if head else images / part[0]["rows"] * part[0]["seconds"]["median"]
    how = "measured" if head else f"{part[0]['rows']:,} rows of one epoch measured"
    script = images / plain
    yield f"`classic`, {epochs} epochs of {images // epochs:,} images, extrapolated: plain script {duration(script)}.\n"
    for x in rates:
        if x["what"].startswith("Attire"):
            whole = images / epochs / x["rate"]["median"] + trained
            parts = f"{duration(whole - trained)} and {duration(trained)} for the classifier ({how})"
            yield f"- {x['what']}: {duration(whole)}, {parts}: {script / whole:.1f} times as fast."
    yield ""


def whole_part(rates: list[dict[str, Any]], result: Mapping[str, Any] | None) -> Iterator[str]:
    """Recipe `classic` run to its end; the plain script's day is its training images over its rate."""
    if result is None:
        return
    plain = plain_rate(rates)
    yield "Run to its end, nothing cached before (`attire train --recipe classic`, `python benchmarks/classic.py`):\n"
    for run in result["runs"]:
        spent, rows, accuracy = run["seconds"], run["rows"], run["accuracy"]
        images = run["epochs"] * rows["train"]
        ratio = [images / plain[key] / spent["total"] for key in ("median", "high", "low")]
        held = 100 * accuracy["value"], 100 * accuracy["low"], 100 * accuracy["high"]
        yield (
            f"- {run['backend']}: {duration(spent['total'])}, of them {duration(spent['extract'])} for the features of "
            f"{rows['train'] + rows['val'] + rows['test']:,} images and {duration(spent['fit'])} for {run['epochs']} "
            f"epochs; {held[0]:.2f} % ({held[1]:.1f}-{held[2]:.1f}) of {accuracy['n']:,} held-out images. The plain "
            f"script's epochs alone, at its measured rate: {duration(images / plain['median'])}, "
            f"**{ratio[0]:.1f} times as long** ({ratio[1]:.1f}-{ratio[2]:.1f})."
        )
    yield ""


def stages_part(result: Mapping[str, Any] | None) -> Iterator[str]:
    yield "## Every stage as a fraction of its limit\n"
    if result is None:
        yield "Not measured yet: `python benchmarks/stages.py --bundle runs/1/model`.\n"
        return
    yield about(result) + " Medians (range); limits measured in the same rounds.\n"
    yield "| limit of the machine | | by |\n|---|---:|---|"
    for name, limit in result["machine"]["limits"].items():
        yield f"| {name} | {told(limit)} {limit['unit']} | {limit['how']} |"
    yield "\n| stage | seconds | a second | fraction of its limit | limit |\n|---|---:|---:|---:|---|"
    for line in result["stages"]:
        rate = significant(line["rows"] / line["seconds"]["median"]) if line["rows"] > 1 else ""
        yield f"| {line['name']} | {told(line['seconds'])} | {rate} | {told(line['fraction'], 2)} | {line['limit']} |"
    yield ""


def growth_part(result: Mapping[str, Any] | None) -> Iterator[str]:
    yield "## As the rows grow\n"
    if result is None:
        yield "Not measured yet: `python benchmarks/growth.py`.\n"
        return
    yield about(result) + " Each in a process of its own; base: what it holds before, libraries loaded.\n"
    yield "| stage | rows | seconds | microseconds a row | peak, MiB | base, MiB |\n|---|---:|---:|---:|---:|---:|"
    for line in sorted(result["stages"], key=lambda line: (line["stage"], line["rows"])):
        each = significant(1e6 * line["seconds"]["median"] / line["rows"])
        peak, base = (f"{line[key]['median'] / 2**20:,.0f}" for key in ("peak", "base"))
        yield f"| {line['stage']} | {line['rows']:,} | {told(line['seconds'])} | {each} | {peak} | {base} |"
    yield "\n| stage | from | to | a row takes | more memory |\n|---|---:|---:|---:|---:|"
    for step in result["steps"]:
        more = f"{step['memory'] / 2**20:+,.0f} MiB"
        yield f"| {step['stage']} | {step['from']:,} | {step['to']:,} | {step['time']:.2f} times as long | {more} |"
    yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=measuring.RESULTS)
    parser.add_argument("--out", type=Path, default=Path("docs") / "performance.md")
    given = parser.parse_args()
    lines = read_lines(given.results / "peers")
    results = [
        files.read_json(path) if path.exists() else None
        for path in (given.results / name for name in ("stages.json", "growth.json", "classic.json"))
    ]
    picture = given.out.parent / "pictures" / "performance.png"
    found = list(curves(lines))
    if found:
        files.write_bytes(picture, figures.png(draw(found)))
    text = [
        "# Performance\n",
        "Made by `make bench-all` (`benchmarks/performance.py` from the files in `benchmarks/results`); not edited.\n",
        *race_part(lines, "pictures/performance.png", results[0], results[2]),
        *stages_part(results[0]),
        *growth_part(results[1]),
    ]
    files.write_text(given.out, "\n".join(text).rstrip() + "\n")
    print(given.out)


if __name__ == "__main__":
    main()
