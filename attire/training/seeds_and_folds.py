"""Several trainings from one cache: `--seeds`, how far chance moves the accuracy; `--folds`, cross-validation."""

import io
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from attire.data.dataset import RowIndices
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
from attire.training.experiment import Experiment, validation_rows
from attire.training.extraction import Extraction, SplitSources
from attire.training.head_training import train_head
from attire.training.outcome import HeadEvaluator
from attire.training.run import create_run_folder, lock_run_folder, resume, start
from attire.training.run_config import FoldOptions, RunConfig, TrainOptions


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


def train_seeds(
    count: int,
    recipe: Recipe,
    *,
    data: str | Path | None = None,
    run_dir: str | Path | None = None,
    progress: Progress | None = None,
    **options: Unpack[TrainOptions],
) -> Seeds:
    """Train `count` runs that differ in their seed alone, counting up from the recipe's: `<run_dir>/seed-0` ...

    data, options: those of `run.train`. Features are extracted once. A stopped series goes on with
    `resume_series(run_dir)`.
    """
    if count < 2:
        raise UsageError("--seeds", f"expected 2 or more, found {count}")
    config = RunConfig.from_options(data, recipe, **options)
    with distributed.process_group(), create_run_folder(run_dir) as folder:
        _write_series(folder, "seeds", count, config)
        return _train_seeds_in(folder, count, config, progress)


def _write_series(folder: Path, kind: str, count: int, config: RunConfig) -> None:
    if distributed.is_main_process():
        series = {"schema": 1, "kind": kind, "count": count, "config": config.to_json()}
        files.write_json(folder / "series.json", series)


def _train_seeds_in(folder: Path, count: int, config: RunConfig, progress: Progress | None) -> Seeds:
    first = config.recipe.seed
    runs = tuple(folder / f"seed-{first + i}" for i in range(count))
    for i, run in enumerate(runs):
        if progress:
            progress.note("Seed", f"{first + i}   ({i + 1} of {count})")
        status = distributed.from_main_process(partial(_status, run))
        if status == "begun":
            resume(run, progress)
        elif status == "new":
            start(replace(config, recipe=replace(config.recipe, seed=first + i)), run, progress)
    seeds = Seeds(folder, runs, tuple(load_result(run) for run in runs))
    if distributed.is_main_process():
        files.write_json(folder / "seeds.json", seeds.to_json())
    return seeds


def _status(run: Path) -> str:
    """How far a run of the series is: finished, begun or new."""
    if (run / "report.html").exists() and (run / "model" / "model.json").exists():
        return "finished"
    return "begun" if (run / "config.json").exists() else "new"


def cross_validate(
    folds: int,
    recipe: Recipe,
    *,
    data: str | Path | None = None,
    run_dir: str | Path | None = None,
    progress: Progress | None = None,
    **options: Unpack[FoldOptions],
) -> Folds:
    """Score each training row by a head that did not train on it; the test set is never touched.

    The folds are scikit-learn's, drawn by the recipe's `split_seed`, stratified where the recipe is. Validation rows
    for the temperature are held out of each fold's training part. Out-of-fold probabilities are in
    `evaluation/predictions.csv`, in the order of the training rows. options: those of `run.train`. Resumable by
    `resume_series(run_dir)`.
    """
    if folds < 2:
        raise UsageError("--folds", f"expected 2 or more, found {folds}")
    config = RunConfig.from_options(data, recipe, **options)
    with distributed.process_group(), create_run_folder(run_dir) as folder:
        _write_series(folder, "folds", folds, config)
        return _cross_validate_in(folder, folds, config, progress or NoProgress())


def _cross_validate_in(folder: Path, folds: int, config: RunConfig, progress: Progress) -> Folds:
    began = time.perf_counter()
    experiment = Experiment.prepare(config.recipe, config.data, devices.choose_device(config.device), progress)
    experiment.check_resources(folder, folds)
    memory.keep_freed_memory()
    source = Extraction(experiment, progress).train_source()
    extracted = time.perf_counter() - began
    data, rows = experiment.splits.data, experiment.splits.train_rows
    probabilities = np.empty((len(rows), len(data.classes)), np.float32)
    histories = []
    for k, out in enumerate(_fold_members(data.labels[rows], folds, config.recipe, data.source)):
        progress.note("Fold", f"{k + 1} of {folds}")
        train, val = validation_rows(data, np.delete(rows, out), config.recipe)
        fold = replace(experiment, train=train, val=val)
        probabilities[out], history = _train_fold(fold, source, rows[out], folder / f"fold-{k + 1}", progress)
        histories.append(history)
    seconds = run_result.run_seconds(began, extracted, sum(e.seconds for history in histories for e in history))
    result = _folds_result(experiment, folds, config, probabilities, histories, seconds)
    distributed.from_main_process(partial(_write_folds, folder, result))
    progress.close()
    return Folds(folder, result)


def _folds_result(
    experiment: Experiment,
    folds: int,
    config: RunConfig,
    probabilities: NDArray[np.float32],
    histories: Sequence[Sequence[Epoch]],
    seconds: dict[str, float],
) -> RunResult:
    """probabilities: (n, K), out of fold, in the order of the training rows."""
    recipe, rows = config.recipe, experiment.splits.data.subset(experiment.splits.train_rows)
    return RunResult(
        title=f"Attire {recipe.name}, {folds}-fold cross-validation on {rows.source}",
        recipe=recipe.name,
        seed=recipe.seed,
        command=_repeat_command(folds, config),
        test=evaluate(probabilities, rows.labels, rows.classes),
        predictions=run_result.Predictions.of_test_set(rows.labels, probabilities, rows.images),
        history=_mean_history(histories),
        seconds=seconds,
        config={"schema": 1, "folds": folds, "recipe": recipe.to_json(), "data": asdict(config.data)},
        environment=experiment.environment(),
        data={"name": rows.source, "rows": {"out of fold": len(rows)}, "test": rows.describe()},
        claimed=config.claimed,
    )


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


def _train_fold(
    experiment: Experiment, source: CachedSource, out: RowIndices, folder: Path, progress: Progress
) -> tuple[NDArray[np.float32], list[Epoch]]:
    """Calibrated probabilities (n, K) of this fold's rows `out`, and its history; stored: no fold runs twice."""
    path, shape = folder / "probabilities.npy", (len(out), len(experiment.splits.data.classes))
    if (stored := _stored_probabilities(path, shape)) is not None and (folder / "history.csv").exists():
        return stored, [Epoch(**row) for row in run_result.read_history(folder / "history.csv")]
    source.standardise = Extraction(experiment, progress).fit_standardiser(source)
    head, history = train_head(experiment, source, folder, progress)
    evaluator = HeadEvaluator(experiment, head, SplitSources(source, source))
    temperature = evaluator.temperature()
    probabilities = calibration.softmax(evaluator.logits(source, out), temperature).astype(np.float32)
    if distributed.is_main_process():
        buffer = io.BytesIO()
        np.save(buffer, probabilities)
        files.write_bytes(path, buffer.getvalue())
    return probabilities, history


def _stored_probabilities(path: Path, shape: tuple[int, int]) -> NDArray[np.float32] | None:
    """What `_train_fold` stored; None where there is nothing sound, and the fold is then done again."""
    try:
        stored: NDArray[np.float32] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return stored if stored.shape == shape and np.isfinite(stored).all() else None


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


def _repeat_command(folds: int, config: RunConfig) -> str:
    recipe, data = config.recipe, config.data
    parts = ["attire", "train", "--recipe", recipe.name, "--folds", str(folds), "--seed", str(recipe.seed)]
    for flag, value in (("--data", data.data), ("--test", data.test)):
        parts += [flag, value] if value else []
    return shlex.join(parts)


def is_series(folder: str | Path) -> bool:
    """Whether `folder` holds a series of seeds or folds."""
    return (Path(folder) / "series.json").exists()


def resume_series(folder: str | Path, progress: Progress | None = None) -> Seeds | Folds:
    """Go on with seeds or folds that were stopped; what is finished is not done again."""
    folder = Path(folder)
    path = folder / "series.json"
    series = files.read_json(path)
    go_on: Callable[[], Seeds | Folds]
    try:
        count, config = series["count"], RunConfig.from_json(series["config"], path)
        if series["kind"] == "seeds":
            go_on = partial(_train_seeds_in, folder, count, config, progress)
        else:
            go_on = partial(_cross_validate_in, folder, count, config, progress or NoProgress())
    except (KeyError, TypeError) as error:
        raise AttireError(path, "not a series of runs", str(error)[:80]) from error
    with distributed.process_group(), lock_run_folder(folder):
        return go_on()
