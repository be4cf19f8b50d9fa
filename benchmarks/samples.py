"""Makes attire/shipped/samples.png again: two official test images of each class that a bundle gets right.

    python benchmarks/samples.py runs/1/model

The first two of each class, in the order of the test set, that are classified rightly with a probability of at least
0.9 and not rejected. Same data and same bundle, same bytes.
"""

import json
import sys
from pathlib import Path

import numpy as np

from attire.data.loading import load_dataset
from attire.evaluation.png import write_sheet
from attire.inference.classifier import load_bundle
from attire.storage import files

ROWS = 400  # of the test set that are looked through
OUT = Path(__file__).parent.parent / "attire" / "shipped" / "samples.png"


def main(bundle: str) -> None:
    data = load_dataset(None, part="test")
    found = load_bundle(bundle, "cpu").predict(np.asarray(data.images[:ROWS]))
    good = [
        row
        for row, told in enumerate(found)
        if told.label == data.classes[data.labels[row]] and told.probability >= 0.9 and not told.out_of_distribution
    ]
    rows = [row for label in range(len(data.classes)) for row in good if data.labels[row] == label]
    chosen = [row for label in range(len(data.classes)) for row in [r for r in rows if data.labels[r] == label][:2]]
    names = [f"{data.classes[data.labels[row]]} (test image {row})" for row in chosen]
    files.write_bytes(OUT, write_sheet(np.asarray(data.images[chosen]), 10, names=json.dumps(names)))
    print(f"{OUT}   {len(names)} samples, {files.human_size(OUT.stat().st_size)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
