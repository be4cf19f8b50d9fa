"""train, extract: a run, or the features that it will read."""

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attire.cli.cache import show_entries
from attire.cli.options import (
    NAME,
    PATH,
    class_names,
    cluster_at,
    cluster_option,
    data_options,
    device_option,
    get_sources,
    json_option,
    memory_option,
    numbers,
    recipe_options,
    source_options,
)
from attire.cli.shell import Command, among
from attire.errors import Stopped, UsageError
from attire.recipes import RECIPES, SETTINGS, Recipe, from_json, named
from attire.storage.run_folder import find_free_folder

if TYPE_CHECKING:
    from attire.progress import Progress
    from attire.training.run import Run
    from attire.training.run_config import TrainOptions
    from attire.training.seeds_and_folds import Folds, Seeds


@dataclass(frozen=True)
class _Settings:
    """What the command line says of a run; None where --config or the recipe decides. claim: in percent."""

    recipe_name: str | None = None
    config: Path | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)  # of the recipe, those that were given
    data: str | None = None
    test: str | None = None
    classes: str | None = None
    test_size: float | int | None = None
    device: str = "auto"
    cache: bool | None = None
    claim: float | None = None
    log: str | None = None
    teachers: tuple[str, ...] = ()

    @property
    def nothing_given(self) -> bool:
        """Whether a stopped run may go on with these settings: it has its own, device included."""
        return self == _Settings(device=self.device)

    def arguments(self) -> "tuple[str | None, Recipe, TrainOptions]":
        """Arguments of `train`: data, recipe and options, by --config, changed by what was given besides."""
        from attire.storage import files

        stored = files.read_json(self.config) if self.config else {}
        if self.recipe_name and stored:
            raise UsageError("--recipe", "given together with --config", do="give one of them")
        recipe = from_json(stored.get("recipe", {}), str(self.config)) if stored else named(self.recipe_name or "fast")
        data = {"test_size": 0.2, **stored.get("data", {})}
        claimed = stored.get("claimed", 0.98) if self.claim is None else self.claim / 100
        if not 0 < claimed <= 1:
            raise UsageError("--claim", f"expected a percentage above 0, at most 100, found {self.claim}")
        options: TrainOptions = {
            "test": data.get("test") if self.test is None else self.test,
            "test_size": data["test_size"] if self.test_size is None else self.test_size,
            "classes": class_names(data.get("classes") if self.classes is None else self.classes),
            "device": self.device,
            "cache": stored.get("cache", True) if self.cache is None else self.cache,
            "claimed": claimed,
            "log": self.log or stored.get("log"),
            "teacher": self.teachers or stored.get("teacher"),
        }
        return data.get("data") if self.data is None else self.data, self._changed(recipe), options

    def _changed(self, recipe: Recipe) -> Recipe:
        widths = {name: numbers(f"--{name}", self.fields[name]) for name in {"hidden", "conv"} & set(self.fields)}
        return replace(recipe, **{**self.fields, **widths})


@dataclass(frozen=True)
class _Job:
    """What to do with the settings: a run, several, or one that goes on; where, and on which cluster."""

    resumed: str | None
    out: str | None
    seeds: int | None
    folds: int | None
    cluster: str | None
    cluster_workers: int | None

    def check(self, settings: _Settings) -> None:
        """Raises UsageError for options that exclude each other."""
        from attire.training.seeds_and_folds import is_series

        many = self.seeds or self.folds
        if self.cluster_workers and self.cluster is None:
            raise UsageError("--cluster-workers", "given without --cluster")
        if self.cluster is not None and (many or (self.resumed and is_series(self.resumed))):
            do = "extract there first: attire extract --cluster"
            raise UsageError("--cluster", "trains one run at a time", do=do)
        if self.cluster is not None and settings.cache is False:
            raise UsageError("--cluster", "needs cached features", do="leave --no-cache out")
        if self.resumed is not None and (many or self.out or not settings.nothing_given):
            raise UsageError("--resume", "goes on with the run's own settings", do="leave the other options out")

    def run(self, settings: _Settings, progress: "Progress") -> "Run | Seeds | Folds":
        from attire.training import run, seeds_and_folds

        if self.resumed is not None and seeds_and_folds.is_series(self.resumed):
            return seeds_and_folds.resume_series(self.resumed, progress)
        if self.resumed is not None:
            with cluster_at(self.cluster, self.cluster_workers or 0) as cluster:
                return run.resume(self.resumed, progress, cluster)
        data, recipe, options = settings.arguments()
        if self.seeds or self.folds:
            return self._run_many(data, recipe, options, progress)
        with cluster_at(self.cluster, self.cluster_workers or 0) as cluster:
            return run.train(data, recipe, run_dir=self.out, progress=progress, cluster=cluster, **options)

    def _run_many(
        self, data: str | None, recipe: Recipe, options: "TrainOptions", progress: "Progress"
    ) -> "Seeds | Folds":
        from attire.training.seeds_and_folds import cross_validate, train_seeds

        if self.seeds and self.folds:
            raise UsageError("--folds", "given together with --seeds", do="give one of them")
        if self.seeds:
            return train_seeds(self.seeds, recipe=recipe, data=data, run_dir=self.out, progress=progress, **options)
        if options["teacher"]:
            raise UsageError("--teacher", "given together with --folds", do="a teacher has seen the rows of every fold")
        if not options["cache"]:
            raise UsageError("--folds", "needs cached features", do="leave --no-cache out")
        return cross_validate(
            self.folds or 0,
            recipe=recipe,
            data=data,
            run_dir=self.out,
            progress=progress,
            test=options["test"],
            test_size=options["test_size"],
            classes=options["classes"],
            device=options["device"],
            claimed=options["claimed"],
        )


def _settings(options: Mapping[str, Any]) -> _Settings:
    own = {name: value for name, value in options.items() if name in _Settings.__dataclass_fields__}
    return _Settings(**own, fields={name: options[name] for name in SETTINGS if options[name] is not None})


def _fraction_or_count(text: str) -> float | int:
    """1.0 is all rows, 1 is one row."""
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise UsageError("--test-size", f"expected a fraction such as 0.2 or a number, found {text!r}") from None


@click.command(cls=Command)
@click.option(
    "--recipe",
    "recipe_name",
    default=None,
    help=f"{' or '.join(RECIPES)}.  [default: fast]",
    shell_complete=among(*RECIPES),
)
@click.option("--config", type=PATH, help="Recipe and data of a run: its config.json.")
@click.option("--resume", "resumed", type=NAME, metavar="RUN", help="Resume a run that was stopped.")
@data_options
@click.option(
    "--test-size",
    type=_fraction_or_count,
    help="Fraction or number of rows held out for testing.  [default: 0.2]",
    metavar="N",
)
@click.option("--out", type=NAME, metavar="FOLDER", help="Folder of the run.  [default: runs/1, runs/2 ...]")
@click.option(
    "--seeds", type=click.IntRange(2), help="Number of runs that differ in their seed alone; shows mean and deviation."
)
@click.option(
    "--folds",
    type=click.IntRange(2),
    help="Number of folds to cross-validate the training rows with; no test set is read.",
)
@device_option
@click.option("--cache/--no-cache", default=None, help="Train on cached features, or through VGG16 in every epoch.")
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    metavar="RUN",
    help="Distillation: also learn from this run's predictions; several are averaged.",
)
@click.option("--log", type=click.Choice(["tensorboard"]), help="Also write the curves for TensorBoard (an extra).")
@click.option(
    "--claim", type=float, default=None, help="Claimed accuracy in percent, compared with the result.  [default: 98]"
)
@cluster_option
@click.option(
    "--cluster-workers",
    type=click.IntRange(1),
    help="Processes that train on the cluster.  [default: 1, or one per GPU]",
)
@source_options
@memory_option
@json_option
@recipe_options
def train(data_from: Path | None, weights_from: Path | None, as_json: bool, **options: Any) -> None:
    """Train a head and evaluate it once on the test set.

    \b
    attire train                                          official data, recipe fast
    attire train --recipe classic --data train.csv        the frozen VGG16 as it was asked for
    attire train --seed 1                                 seconds: features are cached
    """
    job, settings = _Job(**{name: options[name] for name in _Job.__dataclass_fields__}), _settings(options)
    named(settings.recipe_name or "fast")  # here already: a mistyped name is reported before PyTorch is loaded
    if job.out is not None and job.resumed is None and "RANK" not in os.environ:  # of several processes, one checks
        find_free_folder(job.out)

    from attire.model import distributed
    from attire.terminal import Terminal

    with distributed.process_group():
        distributed.main_process_first(lambda: get_sources(data_from, weights_from))
        terminal = Terminal(as_json or not distributed.is_main_process())
        try:
            job.check(settings)
            result = job.run(settings, terminal)
        except Stopped as stop:
            again = f"go on with: {distributed.torchrun_prefix()}attire train --resume {shlex.quote(stop.subject)}"
            raise Stopped(stop.subject, stop.what, do=again) from None
        finally:
            terminal.close()
        if distributed.is_main_process():
            _show_result(result, as_json)


def _show_result(result: "Run | Seeds | Folds", as_json: bool) -> None:
    from attire.cli.tables import comparison_table, terminal_summary
    from attire.terminal import columns, print_result
    from attire.training.seeds_and_folds import Folds, Seeds

    folder = result.folder
    if isinstance(result, Seeds):
        if as_json:
            click.echo(json.dumps({"run": str(folder), **result.to_json()}))
            return
        print_result(comparison_table([run.name for run in result.runs], result.results))
        click.echo(f"\nTest accuracy   {result}\nRuns            {folder}")
        return
    if as_json:
        click.echo(json.dumps({"run": str(folder), **result.result.metrics()}))
        return
    print_result(terminal_summary(result.result, columns()))
    files = f"\nReport          {folder}/report.html\nProbabilities   {folder}/evaluation/predictions.csv"
    click.echo(files if isinstance(result, Folds) else _next_steps(folder))


def _next_steps(folder: Path) -> str:
    run = shlex.quote(str(folder))
    return (
        f"\nRun             {run}\n"
        f"Report          {run}/report.html\n"
        f"Next            attire predict --model {run}/model picture.png\n"
        f"                attire evaluate {run}/model\n"
        f"                attire train --config {run}/config.json --seed 1   (features are cached)"
    )


@click.command(cls=Command)
@click.option(
    "--recipe", "recipe_name", help=f"{' or '.join(RECIPES)}.  [default: fast]", shell_complete=among(*RECIPES)
)
@click.option("--config", type=PATH, help="Recipe and data of a run: its config.json.")
@data_options
@device_option
@cluster_option
@source_options
@json_option
@recipe_options
def extract(
    cluster: str | None, data_from: Path | None, weights_from: Path | None, as_json: bool, **options: Any
) -> None:
    """Extract the features that a training will read into the cache, without training.

    \b
    attire extract                                        official data, recipe fast
    attire extract --recipe classic --data train.csv --cluster 10.0.0.5:6379

    Safe to stop: the same command goes on. One machine or many make the same features, byte for byte.
    """
    from attire.features.cache import cache_entries
    from attire.model.devices import choose_device
    from attire.terminal import Terminal
    from attire.training.experiment import Experiment
    from attire.training.extraction import Extraction
    from attire.training.run_config import RunConfig

    get_sources(data_from, weights_from)
    data, recipe, train_options = _settings(options).arguments()
    config, terminal = RunConfig.from_options(data, recipe, **train_options), Terminal(as_json)
    try:
        with cluster_at(cluster) as machines:
            experiment = Experiment.prepare(recipe, config.data, choose_device(config.device), terminal)
            make = machines.extract_shards if machines else None
            features = Extraction(experiment, terminal, make).extract_all()
    except KeyboardInterrupt:
        raise Stopped("attire extract", "stopped, what was finished is kept", do="the same command goes on") from None
    finally:
        terminal.close()
    keys = {entry.folder.name for entry in features}
    show_entries([entry for entry in cache_entries() if entry.key in keys], as_json)
