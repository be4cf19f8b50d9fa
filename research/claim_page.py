"""docs/claim.md and its pictures, from what research/claim.py kept in claim.json beside it; nothing is measured here.

python research/claim_page.py
"""

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from attire.data.loading import load_dataset
from attire.evaluation import figures
from attire.evaluation.intervals import wilson
from attire.recipes import named
from attire.storage import files

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import measuring

DOCS = Path(__file__).parent.parent / "docs"
CLAIM = Path(__file__).with_name("claim.json")
CLAIMED, PERMITTED = 0.98, 200  # of 10,000
BATCHES = (32, 256)  # of the classic protocol, and of recipe `fast`
PARTS = ("seed-0", "seed-1", "seed-2", "split-42", "split-43", "leak-10", "leak-1000", "break")
SHOWN = 60  # images on the sheet
VERDICTS = ("wrong", "arguable", "fits")  # on a label
Found = Mapping[str, Any]


def percent(line: Mapping[str, int]) -> float:
    return 100 * line["correct"] / line["n"]


def told(line: Mapping[str, int]) -> str:
    """`94.47 % (94.0-94.9, n = 10,000)`."""
    return f"{percent(line):.2f} % ({wilson(line['correct'], line['n']).span()}, n = {line['n']:,})"


def parts(found: Found, kind: str) -> list[tuple[str, Any]]:
    """What was kept under `kind-N`, in the order of N."""
    own = [(name, value) for name, value in found.items() if name.partition("-")[0] == kind]
    return sorted(own, key=lambda item: int(item[0].partition("-")[2] or 0))


def curve(seed: Found) -> list[float]:
    return [percent(line["test"]) for line in seed["epochs"]]


def epoch_table(seed: Found) -> Iterator[str]:
    yield "| epoch | training | validation | test | one-vs-rest, test |"
    yield "|---:|---:|---:|---:|---:|"
    for number, line in enumerate(seed["epochs"], 1):
        val = f"{percent(line['val']):.2f}" if line["val"] else "-"
        cells = (f"{percent(line['train']):.2f}", val, f"{percent(line['test']):.2f}")
        yield f"| {number} | {' | '.join(cells)} | {100 * line['one_vs_rest']:.2f} |"


def lucky_batches(right: NDArray[np.bool_], size: int) -> tuple[float, float]:
    """Accuracy of the first batch in percent, and the share of whole batches that read what was claimed, or more."""
    whole = right[: len(right) // size * size].reshape(-1, size).mean(1)
    return 100 * float(right[:size].mean()), float((whole >= CLAIMED).mean())


def right_rows(seed: Found) -> NDArray[np.bool_]:
    right = np.ones(seed["epochs"][-1]["test"]["n"], bool)
    right[[int(row) for row in seed["wrong"]]] = False
    return right


def moves(found: Found) -> Iterator[str]:
    """One line of the table for each way of moving the figure, against the protocol with the same seed."""
    seeds = [value for _, value in parts(found, "seed")]
    last = [curve(seed)[-1] for seed in seeds]
    base = last[0]
    spread = f" +- {statistics.stdev(last):.2f}" if len(last) > 1 else ""
    what = f"**the protocol**: official test set, last epoch, {len(last)} seed{'s' if len(last) > 1 else ''}"
    yield f"| {what} | {statistics.mean(last):.2f} %{spread} | |"
    for name, value in parts(found, "split"):
        gap = percent(value["held_out"]) - percent(value["test"])
        what = f"a random fifth of the training file held out instead (split {name.partition('-')[2]})"
        yield f"| {what} | {told(value['held_out'])} | {gap:+.2f} against the same classifier on the official set |"
    for name, value in parts(found, "leak"):
        what = f"{int(name.partition('-')[2]):,} test images also in the training set"
        inside = f"; {percent(value['leaked']):.1f} % of those, {percent(value['others']):.2f} % of the others"
        gain = percent(value["test"]) - percent(value["others"])
        yield f"| {what} | {told(value['test'])} | {gain:+.2f}{inside} |"
    best = [max(curve(seed)) - curve(seed)[-1] for seed in seeds]
    gains = ", ".join(f"{gain:+.2f}" for gain in best)
    yield f"| the best test epoch picked | {max(map(max, map(curve, seeds))):.2f} % at most | {gains} by seed |"
    if value := found.get("break"):
        what = f"a stray `break` in the training loop: {value['steps']} steps instead of {value['instead_of']:,}"
        yield f"| {what} | {told(value['test'])} | {percent(value['test']) - base:+.2f} against the protocol |"
    for size in BATCHES:
        first, lucky = lucky_batches(right_rows(seeds[0]), size)
        what = f"a stray `break` in the evaluation loop: the first {size} images alone"
        yield f"| {what} | {first:.1f} % | {100 * lucky:.0f} % of all batches of {size} read 98 % or more |"
    train = seeds[0]["epochs"][-1]["train"]
    yield f"| measured on the training images | {told(train)} | {percent(train) - base:+.2f} |"
    rest = 100 * seeds[0]["epochs"][-1]["one_vs_rest"]
    yield f"| one-vs-rest mean accuracy | {rest:.2f} % | {rest - base:+.2f} |"


def nearness(results: Found) -> Iterator[str]:
    """Whether rows held out of the training file read higher because the rest of it holds more that is like them."""
    if not (found := once_told(results, "near")):
        return
    held, test = found["held_out"], found["test"]
    distances = [f"{part['distance']:.3f} +- {1.96 * part['error']:.3f}" for part in (held, test)]
    yield (
        f"Rows held out of the training file lie {distances[0]} from the nearest of the {found['n']:,} others (split"
        f" 42; Euclidean, pixels of 0 to 1; mean and 95 %), official test images {distances[1]}; that nearest image"
        f" alone names {told(held)} and {told(test)} rightly."
    )


def ordered(results: Found) -> dict[str, Found]:
    """Each recipe's parts, that of the claim first."""
    return dict(sorted(results["recipes"].items(), key=lambda item: item[0] != "classic"))


def recipes(results: Found) -> dict[str, Found]:
    """Those that were followed epoch by epoch."""
    return {name: found for name, found in ordered(results).items() if parts(found, "seed")}


def mistakes(results: Found) -> dict[str, dict[int, int]]:
    """Test row to answer, for each classifier whose mistakes are known."""
    known: dict[str, Found] = {}
    for recipe, found in ordered(results).items():
        for name, value in parts(found, "seed"):
            known[f"`{recipe}`, seed {name.partition('-')[2]} of this page"] = value["wrong"]
        known |= {f"a run of {name}": rows for name, rows in found.get("wrong", {}).items()}
    return {name: {int(row): answer for row, answer in rows.items()} for name, rows in known.items()}


def always_wrong(results: Found) -> list[int]:
    return sorted(set.intersection(*(set(rows) for rows in mistakes(results).values())))


def left(results: Found, always: Sequence[int]) -> Iterator[str]:
    """What is left of the mistakes, and what the labels allow: paragraphs."""
    own = mistakes(results)
    counts = ", ".join(f"{len(rows):,} ({name})" for name, rows in own.items())
    once = set.union(*(set(rows) for rows in own.values()))
    yield (
        f"Of the 10,000 images {len(own)} classifiers get wrong: {counts}. **{len(always):,} images are wrong in all of"
        f" them**, {len(once):,} in at least one. All begin from the same VGG16, so that they err alike. 98 %"
        " permits 200 mistakes."
    )
    if others := once_told(results, "others"):
        counts = ", ".join(f"{len(rows):,} ({name})" for name, rows in others.items())
        shared = set(always).intersection(*({int(row) for row in rows} for rows in others.values()))
        yield (
            f"Classifiers of other kinds, on the pixels alone, get wrong: {counts}. Of the {len(always):,} images"
            f" **{len(shared):,} are wrong in all of these too**."
        )
    noise, looked = once_told(results, "noise"), results.get("looked")
    if noise:
        suspects = set(noise["suspects"])
        ceiling = 100 * (1 - len(suspects) / noise["n"])
        yield (
            f"`attire audit` finds {len(suspects):,} test labels suspect (confident learning over out-of-fold"
            " answers of a"
            f" linear classifier on the same backbone); {len(suspects & set(always)):,} of them are among the"
            f" {len(always):,}."
            " Two bounds, neither of them a result: were every suspect label wrong and no other, a faultless classifier"
            f" would read {ceiling:.1f} %, and 98 % only who learns the errors too; were every suspect label right, the"
            " labels would stand in nobody's way. The truth lies between: suspects are picked by the disagreement of a"
            " classifier that errs itself."
        )
    if noise and looked:
        yield from seen(looked, always, noise["suspects"])
    if noise and (found := results.get("blind")):
        yield from seen_blindly(found, list(own.values()), always, noise["suspects"])


def seen(looked: Mapping[str, Any], always: Sequence[int], suspects: Sequence[int]) -> Iterator[str]:
    """What one pair of eyes made of those images: a paragraph and a table."""
    yield f"Each was looked at, enlarged, with its label and what most of the classifiers answer: {looked['by']}."
    kinds = {f"the {len(always):,} that all get wrong": always, f"the {len(suspects):,} suspects": suspects}
    lines = ["| | another class is plainly the better one | either would do | the label fits |", "|---|---:|---:|---:|"]
    for name, rows in kinds.items():
        counts = [len(set(looked[verdict]) & set(rows)) for verdict in VERDICTS]
        lines.append(f"| {name} | {' | '.join(map(str, counts))} |")
    yield "\n".join(lines)
    wrong, arguable, fits = (len(set(looked[verdict]) & set(always)) for verdict in VERDICTS)
    yield (
        f"So {fits:,} of the mistakes that all of them make are plain failures, and {wrong + arguable:,} lie where the"
        " picture alone does not decide for the label. 98 % permits 200 mistakes in all. A glance at 28 x 28 pixels is"
        " not the knowledge of who sold the garment: many a top without collar or buttons was sold as a shirt."
    )


def seen_blindly(
    found: Found, mistaken: Sequence[Mapping[int, int]], always: Sequence[int], suspects: Sequence[int]
) -> Iterator[str]:
    """What eyes that knew neither label nor answer made of them: paragraphs and a table."""
    rows, labels, others = found["rows"], np.array(found["labels"]), found["others"]
    first = np.array([[own[0] for own in answers] for answers in found["answers"]])
    among = np.array([[label in own for label, own in zip(labels, each, strict=True)] for each in found["answers"]])
    pairs = zip(rows, labels.tolist(), strict=True)
    most = np.array([Counter(own.get(row, label) for own in mistaken).most_common(1)[0][0] for row, label in pairs])
    agreed = np.mean([(one == other).mean() for one, other in combinations(first, 2)])
    yield (
        f"The same images and {len(others):,} other test images, shuffled, were shown to {found['by']}. Shown neither"
        " label nor answer, each named the class held most likely, and a second one where it would do about as well"
        f" (`research/eyes.py`). Their first answers are the same on {100 * agreed:.0f} % of the"
        f" {len(rows):,} images."
    )
    kinds = {
        f"the {len(always):,} that all get wrong": always,
        f"the {len(suspects):,} suspects": suspects,
        f"the {len(others):,} others": others,
    }
    right, usual = first == labels, first == most
    shares = (right, ~right & usual, ~right & ~usual, among)
    lines = [
        "| % of first answers, by observer | the label | what most classifiers answer instead | neither | the label"
        " among two |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind, chosen in kinds.items():
        inside = np.isin(rows, list(chosen))
        cells = [", ".join(f"{100 * value:.0f}" for value in share[:, inside].mean(1)) for share in shares]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    yield "\n".join(lines)
    inside = np.isin(rows, list(always))
    every, none = (right.all(0) & inside).sum(), (~among.any(0) & inside).sum()
    yield (
        f"Of the {len(always):,} that all classifiers get wrong, {every:,} are named by their label by every observer;"
        f" {none:,} by none of them, not even in the second place."
    )


def learning(results: Found) -> Iterator[str]:
    """What more images would bring: a table, and what the power law through it says of the claim."""
    for recipe, found in results["recipes"].items():
        if len(points := [(int(name.partition("-")[2]), value) for name, value in parts(found, "curve")]) < 3:
            continue
        lines = [f"| training images | epochs | `{recipe}`, official test |", "|---:|---:|---:|"]
        lines += [f"| {count:,} | {value['epochs_trained']} | {told(value['test'])} |" for count, value in points]
        yield "\n".join(lines)
        counts = np.array([count for count, _ in points])
        tested = np.array([value["test"]["n"] for _, value in points])
        errors = np.array([value["test"]["n"] - value["test"]["correct"] for _, value in points])
        slope, needed = power_law(counts, errors / tested)
        drawn = np.random.default_rng(0).binomial(tested, errors / tested, (2000, len(points)))
        low, high = np.percentile([power_law(counts, row / tested)[1] for row in drawn], (2.5, 97.5))
        yield (
            f"One fit each (`research/claim.py --recipe {recipe}`; {machine(points[-1][1])}). Each doubling takes"
            f" {100 * (1 - 2**slope):.0f} % of the mistakes away. Continued, further than a law of"
            f" {len(points)} points has a right to be, 98 % would take {millions(needed)} labelled images"
            f" ({millions(low)} to {millions(high)}, were the points independent),"
            f" {needed / counts.max():.0f} times as many as there are, and labels that are right: the law knows nothing"
            " of the arguable ones, which more images of the same making would bring along."
        )


def power_law(counts: NDArray[Any], errors: NDArray[Any]) -> tuple[float, float]:
    """The exponent b of error = a n^b by least squares of the logarithms, and the n that it gives 98 % at."""
    slope, constant = np.polyfit(np.log(counts), np.log(errors), 1)
    return float(slope), float(np.exp((np.log(1 - CLAIMED) - constant) / slope))


def millions(count: float) -> str:
    return f"{count / 1e6:.2g} million"


def once_told(results: Found, kind: str) -> Any:
    """What was kept under `kind`, whichever recipe it was kept with; None if nothing was."""
    return next((found[kind] for found in results["recipes"].values() if kind in found), None)


def about(recipe: str, found: Found) -> str:
    """`Recipe ..., 10 epochs, on ...`: how the figures of one recipe came about."""
    first = parts(found, "seed")[0][1]
    trained, full = first["epochs_trained"], named(recipe).epochs
    shorter = "" if full == trained else f" instead of the recipe's {full}"
    backbone = f", backbone by {first['backend']}" if first.get("backend", "torch") != "torch" else ""
    return f"Recipe `{recipe}`, {trained} epochs{shorter}, cached features{backbone}: {machine(first)}."


def machine(line: Found) -> str:
    """What a figure was measured with."""
    used = line["environment"]
    return f"{used['processor']}, {used['cores']} cores, torch {used['torch']}"


def text(results: Found) -> str:
    every = recipes(results)
    always = always_wrong(results)
    (recipe, found), *_ = every.items()
    (name, first), *_ = parts(found, "seed")
    seed, errors = name.partition("-")[2], len(first["wrong"])
    fewest = min(map(len, mistakes(results).values()))
    tables, moved = [], []
    for each, own in every.items():
        (number, line), *_ = parts(own, "seed")
        tables += [f"### `{each}`, seed {number.partition('-')[2]}", "\n".join(epoch_table(line))]
        moved += [
            f"### `{each}`",
            "\n".join(["| what | reads | moves it by (points) |", "|---|---:|---|", *moves(own)]),
        ]
    blocks = [
        "# 98 %, taken apart",
        " ".join(about(each, own) for each, own in every.items())
        + " Other work beside; made by `research/claim.py` and `research/claim_page.py`; all figures, with the"
        " command of each, are in `research/claim.json`. The test set is the subject here and chooses nothing.",
        "## Epoch by epoch",
        'Accuracy in %. One-vs-rest is the mean accuracy of the ten questions "this class or not": each mistake counts'
        " twice in ten, and 90 % reads 98 %.",
        *tables,
        f"![Accuracy of {recipe} by epoch against the claim](pictures/claim.png)",
        "## What moves the figure",
        *moved,
        "Intervals: Wilson 95 %. One fit each. Differences are within the same classifier, that of the leaks against"
        " the test images that were not leaked. Between two sets of images such a difference has a standard error of"
        " about 0.3 points. The first data release had ten test images among the training images.",
        *nearness(results),
        "## What is left",
        *left(results, always),
        "![Test images that all of them get wrong: label, then answer](pictures/claim-wrong.png)",
        f"The first {min(SHOWN, len(always))} of them: what the label says, then what seed {seed} of `{recipe}` says.",
        "## What 98 % would take",
        f"{errors - PERMITTED:,} of the {errors:,} mistakes of that classifier would have to go, {fewest - PERMITTED:,}"
        f" of the {fewest:,} of the best one above. The best repeated public result on this test set is 96.41 % +- 0.01"
        " (Shake-Shake with cutout and SAM, Foret et al. 2021), a network"
        " trained whole on these images; nothing published supports 98 %.",
        *learning(results),
        "## Still to be measured",
        "\n".join(missing(results)),
    ]
    return "\n\n".join(measuring.wrapped(block) for block in blocks) + "\n"


def missing(results: Found) -> Iterator[str]:
    if "classic" not in results["recipes"]:
        yield "- `classic` itself (`python research/claim.py --recipe classic ...`), where its features are cached."
    for recipe, found in recipes(results).items():
        absent = [part for part in PARTS if part not in found]
        if absent:
            yield f"- Of `{recipe}`: {', '.join(f'`{part}`' for part in absent)} of `research/claim.py`."
    yield "- More than one fit for most lines of the tables."
    if not once_told(results, "others"):
        yield "- Classifiers of other kinds, for the images that all of them get wrong (`others`)."
    if "looked" in results:
        yield "- The labels, seen by people who know garments."
    else:
        yield "- How many suspect labels are wrong: somebody would have to look."


@matplotlib.rc_context(figures.STYLE)
def picture(seed: Found) -> Figure:
    figure, plot = figures.new_axes(6.4, 3.6)
    x = range(1, len(seed["epochs"]) + 1)
    curves = {
        "training": [percent(line["train"]) for line in seed["epochs"]],
        "one-vs-rest, test": [100 * line["one_vs_rest"] for line in seed["epochs"]],
        "validation": [percent(line["val"]) if line["val"] else np.nan for line in seed["epochs"]],
        "test": curve(seed),
    }
    for (name, values), colour, dashes in zip(curves.items(), figures.COLOURS, ("-", "-.", "--", "-"), strict=False):
        if not np.isnan(values).all():
            plot.plot(x, values, dashes, color=colour, label=name, marker="o", markersize=3)
    plot.axhline(100 * CLAIMED, color=figures.INK, linewidth=0.7, linestyle=":")
    plot.annotate("claimed", (x[-1], 100 * CLAIMED), (0, 3), textcoords="offset points", ha="right", size=7.5)
    plot.set(xlabel="epoch", ylabel="accuracy, %")
    plot.legend(loc="best")
    return figure


@matplotlib.rc_context(figures.STYLE)
def sheet(
    titled: Sequence[tuple[str, NDArray[np.uint8]]],
    across: int,
    cell: tuple[float, float],
    size: float,
    interpolation: str | None = None,
) -> Figure:
    """Grey images under their titles, so many to a row; `cell` is width and height of each in inches."""
    down = -(-len(titled) // across)
    figure = Figure(figsize=(cell[0] * across, cell[1] * down), layout="constrained")
    for i, (title, image) in enumerate(titled):
        plot = figure.add_subplot(down, across, i + 1)
        plot.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation=interpolation)
        plot.set_title(title, size=size)
        plot.set_axis_off()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder to write into")
    docs = parser.parse_args().docs
    results, data = files.read_json(CLAIM), load_dataset(part="test")
    found = next(iter(recipes(results).values()))
    first = parts(found, "seed")[0][1]
    always = always_wrong(results)[:SHOWN]
    answers = {int(row): answer for row, answer in first["wrong"].items()}
    files.write_bytes(docs / "pictures" / "claim.png", figures.png(picture(first)))
    names = data.classes
    wrong = [(f"{names[data.labels[row]]}\n{names[answers[row]]}", data.images[row]) for row in always]
    files.write_bytes(docs / "pictures" / "claim-wrong.png", figures.png(sheet(wrong, 10, (0.9, 1.15), 6)))
    files.write_text(docs / "claim.md", text(results))
    print(docs / "claim.md")


if __name__ == "__main__":
    main()
