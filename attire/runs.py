"""`train`: from labelled images to a run folder that holds a bundle, an evaluation and a report."""

import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import nn

from attire import calibration, devices, features, fetch, files, recipes, results, training, vgg
from attire.card import write_model_card
from attire.classifier import Architecture, Classifier, fold_standardisation, load_bundle
from attire.data import OFFICIAL, ImageDataset, Part, Splits, load_dataset, load_splits, split_indices
from attire.errors import AttireError, one_line
from attire.evaluation import Evaluation, Interval, evaluate
from attire.features import FeatureSpec
from attire.recipes import Recipe
from attire.report import write_report
from attire.sources import CachedSource, OnTheFlySource, Standardiser, measure
from attire.weights import read_weights, tensor_digest

BOUNDS = ("accuracy_low", "accuracy_high")


class Watcher(Protocol):
    """Who is told how a run goes: the terminal's bars, or nobody."""

    def note(self, name: str, text: str) -> None:
        """A stage is settled: `Data`, `Weights`, `Recipe` ..."""

    def advance(self, stage: str, done: int, total: int, text: str = "") -> None:
        """`done` of `total` rows of a stage."""

    def epoch(self, line: training.Epoch) -> None:
        """An epoch is over."""

    def close(self) -> None:
        """Nothing further is shown."""


class Silent:
    """Nobody watches."""

    def note(self, name: str, text: str) -> None: ...

    def advance(self, stage: str, done: int, total: int, text: str = "") -> None: ...

    def epoch(self, line: training.Epoch) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class DataChoice:
    """Where the images come from, in words that can be written to `config.json` and given back."""

    data: str | None = None  # None: the official set
    test: str | None = None
    test_size: float | int = 0.2
    classes: tuple[str, ...] | None = None

    def load(self, recipe: Recipe) -> Splits:
        return load_splits(
            self.data,
            test=self.test,
            test_size=self.test_size,
            seed=recipe.split_seed,
            stratify=recipe.stratify,
            classes=self.classes,
        )


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, what it found, and the bundle that ships."""

    folder: Path
    result: results.RunResult

    @property
    def bundle(self) -> Path:
        return self.folder / "model"

    @property
    def accuracy(self) -> Interval:
        return self.result.test.accuracy

    def load(self) -> Classifier:
        return load_bundle(self.bundle)


def train(
    data: str | Path | None = None,
    recipe: str | Recipe = "fast",
    *,
    test: str | Path | None = None,
    test_size: float | int = 0.2,
    classes: Sequence[str] | None = None,
    run_dir: str | Path | None = None,
    seed: int | None = None,
    device: str = "auto",
    cache: bool = True,
    claimed: float = 0.98,
    watcher: Watcher | None = None,
) -> Run:
    """Train a classifier and evaluate it once on the test set.

    data: None for the official set, else a CSV, an IDX file or a folder; run_dir: a new or empty folder, `runs/1`,
    `runs/2` ... when left out. Raises AttireError for bad data, Stopped when it was interrupted: then
    `resume(run_dir)` goes on exactly where it stood.
    """
    chosen = recipes.named(recipe) if isinstance(recipe, str) else recipe
    chosen = chosen if seed is None else replace(chosen, seed=seed)
    paths = [None if path is None else str(path) for path in (data, test)]
    source = DataChoice(paths[0], paths[1], test_size, None if classes is None else tuple(classes))
    devices.choose_device(device)
    folder = new_folder(run_dir)
    config = {
        "schema": 1,
        "recipe": chosen.to_json(),
        "data": asdict(source),
        "device": device,
        "cache": cache,
        "claimed": claimed,
    }
    with claimed_folder(folder):
        files.write_json(folder / "config.json", config)
        return carry_out(folder, chosen, source, device, cache, claimed, watcher or Silent())


def resume(run_dir: str | Path, watcher: Watcher | None = None) -> Run:
    """Go on with a run that was stopped, from its own `config.json` and newest checkpoint."""
    folder = Path(run_dir)
    if not (folder / "config.json").exists():
        raise AttireError(folder, "no run to resume: it holds no config.json", do="start one with: attire train")
    config = files.read_json(folder / "config.json")
    try:
        recipe = recipes.from_json(config["recipe"], str(folder / "config.json"))
        values = dict(config["data"])
        source = DataChoice(**{**values, "classes": tuple(values["classes"]) if values["classes"] else None})
        device, cache, claimed = config["device"], config["cache"], config["claimed"]
    except (KeyError, TypeError) as error:
        raise AttireError(folder / "config.json", "not the config of a run", str(error)[:80]) from error
    with claimed_folder(folder):
        return carry_out(folder, recipe, source, device, cache, claimed, watcher or Silent())


def new_folder(run_dir: str | Path | None) -> Path:
    if run_dir is None:
        taken = [int(path.name) for path in Path("runs").glob("*") if path.name.isdigit()]
        return files.make_dir(Path("runs") / str(max(taken, default=0) + 1))
    folder = Path(run_dir)
    if folder.exists() and not folder.is_dir():
        raise AttireError(folder, "expected a folder, found a file", do="give --out another name")
    if folder.is_dir() and any(folder.iterdir()):
        do = f"give --out another name, or go on with: attire train --resume {shlex.quote(str(folder))}"
        raise AttireError(folder, "the folder is not empty", do=do)
    return files.make_dir(folder)


@contextmanager
def claimed_folder(folder: Path) -> Iterator[None]:
    """One process a run folder: a second one is refused at once, and told who holds it."""
    held = folder / ".lock"
    try:
        with files.lock(held, wait=0.5):
            files.write_text(folder / ".pid", f"{os.getpid()}\n")
            yield
            (folder / ".pid").unlink(missing_ok=True)
    except TimeoutError as error:
        pid = (folder / ".pid").read_text().strip() if (folder / ".pid").exists() else "unknown"
        raise AttireError(folder, f"another attire (process {pid}) is training into it") from error


def carry_out(
    folder: Path, recipe: Recipe, source: DataChoice, device: str, cache: bool, claimed: float, watcher: Watcher
) -> Run:
    """The stages, in order. Each leaves on disk what the next start of the same run will not do again."""
    began = time.perf_counter()
    stage = Stage(recipe, source, devices.choose_device(device), watcher)
    devices.keep_freed_memory()  # from here on: what reading a CSV took goes back to the system
    files.write_json(folder / "data.json", stage.describe_data())
    files.write_json(folder / "environment.json", stage.environment())
    sources = stage.cached() if cache else stage.on_the_fly()
    extracted = time.perf_counter() - began
    head, history = stage.fit(sources[0], folder)
    found = stage.evaluate(head, sources)
    seconds = {"extract": extracted, "fit": sum(epoch.seconds for epoch in history)}
    seconds["total"] = time.perf_counter() - began
    result = stage.result(folder, found, history, seconds, claimed)
    stage.save(folder, head, sources[0].standardise, found.temperature, result)
    watcher.close()
    return Run(folder, result)


@dataclass(frozen=True)
class Found:
    """What the trained head says of each set; test probabilities (n, K) are calibrated with `temperature`."""

    temperature: float
    test: Evaluation
    train: Evaluation
    val: Evaluation | None
    probabilities: NDArray[np.float64]


Source = CachedSource | OnTheFlySource
Sources = tuple[Source, Source]  # of the training data and of the test data; one and the same after a split


class Stage:
    """What the stages of one run share: recipe, rows, weights, device."""

    def __init__(self, recipe: Recipe, source: DataChoice, device: torch.device, watcher: Watcher) -> None:
        self.recipe, self.device, self.watcher = recipe, device, watcher
        self.splits = source.load(recipe)
        watcher.note("Data", describe_data(self.splits))
        self.train, self.val = validation_rows(self.splits, recipe)
        self.weights = fetch.vgg16_weights(progress=watcher.advance)
        watcher.note("Weights", "VGG16 ImageNet, 13 convolutions   verified")
        watcher.note("Recipe", recipe.describe())
        widths = (recipe.freeze_to, recipe.image_size, recipe.pool)
        self.architecture = Architecture(*widths, recipe.hidden, recipe.dropout)
        int8 = recipe.backend != "torch"
        precision = "int8" if int8 else devices.choose_precision(recipe.precision, device)
        self.digest = tensor_digest(read_weights(self.weights))
        self.spec = FeatureSpec(*widths, self.digest, precision, backend=recipe.backend)

    def describe_data(self) -> dict[str, Any]:
        rows = {"train": len(self.train), "val": len(self.val), "test": len(self.splits.test_rows)}
        name = self.splits.data.source
        return {"name": "Fashion-MNIST" if name == OFFICIAL else name, "rows": rows, **self.splits.describe()}

    def environment(self) -> dict[str, Any]:
        return {**devices.environment(self.device), "precision": self.spec.precision, "backend": self.spec.backend}

    def model(self, classifier: nn.Sequential) -> torchvision.models.VGG:
        return vgg.vgg16(self.weights, self.recipe.freeze_to, self.recipe.pool, classifier)

    def load_trunk(self) -> features.Trunk:
        """The frozen part alone, on the device and in the precision of the run."""
        return open_trunk(self.model(nn.Sequential()), self.spec, self.device)

    def extract(self, data: ImageDataset, view: str, what: str) -> features.Features:
        def progress(done: int, total: int) -> None:
            self.watcher.advance(f"Features  {what}", done, total)

        return features.extract(
            data.images, data.image_digest, replace(self.spec, view=view), self.load_trunk, progress
        )

    def cached(self) -> Sources:
        """Features of every row, extracted once; the mirrored view for the training data only."""
        data, test = self.splits.data, self.splits.test_data
        plain = self.extract(data, "plain", "train" if test is not data else "all")
        mirrored = self.extract(data, "flip", "train, mirrored") if self.recipe.flips else None
        trained = CachedSource(plain, mirrored)
        if self.recipe.standardise:
            trained.standardise = measure(
                torch.from_numpy(plain.gather(rows)) for rows in np.array_split(self.train, blocks_of(len(self.train)))
            )
        if test is data:
            return trained, trained
        tested = CachedSource(self.extract(test, "plain", "test"))
        tested.standardise = trained.standardise
        return trained, tested

    def on_the_fly(self) -> Sources:
        """No cache: every epoch sends every picture through the trunk again."""
        trunk, size = self.load_trunk(), self.recipe.image_size

        def source(data: ImageDataset) -> OnTheFlySource:
            return OnTheFlySource(vgg.GarmentDataset(data.images, data.labels, size), trunk, features.batch_rows(size))

        trained = source(self.splits.data)
        if self.recipe.standardise:
            trained.standardise = measure(trained.batches(self.train, 2048, None))
        tested = trained if self.splits.test_data is self.splits.data else source(self.splits.test_data)
        tested.standardise = trained.standardise
        return trained, tested

    def fit(self, source: Source, folder: Path) -> tuple[nn.Sequential, list[training.Epoch]]:
        """A new classifier from the seed, trained; the global random state is left as it was."""
        labels = self.splits.data.labels
        with torch.random.fork_rng(devices=[0] if self.device.type == "cuda" else []):
            torch.manual_seed(self.recipe.seed)
            head = self.architecture.build(len(self.splits.data.classes)).to(self.device)
            checkpoints = folder / "checkpoints"
            rows = (self.train, self.val)
            history = training.fit(head, source, labels, *rows, self.recipe, checkpoints, self.report_epoch)
        return head, history

    def report_epoch(self, state: training.State, done: int, total: int) -> None:
        epochs = self.recipe.epochs
        text = f"epoch {min(state.epoch + 1, epochs)}/{epochs}"
        if state.history:
            last = state.history[-1]
            text += f"  loss {last.train_loss:.4f}"
            text += f"  val {100 * last.val_accuracy:.1f} %" if last.val_accuracy is not None else ""
        self.watcher.advance("Training", state.epoch * total + done, epochs * total, text)
        if not done:
            self.watcher.epoch(state.history[-1])

    def evaluate(self, head: nn.Sequential, sources: Sources) -> Found:
        """The test set is read here, once, by the weights that training ended with."""
        labels, classes = self.splits.data.labels, self.splits.data.classes

        def logits(source: Source, rows: training.Rows) -> NDArray[np.float32]:
            return np.asarray(training.predict_logits(head, source, rows).numpy())

        temperature, val = 1.0, None
        if len(self.val):
            val_logits = logits(sources[0], self.val)
            temperature = calibration.fit_temperature(val_logits, labels[self.val])
            val = evaluate(calibration.softmax(val_logits, temperature), labels[self.val], classes)
        trained = calibration.softmax(logits(sources[0], self.train), temperature)
        tested = calibration.softmax(logits(sources[1], self.splits.test_rows), temperature)
        test_labels = self.splits.test_data.labels[self.splits.test_rows]
        return Found(
            temperature,
            test=evaluate(tested, test_labels, classes),
            train=evaluate(trained, labels[self.train], classes),
            val=val,
            probabilities=tested,
        )

    def result(
        self, folder: Path, found: Found, history: list[training.Epoch], seconds: dict[str, float], claimed: float
    ) -> results.RunResult:
        test = self.splits.test
        return results.RunResult(
            title=f"Attire {self.recipe.name} on {self.describe_data()['name']}",
            recipe=self.recipe.name,
            seed=self.recipe.seed,
            command=f"attire train --config {shlex.quote(str(folder / 'config.json'))}",
            test=found.test,
            train=found.train,
            val=found.val,
            predictions=results.predictions(test.labels, found.probabilities, test.images),
            history=[asdict(epoch) for epoch in history],
            seconds=seconds,
            config=files.read_json(folder / "config.json"),
            environment=self.environment(),
            data=self.describe_data(),
            claimed=claimed,
        )

    def save(
        self, folder: Path, head: nn.Sequential, scaled: Standardiser, temperature: float, result: results.RunResult
    ) -> None:
        """Report and bundle. The trunk that ships is read afresh from the verified weights: frozen means the same."""
        if scaled.mean is not None and scaled.scale is not None:
            fold_standardisation(head, scaled.mean, scaled.scale)
        facts = {
            "name": result.title,
            "recipe": self.recipe.to_json(),
            "test": {key: result.test.to_json()[key] for key in ("n", "correct", "accuracy", *BOUNDS)},
            "test_digest": self.splits.test_data.image_digest,
            "trunk": self.digest,
        }
        results.save_result(folder, result)
        write_report(folder, result)
        model = self.model(head.cpu())
        Classifier(model, self.architecture, self.splits.data.classes, temperature, facts).save(folder / "model")
        write_model_card(folder / "model", result)


def evaluate_bundle(
    bundle: str | Path,
    data: str | Path | None = None,
    part: Part = "test",
    classes: Sequence[str] | None = None,
    backend: str = "torch",
    device: str = "auto",
    watcher: Watcher | None = None,
) -> results.RunResult:
    """Measure a bundle on labelled images, the features taken from the cache where it has them.

    data: as for `train`; None is the official set, of which `part` is read. Raises AttireError where the data's
    classes are not the bundle's.
    """
    began = time.perf_counter()
    classifier = load_bundle(bundle, device)
    labelled = load_dataset(data, part=part, classes=classes or (classifier.classes if data else None))
    devices.keep_freed_memory()
    if labelled.classes != classifier.classes:
        raise AttireError(labelled.source, f"its classes are not the bundle's ({', '.join(classifier.classes)})")
    source = CachedSource(bundle_features(classifier, labelled, backend, watcher or Silent()))
    head = cast(nn.Sequential, classifier.model.classifier)
    logits = training.predict_logits(head, source, np.arange(len(labelled))).numpy()
    probabilities = calibration.softmax(logits, classifier.temperature)
    recipe = classifier.facts.get("recipe", {})
    where = None if data is None else str(data)
    choice = {"data": where, "part": part, "classes": None if classes is None else list(classes)}
    return results.RunResult(
        title=f"{classifier.facts.get('name', 'bundle')}, measured on {labelled.source}",
        recipe=str(recipe.get("name", "unknown")),
        seed=int(recipe.get("seed", 0)),
        command=f"attire evaluate {shlex.quote(str(bundle))}" + (f" --data {shlex.quote(where)}" if where else ""),
        test=evaluate(probabilities, labelled.labels, labelled.classes),
        predictions=results.predictions(labelled.labels, probabilities, labelled.images),
        seconds={"total": time.perf_counter() - began},
        config={"schema": 1, "bundle": str(bundle), "backend": backend, "data": choice},
        environment={**devices.environment(classifier.device), "backend": backend},
        data={"name": labelled.source, "rows": {"test": len(labelled)}, "test": labelled.describe()},
    )


def bundle_features(classifier: Classifier, data: ImageDataset, backend: str, watcher: Watcher) -> features.Features:
    """Features of all images by the bundle's own trunk."""
    about, model = classifier.architecture, classifier.model
    tensors = {name: value.float().cpu().numpy() for name, value in model.features.state_dict().items()}
    whole = {f"features.{name}": value for name, value in tensors.items()}
    digest = classifier.facts.get("trunk", "") or files.sha256(b"".join(v.tobytes() for v in whole.values()))
    precision = devices.choose_precision("auto", classifier.device) if backend == "torch" else "int8"
    spec = FeatureSpec(about.freeze_to, about.image_size, about.pool, digest, precision, backend=backend)

    def load_trunk() -> features.Trunk:
        return open_trunk(model, spec, classifier.device)

    def progress(done: int, total: int) -> None:
        watcher.advance("Features", done, total)

    return features.extract(data.images, data.image_digest, spec, load_trunk, progress)


def open_trunk(model: torchvision.models.VGG, spec: FeatureSpec, device: torch.device) -> features.Trunk:
    """The frozen part of a model as the function that extraction calls, on the backend that the spec names."""
    if spec.backend == "torch":
        return vgg.Trunk(model, device, spec.precision)
    from attire.quantised import CALIBRATION_IMAGES, Int8Trunk  # an optional extra, imported only where it is used

    name = f"{spec.freeze_to}-{spec.image_size}-{spec.pool}-{spec.weights[:8]}"
    images = load_dataset().images[:CALIBRATION_IMAGES]
    return Int8Trunk(vgg.Trunk(model, torch.device("cpu"), "fp32"), name, spec.image_size, images)


def validation_rows(splits: Splits, recipe: Recipe) -> tuple[training.Rows, training.Rows]:
    """The training rows, and the rows cut from them for validation: as many as the recipe says, at most a tenth.

    A tenth of a small set may be too few for a row of each class: then that many, where the split is stratified.
    """
    if not recipe.val_size:
        return splits.train_rows, np.empty(0, np.int64)
    labels = splits.data.labels[splits.train_rows]
    least = len(np.unique(labels)) if recipe.stratify else 1
    count = min(recipe.val_size, max(least, len(labels) // 10))
    rest, part = split_indices(labels, count, recipe.split_seed, recipe.stratify, name=splits.data.source)
    return splits.train_rows[rest], splits.train_rows[part]


def describe_data(splits: Splits) -> str:
    name = splits.data.source
    name = "Fashion-MNIST" if name == OFFICIAL else one_line(name)
    return f"{name}, {len(splits.train_rows):,} + {len(splits.test_rows):,} images   verified"


def blocks_of(rows: int) -> int:
    return -(-rows // 2048)
