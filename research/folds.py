"""What cross-validation and a grid cost in scikit-learn when no image goes through VGG16 twice.

    python research/folds.py              3 rounds of 2,000 training images, a cache of its own; minutes on 2 cores

Each round takes images that were not used before: five folds with nothing cached, the same five again, then a grid of
four settings over five folds. Counted are the pictures that went through the frozen part, mirrored ones included.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
from sklearn.model_selection import GridSearchCV, cross_val_score

from attire import VGGClassifier, load_dataset
from attire.model import devices, vgg

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from measuring import scratch_cache, spread, told

GRID = {"lr": [1e-3, 3e-3], "hidden": [(128,), (512,)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2000)
    options = parser.parse_args()
    passed: list[int] = []
    forward = vgg.Backbone.forward

    def counted(self: vgg.Backbone, x: torch.Tensor) -> torch.Tensor:
        passed.append(len(x))
        return forward(self, x)

    lines: dict[str, list[tuple[float, int, float]]] = {}
    with scratch_cache():
        data = load_dataset()
        VGGClassifier(epochs=1).fit(data.images[-200:], data.labels[-200:])  # what is measured once on a machine
        vgg.Backbone.forward = counted  # type: ignore[method-assign]
        for i in range(options.rounds):
            rows = slice(i * options.rows, (i + 1) * options.rows)
            images, labels = data.images[rows], data.labels[rows]
            folds = partial(cross_val_score, VGGClassifier(), images, labels)
            grid = partial(GridSearchCV(VGGClassifier(), GRID).fit, images, labels)
            for name, work in {"five folds": folds, "the same again": folds, "a grid of four": grid}.items():
                passed.clear()
                began = time.perf_counter()
                found = work()
                spent = time.perf_counter() - began
                score = found.best_score_ if work is grid else found.mean()
                lines.setdefault(name, []).append((spent, sum(passed), score))
    about = devices.environment(devices.choose_device())
    print(f"{about['processor']}, {about['cores']} cores, torch {about['torch']}; {options.rows:,} images a round")
    for name, values in lines.items():
        pictures = ", ".join(f"{count:,}" for _, count, _ in values)
        scores = ", ".join(f"{100 * score:.1f}" for *_, score in values)
        print(
            f"{name:16} {told(spread([spent for spent, *_ in values]))} s   pictures {pictures}   accuracy {scores} %"
        )


if __name__ == "__main__":
    main()
