"""Test images for eyes that know neither label nor answer: do they name the class that every classifier misses?

    python research/eyes.py sheets --out sheets                  numbered pictures; rows.json is the key to them
    python research/eyes.py read a.csv b.csv --sheets sheets     what each observer answered, into research/claim.json

The images are those that claim.json says were looked at with their labels, among as many others, drawn from the
rest of the official test set, as fill the sheets: how often such eyes agree with labels at all. A line of an observer's
file: number,class,other. `other` is a class that would do about as well, or empty.
"""

import argparse
import csv
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import claim_page
import numpy as np

from attire.data.dataset import FASHION_CLASSES
from attire.data.loading import load_dataset
from attire.evaluation import figures
from attire.storage import files

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import measuring

ACROSS, DOWN = 5, 4
OTHERS = 150  # at least


def order(looked: Mapping[str, Any], n: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """(rows as they are shown, those of them that nobody called doubtful): whole sheets, shuffled."""
    doubtful = sorted({row for verdict in claim_page.VERDICTS for row in looked[verdict]})
    rng, size = np.random.default_rng(seed), ACROSS * DOWN
    count = -(-(len(doubtful) + OTHERS) // size) * size - len(doubtful)
    others = rng.choice(np.setdiff1d(np.arange(n), doubtful), count, replace=False)
    shown = rng.permutation(np.concatenate([np.array(doubtful, np.int64), others]))
    return shown.tolist(), sorted(others.tolist())


def answers(path: Path, count: int) -> list[list[int]]:
    """[class] or [class, other] of each number, from 1; SystemExit unless each is there once."""
    with path.open(newline="") as file:
        lines = sorted(csv.DictReader(file), key=lambda line: int(line["number"]))
    if [int(line["number"]) for line in lines] != list(range(1, count + 1)):
        raise SystemExit(f"error: {path}: expected the numbers 1 to {count:,}, each once")
    return [[FASHION_CLASSES.index(name) for name in (line["class"], line["other"]) if name] for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sheets", "read"])
    parser.add_argument("answers", nargs="*", type=Path, help="for read: a file of each observer")
    parser.add_argument("--sheets", "--out", type=Path, default=Path("sheets"))
    parser.add_argument("--by", default="people", help="for read: who the observers are")
    given = parser.parse_args()
    claim = files.read_json(claim_page.CLAIM)
    if given.what == "sheets":
        data = load_dataset(part="test")
        rows, others = order(claim["looked"], len(data))
        files.make_dir(given.sheets)
        files.write_json(given.sheets / "rows.json", {"schema": 1, "rows": rows, "others": others})
        for start in range(0, len(rows), ACROSS * DOWN):
            pictures = [
                (str(start + 1 + i), data.images[row]) for i, row in enumerate(rows[start : start + ACROSS * DOWN])
            ]
            drawn = claim_page.sheet(pictures, ACROSS, (2, 2.2), 12, "bicubic")
            name = f"sheet-{start // (ACROSS * DOWN) + 1:02}.png"
            files.write_bytes(given.sheets / name, figures.png(drawn))
        print(f"{given.sheets}: {len(rows):,} pictures")
        return
    if len(given.answers) < 2:
        raise SystemExit("error: read: expected two observers' files or more")
    shown = files.read_json(given.sheets / "rows.json")
    rows, others = shown["rows"], shown["others"]
    labels = load_dataset(part="test").labels[rows].tolist()
    found = [answers(path, len(rows)) for path in given.answers]
    about = {"by": given.by, "command": measuring.command()}
    claim["blind"] = {**about, "rows": rows, "others": others, "labels": labels, "answers": found}
    files.write_json(claim_page.CLAIM, claim)


if __name__ == "__main__":
    main()
