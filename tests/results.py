"""Results of small runs that never were."""

from typing import Any

import numpy as np

from attire.evaluation.calibration import softmax
from attire.evaluation.metrics import evaluate
from attire.evaluation.run_result import Predictions, RunResult

CLASSES = ("T-shirt/top", "Coat", "Bag, large")
NASTY = ("<script>alert(1)</script>", "[red]$x$[/red]", 'a|b"\x1b[31m')
HISTORY = [
    {"epoch": 1, "train_loss": 0.9, "val_loss": 0.8, "val_accuracy": 0.7, "seconds": 2.0},
    {"epoch": 2, "train_loss": 0.5, "val_loss": None, "val_accuracy": None, "seconds": 2.1},
]


def make_result(classes: tuple[str, ...] = CLASSES, n: int = 120, signal: float = 2.0, **changes: Any) -> RunResult:
    rng = np.random.default_rng(0)
    labels = rng.integers(len(classes), size=n)
    logits = rng.normal(size=(n, len(classes)))
    logits[np.arange(n), labels] += signal
    probabilities = softmax(logits).astype(np.float32)
    images = rng.integers(256, size=(n, 28, 28), dtype=np.uint8)
    evaluation = evaluate(probabilities, labels, classes, resamples=50)
    values: dict[str, Any] = {
        "title": "A small run",
        "recipe": "fast",
        "seed": 3,
        "command": "attire train --recipe fast --seed 3",
        "test": evaluation,
        "train": evaluation,
        "predictions": Predictions.of_test_set(labels, probabilities, images),
        "history": HISTORY,
        "seconds": {"extract": 3.0, "fit": 1.0, "total": 5.0},
        "config": {"boundary": "block3", "head": {"hidden": [512]}},
        "environment": {"python": "3.11"},
        "data": {"name": "Small"},
    }
    return RunResult(**(values | changes))
