"""`train`: from labelled images to a run folder that holds a bundle, an evaluation and a report."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from attire import recipes
from attire.data.loading import DataChoice
from attire.errors import AttireError, UsageError
from attire.evaluation import run_result
from attire.evaluation.intervals import Interval
from attire.features.cache import ShardExtractor
from attire.inference.classifier import Classifier, load_bundle
from attire.model import devices, distributed
from attire.progress import NoProgress, Progress
from attire.recipes import Recipe
from attire.storage import files, memory, run_folder
from attire.training import distillation as teaching
from attire.training.distillation import Teacher
from attire.training.experiment import Experiment


@dataclass(frozen=True)
class _Run:
    """A finished run: its folder, what it found, and the bundle that ships."""

    folder: Path
    result: run_result.RunResult

    @property
    def bundle(self) -> Path:
        return self.folder / "model"

    @property
    def accuracy(self) -> Interval:
        return self.result.test.accuracy

    def load(self) -> Classifier:
        return load_bundle(self.bundle)


class _Machines(Protocol):
    """Machines that a run is carried out on; `cluster.Cluster` is the one kind there is."""

    @property
    def extract_shards(self) -> ShardExtractor:
        """Makes missing shards."""

    def resume(self, folder: Path, progress: Progress) -> None:
        """Call `resume` with this run's folder in each of the processes that train it together."""


class _Stored(NamedTuple):
    """What `config.json` of a run says."""

    recipe: Recipe
    source: DataChoice
    device: str
    cache: bool
    claimed: float
    log: str | None
    teacher: Teacher | None


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
    teacher: Sequence[str | Path] | Mapping[str, Any] | Teacher | None = None,
    progress: Progress | None = None,
    cluster: _Machines | None = None,
) -> _Run:
    """Train a classifier and evaluate it once on the test set.

    data: None for the official set, else a CSV, IDX or Parquet file, a folder or a URL of these; run_dir: a new or
    empty folder, `runs/1`, `runs/2` ... when left out; log: "tensorboard" also writes the curves into
    `<run_dir>/tensorboard` (an extra); teacher: runs or bundles whose averaged answers are learnt from besides the
    labels (distillation); cluster: machines that extract and train, see `cluster.connect`.
    Raises AttireError for bad data, Stopped when it was interrupted: then
    `resume(run_dir)` goes on exactly where it stood.

    Under torchrun, or in processes that have joined a group of `torch.distributed`, all call it alike and train as one,
    with a cache and a run folder on a disk that they share; see `ranks`. The first writes, all return the run.
    """
    chosen = recipes.named(recipe) if isinstance(recipe, str) else recipe
    chosen = chosen if seed is None else replace(chosen, seed=seed)
    paths = [None if path is None else str(path) for path in (data, test)]
    source = DataChoice(paths[0], paths[1], test_size, None if classes is None else tuple(classes))
    devices.choose_device(device)
    taught = teaching.choose(teacher)
    config = {
        "schema": 1,
        "recipe": chosen.to_json(),
        "data": asdict(source),
        "device": device,
        "cache": cache,
        "claimed": claimed,
        "log": log,
        "teacher": taught.to_json() if taught else None,
    }
    watch = progress or NoProgress()
    with distributed.process_group(), new_folder(run_dir) as folder:
        if distributed.is_main_process():
            files.write_json(folder / "config.json", config)
        with _logging(None if cluster else log, folder, watch) as watching:
            if not cluster:
                return _carry_out(folder, chosen, source, device, cache, claimed, watching, taught)
            _begin(folder, chosen, source, device, watching, cluster.extract_shards).extract_all()
    return _finished_on(cluster, folder, watch)


def resume(run_dir: str | Path, progress: Progress | None = None, cluster: _Machines | None = None) -> _Run:
    """Go on with a run that was stopped, from its own `config.json` and newest checkpoint."""
    folder = Path(run_dir)
    if not (folder / "config.json").exists():
        raise AttireError(folder, "no run to resume: it holds no config.json", do="start one with: attire train")
    known = _read_config(folder)
    told = (known.recipe, known.source, known.device)
    log, watch = None if cluster else known.log, progress or NoProgress()
    with distributed.process_group(), claimed_folder(folder), _logging(log, folder, watch) as watching:
        if not cluster:
            return _carry_out(folder, *told, known.cache, known.claimed, watching, known.teacher)
        _begin(folder, *told, watching, cluster.extract_shards).extract_all()
    return _finished_on(cluster, folder, watch)


def _finished_on(cluster: _Machines, folder: Path, progress: Progress) -> _Run:
    """A run whose features are in the cache, carried out by processes that hold its folder themselves."""
    cluster.resume(folder, progress)
    return _Run(folder, run_result.load_result(folder))


def _read_config(folder: Path) -> _Stored:
    config = files.read_json(folder / "config.json")
    try:
        recipe = recipes.from_json(config["recipe"], str(folder / "config.json"))
        values = dict(config["data"])
        source = DataChoice(**{**values, "classes": tuple(values["classes"]) if values["classes"] else None})
        taught = teaching.choose(config.get("teacher"))
        told = (config["device"], config["cache"], config["claimed"], config.get("log"))
        return _Stored(recipe, source, *told, taught)
    except (KeyError, TypeError) as error:
        raise AttireError(folder / "config.json", "not the config of a run", str(error)[:80]) from error


def new_folder(run_dir: str | Path | None) -> AbstractContextManager[Path]:
    """`folders.made_folder`, by the first process for all."""
    return distributed.enter_on_main_process(lambda: run_folder.new_run_folder(run_dir))


def claimed_folder(folder: Path) -> AbstractContextManager[Path]:
    """`folders.claim`, by the first process for all."""
    return distributed.enter_on_main_process(lambda: run_folder.claim_folder(folder))


@contextmanager
def _logging(log: str | None, folder: Path, progress: Progress) -> Iterator[Progress]:
    """`progress`, or one that also writes TensorBoard's files; of several processes the first alone is watched."""
    if log is None or not distributed.is_main_process():
        yield progress if distributed.is_main_process() else NoProgress()
        return
    if log != "tensorboard":
        raise UsageError("--log", f"expected tensorboard, found {log!r}")
    from attire.training.tensorboard import Board  # an optional extra, imported only where it is used

    board = Board(progress, folder / "tensorboard")
    try:
        yield board
    finally:
        board.writer.close()


def _carry_out(
    folder: Path,
    recipe: Recipe,
    source: DataChoice,
    device: str,
    cache: bool,
    claimed: float,
    progress: Progress,
    teacher: Teacher | None = None,
) -> _Run:
    """The stages, in order. Each leaves on disk what the next start of the same run will not do again."""
    began = time.perf_counter()
    stage = _begin(folder, recipe, source, device, progress)
    sources = stage.cached() if cache else stage.on_the_fly()
    soft = None
    if teacher:
        progress.note("Teacher", teaching.describe(teacher, recipe))
        told = (stage.splits, stage.training_views(), recipe, folder, progress, stage.taught)
        soft, stage.taught = distributed.main_process_first(lambda: teaching.targets(teacher, *told))
        if distributed.is_main_process():
            files.write_json(folder / "data.json", stage.describe_data())
    extracted = time.perf_counter() - began
    head, history = stage.fit(sources[0], folder, soft)
    answers = stage.answers(head, sources)
    done: list[run_result.RunResult] = []

    def finish() -> None:
        found = stage.evaluate(head, sources, answers)
        seconds = run_result.spent(began, extracted, sum(epoch.seconds for epoch in history))
        result = stage.result(folder, found, history, seconds, claimed)
        stage.save(folder, head, sources[0].standardise, found, result)
        accuracy = result.test.accuracy
        progress.tested(accuracy.value, accuracy.low, accuracy.high, len(history))
        done.append(result)

    distributed.from_main_process(finish)
    progress.close()
    return _Run(folder, done[0] if done else run_result.load_result(folder))


def _begin(
    folder: Path,
    recipe: Recipe,
    source: DataChoice,
    device: str,
    progress: Progress,
    make: ShardExtractor | None = None,
) -> Experiment:
    """The stage of a run, and what it found written down. A run that goes on keeps what it began with."""
    if distributed.is_main_process():
        run_result.reopen(folder)
    stage = Experiment(recipe, source, devices.choose_device(device), progress, make)
    distributed.from_main_process(lambda: stage.check(folder))
    memory.keep_freed_memory()  # from here on: what reading a CSV took goes back to the system
    told = [folder / name for name in ("data.json", "environment.json")]
    data, environment = distributed.from_main_process(
        lambda: [files.read_json(path) if path.exists() else {} for path in told]
    )
    stage.taught = data.get("teacher")
    stage.keep(environment)
    if distributed.is_main_process():
        files.write_json(told[0], stage.describe_data())
        files.write_json(told[1], stage.environment())
    return stage
