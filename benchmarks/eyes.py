"""Test images for eyes that know neither label nor answer: do they name the class that every classifier misses?

    python benchmarks/eyes.py sheets --out sheets                  numbered pictures; rows.json is the key to them
    python benchmarks/eyes.py read a.csv b.csv --sheets sheets     what each observer answered, into docs/claim.json

The images are those that docs/claim.json says were looked at with their labels, among as many others, drawn from the
rest of the official test set, as fill the sheets: how often such eyes agree with labels at all. A line of an observer's
file: number,class,other. `other` is a class that would do about as well, or empty.
"""

import argparse
import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import measuring
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from attire import figures, files
from attire.data import FASHION_CLASSES, load_dataset

CLAIM = Path(__file__).parent.parent / "docs" / "claim.json"
ACROSS, DOWN = 5, 4
OTHERS = 150  # at least


def order(looked: Mapping[str, Any], n: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """(rows as they are shown, those of them that nobody called doubtful): whole sheets, shuffled."""
    doubtful = sorted({row for verdict in ("wrong", "arguable", "fits") for row in looked[verdict]})
    rng, size = np.random.default_rng(seed), ACROSS * DOWN
    count = -(-(len(doubtful) + OTHERS) // size) * size - len(doubtful)
    others = rng.choice(np.setdiff1d(np.arange(n), doubtful), count, replace=False)
    shown = rng.permutation(np.concatenate([np.array(doubtful, np.int64), others]))
    return shown.tolist(), sorted(others.tolist())


@matplotlib.rc_context(figures.STYLE)
def sheet(images: NDArray[np.uint8], first: int) -> Figure:
    figure = Figure(figsize=(2 * ACROSS, 2.2 * DOWN), layout="constrained")
    for i, image in enumerate(images):
        plot = figure.add_subplot(DOWN, ACROSS, i + 1)
        plot.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="bicubic")
        plot.set_title(str(first + i), size=12)
        plot.set_axis_off()
    return figure


def answers(path: Path, count: int) -> list[list[int]]:
    """[class] or [class, other] of each number, from 1; SystemExit unless each is there once."""
    with path.open(newline="") as file:
        found = {int(line["number"]): [line["class"], line["other"] or None] for line in csv.DictReader(file)}
    if sorted(found) != list(range(1, count + 1)):
        raise SystemExit(f"error: {path}: expected the numbers 1 to {count:,}, each once")
    return [[FASHION_CLASSES.index(name) for name in found[i + 1] if name is not None] for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sheets", "read"])
    parser.add_argument("answers", nargs="*", type=Path, help="for read: a file of each observer")
    parser.add_argument("--sheets", "--out", type=Path, default=Path("sheets"))
    parser.add_argument("--by", default="people", help="for read: who the observers are")
    given = parser.parse_args()
    claim = files.read_json(CLAIM)
    if given.what == "sheets":
        data = load_dataset(part="test")
        rows, others = order(claim["looked"], len(data))
        files.make_dir(given.sheets)
        files.write_json(given.sheets / "rows.json", {"schema": 1, "rows": rows, "others": others})
        for start in range(0, len(rows), ACROSS * DOWN):
            images = data.images[rows[start : start + ACROSS * DOWN]]
            name = f"sheet-{start // (ACROSS * DOWN) + 1:02}.png"
            files.write_bytes(given.sheets / name, figures.png(sheet(images, start + 1)))
        print(f"{given.sheets}: {len(rows):,} pictures")
        return
    shown = files.read_json(given.sheets / "rows.json")
    rows, others = shown["rows"], shown["others"]
    labels = load_dataset(part="test").labels[rows].tolist()
    found = [answers(path, len(rows)) for path in given.answers]
    about = {"by": given.by, "command": measuring.command()}
    claim["blind"] = {**about, "rows": rows, "others": others, "labels": labels, "answers": found}
    files.write_json(CLAIM, claim)


if __name__ == "__main__":
    main()
