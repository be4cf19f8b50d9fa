"""The claim of 98 % taken apart: what moves an accuracy that should stand still, by how much, and what is left.

    python research/claim.py seed-0 seed-1 seed-2 split-42 split-43 leak-10 leak-1000 break
    python research/claim.py wrong --run runs/1 --run runs/2       test images that all of these get wrong
    python research/claim.py noise --audit audit                   after: attire audit --run runs/1
    python research/claim.py others                                classifiers without VGG16
    python research/claim.py near                                  do held-out rows lie nearer than test rows?
    python research/claim.py --recipe frozen-best --epochs 30 curve-15000     trained on so many of the rows
    python research/claim_page.py                                  docs/claim.md and its pictures

Each part trains the recipe's classifier on cached features (--recipe, --epochs) and adds what it found to
research/claim.json. The test set chooses nothing here: it is the subject.
"""

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor, nn

from attire.data import dataset
from attire.data.dataset import FASHION_MNIST, ImageDataset, split_indices
from attire.data.loading import DataChoice, load_dataset
from attire.evaluation.metrics import _one_vs_rest_accuracy
from attire.features.sources import CachedSource
from attire.model import devices, heads
from attire.progress import NoProgress
from attire.recipes import Recipe, from_json, named
from attire.storage import files, memory
from attire.training import augment, checkpoints, loop, optimiser
from attire.training.experiment import Experiment
from attire.training.extraction import Extraction, SplitSources
from attire.training.head_training import _new_head
from attire.training.outcome import HeadEvaluator
from attire.training.sampler import epoch_order

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import measuring

OUT = Path(__file__).with_name("claim.json")
HELD_OUT = 12_000  # a fifth of the training file, as the claim's own protocol holds out
Rows = NDArray[np.int64]


class Joined:
    """Rows of the training features, then those of the test features, which have the plain view alone."""

    def __init__(self, first: CachedSource, second: CachedSource) -> None:
        self.first, self.second, self.standardise = first, second, first.standardise

    def batches(self, order: Rows, batch_size: int, views: dataset.ViewIndices | None) -> Iterator[Tensor]:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            numbers = None if views is None else views[start : start + batch_size]
            inside = rows < self.first.rows
            own = None if numbers is None else numbers[inside]
            parts = [(self.first, rows[inside], own, inside)]
            parts += [(self.second, rows[~inside] - self.first.rows, None, ~inside)]
            x = torch.empty(len(rows), self.first.views[0].shape[1])
            for source, wanted, view, mask in parts:
                if len(wanted):
                    x[torch.from_numpy(mask)] = next(iter(source.batches(wanted, len(wanted), view)))
            yield x


class Bench:
    """The official data with the recipe's cached features; validation rows are cut off as in every run."""

    def __init__(self, recipe: Recipe) -> None:
        self.experiment = Experiment.prepare(recipe, DataChoice(), devices.choose_device("cpu"), NoProgress())
        self.recipe = replace(recipe, precision=self.experiment.train_precision)
        memory.keep_freed_memory()
        trained, tested = Extraction(self.experiment, NoProgress()).sources()
        assert isinstance(trained, CachedSource)
        assert isinstance(tested, CachedSource)
        self.trained, self.tested = trained, tested
        self.labels, self.test_labels = self.experiment.splits.data.labels, self.experiment.splits.test_data.labels
        self.test = np.arange(len(self.test_labels))

    def head(self, recipe: Recipe) -> nn.Sequential:
        torch.manual_seed(recipe.seed)
        return _new_head(self.experiment, self.trained)

    def fit(
        self,
        recipe: Recipe,
        source: Any,
        labels: Rows,
        rows: Rows,
        each: Callable[[nn.Sequential], Any] | None = None,
    ) -> nn.Sequential:
        """The classifier, trained on these rows; `each` sees it after every epoch."""
        head = self.head(recipe)

        def report(state: checkpoints.TrainingState, done: int, total: int) -> None:
            if not done:
                print(f"epoch {state.epoch}: {each(head) if each else state.history[-1].train_loss}"[:200], flush=True)

        with tempfile.TemporaryDirectory(dir=files.cache_dir()) as folder:
            data = loop.TrainingData(source, labels, rows, rows[:0])
            loop.fit(head, data, recipe, Path(folder) / "run" / "checkpoints", report)
        return head

    def right(self, head: nn.Sequential, source: CachedSource, rows: Rows, labels: Rows) -> NDArray[np.bool_]:
        return np.asarray(self.answers(head, source, rows) == labels[rows])

    def right_tested(self, head: nn.Sequential) -> NDArray[np.bool_]:
        return self.right(head, self.tested, self.test, self.test_labels)

    def answers(self, head: nn.Sequential, source: CachedSource, rows: Rows) -> Rows:
        return np.asarray(
            HeadEvaluator(self.experiment, head, SplitSources(source, source)).logits(source, rows).argmax(1)
        )


def share(right: NDArray[np.bool_]) -> dict[str, int]:
    return {"correct": int(right.sum()), "n": len(right)}


def mistakes(answers: Rows, labels: Rows) -> dict[str, int]:
    """The answers that are wrong, by their rows."""
    return {str(row): int(answers[row]) for row in np.flatnonzero(answers != labels)}


def epochs(bench: Bench, seed: int) -> dict[str, Any]:
    """The protocol: every epoch's accuracy on training, validation and test rows; the last one's mistakes."""
    recipe = replace(bench.recipe, seed=seed)
    lines: list[dict[str, Any]] = []
    answers = np.empty(0, np.int64)

    def each(head: nn.Sequential) -> dict[str, Any]:
        nonlocal answers
        answers = bench.answers(head, bench.tested, bench.test)
        right = answers == bench.test_labels
        line = {"test": share(right), "one_vs_rest": _one_vs_rest_accuracy(int((~right).sum()), len(right), 10)}
        for name, rows in (("train", bench.experiment.train), ("val", bench.experiment.val)):
            line[name] = share(bench.right(head, bench.trained, rows, bench.labels)) if len(rows) else None
        lines.append(line)
        return line

    bench.fit(recipe, bench.trained, bench.labels, bench.experiment.train, each)
    return {"epochs": lines, "wrong": mistakes(answers, bench.test_labels)}


def split(bench: Bench, seed: int) -> dict[str, Any]:
    """The claim's own kind of test set: a random fifth of the training file; and the official one, same classifier."""
    rest, held = split_indices(bench.labels, HELD_OUT, seed, False, name=FASHION_MNIST)
    head = bench.fit(bench.recipe, bench.trained, bench.labels, rest)
    held_out = share(bench.right(head, bench.trained, held, bench.labels))
    return {"held_out": held_out, "test": share(bench.right_tested(head))}


def curve(bench: Bench, count: int) -> dict[str, Any]:
    """Trained on so many of the rows: what more images would bring."""
    head = bench.fit(bench.recipe, bench.trained, bench.labels, bench.experiment.train[:count])
    return {"test": share(bench.right_tested(head))}


def leak(bench: Bench, count: int) -> dict[str, Any]:
    """So many test images, with their labels, also among the training images: 10 as in the first release."""
    leaked = np.random.default_rng(0).choice(bench.test, count, replace=False)
    rows = np.concatenate([bench.experiment.train, len(bench.labels) + leaked])
    labels = np.concatenate([bench.labels, bench.test_labels])
    inside = np.isin(bench.test, leaked)
    head = bench.fit(bench.recipe, Joined(bench.trained, bench.tested), labels, rows)
    right = bench.right_tested(head)
    return {"test": share(right), "leaked": share(right[inside]), "others": share(right[~inside])}


def stray_break(bench: Bench) -> dict[str, Any]:
    """`break` at the end of a loop's body: only the first batch of each epoch trains; only the first one is scored."""
    recipe, head = bench.recipe, bench.head(bench.recipe)
    adam = optimiser.make_optimiser(head, recipe)
    steps = -(-len(bench.experiment.train) // recipe.batch_size)
    for epoch in range(recipe.epochs):
        heads.set_train_mode(head, False)
        rows = epoch_order(bench.experiment.train, recipe, epoch)[0][: recipe.batch_size]
        optimiser.set_learning_rate(adam, recipe, epoch * steps, steps)
        x = next(iter(bench.trained.batches(rows, len(rows), None)))
        target = augment.Target(torch.from_numpy(bench.labels[rows]))
        loop._train_step(head, adam, x, target, recipe)
    right = bench.right_tested(head)
    return {"steps": recipe.epochs, "instead_of": recipe.epochs * steps, "test": share(right)}


def wrong(recipe: str, runs: list[Path]) -> dict[str, Any]:
    """The official test rows that each of these runs gets wrong, by their own predictions; beside those kept before."""
    data = load_dataset(part="test")
    found = kept()["recipes"].get(recipe, {}).get("wrong", {})
    for run in runs:
        result = measuring.official_result(run, data.digest)
        epochs = from_json(result.config["recipe"]).epochs
        length = measuring.other_length(result.recipe, epochs)
        found[f"{result.recipe}{length}, seed {result.seed}"] = mistakes(result.predictions.predicted, data.labels)
    return found


def pixels(data: ImageDataset) -> NDArray[np.float32]:
    """(N, 784), 0 to 1."""
    return data.images.reshape(len(data), -1) / np.float32(255)


def others() -> dict[str, Any]:
    """The test rows that classifiers of other kinds get wrong, each fitted to the pixels of the 60,000 images."""
    train, test = load_dataset(part="train"), load_dataset(part="test")
    x, held = pixels(train), pixels(test)
    found = {"a small network": small_network(train, test)}
    fitted = {
        "support vectors": make_pipeline(StandardScaler(), PCA(80, random_state=0), SVC(C=10)),
        "boosted trees": HistGradientBoostingClassifier(max_iter=200, random_state=0),
        "nearest neighbours": KNeighborsClassifier(5, weights="distance"),
    }
    for name, model in fitted.items():
        found[name] = model.fit(x, train.labels).predict(held)
    return {name: mistakes(answers, test.labels) for name, answers in found.items()}


def near() -> dict[str, Any]:
    """How far rows of split 42 and official test rows lie from the nearest of the others, by pixels of 0 to 1."""
    train, test = load_dataset(part="train"), load_dataset(part="test")
    rest, held = split_indices(train.labels, HELD_OUT, 42, False, name=FASHION_MNIST)
    x = pixels(train)
    nearest = KNeighborsClassifier(1, algorithm="brute").fit(x[rest], train.labels[rest])
    found: dict[str, Any] = {"n": len(rest)}
    for name, rows, labels in (("held_out", x[held], train.labels[held]), ("test", pixels(test), test.labels)):
        far, which = nearest.kneighbors(rows)
        right = train.labels[rest][which[:, 0]] == labels
        found[name] = {"distance": float(far.mean()), "error": float(far.std() / len(far) ** 0.5), **share(right)}
    return found


def small_network(train: ImageDataset, test: ImageDataset, epochs: int = 8) -> Rows:
    """Answers of a network of four convolutions on the pixels, from scratch: Adam, one cycle, mirrored at random."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for given, width, pool in ((1, 32, False), (32, 32, True), (32, 64, False), (64, 64, True)):
        layers += [nn.Conv2d(given, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
    net = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(64 * 49, 256), nn.ReLU(), nn.Linear(256, 10))
    net = net.to(memory_format=torch.channels_last)
    x, held = (torch.from_numpy(data.images)[:, None].float() / 255 for data in (train, test))
    y, batch = torch.from_numpy(train.labels), 256
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    steps = -(-len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, epochs * steps)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(x)), batch):
            given = torch.where(torch.rand(len(rows), 1, 1, 1) < 0.5, x[rows].flip(3), x[rows])
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(nn.functional.cross_entropy(net(given), y[rows], label_smoothing=0.05))
            optimiser.step()
            schedule.step()
    net.eval()
    with torch.inference_mode():
        return torch.cat([net(part).argmax(1) for part in held.split(1000)]).numpy()


def noise(audit: Path) -> dict[str, Any]:
    """The test rows whose label `attire audit` finds suspect."""
    with (audit / "suspects.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["part"] == "test"]
    rows = sorted(int(line["row"]) for line in lines)
    return {"suspects": rows, "n": len(load_dataset(part="test"))}


def kept() -> dict[str, Any]:
    return files.read_json(OUT) if OUT.exists() else {"schema": 1, "recipes": {}}


def keep(recipe: str, name: str, value: Any) -> None:
    """Put it into the file, with the command that found it: with each that added to it, if it is `wrong`."""
    found = kept()
    mine = found["recipes"].setdefault(recipe, {})
    mine[name] = value
    commands = mine.setdefault("commands", {})
    earlier = commands[name].split(" && ") if name == "wrong" and name in commands else []
    commands[name] = " && ".join(dict.fromkeys([*earlier, measuring.command()]))
    files.write_json(OUT, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = "seed-N, split-N, leak-N, curve-N, break, wrong, noise, others, near"
    parser.add_argument("parts", nargs="+", help=kinds)
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--backend", default="torch", help="of the frozen backbone: that whose features are cached")
    parser.add_argument("--run", type=Path, action="append", default=[], help="for wrong: a run's folder")
    parser.add_argument("--audit", type=Path, help="for noise: the folder that `attire audit` wrote")
    given = parser.parse_args()
    recipe = named(given.recipe)
    recipe = replace(recipe, epochs=given.epochs or recipe.epochs, backend=given.backend)
    apart: dict[str, Callable[[], dict[str, Any]]] = {
        "wrong": lambda: wrong(given.recipe, given.run),
        "noise": lambda: noise(given.audit),
        "others": others,
        "near": near,
    }
    bench: Bench | None = None
    for part in given.parts:
        kind, _, number = part.partition("-")
        if kind in apart:
            keep(given.recipe, kind, apart[kind]())
            continue
        bench, began = bench or Bench(recipe), time.perf_counter()
        known = {"seed": epochs, "split": split, "leak": leak, "curve": curve}
        found = stray_break(bench) if kind == "break" else known[kind](bench, int(number))
        told = {
            "epochs_trained": recipe.epochs,
            "backend": recipe.backend,
            "seconds": round(time.perf_counter() - began, 1),
        }
        keep(given.recipe, part, {**found, "environment": measuring.environment(), **told})


if __name__ == "__main__":
    main()
