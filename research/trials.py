"""A recipe's variants on validation rows: how settings are chosen. The test set is not read.

    python research/trials.py fast "hidden=(1024,)" "batch_size=512 lr=2e-3"
    python research/trials.py best --rows 30000 --rest "epochs=8" "epochs=8 image_size=48"

Each variant is a line of changes to the recipe's fields. It is trained from cached features on the rows that
`attire train` trains on (--rows: the first so many of them) and scored on its validation rows, with --rest also on
those of the training rows that it did not see, so that smaller differences show: one view, then the mean over the views
that the variant averages, or over both the plain and the mirrored one. Each further variant is also compared with the
first one of its seed, on the same rows.
"""

import argparse
import ast
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attire import progress, recipes
from attire.data.loading import DataChoice
from attire.evaluation.intervals import wilson
from attire.features import logits as features_logits
from attire.features import views as features_views
from attire.model import devices
from attire.progress import NoProgress
from attire.recipes import Recipe
from attire.storage import files, memory
from attire.training.experiment import Experiment
from attire.training.extraction import Extraction
from attire.training.head_training import train_head

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import measuring


class Progress(NoProgress):
    """A line for each epoch."""

    def epoch(self, epoch: progress.Epoch) -> None:
        told = f"loss {epoch.train_loss:.4f}  val {100 * (epoch.val_accuracy or 0):.2f} %  {epoch.seconds:.0f} s"
        print(f"    epoch {epoch.epoch:3}  {told}", flush=True)


def changed(recipe: Recipe, text: str) -> Recipe:
    pairs = (part.split("=", 1) for part in text.split())
    changes = {name: ast.literal_eval(value) if value[0] not in "bcfnt" else value for name, value in pairs}
    return recipes.from_json({**recipe.to_json(), **changes})


def trial(recipe: Recipe, rows: int | None, rest: bool) -> NDArray[np.bool_]:
    """Train it and print what it reads; which of the scored rows it names rightly, its views averaged."""
    experiment = Experiment.prepare(recipe, DataChoice(), devices.choose_device("cpu"), Progress())
    memory.keep_freed_memory()
    unseen = experiment.train[rows:] if rest and rows else experiment.train[:0]
    scored = np.concatenate([experiment.val, unseen])
    experiment = replace(experiment, train=experiment.train[:rows])
    extraction = Extraction(experiment, Progress())
    source = extraction.train_source()
    source.standardise = extraction.fit_standardiser(source)
    began, busy = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(dir=files.cache_dir()) as folder:
        head, _ = train_head(experiment, source, Path(folder) / "run", Progress())
    took, cpu = time.perf_counter() - began, time.process_time() - busy
    labels, told = experiment.splits.data.labels[scored], []
    shown = [("one view", [0])]
    for count in sorted({recipe.tta, 2 if recipe.flips else 1} - {1}):
        names = features_views.tta_views(count)
        if set(names) <= set(source.names):
            shown.append((f"{count} views", [source.names.index(name) for name in names]))
    for what, views in shown:
        logits = features_logits.predict_logits(head, source, scored, 1024, views).numpy()
        correct = np.asarray(logits.argmax(1) == labels)
        right, n = int(correct.sum()), len(labels)
        told.append(f"{what} {100 * right / n:.2f} % ({wilson(right, n).span()}, n = {n:,})")
    print(f"  {', '.join(told)}; {took:.0f} s, {cpu:.0f} s of processor time", flush=True)
    return correct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=sorted(recipes.RECIPES))
    parser.add_argument("changes", nargs="*", default=[""])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rest", action="store_true")
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_intermixed_args()
    print(measuring.environment())
    first: dict[int, NDArray[np.bool_]] = {}
    for text in given.changes:
        for seed in range(given.seeds):
            recipe = replace(changed(recipes.named(given.recipe), text), seed=seed)
            print(f"{given.recipe} {text or 'as it is'}, seed {seed}", flush=True)
            correct = trial(recipe, given.rows, given.rest)
            if (other := first.setdefault(seed, correct)) is not correct:
                print(f"  against the first: {measuring.gained(other, correct)}", flush=True)


if __name__ == "__main__":
    main()
