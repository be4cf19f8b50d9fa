"""What runs that were made at different times, on different machines, say together.

    python research/averaged.py --keep runs/1/seed-0 --keep runs/1/seed-1     adds their answers to the kept ones
    python research/averaged.py                                               every set of them, on validation rows
    python research/averaged.py --only best                                   of one recipe alone

`attire ensemble` averages bundles; a bundle has 17 MB, its answers 300 KB, which a repository can keep: probabilities
of the 5,000 validation and the 10,000 official test images, in 16 bits, in research/answers. Which members
are averaged is chosen on the validation rows, by their mean log loss; the test rows are read for that set, and for the
best of its members alone.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attire.data.loading import load_dataset
from attire.evaluation.intervals import wilson
from attire.inference.classifier import load_bundle
from attire.inference.ensemble import Ensemble
from attire.recipes import from_json
from attire.storage import files
from attire.training.experiment import validation_rows

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import measuring

ANSWERS = Path(__file__).parent / "answers"
PARTS = ("val", "test")
Probabilities = NDArray[np.float64]


def keep(run: Path, folder: Path = ANSWERS) -> Path:
    """Write the answers of a finished run on the official data."""
    result, train = measuring.official_result(run, load_dataset(part="test").digest), load_dataset(part="train")
    recipe = from_json(result.config["recipe"])
    rows = validation_rows(train, np.arange(len(train)), recipe)[1]
    about = {
        "recipe": recipe.to_json(),
        "correct": int(result.predictions.correct.sum()),
        "processor": result.environment["processor"],
        "torch": result.environment["torch"],
    }
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        about=np.frombuffer(json.dumps(about).encode(), np.uint8),
        rows=rows.astype(np.uint16),
        val=load_bundle(run / "model").predict_proba(train.images[rows]).astype(np.float16),
        test=result.predictions.probabilities.astype(np.float16),
    )
    path = files.make_dir(folder) / f"{recipe.name}-{recipe.epochs}-{recipe.seed}.npz"
    files.write_bytes(path, buffer.getvalue())
    return path


def read(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """(what run it was, answers by part); the rows of all must be the same."""
    with np.load(path, allow_pickle=False) as found:
        about = json.loads(found["about"].tobytes())
        return about, {
            "rows": found["rows"].astype(np.int64),
            **{part: found[part].astype(np.float64) for part in PARTS},
        }


def log_loss(probabilities: Probabilities, labels: NDArray[np.int64]) -> float:
    own = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.clip(own, 1e-6, None)).mean())


def sets(names: list[str]) -> Iterator[tuple[str, ...]]:
    for count in range(1, len(names) + 1):
        yield from combinations(names, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, action="append", default=[], help="a finished run's folder")
    parser.add_argument("--only", default="", help="those whose name begins so")
    given = parser.parse_args()
    for run in given.keep:
        print(keep(run))
    if given.keep:
        return
    kept = {path.stem: read(path)[1] for path in sorted(ANSWERS.glob(f"{given.only}*.npz"))}
    if not kept:
        raise SystemExit("error: no answers are kept")
    rows = next(iter(kept.values()))["rows"]
    if any(not np.array_equal(found["rows"], rows) for found in kept.values()):
        raise SystemExit("error: kept answers are of different validation rows")
    labels = {"val": load_dataset(part="train").labels[rows], "test": load_dataset(part="test").labels}

    def of(members: tuple[str, ...], part: str) -> Probabilities:
        return Ensemble.mean([kept[name][part] for name in members])

    def right(found: Probabilities, part: str) -> NDArray[np.bool_]:
        return np.asarray(found.argmax(1) == labels[part])

    losses = {}
    for members in sets(list(kept)):
        found = of(members, "val")
        losses[members] = log_loss(found, labels["val"])
        told = wilson(int(right(found, "val").sum()), len(rows))
        print(
            f"validation {100 * told.value:.2f} % ({told.span()}), log loss {losses[members]:.4f}: {', '.join(members)}"
        )
    chosen = min(losses, key=lambda members: losses[members])
    best = min(((name,) for name in kept), key=lambda members: losses[members])
    ours, alone = (right(of(members, "test"), "test") for members in (chosen, best))
    told = wilson(int(ours.sum()), len(ours))
    print(f"chosen: {', '.join(chosen)}; official test {100 * told.value:.2f} % ({told.span()}, n = {len(ours):,})")
    print(f"against {best[0]} alone, {100 * alone.mean():.2f} %: {measuring.gained(alone, ours)}")


if __name__ == "__main__":
    main()
