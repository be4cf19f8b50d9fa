"""Accuracy of the official test set against what it cost: docs/cost.md and its picture, from finished runs.

    python benchmarks/cost.py runs/1 runs/2 runs/series/seed-0     takes these into docs/cost.json; runs of one recipe
                                                                   and backend that differ in their seed make one line
    python benchmarks/cost.py                                      docs/cost.md and docs/pictures/cost.png from it
    python benchmarks/cost.py --rate frozen-best=522               pictures/s of its features, measured apart

A run's minutes are those of its own report: everything but the download. Where the features of all its runs were cached
before, what they take at their measured rate is added; without one the recipe has no line.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import measuring
import performance
from matplotlib.figure import Figure

from attire import recipes
from attire.data.loading import load_dataset
from attire.evaluation import figures
from attire.evaluation.intervals import wilson
from attire.evaluation.run_result import RunResult
from attire.storage import files

DOCS = Path(__file__).parent.parent / "docs"
CACHED = 5_000  # pictures/s: faster than any processor of ours extracts, so that most features were in the cache

# What others report for the official 10,000 test images, without what it cost them. The first group is the table of the
# data set's own README, whose authors have not tested those figures; Foret et al. repeated theirs.
README = "github.com/zalandoresearch/fashion-mnist, as submitted there"
PUBLIC = (
    ("crowd-sourced people, 1,000 images", 83.5, README),
    ("HOG + SVM", 92.6, README),
    ("VGG16, 26 million parameters", 93.5, README),
    ("GoogLeNet", 93.7, README),
    ("ResNet18, augmented", 94.9, README),
    ("DenseNet-BC, 768,000 parameters, augmented", 95.4, README),
    ("WRN-28-10, augmented", 95.9, README),
    ("WRN-28-10, augmented, random erasing", 96.3, README),
    ("WRN-40-4, augmented", 96.7, README),
    ("Shake-Shake, cutout, SAM", 96.41, "Foret et al. 2021, mean of repeated runs, +- 0.01"),
)


@dataclass(frozen=True)
class Line:
    """One recipe on one machine: test accuracies in percent by seed, and minutes of a run."""

    name: str
    accuracies: tuple[float, ...]
    minutes: float
    how: str
    machine: str
    length: str = ""  # as the name tells it, ` --epochs 24`: of runs of another length than their recipe's

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    def told(self) -> str:
        """`94.64 % +- 0.05, 3 seeds`, or `95.04 % (94.6-95.4)`."""
        if len(self.accuracies) > 1:
            return f"{self.mean:.2f} % +- {statistics.stdev(self.accuracies):.2f}, {len(self.accuracies)} seeds"
        return f"{self.mean:.2f} % ({wilson(round(100 * self.mean), 10_000).span()}), one seed"


def summary(result: RunResult) -> dict[str, Any]:
    rows, seconds, recipe = result.data["rows"], result.seconds, recipes.from_json(result.config["recipe"])
    pictures = (rows["train"] + rows["val"]) * recipe.training_views + rows["test"] * recipe.tta
    more = "".join(
        f" --{name.replace(chr(95), chr(45))}"
        for name in ("synthetic_drawings", "outlier_exposure")
        if getattr(recipe, name)
    )
    return {
        "recipe": result.recipe + more,
        "backend": result.environment.get("backend", "torch"),
        "seed": result.seed,
        "epochs": len(result.history),
        "correct": result.predictions.correct.sum().item(),
        "n": len(result.predictions.correct),
        "seconds": dict(seconds),
        "cached": pictures / seconds["extract"] > CACHED,
        "pictures": pictures,
        "processor": result.environment["processor"],
        "torch": result.environment["torch"],
    }


def take(runs: Sequence[Path], path: Path) -> None:
    """Add these runs; one of the same recipe, backend, epochs, seed and processor takes the place of an older one."""
    found = read(path)
    kept = found["runs"]
    official = load_dataset(part="test").digest
    for run in runs:
        result = measuring.official_result(run, official)
        if result.data.get("teacher"):
            raise SystemExit(f"error: {run} was taught: what it cost is its teachers' cost too")
        new = summary(result)
        same = ("recipe", "backend", "epochs", "seed", "processor")
        kept = [old for old in kept if any(old[key] != new[key] for key in same)] + [new]
    files.write_json(path, {**found, "runs": sorted(kept, key=lambda run: (run["recipe"], run["seed"]))})


def read(path: Path) -> dict[str, Any]:
    return files.read_json(path) if path.exists() else {"schema": 1, "rates": {}, "runs": []}


def lines(runs: Sequence[Mapping[str, Any]], rates: Mapping[str, float]) -> Iterator[Line]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["recipe"], run["backend"], run["epochs"], run["processor"]), []).append(run)
    for (recipe, backend, epochs, processor), group in groups.items():
        fresh = [run for run in group if not run["cached"]]
        if not fresh and recipe not in rates:
            continue
        backbone = f", {backend}" if backend not in ("torch", "torch-winograd") else ""
        length = measuring.other_length(recipe.split()[0], epochs)
        later = [run["seconds"]["total"] / 60 for run in group if run["cached"]]
        how = f"{epochs} epochs" + (f"; a further seed {statistics.median(later):.1f} min" if later else "")
        if fresh:
            minutes = statistics.median(run["seconds"]["total"] for run in fresh) / 60
        else:
            features = group[0]["pictures"] / rates[recipe] / 60
            minutes = statistics.median(later) + features
            how += f"; of these minutes {features:.1f} for features, at {rates[recipe]:g} pictures/s"
        accuracies = tuple(100 * run["correct"] / run["n"] for run in group)
        machine = f"{processor}, torch {group[0]['torch']}"
        yield Line(f"`{recipe}{length}`{backbone}", accuracies, minutes, how, machine, length)


def script_minutes(peers: performance.Lines) -> float:
    """Ten epochs of the plain script over 48,000 images, at its measured rate."""
    rate = performance.plain_rate(performance.of_kind(peers, "rates", "rate"))["median"]
    return performance.CLASSIC[1] / rate / 60


def table(found: Sequence[Line], script: float) -> Iterator[str]:
    yield "| recipe | official test, n = 10,000 | minutes on 2 cores | the plain script's time over it | |"
    yield "|---|---:|---:|---:|---|"
    for line in sorted(found, key=lambda line: line.mean):
        yield f"| {line.name} | {line.told()} | {line.minutes:.1f} | {script / line.minutes:.0f} | {line.how} |"


def text(found: Sequence[Line], peers: Sequence[performance.Curve], script: float) -> str:
    machines = "; ".join(sorted({line.machine for line in found}))
    others = [
        f"| {performance.NAMES[curve.name]} | {100 * curve.best[1]:.2f} % | {curve.best[0] / 60:.1f} |"
        for curve in peers
    ]
    public = [f"| {name} | {accuracy:g} % | {source} |" for name, accuracy, source in PUBLIC]
    blocks = [
        "# Accuracy and cost",
        "Made by `benchmarks/cost.py` from finished runs ([cost.json](cost.json)); each was scored once on the official"
        f" test set, by the weights its training ended with. {machines}; 2 cores, no GPU; other work was beside some of"
        " them, so that minutes are upper bounds. Features that were cached before are reckoned at the rate that they"
        " came at in another run. What Attire ships is"
        " `frozen-best --synthetic-drawings --outlier-exposure --epochs 20`. The plain script"
        f" (`benchmarks/plain_script.py`, ten epochs of 48,000 images, {script / 60:.1f} h at its measured rate) is the"
        " yardstick.",
        "\n".join(table(found, script)),
        "![Accuracy of the official test set against minutes of work](pictures/cost.png)",
        "## Others on the same machine",
        "The best that each reached within its time ([performance](performance.md)).",
        "\n".join(["| | accuracy | minutes |", "|---|---:|---:|", *others]),
        "## What others report",
        "For the same 10,000 images, cost not told; single runs but for the last, and mostly not repeated by anybody.",
        "\n".join(["| | accuracy | by |", "|---|---:|---|", *public]),
    ]
    return "\n\n".join(map(measuring.wrapped, blocks)) + "\n"


@matplotlib.rc_context(figures.STYLE)
def picture(found: Sequence[Line], peers: Sequence[performance.Curve], script: float) -> Figure:
    figure, plot = figures.new_axes(7.2, 4.6)

    def mark(
        at: tuple[float, float], name: str, style: Mapping[str, Any], moved: tuple[float, float], size: float
    ) -> None:
        plot.plot(*at, **style)
        plot.annotate(name.replace("`", ""), at, moved, textcoords="offset points", size=size, annotation_clip=False)

    names = {line.name for line in found}
    for line in found:
        beside_its_recipe = line.length and line.name.replace(line.length, "") in names
        name = line.length.replace(" --epochs ", "") + " epochs" if beside_its_recipe else line.name
        behind = any(other.mean > line.mean and other.minutes <= line.minutes for other in found)
        beside = (5, -9) if behind else (-4, 6)
        mark((line.minutes, line.mean), name, {"marker": "o", "color": figures.BLUE}, beside, 8)
    for curve in peers:
        at = curve.best[0] / 60, 100 * curve.best[1]
        mark(
            at, performance.NAMES[curve.name], {"marker": "s", "color": figures._ORANGE, "markersize": 4}, (5, -2), 6.5
        )
    base = next((line.mean for line in found if "classic" in line.name), None)
    if base is not None:
        hollow = {"marker": "o", "color": figures.INK, "markerfacecolor": "none"}
        mark((script, base), "plain script", hollow, (-50, 6), 7)
    right, above = 2.2 * script, 0.0
    for name, accuracy, _ in sorted(PUBLIC[1:], key=lambda line: line[1]):
        above = max(accuracy, above + 0.38)  # names of neighbours do not cover each other
        plot.plot([0.8 * right, right], [accuracy, accuracy], color=figures.COLOURS[4], linewidth=1)
        plot.annotate(name, (right, above), (4, -2), textcoords="offset points", size=5.5, annotation_clip=False)
    plot.axhline(98, color=figures.INK, linewidth=0.6, linestyle=":")
    plot.annotate("claimed", (1, 98), (0, 3), textcoords="offset points", size=7)
    plot.set_xscale("log")
    plot.set_xlim(1, right)
    plot.set_ylim(82, 98.6)
    plot.set(
        xlabel="minutes on 2 cores (log); grey at the right: reported by others, cost not told", ylabel="accuracy, %"
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder that holds cost.json")
    parser.add_argument("--rate", action="append", default=[], help="RECIPE=PICTURES a second of its features")
    given = parser.parse_args()
    if given.runs:
        take(given.runs, given.docs / "cost.json")
    told = read(given.docs / "cost.json")
    told["rates"] |= {name: float(rate) for name, rate in (text.split("=") for text in given.rate)}
    files.write_json(given.docs / "cost.json", told)
    peers = performance.read_lines(measuring.RESULTS / "peers")
    found = list(lines(told["runs"], told["rates"]))
    curves = [curve for curve in performance.curves(peers) if not curve.extrapolated and curve.name != "attire-fast"]
    script = script_minutes(peers)
    files.write_bytes(given.docs / "pictures" / "cost.png", figures.png(picture(found, curves, script)))
    files.write_text(given.docs / "cost.md", text(found, curves, script))
    print(given.docs / "cost.md")


if __name__ == "__main__":
    main()
