"""How often the 95 % intervals of an evaluation hold the truth, over synthetic test sets of known figures.

One table of a million rows stands for the truth; each test set is drawn from it with replacement.

    python research/coverage.py --sets 2000 --rows 2000
"""

import argparse
import time

import numpy as np

from attire.evaluation.calibration import softmax
from attire.evaluation.metrics import evaluate

FIGURES = ("accuracy", "balanced_accuracy", "top2", "macro_f1", "log_loss", "brier", "calibration_error")
TRUTH = 1_000_000
CLASSES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=1000)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    labels = rng.integers(CLASSES, size=TRUTH)
    logits = rng.normal(size=(TRUTH, CLASSES)).astype(np.float32)
    logits[np.arange(TRUTH), labels] += 2.6 + 1.5 * (labels % 3)  # some classes are harder than others
    p, names = softmax(logits, 0.8).astype(np.float32), [f"class {c}" for c in range(CLASSES)]
    truth = evaluate(p, labels, names, resamples=2)
    covered = np.zeros(len(FIGURES))
    recalls, began = 0, time.perf_counter()
    for seed in range(given.sets):
        rows = rng.integers(TRUTH, size=given.rows)
        found = evaluate(p[rows], labels[rows], names, resamples=given.resamples, seed=seed)
        pairs = [(getattr(found, name), getattr(truth, name).value) for name in FIGURES]
        covered += [interval.low <= value <= interval.high for interval, value in pairs]
        classes = zip(found.per_class, truth.per_class, strict=True)
        recalls += sum(own.recall.low <= true.recall.value <= own.recall.high for own, true in classes)
    print(f"{given.sets:,} test sets of {given.rows:,} rows, {given.resamples:,} resamples, true accuracy "
          f"{100 * truth.accuracy.value:.2f} %, {time.perf_counter() - began:.0f} s")  # fmt: skip
    for name, count in zip(FIGURES, covered, strict=True):
        print(f"{name:18} {100 * count / given.sets:.1f} %")
    print(f"{'recall of a class':18} {100 * recalls / given.sets / CLASSES:.1f} %")


if __name__ == "__main__":
    main()
