"""`train`: from labelled images to a run folder that holds a bundle, an evaluation and a report."""

import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from attire import devices, files, recipes, results
from attire import teacher as teaching
from attire.classifier import Classifier, load_bundle
from attire.errors import AttireError, Stopped, UsageError
from attire.evaluation import Interval
from attire.recipes import Recipe
from attire.stages import DataChoice, Stage
from attire.teacher import Teacher
from attire.watching import Silent, Watcher

LOCK, PID = ".lock", ".pid"  # in a run's folder while a process works on it


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
    teacher: Sequence[str | Path] | Mapping[str, Any] | Teacher | None = None,
    watcher: Watcher | None = None,
) -> Run:
    """Train a classifier and evaluate it once on the test set.

    data: None for the official set, else a CSV, an IDX file or a folder; run_dir: a new or empty folder, `runs/1`,
    `runs/2` ... when left out; log: "tensorboard" also writes the curves into `<run_dir>/tensorboard` (an extra);
    teacher: runs or bundles whose averaged answers are learnt from besides the labels (distillation).
    Raises AttireError for bad data, Stopped when it was interrupted: then
    `resume(run_dir)` goes on exactly where it stood.
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
    with new_folder(run_dir) as folder:
        files.write_json(folder / "config.json", config)
        with logging(log, folder, watcher or Silent()) as watching:
            return carry_out(folder, chosen, source, device, cache, claimed, watching, taught)


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
        taught = teaching.choose(config.get("teacher"))
    except (KeyError, TypeError) as error:
        raise AttireError(folder / "config.json", "not the config of a run", str(error)[:80]) from error
    with claimed_folder(folder), logging(config.get("log"), folder, watcher or Silent()) as watching:
        return carry_out(folder, recipe, source, device, cache, claimed, watching, taught)


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
            except Stopped:
                raise
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
    taken = [int(path.name) for path in Path("runs").glob("*") if path.name.isdigit()]
    folder = Path("runs") / str(max(taken, default=0) + 1) if run_dir is None else Path(run_dir)
    if folder.exists() and not folder.is_dir():
        raise AttireError(folder, "expected a folder, found a file", do="give --out another name")
    if folder.is_dir() and not all(map(is_leftover, folder.iterdir())):
        if (folder / LOCK).exists():
            with claim(folder):  # who is at work there comes before what lies there
                pass
        do = "give --out another name"
        if any((folder / name).exists() for name in ("checkpoints", "series.json")):
            do += f", or go on with: attire train --resume {shlex.quote(str(folder))}"
        raise AttireError(folder, "the folder is not empty", do=do)
    files.check_writable(folder)
    return folder


def is_leftover(path: Path) -> bool:
    """What a process leaves that was killed before it had written the config of a new run."""
    return path.name in (LOCK, PID) or path.match(f"{files.PART}*.part")


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
    pid = folder / PID
    with claim(folder):
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
def claim(folder: Path) -> Iterator[None]:
    """Hold a folder's lock. Raises AttireError that names who has it; who is just leaving is waited for."""
    with ExitStack() as held:
        try:
            held.enter_context(files.lock(folder / LOCK, wait=0.2))
        except TimeoutError as error:
            pid = folder / PID
            holder = pid.read_text().strip() if pid.exists() else "unknown"
            raise AttireError(folder, f"another attire (process {holder}) is training into it") from error
        yield


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
    folder: Path,
    recipe: Recipe,
    source: DataChoice,
    device: str,
    cache: bool,
    claimed: float,
    watcher: Watcher,
    teacher: Teacher | None = None,
) -> Run:
    """The stages, in order. Each leaves on disk what the next start of the same run will not do again."""
    began = time.perf_counter()
    results.reopen(folder)
    stage = Stage(recipe, source, devices.choose_device(device), watcher)
    stage.check(folder)
    devices.keep_freed_memory()  # from here on: what reading a CSV took goes back to the system
    if (folder / "data.json").exists():
        stage.taught = files.read_json(folder / "data.json").get("teacher")
    files.write_json(folder / "data.json", stage.describe_data())
    files.write_json(folder / "environment.json", stage.environment())
    sources = stage.cached() if cache else stage.on_the_fly()
    soft = None
    if teacher:
        watcher.note("Teacher", teaching.describe(teacher, recipe))
        told = (stage.splits, stage.training_views(), recipe, folder, watcher, stage.taught)
        soft, stage.taught = teaching.targets(teacher, *told)
        files.write_json(folder / "data.json", stage.describe_data())
    extracted = time.perf_counter() - began
    head, history = stage.fit(sources[0], folder, soft)
    found = stage.evaluate(head, sources)
    seconds = {"extract": extracted, "fit": sum(epoch.seconds for epoch in history)}
    seconds["total"] = time.perf_counter() - began
    result = stage.result(folder, found, history, seconds, claimed)
    stage.save(folder, head, sources[0].standardise, found, result)
    watcher.tested(result.test.accuracy, len(history))
    watcher.close()
    return Run(folder, result)
