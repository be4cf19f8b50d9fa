"""train, extract: a run, or the features that it will read."""

import json
import os
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

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
from attire.recipes import RECIPES, Recipe, named
from attire.storage.run_folder import find_free_folder

# What `train` alone asks for, as if it had not been given.
_ONLY_TRAINED = {"test_size": None, "cache": None, "claim": None, "log": None, "teachers": ()}


def _share_or_count(text: str) -> float | int:
    """1.0 is all of something, 1 is one row."""
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise UsageError("--test-size", f"expected a share such as 0.2 or a count, found {text!r}") from None


@click.command(cls=Command)
@click.option(
    "--recipe",
    "recipe_name",
    default=None,
    help=f"{' or '.join(RECIPES)}.  [default: fast]",
    shell_complete=among(*RECIPES),
)
@click.option("--config", type=PATH, help="A run's config.json: its recipe and data again.")
@click.option("--resume", "resumed", type=NAME, metavar="RUN", help="Go on with a run that was stopped.")
@data_options
@click.option(
    "--test-size",
    type=_share_or_count,
    help="Share of one file, or rows of it, that test.  [default: 0.2]",
    metavar="N",
)
@click.option("--out", type=NAME, metavar="FOLDER", help="The run's folder.  [default: runs/1, runs/2 ...]")
@click.option("--seeds", type=click.IntRange(2), help="So many runs that differ in their seed: mean and deviation.")
@click.option("--folds", type=click.IntRange(2), help="Cross-validation over the training rows; no test set is read.")
@device_option
@click.option("--cache/--no-cache", default=None, help="Train from cached features, or through VGG16 in every epoch.")
@click.option(
    "--teacher", "teachers", multiple=True, metavar="RUN", help="Learn from its answers too; several: average."
)
@click.option("--log", type=click.Choice(["tensorboard"]), help="Also write the curves for TensorBoard (an extra).")
@click.option("--claim", type=float, default=None, help="Accuracy in % to check.  [default: 98]")
@cluster_option
@click.option(
    "--cluster-workers", type=click.IntRange(1), help="Processes that train there.  [default: 1, or one a GPU]"
)
@source_options
@memory_option
@json_option
@recipe_options
def train(
    recipe_name: str | None,
    config: Path | None,
    resumed: str | None,
    out: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a classifier and measure it once on the test set.

    \b
    attire train                                          official data, recipe fast
    attire train --recipe classic --data train.csv        the frozen VGG16 as it was asked for
    attire train --seed 1                                 seconds: features are cached
    """
    named(recipe_name or "fast")  # here already: what is mistyped is told before PyTorch is loaded
    if out is not None and resumed is None and "RANK" not in os.environ:  # of several processes, one asks for all
        find_free_folder(out)

    from attire.model import distributed

    sources = options.pop("data_from"), options.pop("weights_from")
    with distributed.process_group():
        distributed.main_process_first(lambda: get_sources(*sources))
        found = _trained(recipe_name, config, resumed, out, as_json, options)
        if distributed.is_main_process():
            _show_trained(found, as_json)


def _trained(
    recipe_name: str | None,
    config: Path | None,
    resumed: str | None,
    out: str | None,
    as_json: bool,
    options: dict[str, Any],
) -> Any:
    """The run, the seeds or the folds that `attire train` is asked for, or that it is to go on with."""
    from attire.model import distributed
    from attire.terminal import Terminal
    from attire.training import run as training_run
    from attire.training import seeds_and_folds
    from attire.training.run import resume

    watch, seeds, folds = Terminal(as_json or not distributed.is_main_process()), options.pop("seeds"), options.pop("folds")
    cluster, workers = options.pop("cluster"), options.pop("cluster_workers")
    _check_cluster(cluster, workers, seeds, folds, options["cache"], resumed)
    try:
        if resumed is not None:
            given = [name for name, value in options.items() if value not in (None, ()) and name != "device"]
            if given or recipe_name or config or out or seeds or folds:
                raise UsageError("--resume", "goes on with the run's own settings", do="leave the other options out")
            if seeds_and_folds.is_series(resumed):
                return seeds_and_folds.resume_series(resumed, watch)
            with cluster_at(cluster, workers or 0) as machines:
                return resume(resumed, watch, machines)
        arguments = {**_train_arguments(recipe_name, config, options), "run_dir": out, "progress": watch}
        if seeds or folds:
            return _train_many(seeds, folds, arguments)
        with cluster_at(cluster, workers or 0) as machines:
            return training_run.train(**arguments, cluster=machines)
    except Stopped as stop:
        again = f"go on with: {distributed.torchrun_prefix()}attire train --resume {shlex.quote(stop.subject)}"
        raise Stopped(stop.subject, stop.what, do=again) from None
    finally:
        watch.close()


def _check_cluster(
    cluster: str | None, workers: int | None, seeds: int | None, folds: int | None, cache: bool | None, resumed: Any
) -> None:
    from attire.training.seeds_and_folds import is_series

    if workers and cluster is None:
        raise UsageError("--cluster-workers", "given without --cluster")
    if cluster is None:
        return
    if seeds or folds or (resumed and is_series(resumed)):
        do = "extract there first: attire extract --cluster"
        raise UsageError("--cluster", "trains one run at a time", do=do)
    if cache is False:
        raise UsageError("--cluster", "needs cached features", do="leave --no-cache out")


def _train_many(seeds: int | None, folds: int | None, arguments: dict[str, Any]) -> Any:
    from attire.training import seeds_and_folds

    if seeds and folds:
        raise UsageError("--folds", "given together with --seeds", do="give one of them")
    if seeds:
        return seeds_and_folds.train_seeds(seeds, **arguments)
    arguments.pop("log")
    if arguments.pop("teacher"):
        raise UsageError("--teacher", "given together with --folds", do="a teacher has seen the rows of every fold")
    if not arguments.pop("cache"):
        raise UsageError("--folds", "needs cached features", do="leave --no-cache out")
    return seeds_and_folds.cross_validate(cast(int, folds), **arguments)


def _train_arguments(name: str | None, config: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """What `runs.train` takes: the named or stored recipe, changed by the flags that were given."""
    from attire import recipes
    from attire.storage import files

    stored = files.read_json(config) if config else {}
    if name and stored:
        raise UsageError("--recipe", "given together with --config", do="give one of them")
    recipe = recipes.from_json(stored.get("recipe", {}), str(config)) if stored else recipes.named(name or "fast")
    names = {field.name for field in fields(Recipe)}
    changes = {key: value for key, value in options.items() if key in names and value is not None}
    for field in {"hidden", "conv"} & set(changes):
        changes[field] = numbers(f"--{field}", changes[field])
    data = stored.get("data", {})
    given = {key: options[key] if options[key] is not None else data.get(key) for key in ("data", "test", "classes")}
    size = options["test_size"] if options["test_size"] is not None else data.get("test_size", 0.2)
    claim = options["claim"] / 100 if options["claim"] is not None else stored.get("claimed", 0.98)
    if not 0 < claim <= 1:
        raise UsageError("--claim", f"expected a percentage above 0, at most 100, found {options['claim']}")
    return {
        "recipe": replace(recipe, **changes),
        "data": given["data"],
        "test": given["test"],
        "classes": class_names(given["classes"]),
        "test_size": size,
        "device": options["device"],
        "cache": options["cache"] if options["cache"] is not None else stored.get("cache", True),
        "claimed": claim,
        "log": options["log"] or stored.get("log"),
        "teacher": options["teachers"] or stored.get("teacher"),
    }


def _show_trained(found: Any, as_json: bool) -> None:
    """The end of `attire train`: of one run, of a series of seeds, or of folds."""
    from attire.cli.tables import comparison_table, terminal_summary
    from attire.evaluation.run_result import metrics
    from attire.terminal import columns, print_result
    from attire.training.seeds_and_folds import Folds, Seeds

    if isinstance(found, Seeds):
        if as_json:
            click.echo(json.dumps({"run": str(found.folder), **found.to_json()}))
            return
        print_result(comparison_table([run.name for run in found.runs], found.results))
        click.echo(f"\nTest accuracy   {found}\nRuns            {found.folder}")
        return
    if as_json:
        click.echo(json.dumps({"run": str(found.folder), **metrics(found.result)}))
        return
    print_result(terminal_summary(found.result, columns()))
    told = f"\nReport          {found.folder}/report.html\nProbabilities   {found.folder}/evaluation/predictions.csv"
    click.echo(told if isinstance(found, Folds) else _next_steps(found.folder))


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
@click.option("--config", type=PATH, help="A run's config.json: its recipe and data.")
@data_options
@device_option
@cluster_option
@source_options
@json_option
@recipe_options
def extract(recipe_name: str | None, config: Path | None, cluster: str | None, as_json: bool, **options: Any) -> None:
    """Put the features that a training will read into the cache, without training.

    \b
    attire extract                                        official data, recipe fast
    attire extract --recipe classic --data train.csv --cluster 10.0.0.5:6379

    Safe to stop: the same command goes on. What is made, on one machine or on many, is the same, byte for byte.
    """
    from attire.data.loading import DataChoice
    from attire.features.cache import cache_entries
    from attire.model.devices import choose_device
    from attire.terminal import Terminal
    from attire.training.experiment import Experiment

    get_sources(options.pop("data_from"), options.pop("weights_from"))
    told = _train_arguments(recipe_name, config, {**_ONLY_TRAINED, **options})
    names = told["classes"] and tuple(told["classes"])
    source, watch = DataChoice(told["data"], told["test"], told["test_size"], names), Terminal(as_json)
    try:
        with cluster_at(cluster) as machines:
            make = machines.extract_shards if machines else None
            made = Experiment(told["recipe"], source, choose_device(told["device"]), watch, make).extract_all()
    except KeyboardInterrupt:
        raise Stopped("attire extract", "stopped, what was finished is kept", do="the same command goes on") from None
    finally:
        watch.close()
    keys = {found.folder.name for found in made}
    show_entries([entry for entry in cache_entries() if entry.key in keys], as_json)
