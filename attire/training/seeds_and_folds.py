"""Several trainings from one cache: `--seeds`, how far chance moves the accuracy; `--folds`, cross-validation."""

import io
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attire import recipes
from attire.data import dataset
from attire.data.loading import DataChoice
from attire.errors import AttireError, UsageError
from attire.evaluation import calibration, run_result
from attire.evaluation.metrics import evaluate
from attire.evaluation.report import write_report
from attire.evaluation.run_result import RunResult, load_result, save_result
from attire.features.sources import CachedSource
from attire.model import devices, distributed
from attire.progress import Epoch, NoProgress, Progress
from attire.recipes import Recipe
from attire.storage import files, memory
from attire.training import distillation
from attire.training.experiment import Experiment, validation_rows
from attire.training.run import claimed_folder, new_folder, resume, train


@dataclass(frozen=True)
class Seeds:
    """The same recipe from several seeds. `deviation` is the sample's standard deviation over seeds."""

    folder: Path
    runs: tuple[Path, ...]
    results: tuple[RunResult, ...]

    @property
    def accuracies(self) -> list[float]:
        return [result.test.accuracy.value for result in self.results]

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.accuracies)

    def __str__(self) -> str:
        spread = f"{100 * self.mean:.2f} % +- {100 * self.deviation:.2f}"
        n = self.results[0].test.n
        return f"{spread} (mean and standard deviation of {len(self.results)} seeds, n = {n:,} each)"

    def to_json(self) -> dict[str, Any]:
        rows = [
            {"run": str(run), "seed": r.seed, **r.test.to_json()}
            for run, r in zip(self.runs, self.results, strict=True)
        ]
        return {"schema": 1, "kind": "seeds", "mean": self.mean, "deviation": self.deviation, "runs": rows}


@dataclass(frozen=True)
class Folds:
    """A finished cross-validation: its folder, and every training row scored out of fold."""

    folder: Path
    result: RunResult


def train_seeds(count: int, recipe: Recipe, *, run_dir: str | Path | None = None, **arguments: Any) -> Seeds:
    """Train `count` runs that differ in their seed alone, counting up from the recipe's: `<run_dir>/seed-0` ...

    arguments: those of `runs.train`. Features are extracted once. A series that was stopped goes on with
    `resume_series(run_dir)`.
    """
    devices.choose_device(arguments.get("device", "auto"))
    if count < 2:
        raise UsageError("--seeds", f"expected 2 or more, found {count}")
    progress = arguments.pop("progress", None)
    about = {"schema": 1, "kind": "seeds", "count": count, "recipe": recipe.to_json(), "arguments": _plain(arguments)}
    with distributed.process_group(), new_folder(run_dir) as folder:
        if distributed.is_main_process():
            files.write_json(folder / "series.json", about)
        return _seeds_in(folder, count, recipe, arguments, progress)


def _seeds_in(
    folder: Path, count: int, recipe: Recipe, arguments: Mapping[str, Any], progress: Progress | None
) -> Seeds:
    runs = tuple(folder / f"seed-{recipe.seed + i}" for i in range(count))
    for i, run in enumerate(runs):
        if progress:
            progress.note("Seed", f"{recipe.seed + i}   ({i + 1} of {count})")
        there = distributed.from_main_process(partial(_begun, run))
        if there == "finished":
            continue
        if there == "begun":
            resume(run, progress)
        else:
            train(recipe=replace(recipe, seed=recipe.seed + i), run_dir=run, progress=progress, **arguments)
    found = Seeds(folder, runs, tuple(load_result(run) for run in runs))
    if distributed.is_main_process():
        files.write_json(folder / "seeds.json", found.to_json())
    return found


def _begun(run: Path) -> str:
    """How far a run of the series is: finished, begun or new."""
    if (run / "report.html").exists() and (run / "model" / "model.json").exists():
        return "finished"
    return "begun" if (run / "config.json").exists() else "new"


def cross_validate(
    folds: int,
    recipe: Recipe,
    *,
    data: str | Path | None = None,
    test: str | Path | None = None,
    test_size: float | int = 0.2,
    classes: Sequence[str] | None = None,
    run_dir: str | Path | None = None,
    device: str = "auto",
    claimed: float = 0.98,
    progress: Progress | None = None,
) -> Folds:
    """Each training row is scored by a classifier that did not train on it; the test set is never touched.

    The folds are scikit-learn's, drawn by the recipe's `split_seed`, stratified where the recipe is. Validation rows
    for the temperature are cut from each fold's training part. Out-of-fold probabilities are in
    `evaluation/predictions.csv`, in the order of the training rows. Resumable by `resume_series(run_dir)`.
    """
    if folds < 2:
        raise UsageError("--folds", f"expected 2 or more, found {folds}")
    paths = [None if path is None else str(path) for path in (data, test)]
    choice = DataChoice(paths[0], paths[1], test_size, None if classes is None else tuple(classes))
    config = {"schema": 1, "folds": folds, "recipe": recipe.to_json(), "data": asdict(choice), "device": device}
    with distributed.process_group(), new_folder(run_dir) as folder:
        if distributed.is_main_process():
            files.write_json(folder / "series.json", {**config, "kind": "folds", "claimed": claimed})
        return _folds_in(folder, folds, recipe, choice, device, claimed, progress or NoProgress())


def _folds_in(
    folder: Path, folds: int, recipe: Recipe, choice: DataChoice, device: str, claimed: float, progress: Progress
) -> Folds:
    began = time.perf_counter()
    stage = Experiment(recipe, choice, devices.choose_device(device), progress)
    stage.check(folder, folds)
    memory.keep_freed_memory()
    source, data = stage.train_features(), stage.splits.data
    extracted = time.perf_counter() - began
    everything = stage.splits.train_rows
    probabilities = np.empty((len(everything), len(data.classes)), np.float32)
    histories = []
    for k, out in enumerate(_fold_members(data.labels[everything], folds, recipe, data.source)):
        progress.note("Fold", f"{k + 1} of {folds}")
        stage.train, stage.val = validation_rows(data, np.delete(everything, out), recipe)
        part, history = _one_fold(stage, source, everything[out], folder / f"fold-{k + 1}")
        probabilities[out] = part
        histories.append(history)
    seconds = run_result.spent(began, extracted, sum(e.seconds for history in histories for e in history))
    rows = data.subset(everything)
    result = RunResult(
        title=f"Attire {recipe.name}, {folds}-fold cross-validation on {rows.source}",
        recipe=recipe.name,
        seed=recipe.seed,
        command=_repeat_command(folds, recipe, choice),
        test=evaluate(probabilities, rows.labels, rows.classes),
        predictions=run_result.predictions(rows.labels, probabilities, rows.images),
        history=_mean_history(histories),
        seconds=seconds,
        config={"schema": 1, "folds": folds, "recipe": recipe.to_json(), "data": asdict(choice)},
        environment=stage.environment(),
        data={"name": rows.source, "rows": {"out of fold": len(rows)}, "test": rows.describe()},
        claimed=claimed,
    )
    distributed.from_main_process(partial(_write_folds, folder, result))
    progress.close()
    return Folds(folder, result)


def _write_folds(folder: Path, result: RunResult) -> None:
    save_result(folder, result)
    write_report(folder, result)


def _fold_members(labels: NDArray[np.int64], folds: int, recipe: Recipe, name: str) -> list[NDArray[np.int64]]:
    """Positions into `labels` of each fold; together they are every row once."""
    from sklearn.model_selection import KFold, StratifiedKFold

    counts = np.bincount(labels)
    if recipe.stratify and counts[counts > 0].min() < folds:
        few = int(counts[counts > 0].min())
        raise AttireError(name, f"a class has {few} rows, too few for {folds} folds", do="use fewer --folds")
    kind = StratifiedKFold if recipe.stratify else KFold
    return [out for _, out in kind(folds, shuffle=True, random_state=recipe.split_seed).split(labels, labels)]


def _one_fold(
    stage: Experiment, source: CachedSource, out: dataset.RowIndices, folder: Path
) -> tuple[NDArray[np.float32], list[Epoch]]:
    """Calibrated probabilities (n, K) of the rows that this fold leaves out; kept, so that no fold is done twice."""
    kept = folder / "probabilities.npy"
    expected = (len(out), len(stage.splits.data.classes))
    if (before := _probabilities_in(kept, expected)) is not None and (folder / "history.csv").exists():
        return before, [Epoch(**row) for row in run_result.read_history(folder / "history.csv")]
    source.standardise = stage.measured(source)
    head, history = stage.fit(source, folder)
    temperature = 1.0
    if len(stage.val):
        logits = stage.logits(head, source, stage.val)
        temperature = calibration.fit_temperature(logits, stage.splits.data.labels[stage.val])
    found = calibration.softmax(stage.logits(head, source, out), temperature).astype(np.float32)
    if distributed.is_main_process():
        buffer = io.BytesIO()
        np.save(buffer, found)
        files.write_bytes(kept, buffer.getvalue())
    return found, history


def _probabilities_in(path: Path, shape: tuple[int, int]) -> NDArray[np.float32] | None:
    """What `one_fold` kept; None where there is nothing sound, and the fold is then done again."""
    try:
        found: NDArray[np.float32] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and np.isfinite(found).all() else None


def _mean_history(histories: Sequence[Sequence[Epoch]]) -> list[dict[str, Any]]:
    """The folds' curves averaged; seconds are summed."""
    lines = []
    for epochs in zip(*histories, strict=True):
        line: dict[str, Any] = {"epoch": epochs[0].epoch, "seconds": sum(epoch.seconds for epoch in epochs)}
        for key in ("train_loss", "val_loss", "val_accuracy"):
            values = [getattr(epoch, key) for epoch in epochs]
            line[key] = None if None in values else statistics.mean(values)
        lines.append(line)
    return lines


def _repeat_command(folds: int, recipe: Recipe, choice: DataChoice) -> str:
    parts = ["attire", "train", "--recipe", recipe.name, "--folds", str(folds), "--seed", str(recipe.seed)]
    for flag, value in (("--data", choice.data), ("--test", choice.test)):
        parts += [flag, value] if value else []
    return shlex.join(parts)


def is_series(folder: str | Path) -> bool:
    return (Path(folder) / "series.json").exists()


def resume_series(folder: str | Path, progress: Progress | None = None) -> Seeds | Folds:
    """Go on with seeds or folds that were stopped; what is finished is not done again."""
    folder = Path(folder)
    about = files.read_json(folder / "series.json")
    go_on: Callable[[], Seeds | Folds]
    try:
        recipe = recipes.from_json(about["recipe"], str(folder / "series.json"))
        if about["kind"] == "seeds":
            go_on = partial(_seeds_in, folder, about["count"], recipe, about["arguments"], progress)
        else:
            values = dict(about["data"])
            choice = DataChoice(**{**values, "classes": tuple(values["classes"]) if values["classes"] else None})
            told = (about["folds"], recipe, choice, about["device"], about["claimed"])
            go_on = partial(_folds_in, folder, *told, progress or NoProgress())
    except (KeyError, TypeError) as error:
        raise AttireError(folder / "series.json", "not a series of runs", str(error)[:80]) from error
    with distributed.process_group(), claimed_folder(folder):
        return go_on()


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same, fit for JSON."""
    told = {key: str(value) if isinstance(value, Path) else value for key, value in arguments.items()}
    found = distillation.choose(told.pop("teacher", None))
    return told if found is None else {**told, "teacher": found.to_json()}
