"""`train`: from labelled images to a run folder that holds a bundle, an evaluation and a report."""

import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from torch import nn

from attire import calibration, devices, features, files, recipes, results, training
from attire.classifier import Classifier, load_bundle
from attire.data import ImageDataset, Part, load_dataset
from attire.errors import AttireError, Stopped, UsageError
from attire.evaluation import Interval, evaluate
from attire.features import FeatureSpec
from attire.recipes import BACKENDS, Recipe
from attire.sources import CachedSource
from attire.stages import DataChoice, Stage, open_trunk
from attire.watching import Silent, Watcher


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
    log: str | None = None,
    watcher: Watcher | None = None,
) -> Run:
    """Train a classifier and evaluate it once on the test set.

    data: None for the official set, else a CSV, an IDX file or a folder; run_dir: a new or empty folder, `runs/1`,
    `runs/2` ... when left out; log: "tensorboard" also writes the curves into `<run_dir>/tensorboard` (an extra).
    Raises AttireError for bad data, Stopped when it was interrupted: then
    `resume(run_dir)` goes on exactly where it stood.
    """
    chosen = recipes.named(recipe) if isinstance(recipe, str) else recipe
    chosen = chosen if seed is None else replace(chosen, seed=seed)
    paths = [None if path is None else str(path) for path in (data, test)]
    source = DataChoice(paths[0], paths[1], test_size, None if classes is None else tuple(classes))
    devices.choose_device(device)
    config = {
        "schema": 1,
        "recipe": chosen.to_json(),
        "data": asdict(source),
        "device": device,
        "cache": cache,
        "claimed": claimed,
        "log": log,
    }
    with new_folder(run_dir) as folder:
        files.write_json(folder / "config.json", config)
        with logging(log, folder, watcher or Silent()) as watching:
            return carry_out(folder, chosen, source, device, cache, claimed, watching)


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
    with claimed_folder(folder), logging(config.get("log"), folder, watcher or Silent()) as watching:
        return carry_out(folder, recipe, source, device, cache, claimed, watching)


@contextmanager
def new_folder(run_dir: str | Path | None) -> Iterator[Path]:
    """A new run folder, held. What fails before there is a checkpoint leaves no folder that was not there before."""
    folder = free_folder(run_dir)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        files.make_dir(folder)
        with claimed_folder(folder):
            try:
                yield folder
            except Exception:
                if not any(folder.rglob("*.ckpt")):
                    clear(folder)
                raise
    finally:
        for path in missing:
            with suppress(OSError):  # it is not empty: the run is there
                path.rmdir()


def free_folder(run_dir: str | Path | None) -> Path:
    """A folder that may be written into, not made yet; the next of `runs/1`, `runs/2` ... for None."""
    if run_dir is None:
        taken = [int(path.name) for path in Path("runs").glob("*") if path.name.isdigit()]
        return Path("runs") / str(max(taken, default=0) + 1)
    folder = Path(run_dir)
    if folder.exists() and not folder.is_dir():
        raise AttireError(folder, "expected a folder, found a file", do="give --out another name")
    if folder.is_dir() and any(folder.iterdir()):
        do = "give --out another name"
        if any((folder / name).exists() for name in ("checkpoints", "series.json")):
            do += f", or go on with: attire train --resume {shlex.quote(str(folder))}"
        raise AttireError(folder, "the folder is not empty", do=do)
    return folder


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def claimed_folder(folder: Path) -> Iterator[None]:
    """One process a run folder: a second one is refused at once, and told who holds it.

    Ctrl-C becomes `Stopped`, and its subject this folder: of a series stopped in one of its runs, the series.
    """
    pid = folder / ".pid"
    with ExitStack() as held:
        try:
            held.enter_context(files.lock(folder / ".lock", wait=0.5))
        except TimeoutError as error:
            holder = pid.read_text().strip() if pid.exists() else "unknown"
            raise AttireError(folder, f"another attire (process {holder}) is training into it") from error
        files.write_text(pid, f"{os.getpid()}\n")
        try:
            yield
        except Stopped as stop:
            raise Stopped(folder, stop.what) from None
        except KeyboardInterrupt:
            raise Stopped(folder, "stopped, what was finished is kept") from None
        finally:
            pid.unlink(missing_ok=True)


@contextmanager
def logging(log: str | None, folder: Path, watcher: Watcher) -> Iterator[Watcher]:
    """`watcher`, or one that also writes TensorBoard's files."""
    if log is None:
        yield watcher
        return
    if log != "tensorboard":
        raise UsageError("--log", f"expected tensorboard, found {log!r}")
    from attire.board import Board  # an optional extra, imported only where it is used

    board = Board(watcher, folder / "tensorboard")
    try:
        yield board
    finally:
        board.writer.close()


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
    stage.save(folder, head, sources[0].standardise, found, result)
    watcher.tested(result.test.accuracy, len(history))
    watcher.close()
    return Run(folder, result)


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
    if backend not in BACKENDS:
        raise UsageError("--backend", f"expected {' or '.join(BACKENDS)}, found {backend!r}")
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
