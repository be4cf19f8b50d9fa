"""`train`: from labelled images to a run folder that holds a bundle, an evaluation and a report."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Unpack

import numpy as np
from numpy.typing import NDArray

from attire import recipes
from attire.errors import AttireError, UsageError
from attire.evaluation import run_result
from attire.evaluation.intervals import Interval
from attire.evaluation.run_result import RunResult
from attire.features.cache import ShardExtractor
from attire.inference.classifier import Classifier, load_bundle
from attire.model import devices, distributed
from attire.progress import NoProgress, Progress
from attire.recipes import Recipe
from attire.storage import files, memory, run_folder
from attire.training.distillation import Teacher
from attire.training.experiment import Experiment
from attire.training.extraction import Extraction
from attire.training.head_training import train_head
from attire.training.outcome import HeadEvaluator
from attire.training.run_config import RunConfig, TrainOptions
from attire.training.saving import make_result, save_run

_TeacherRecord = dict[str, Any] | None  # what data.json says of the teacher


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its result, and the bundle that ships."""

    folder: Path
    result: RunResult

    @property
    def bundle(self) -> Path:
        return self.folder / "model"

    @property
    def accuracy(self) -> Interval:
        return self.result.test.accuracy

    def load(self) -> Classifier:
        return load_bundle(self.bundle)


class _Cluster(Protocol):
    """Machines that extract features and train; `cluster.Cluster` is the one kind there is."""

    @property
    def extract_shards(self) -> ShardExtractor:
        """Computes missing shards."""

    def resume(self, folder: Path, progress: Progress) -> None:
        """Call `resume` with this run's folder in each of the processes that train it together."""


def train(
    data: str | Path | None = None,
    recipe: str | Recipe = "fast",
    *,
    run_dir: str | Path | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
    cluster: _Cluster | None = None,
    **options: Unpack[TrainOptions],
) -> Run:
    """Train a head and evaluate it once on the test set.

    data: None for the official set, else a CSV, IDX or Parquet file, a folder or a URL of these; run_dir: a new or
    empty folder, `runs/1`, `runs/2` ... when left out; seed: replaces the recipe's; cluster: machines that extract and
    train, see `cluster.connect`.

    options: `test`, `test_size` (0.2) and `classes`, see `load_splits`; `device` ("auto", "cpu", "cuda" or "mps");
    `cache=False` trains through VGG16 in every epoch; `claimed` (0.98), the accuracy to compare with;
    `log="tensorboard"` also writes the curves into `<run_dir>/tensorboard` (an extra); `teacher`, runs or bundles whose
    averaged probabilities are learnt from besides the labels (distillation).

    Raises AttireError for bad data, Stopped when it was interrupted: then `resume(run_dir)` goes on exactly where it
    stood. Under torchrun, or in processes that have joined a group of `torch.distributed`, all call it alike and train
    as one, with a cache and a run folder on a disk that they share. The first writes, all return the run.
    """
    recipe = recipes.named(recipe) if isinstance(recipe, str) else recipe
    recipe = recipe if seed is None else replace(recipe, seed=seed)
    return start(RunConfig.from_options(data, recipe, **options), run_dir, progress, cluster)


def start(
    config: RunConfig,
    run_dir: str | Path | None = None,
    progress: Progress | None = None,
    cluster: _Cluster | None = None,
) -> Run:
    """A new run of this config; see `train`."""
    progress = progress or NoProgress()
    with distributed.process_group(), create_run_folder(run_dir) as folder:
        if distributed.is_main_process():
            files.write_json(folder / "config.json", config.to_json())
        if not cluster:
            return _train_here(folder, config, progress)
        _extract_on(cluster, folder, config, progress)
    return _train_on(cluster, folder, progress)


def resume(run_dir: str | Path, progress: Progress | None = None, cluster: _Cluster | None = None) -> Run:
    """Go on with a run that was stopped, from its own `config.json` and newest checkpoint."""
    folder, progress = Path(run_dir), progress or NoProgress()
    if not (folder / "config.json").exists():
        raise AttireError(folder, "no run to resume: it holds no config.json", do="start one with: attire train")
    config = _read_config(folder / "config.json")
    with distributed.process_group(), lock_run_folder(folder):
        if not cluster:
            return _train_here(folder, config, progress)
        _extract_on(cluster, folder, config, progress)
    return _train_on(cluster, folder, progress)


def _read_config(path: Path) -> RunConfig:
    values = files.read_json(path)
    try:
        return RunConfig.from_json(values, path)
    except (KeyError, TypeError) as error:
        raise AttireError(path, "not the config of a run", str(error)[:80]) from error


def create_run_folder(run_dir: str | Path | None) -> AbstractContextManager[Path]:
    """`run_folder.new_run_folder`, by the first process for all."""
    return distributed.enter_on_main_process(lambda: run_folder.new_run_folder(run_dir))


def lock_run_folder(folder: Path) -> AbstractContextManager[Path]:
    """`run_folder.claim_folder`, by the first process for all."""
    return distributed.enter_on_main_process(lambda: run_folder.claim_folder(folder))


def _extract_on(cluster: _Cluster, folder: Path, config: RunConfig, progress: Progress) -> None:
    """Extract every feature that the run reads into the cache."""
    progress = progress if distributed.is_main_process() else NoProgress()
    experiment, _ = _begin(folder, config, progress)
    Extraction(experiment, progress, cluster.extract_shards).extract_all()


def _train_on(cluster: _Cluster, folder: Path, progress: Progress) -> Run:
    """Train a run whose features are in the cache, in processes that lock its folder themselves."""
    cluster.resume(folder, progress)
    return Run(folder, run_result.load_result(folder))


def _train_here(folder: Path, config: RunConfig, progress: Progress) -> Run:
    """Extract, train and evaluate. Each step leaves on disk what the next start of the run will not do again."""
    with _logging(config.log, folder, progress) as logged:
        return _run_steps(folder, config, logged)


@contextmanager
def _logging(log: str | None, folder: Path, progress: Progress) -> Iterator[Progress]:
    """`progress`, or one that also writes TensorBoard's files; of several processes only the first shows progress."""
    if log is None or not distributed.is_main_process():
        yield progress if distributed.is_main_process() else NoProgress()
        return
    if log != "tensorboard":
        raise UsageError("--log", f"expected tensorboard, found {log!r}")
    from attire.training.tensorboard import TensorBoardProgress  # an optional extra, imported only where it is used

    board = TensorBoardProgress(progress, folder / "tensorboard")
    try:
        yield board
    finally:
        board.writer.close()


def _run_steps(folder: Path, config: RunConfig, progress: Progress) -> Run:
    began = time.perf_counter()
    experiment, teacher = _begin(folder, config, progress)
    extraction = Extraction(experiment, progress)
    sources = extraction.sources() if config.cache else extraction.on_the_fly_sources()
    targets = None
    if config.teacher:
        targets, teacher = _teach(config.teacher, experiment, folder, progress, teacher)
    extracted = time.perf_counter() - began
    head, history = train_head(experiment, sources.train, folder, progress, targets)
    evaluator = HeadEvaluator(experiment, head, sources)
    logits = evaluator.split_logits()
    results: list[RunResult] = []

    def finish() -> None:
        outcome = evaluator.evaluate(logits, progress)
        seconds = run_result.run_seconds(began, extracted, sum(epoch.seconds for epoch in history))
        result = make_result(
            experiment, outcome, folder, history=history, seconds=seconds, claimed=config.claimed, teacher=teacher
        )
        save_run(folder, experiment, head, sources.train.standardise, outcome, result)
        accuracy = result.test.accuracy
        progress.tested(accuracy.value, accuracy.low, accuracy.high, len(history))
        results.append(result)

    distributed.from_main_process(finish)
    progress.close()
    return Run(folder, results[0] if results else run_result.load_result(folder))


def _begin(folder: Path, config: RunConfig, progress: Progress) -> tuple[Experiment, _TeacherRecord]:
    """The prepared experiment, written down, and the teacher's record. A resumed run keeps what it began with."""
    if distributed.is_main_process():
        run_result.delete_digests(folder)
    experiment = Experiment.prepare(config.recipe, config.data, devices.choose_device(config.device), progress)
    distributed.from_main_process(lambda: experiment.check_resources(folder))
    memory.keep_freed_memory()  # from here on: what reading a CSV took goes back to the system
    paths = [folder / name for name in ("data.json", "environment.json")]
    data, environment = distributed.from_main_process(
        lambda: [files.read_json(path) if path.exists() else {} for path in paths]
    )
    experiment = experiment.with_choices_of(environment)
    teacher: _TeacherRecord = data.get("teacher")
    if distributed.is_main_process():
        files.write_json(folder / "data.json", experiment.describe_data(teacher))
        files.write_json(folder / "environment.json", experiment.environment())
    return experiment, teacher


def _teach(
    teacher: Teacher, experiment: Experiment, folder: Path, progress: Progress, recorded: _TeacherRecord
) -> tuple[NDArray[np.float32], _TeacherRecord]:
    """The teacher's soft targets, and the record of them, which goes into `data.json`."""
    recipe, splits, views = experiment.recipe, experiment.splits, experiment.augmentation_views
    progress.note("Teacher", teacher.describe(recipe))
    targets, record = distributed.main_process_first(
        lambda: teacher.soft_targets(splits, views, recipe, folder, progress, recorded)
    )
    if distributed.is_main_process():
        files.write_json(folder / "data.json", experiment.describe_data(record))
    return targets, record
