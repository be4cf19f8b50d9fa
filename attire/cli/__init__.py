"""The command line: one short function per command. The only code that knows argv."""

import io
import json
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import click

from attire import __version__, shell
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
from attire.errors import AttireError, AttireWarning, Stopped, UsageError, one_line
from attire.recipes import BACKENDS, RECIPES, Recipe
from attire.shell import among

if TYPE_CHECKING:
    from attire.classifier import Classifier
    from attire.features import CacheEntry

# What `train` alone asks for, as if it had not been given.
ONLY_TRAINED = {"test_size": None, "cache": None, "claim": None, "log": None, "teachers": ()}


@click.group(cls=shell.Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="attire")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Garment classification by transfer learning with VGG16, measured honestly.

    \b
    attire train                       the official Fashion-MNIST, recipe fast
    attire train --data mine.csv       your own labelled images
    attire predict a.png               the answer for a picture, by the model that ships
    """


@cli.command()
@source_options
@json_option
def fetch(data_from: Path | None, weights_from: Path | None, as_json: bool) -> None:
    """Fetch and verify the official data and VGG16's weights; what is there already is only verified.

    \b
    attire fetch
    attire fetch --data-from FOLDER --weights-from FILE     without a network
    """
    from attire import fetch as fetching
    from attire.terminal import Terminal, print_result

    watch = Terminal(as_json)
    data = fetching.official_data(data_from, watch.advance)
    weights = fetching.vgg16_weights(weights_from, watch.advance)
    watch.close()
    if as_json:
        click.echo(json.dumps({"data": str(data), "weights": str(weights)}))
    else:
        print_result(f"Data      {data}   verified\nWeights   {weights}   verified")


def share_or_count(text: str) -> float | int:
    """1.0 is all of something, 1 is one row."""
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise UsageError("--test-size", f"expected a share such as 0.2 or a count, found {text!r}") from None


@cli.command()
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
    "--test-size", type=share_or_count, help="Share of one file, or rows of it, that test.  [default: 0.2]", metavar="N"
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
    from attire import ranks

    sources = options.pop("data_from"), options.pop("weights_from")
    with ranks.joined():
        ranks.after_first(lambda: get_sources(*sources))
        found = trained(recipe_name, config, resumed, out, as_json, options)
        if ranks.leads():
            show_trained(found, as_json)


def trained(
    recipe_name: str | None,
    config: Path | None,
    resumed: str | None,
    out: str | None,
    as_json: bool,
    options: dict[str, Any],
) -> Any:
    """The run, the seeds or the folds that `attire train` is asked for, or that it is to go on with."""
    from attire import ranks, runs, series
    from attire.terminal import Terminal

    watch, seeds, folds = Terminal(as_json or not ranks.leads()), options.pop("seeds"), options.pop("folds")
    cluster, workers = options.pop("cluster"), options.pop("cluster_workers")
    check_cluster(cluster, workers, seeds, folds, options["cache"], resumed)
    try:
        if resumed is not None:
            given = [name for name, value in options.items() if value not in (None, ()) and name != "device"]
            if given or recipe_name or config or out or seeds or folds:
                raise UsageError("--resume", "goes on with the run's own settings", do="leave the other options out")
            if series.is_series(resumed):
                return series.resume_series(resumed, watch)
            with cluster_at(cluster, workers or 0) as machines:
                return runs.resume(resumed, watch, machines)
        arguments = {**train_arguments(recipe_name, config, options), "run_dir": out, "watcher": watch}
        if seeds or folds:
            return train_many(seeds, folds, arguments)
        with cluster_at(cluster, workers or 0) as machines:
            return runs.train(**arguments, cluster=machines)
    except Stopped as stop:
        again = f"go on with: {ranks.command()}attire train --resume {shlex.quote(stop.subject)}"
        raise Stopped(stop.subject, stop.what, do=again) from None
    finally:
        watch.close()


def check_cluster(
    cluster: str | None, workers: int | None, seeds: int | None, folds: int | None, cache: bool | None, resumed: Any
) -> None:
    from attire.series import is_series

    if workers and cluster is None:
        raise UsageError("--cluster-workers", "given without --cluster")
    if cluster is None:
        return
    if seeds or folds or (resumed and is_series(resumed)):
        do = "extract there first: attire extract --cluster"
        raise UsageError("--cluster", "trains one run at a time", do=do)
    if cache is False:
        raise UsageError("--cluster", "needs cached features", do="leave --no-cache out")


def train_many(seeds: int | None, folds: int | None, arguments: dict[str, Any]) -> Any:
    from attire import series

    if seeds and folds:
        raise UsageError("--folds", "given together with --seeds", do="give one of them")
    if seeds:
        return series.train_seeds(seeds, **arguments)
    arguments.pop("log")
    if arguments.pop("teacher"):
        raise UsageError("--teacher", "given together with --folds", do="a teacher has seen the rows of every fold")
    if not arguments.pop("cache"):
        raise UsageError("--folds", "needs cached features", do="leave --no-cache out")
    return series.cross_validate(cast(int, folds), **arguments)


def show_trained(found: Any, as_json: bool) -> None:
    """The end of `attire train`: of one run, of a series of seeds, or of folds."""
    from attire.report import comparison_table, terminal_summary
    from attire.results import metrics
    from attire.series import Folds, Seeds
    from attire.terminal import columns, print_result

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
    click.echo(told if isinstance(found, Folds) else next_steps(found.folder))


def train_arguments(name: str | None, config: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """What `runs.train` takes: the named or stored recipe, changed by the flags that were given."""
    from attire import files, recipes

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


@cli.command()
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
    from attire import features
    from attire.devices import choose_device
    from attire.stages import DataChoice, Stage
    from attire.terminal import Terminal

    get_sources(options.pop("data_from"), options.pop("weights_from"))
    told = train_arguments(recipe_name, config, {**ONLY_TRAINED, **options})
    names = told["classes"] and tuple(told["classes"])
    source, watch = DataChoice(told["data"], told["test"], told["test_size"], names), Terminal(as_json)
    try:
        with cluster_at(cluster) as machines:
            make = machines.extract_shards if machines else None
            made = Stage(told["recipe"], source, choose_device(told["device"]), watch, make).extract_all()
    except KeyboardInterrupt:
        raise Stopped("attire extract", "stopped, what was finished is kept", do="the same command goes on") from None
    finally:
        watch.close()
    keys = {found.folder.name for found in made}
    show_entries([entry for entry in features.cache_entries() if entry.key in keys], as_json)


def show_entries(entries: "list[CacheEntry]", as_json: bool, **more: Any) -> None:
    """The end of `attire extract` and of `attire cache`."""
    from attire.features import cache_folder
    from attire.files import human_size

    if as_json:
        click.echo(json.dumps({**more, "entries": [entry.to_json() for entry in entries]}))
        return
    for entry in entries:
        click.echo(f"{entry.key[:12]}  {human_size(entry.size):>9}  {entry.describe()}")
    click.echo(f"{len(entries)} entries, {human_size(sum(e.size for e in entries))} in {cache_folder()}")


def next_steps(folder: Path) -> str:
    run = shlex.quote(str(folder))
    return (
        f"\nRun             {run}\n"
        f"Report          {run}/report.html\n"
        f"Next            attire predict --model {run}/model picture.png\n"
        f"                attire evaluate {run}/model\n"
        f"                attire train --config {run}/config.json --seed 1   (features are cached)"
    )


@cli.command()
@click.argument("bundle", type=PATH)
@data_options
@click.option(
    "--part", type=click.Choice(["train", "test"]), default="test", show_default=True, help="Of data that has both."
)
@click.option(
    "--backend",
    default="torch",
    show_default=True,
    help="torch, openvino or openvino-int8 (an extra).",
    shell_complete=among(*BACKENDS),
)
@click.option("--views", type=int, help="Views averaged, each a forward pass.  [default: the bundle's own number]")
@click.option("--out", type=PATH, help="Write report, tables and pictures into this new folder.")
@device_option
@memory_option
@json_option
def evaluate(
    bundle: Path,
    data: str | None,
    test: str | None,
    classes: str | None,
    part: Any,
    backend: str,
    views: int | None,
    out: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure a bundle, or an exported file, on labelled images: by default the official 10,000 test images.

    \b
    attire evaluate runs/1/model
    attire evaluate model.onnx --data mine.csv --out measured     with report, tables and pictures
    """
    from attire import runs
    from attire.report import class_table, write_report
    from attire.results import metrics, save_result
    from attire.scoring import evaluate_bundle
    from attire.terminal import Terminal, columns, print_result

    watch, folder = Terminal(as_json), runs.free_folder(out) if out else None
    try:
        result = evaluate_bundle(bundle, test or data, part, class_names(classes), backend, device, watch, views)
    finally:
        watch.close()
    if folder:
        save_result(folder, result)
        write_report(folder, result)
    if as_json:
        click.echo(json.dumps(metrics(result)))
        return
    print_result(f"Accuracy        {result.test.accuracy}\nClaim check     {result.claim}\n{passes(result.config)}")
    print_result(class_table(result.test, columns()))


def passes(config: Any) -> str:
    """What an answer costs where it takes more than one forward pass."""
    return f"Views           an answer takes {config['views']} forward passes\n" if config["views"] > 1 else ""


@cli.command()
@click.argument("models", nargs=-1, required=True, type=PATH, metavar="RUN RUN...")
@click.option("--data", metavar="PATH", help="As for evaluate.  [default: the official test images]")
@click.option("--classes", help="Class names in the order of their labels, separated by commas.")
@click.option(
    "--part", type=click.Choice(["train", "test"]), default="test", show_default=True, help="Of data that has both."
)
@click.option("--views", type=int, help="Views averaged by each member.  [default: its own number]")
@click.option("--out", type=PATH, help="Write report, tables and ensemble.json into this folder.")
@device_option
@memory_option
@json_option
def ensemble(
    models: tuple[Path, ...], data: str | None, classes: str | None, out: Path | None, as_json: bool, **options: Any
) -> None:
    """Measure several runs or bundles as one model, which averages their probabilities.

    \b
    attire ensemble runs/1 runs/2 runs/3
    attire ensemble runs/1 runs/2 --views 2 --out both    then: attire ensemble both/ensemble.json
    """
    from attire import runs
    from attire.report import comparison_table, write_report
    from attire.results import save_result
    from attire.scoring import evaluate_ensemble
    from attire.terminal import Terminal, print_result

    watch, folder = Terminal(as_json), runs.free_folder(out) if out else None
    try:
        found = evaluate_ensemble(models, data, classes=class_names(classes), watcher=watch, **options)
    finally:
        watch.close()
    if folder:
        save_result(folder, found.result)
        write_report(folder, found.result)
        found.ensemble.save(folder / "ensemble.json")
    if as_json:
        click.echo(json.dumps(found.to_json()))
        return
    print_result(comparison_table(found.names, (found.result, *found.members)))
    click.echo(f"\nAccuracy        {found.result.test.accuracy}\nClaim check     {found.result.claim}")
    click.echo(f"{passes(found.result.config)}{found.pair}")


@cli.command()
@click.argument("arguments", nargs=-1, type=NAME, metavar="FILE...")
@click.option("--model", type=PATH, help="A bundle, a run or an exported file.  [default: ours]")
@click.option(
    "--format", "form", type=click.Choice(["table", "jsonl", "csv"]), help="Of the answers.  [default: table]"
)
@click.option("--top", type=click.IntRange(1), default=3, show_default=True, help="How many classes to show.")
@click.option("--show", type=PATH, metavar="FOLDER", help="What the model saw, as PNG.")
@click.option("--out", type=NAME, metavar="PATH", help="Of Parquet: the answers, a Parquet file or a folder of parts.")
@device_option
@cluster_option
@click.option("--json", "as_json", is_flag=True, help="The same as --format jsonl: an object a line.")
def predict(
    arguments: tuple[str, ...],
    model: Path | None,
    form: str | None,
    as_json: bool,
    device: str,
    out: str | None,
    cluster: str | None,
    **options: Any,
) -> None:
    """Name the garment in pictures: files, folders, patterns, rows of CSV files, or - for standard input.

    \b
    attire predict shoe.jpg
    attire predict photos/ 'more/*.png' --format csv > answers.csv
    attire predict --model runs/1/model --json fashion-mnist_test.csv
    attire predict mine.parquet --out answers.parquet      resumable; s3:// and such too

    Needs no training and no network: a trained model is part of Attire. What looks unlike the training images is "none
    of the ten"; so are about 5 % of garments. A bad file is one line on stderr; the others are answered, and the exit
    status is 1. A CSV file holds pixel1 .. pixel784, with or without labels. --show writes one strip a picture, into
    a folder, or into a file for a single picture.
    """
    from attire import answers

    if as_json and form not in (None, "jsonl"):
        raise UsageError("--json", f"given together with --format {form}", do="give one of them")
    path, asked = answers.split_model(arguments, model)
    if out is not None and (form or options["show"] or len(asked) != 1):
        what = "neither --format nor --show goes with it" if len(asked) == 1 else f"{len(asked)} inputs, expected one"
        raise UsageError("--out", what)
    opened = answers.open_model(path, device)
    if answers.lacks_verdict(opened):
        from attire.classifier import CANNOT_REJECT, TRAIN_AGAIN

        click.echo(f"warning: {one_line(str(path))}: {CANNOT_REJECT}; {TRAIN_AGAIN}", err=True)
    if out is not None:
        if cluster is not None:
            raise UsageError("--cluster", "given together with --out", do="give one of them")
        failed = predict_parquet(asked[0], out, opened, path, options["top"], as_json)
    else:
        with cluster_at(cluster) as machines:
            ask = partial(machines.answer, path, device) if machines else None
            failed = answers.tell(asked, opened, form="jsonl" if as_json else form or "table", ask=ask, **options)
    if failed:
        click.get_current_context().exit(1)


def predict_parquet(where: str, out: str, model: Any, path: Path | None, top: int, as_json: bool) -> int:
    """Parquet to Parquet; how many rows have no answer."""
    from attire import bulk
    from attire.terminal import Terminal

    watch = Terminal(as_json)
    try:
        done = bulk.predict(
            where,
            out,
            model,
            bulk.model_digest(path),
            top=top,
            progress=lambda rows, total: watch.advance("Pictures", rows, total),
            complain=lambda line: click.echo(f"error: {line}", err=True),
        )
    finally:
        watch.close()
    click.echo(json.dumps(done.to_json()) if as_json else f"{done}")
    return done.errors


@cli.command()
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, default="release", show_default=True, help="The new bundle.")
@json_option
def release(run: Path, out: Path, as_json: bool) -> None:
    """Make a run's bundle fit to ship: 16-bit weights, ONNX Runtime's graph, card and report, measured again.

    \b
    attire release runs/1 --out release

    Refused where it does not answer as the run's bundle does on the official test images. What is at --out is replaced
    once all of it is written.
    """
    from attire.release import release as make
    from attire.terminal import Terminal

    watch = Terminal(as_json)
    try:
        made = make(run, out, watch)
    finally:
        watch.close()
    click.echo(json.dumps({"bundle": str(out), **made}) if as_json else f"{out}")


@cli.command()
@click.argument("paths", nargs=-1, required=True, type=PATH, metavar="FILE...")
@click.option("--model", type=PATH, metavar="BUNDLE", help="Whose answer.  [default: the one that ships]")
@click.option("--out", type=PATH, default=".", help="Folder for the pictures.  [default: here]")
@click.option("--label", metavar="CLASS", help="What speaks for this class.  [default: for the answer]")
@device_option
@json_option
def explain(
    paths: tuple[Path, ...], model: Path | None, out: Path, label: str | None, device: str, as_json: bool
) -> None:
    """Show where in a picture the answer comes from, and the training images it is most like.

    \b
    attire explain shoe.jpg                            writes shoe-explained.png
    attire explain --model runs/1/model --label Coat shirt.jpg

    Bright in the heat map is what the class loses most by when it is covered. Distances: 0 for the same picture, 1.4
    for unrelated ones. A bad file is one line on stderr; the others are explained, and the exit status is 1.
    """
    from attire.classifier import load_bundle
    from attire.explain import NO_NEIGHBOURS

    classifier, failed, taken = load_bundle(model, device), 0, set[str]()
    if classifier.neighbours is None:
        click.echo(f"warning: {one_line(str(model or 'shipped'))}: {NO_NEIGHBOURS}; train it again", err=True)
    for path in paths:
        try:
            explain_file(classifier, path, out, label, as_json, taken)
        except UsageError:
            raise
        except AttireError as error:
            click.echo(f"error: {error}", err=True)
            failed += 1
    if failed:
        click.get_current_context().exit(1)


def explain_file(
    classifier: "Classifier", path: Path, out: Path, label: str | None, as_json: bool, taken: set[str]
) -> None:
    from attire import explain as explaining

    original, image = explaining.open_picture(path)
    found = explaining.explain(classifier, image, label)
    picture = out / free_name(path.stem, taken)
    explaining.write_sheet(picture, original, image, found)
    if as_json:
        told = {"file": str(path), **explaining.to_json(found), "picture": str(picture)}
        click.echo(json.dumps(told))
        return
    click.echo(f"{one_line(str(path)):24} {found.prediction}")
    if found.neighbours:
        near = ", ".join(f"{one.label} {one.distance:.2f}" for one in found.neighbours)
        click.echo(f"{'':24} nearest      {found.tally}   ({near})")
    click.echo(f"{'':24} picture      {one_line(str(picture))}")


def free_name(stem: str, taken: set[str]) -> str:
    """`shoe-explained.png`; `shoe-2-explained.png` where another picture of this call is called so."""
    numbered = (f"{stem}{f'-{i}' if i > 1 else ''}-explained.png" for i in range(1, len(taken) + 2))
    name = next(name for name in numbered if name not in taken)
    taken.add(name)
    return name


@cli.command()
@click.argument("bundle", type=PATH)
@click.option(
    "--format",
    "kind",
    default="onnx",
    show_default=True,
    help="onnx, openvino, torch-export or safetensors.",
    shell_complete=among("onnx", "openvino", "torch-export", "safetensors"),
)
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    help="fp32, bf16 or int8; not every format has each.",
    shell_complete=among("fp32", "bf16", "int8"),
)
@click.option("--out", type=PATH, help="The file.  [default: the bundle's name and .onnx ...]")
@click.option("--max-drop", default=0.3, show_default=True, help="Points of accuracy that bf16 and int8 may lose.")
@json_option
def export(bundle: Path, kind: str, precision: str, out: Path | None, max_drop: float, as_json: bool) -> None:
    """Write a bundle for another runtime, preprocessing inside, if it is proved equal on 2,000 test images.

    \b
    attire export runs/1/model                    model.onnx, fp32: probabilities within 0.0001
    attire export runs/1/model --precision int8   a quarter of the size; its accuracy is measured
    """
    from attire.export import export as write_export
    from attire.terminal import Terminal

    watch = Terminal(as_json)
    try:
        made = write_export(bundle, kind, out=out, precision=precision, max_drop=max_drop / 100, watcher=watch)
    finally:
        watch.close()
    if as_json:
        click.echo(json.dumps({"file": str(made.path), **made.facts}))
    else:
        click.echo(f"{made.path}")


@cli.command("export-csv")
@click.argument("folder", type=PATH)
@source_options
@json_option
def export_csv(folder: Path, data_from: Path | None, weights_from: Path | None, as_json: bool) -> None:
    """Write the official sets in Kaggle's form: fashion-mnist_train.csv and fashion-mnist_test.csv.

    \b
    attire export-csv data/
    """
    from attire import files
    from attire.data import load_dataset, write_csv

    get_sources(data_from, weights_from)
    files.make_dir(folder)
    written = {}
    for part in ("train", "test"):
        path = folder / f"fashion-mnist_{part}.csv"
        dataset = load_dataset(None, part=part)
        write_csv(dataset, path)
        written[part] = {"file": str(path), "rows": len(dataset)}
        if not as_json:
            click.echo(f"{path}   {len(dataset):,} rows")
    if as_json:
        click.echo(json.dumps(written))


@cli.command()
@click.option("--delete", "keys", metavar="KEY", multiple=True, help="Delete the entry whose key begins so.")
@click.option("--clear", is_flag=True, help="Delete all of them.")
@json_option
def cache(keys: tuple[str, ...], clear: bool, as_json: bool) -> None:
    """List the cached features with their size and what made them, copies of tables and of objects; or delete them.

    \b
    attire cache
    attire cache --delete 3f2a     the entry whose key begins so
    """
    from attire import copies, features, lookup, objects
    from attire.files import human_size

    freed = copies.delete_copies() + objects.delete_copies() if clear else 0
    if clear:
        keys = tuple(entry.key for entry in features.cache_entries())
    freed += sum(features.delete_entry(key) for key in keys) + lookup.delete_stale()
    entries, tables, fetched = features.cache_entries(), dict(copies.copies()), list(objects.copies())
    if not as_json:
        if keys or clear:
            click.echo(f"freed {human_size(freed)}")
        for key, size in tables.items():
            click.echo(f"{key[:12]}  {human_size(size):>9}  a CSV file or Parquet files, parsed")
        for key, url, size in fetched:
            click.echo(f"{key[:12]}  {human_size(size):>9}  a copy of {one_line(url)}")
    sizes = {url: size for _, url, size in fetched}
    show_entries(entries, as_json, freed=freed, tables=tables, objects=sizes)


@cli.command()
@click.argument("run", type=PATH)
@json_option
def report(run: Path, as_json: bool) -> None:
    """Write a finished run's report.html again, from the run's own files.

    \b
    attire report runs/1
    """
    from attire.report import write_report
    from attire.results import load_result

    page = write_report(run, load_result(run))
    click.echo(json.dumps({"page": str(page)}) if as_json else page)


@cli.command()
@click.option(
    "--data",
    type=NAME,
    metavar="PATH",
    help="As for train; only its training rows are used.  [default: the official set]",
)
@click.option("--classes", help="Class names in the order of their labels, separated by commas.")
@click.option("--sizes", default="32,48,64,96,112,160,224", show_default=True, help="Picture sides in px.")
@click.option("--boundaries", default="block2,block3,block4,block5", show_default=True, help="Where to tap VGG16.")
@click.option("--backgrounds", default="black", show_default=True, help="black, white or black,white.")
@click.option("--rows", type=click.IntRange(1), default=4000, show_default=True, help="Training images that fit.")
@click.option("--val", type=click.IntRange(1), default=3000, show_default=True, help="Training images that score.")
@click.option("--out", type=PATH, default="sweep", show_default=True, help="Goes on there.")
@device_option
@memory_option
@json_option
def sweep(sizes: str, boundaries: str, backgrounds: str, classes: str | None, as_json: bool, **options: Any) -> None:
    """Try every freeze boundary, picture size and pooling on a subset, and propose a recipe.

    \b
    attire sweep                                           the official set
    attire sweep --data mine.csv --sizes 32,48 --out tried

    Each is scored by a closed-form linear classifier on rows cut from the training set. Safe to stop: the same
    command goes on.
    """
    from attire.report import sweep_table
    from attire.sweep import sweep as run_sweep
    from attire.terminal import Terminal, print_result

    watch = Terminal(as_json)
    lists: dict[str, Any] = {
        "boundaries": boundaries.split(","),
        "backgrounds": backgrounds.split(","),
        "sizes": numbers("--sizes", sizes),
    }
    try:
        found = run_sweep(classes=class_names(classes), watcher=watch, **lists, **options)
    finally:
        watch.close()
    if as_json:
        click.echo(json.dumps(found.to_json()))
        return
    print_result(sweep_table(found.ranked[:20], found.front))
    click.echo(f"\nPicture         {found.folder}/sweep.png   (all {len(found.cells)} lines: sweep.csv)")
    click.echo(f"Proposed        {found.command()}   (the fastest within a standard error of the best)")


@cli.command()
@click.argument("compared", nargs=-1, required=True, type=PATH, metavar="RUN RUN...")
@click.option("--out", type=PATH, help="The page.  [default: compare-A-B.html beside the first]")
@json_option
def compare(compared: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Compare runs on the same test images: paired test, interval of the difference, where they disagree.

    \b
    attire compare runs/1 runs/2
    attire compare runs/1 measured          a folder that `attire evaluate --out` wrote
    """
    from attire.compare import compare as paired
    from attire.compare import write_comparison
    from attire.report import comparison_table
    from attire.terminal import print_result

    if out and out.suffix == ".json":
        raise UsageError(
            "--out", f"names the page, found {out.name!r}", do="end it in .html; the same in JSON lies beside it"
        )
    found = paired(compared)
    page = out or compared[0].parent / f"compare-{'-'.join(path.name for path in compared)}.html"
    write_comparison(found, page)
    if as_json:
        click.echo(json.dumps({"page": str(page), **found.to_json()}))
        return
    print_result(comparison_table(found.names, found.results))
    for pair in found.pairs:
        click.echo(f"{pair}")
    click.echo(f"\nReport          {page}")


@cli.command()
@click.argument("data", required=False, type=NAME)
@click.option("--test", type=NAME, metavar="FILE", help="This file or folder is the test set.")
@click.option("--classes", help="Class names in the order of their labels, separated by commas.")
@click.option("--run", type=PATH, help="Take this run's accuracy apart; tested on the same set.")
@click.option("--out", type=PATH, default="audit", show_default=True, help="A new folder.")
@device_option
@memory_option
@json_option
def audit(
    data: str | None,
    test: str | None,
    classes: str | None,
    run: Path | None,
    out: Path,
    device: str,
    as_json: bool,
) -> None:
    """Look for doubles, leaks between training and test part, odd images and wrong labels in DATA.

    \b
    attire audit                       the official data
    attire audit mine.csv              a file, as for train
    attire audit --run runs/1          and what that does to the accuracy of a run
    """
    from attire.audit import audit as look_through
    from attire.audit import write_audit
    from attire.report import audit_table
    from attire.runs import free_folder
    from attire.terminal import Terminal, print_result

    watch, folder = Terminal(as_json), free_folder(out)
    try:
        found = look_through(data, test=test, classes=class_names(classes), run=run, device=device, watcher=watch)
    finally:
        watch.close()
    page = write_audit(found, folder)
    if as_json:
        click.echo(json.dumps({"page": str(page), **found.to_json()}))
        return
    print_result(audit_table(found.counts(), found.accuracies))
    click.echo(f"\nReport          {page}")


@cli.command()
@click.argument("models", nargs=-1, type=PATH, metavar="BUNDLE EXPORT...")
@click.option("--data", type=NAME, metavar="PATH", help="Test images, as for evaluate.  [default: the official set]")
@click.option("--images", type=click.IntRange(0), default=0, help="Accuracy on so many of them.  [default: all]")
@click.option("--threads", type=click.IntRange(0), default=0, help="For PyTorch.  [default: the machine's]")
@click.option("--out", type=PATH, default="bench", show_default=True, help="A new folder.")
@click.option("--machine", is_flag=True, help="Instead: what this machine can do at most.")
@click.option("--quick", is_flag=True, help="With --machine: tiny, to see that it works; the figures are no limits.")
@json_option
def bench(models: tuple[Path, ...], machine: bool, quick: bool, as_json: bool, **options: Any) -> None:
    """Latency, throughput, memory, size and accuracy of a bundle and its exports, side by side in one run.

    \b
    attire bench runs/1/model model.onnx model.openvino
    attire bench --machine          matrix products in fp32, bf16, int8; memory and disk
    """
    if machine == bool(models) or quick > machine:
        do = "name a bundle, and the exports to compare with it, or give --machine"
        raise UsageError("attire bench", do if machine == bool(models) else "--quick goes with --machine")
    if machine:
        bench_machine(options["threads"], quick, as_json)
    else:
        bench_models(models, as_json=as_json, **options)


def bench_machine(threads: int, quick: bool, as_json: bool) -> None:
    from attire.machine import measure
    from attire.report import machine_table
    from attire.terminal import Terminal, print_result

    watch = Terminal(as_json)
    try:
        found = measure(threads=threads, quick=quick, watcher=watch)
    finally:
        watch.close()
    if as_json:
        click.echo(json.dumps(found.to_json()))
    else:
        print_result(machine_table(found))


def bench_models(
    models: tuple[Path, ...], data: str | None, images: int, threads: int, out: Path, as_json: bool
) -> None:
    from attire.bench import bench as measure
    from attire.bench import write_bench
    from attire.report import bench_table
    from attire.runs import free_folder
    from attire.terminal import Terminal, print_result

    watch, folder = Terminal(as_json), free_folder(out)
    try:
        found = measure(models, data, images=images, threads=threads, watcher=watch)
    finally:
        watch.close()
    picture = write_bench(found, folder)
    if as_json:
        click.echo(json.dumps({"picture": str(picture), **found.to_json()}))
        return
    print_result(bench_table(found))
    click.echo(f"\nPicture         {picture}")


@cli.command()
@click.option("--images", required=True, metavar="N", help="How many: 1e8, 100M.")
@click.option("--devices", default="8xcpu2", show_default=True, metavar="NxKIND", help="How many of what: 64xh100.")
@click.option("--recipe", "name", default="fast", show_default=True, help="fast or classic.")
@click.option("--input", "kind", default="png", show_default=True, help="rows (784 bytes), png (28x28) or photo.")
@click.option("--precision", default="bf16", show_default=True, help="Of extraction: fp32, bf16 or int8.")
@click.option("--batch-size", type=click.IntRange(1), help="Rows a step over all devices.  [default: the recipe's]")
@click.option("--price", type=float, help="Dollars an hour for one device.  [default: the kind's]")
@click.option("--store", type=float, default=100.0, show_default=True, help="GB/s that the store serves in all.")
@click.option("--mtbf", type=float, default=50_000.0, show_default=True, help="Hours a device runs between failures.")
@json_option
def plan(images: str, devices: str, name: str, kind: str, as_json: bool, store: float, **options: Any) -> None:
    """Hours, dollars and what breaks first, for more images and devices than we have: a model, not a measurement.

    \b
    attire plan --images 1e8 --devices 64xcpu2
    attire plan --images 1e10 --devices 64xh100 --input photo --price 2.5

    cpu2 and cpu2-old are measured; c7i.8xlarge, l4, a100 and h100 are assumed from published peaks and prices, and
    the table says so. How good the model is where it can be checked: docs/scale.md.
    """
    from attire import plan as planning
    from attire.recipes import named

    count, device = planning.parse_devices(devices)
    rows = planning.parse_images(images)
    made = planning.make(planning.Asked(rows, count, device, named(name), kind, store=store * 1e9, **options))
    click.echo(json.dumps(made.to_json()) if as_json else planning.text(made))


@cli.command()
@click.argument("bundle", required=False, type=PATH)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of this machine to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME", help="Also answer to this Host name.")
@click.option("--token-file", type=PATH, help="Want the token in this file, or in ATTIRE_TOKEN.")
@click.option("--max-queue", type=click.IntRange(1), default=128, show_default=True, help="Pictures that may wait.")
@click.option("--workers", type=click.IntRange(0), default=0, help="Threads that run the model.  [default: 2 on a CPU]")
@click.option("--threads", type=click.IntRange(0), default=0, help="PyTorch's in each.  [default: its share of cores]")
@click.option("--access-log", is_flag=True, help="A JSON line on stderr for each request.")
@cluster_option
@click.option("--replicas", type=click.IntRange(0), help="Copies on the cluster; 0 ends them.  [default: one a node]")
@click.option("--json", "as_json", is_flag=True, help="Say where it listens as one JSON object.")
@device_option
def serve(
    bundle: Path | None,
    host: str,
    port: int,
    hosts: tuple[str, ...],
    token_file: Path | None,
    cluster: str | None,
    replicas: int | None,
    as_json: bool,
    device: str,
    **limits: Any,
) -> None:
    """Answer over HTTP: a page for people, predictions for programs.

    \b
    attire serve                         the model that ships
    attire serve runs/1/model
    curl --data-binary @shoe.png -H 'Content-Type: image/png' http://127.0.0.1:8000/predict

    It listens on this machine alone unless --host says otherwise; then give it a token too. On a cluster that stays, it
    stays too: the same command with another bundle replaces the model while it answers, --replicas 0 ends it.
    """
    from attire import guards, listener
    from attire.answers import open_model
    from attire.bundles import find_bundle
    from attire.classifier import Classifier, load_bundle
    from attire.server import create_app

    if replicas is not None and cluster is None:
        raise UsageError("--replicas", "given without --cluster")
    folder = find_bundle(bundle)
    settings = {
        "hosts": (*guards.LOOPBACK, f"[{host}]" if ":" in host else host, *hosts),
        "token": read_token(token_file),
        "report": report_of(folder),
        **limits,
    }
    if cluster is not None:
        serve_on(cluster, folder, host, port, replicas, settings, device, as_json)
        return
    with listener.bind(host, port) as found:
        predictor = open_model(folder, device)
        classifier = predictor if isinstance(predictor, Classifier) else load_bundle(folder, device)
        app = create_app(classifier, predictor, **settings)
        told = where_it_serves(listener.url_of(found), described(classifier, folder), as_json)
        leave = app.state.service.leave
        ended = listener.serve(app, found, leave, lambda: click.echo(told))
    if ended == signal.SIGINT:
        raise Stopped("attire serve", "stopped; every accepted request was answered")


def serve_on(
    cluster: str,
    folder: Path,
    host: str,
    port: int,
    replicas: int | None,
    settings: dict[str, Any],
    device: str,
    as_json: bool,
) -> None:
    """`attire serve --cluster`: until Ctrl-C on a cluster of our own, else it stays there."""
    from attire.classifier import load_bundle

    if not port:
        raise UsageError("--port", "0 cannot be shared by a cluster", do="give a port")
    model = described(load_bundle(folder, "cpu"), folder)
    with cluster_at(cluster) as machines:
        assert machines
        if replicas == 0:
            machines.stop_serving()
            return
        url = machines.serve(folder, device, host, port, replicas or machines.nodes, settings)
        ends = "stop with Ctrl-C" if machines.alone else f"stop with: attire serve --cluster {cluster} --replicas 0"
        click.echo(where_it_serves(url, model, as_json, ends))
        if not machines.alone:
            return
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            raise Stopped("attire serve", "stopped; every accepted request was answered") from None
        finally:
            machines.stop_serving()


def where_it_serves(url: str, model: str, as_json: bool, ends: str = "stop with Ctrl-C") -> str:
    if as_json:
        return json.dumps({"url": url, "model": model, "version": __version__})
    return f"Attire {short_version()} on {url}   model {model}   {ends}"


def read_token(path: Path | None) -> str | None:
    """From a file or the environment, never from argv, which every user of the machine can read."""
    if path is None:
        return os.environ.get("ATTIRE_TOKEN") or None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise AttireError(path, "cannot read the token", getattr(error, "strerror", None) or "not UTF-8") from error
    if not token:
        raise AttireError(path, "holds no token", do="make one with: openssl rand -hex 16")
    return token


def report_of(bundle: Path) -> str | None:
    """The report beside a bundle, or of the run that it belongs to."""
    for path in (bundle / "report.html", bundle.parent / "report.html"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None


def short_version() -> str:
    return ".".join(__version__.split(".")[:2])


def described(classifier: "Classifier", bundle: Path) -> str:
    """`fast (94.5 %, 11 MB)`: recipe, measured accuracy, size of the weights."""
    from attire.bundles import WEIGHTS
    from attire.files import human_size

    facts = classifier.facts
    recipe, test = facts.get("recipe"), facts.get("test")
    name = recipe.get("name") if isinstance(recipe, dict) else facts.get("name")
    told = [f"{100 * test['accuracy']:.1f} %"] if isinstance(test, dict) and "accuracy" in test else []
    told.append(human_size((bundle / WEIGHTS).stat().st_size))
    return one_line(f"{name or bundle.name} ({', '.join(told)})" if told else f"{name or bundle.name}")


cli.add_command(shell.completion)
cli.add_command(shell.doctor)


def main() -> NoReturn:
    """The one place where errors become a line and an exit status."""
    debug = "--debug" in sys.argv
    warnings.showwarning = show_warning
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()  # None where the caller closed it
    try:
        status = cli.main(prog_name="attire", standalone_mode=False) or 0
    except SystemExit:  # what click and rich make of a pipe that is closed: `attire ... | head`
        status = 0
    except AttireError as error:
        status = fail(str(error), error.status, debug)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "attire"
        status = fail(f"{where}: {one_line(f'{shell.what(error)}; {shell.hint(error)}')}", 2, debug)
    except click.ClickException as error:
        status = fail(one_line(error.format_message()), 1, debug)
    except (KeyboardInterrupt, click.Abort):
        status = fail("stopped; what was finished is kept", 130, debug)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("allocate|out of memory", str(error)):
            raise
        status = fail("out of memory; try a smaller --image-size or --batch-size", 1, debug)
    except OSError as error:
        from attire import files

        name = str(error.filename or "attire")
        do = files.room_left(Path(name), error)
        status = fail(f"{one_line(name)}: {error.strerror or error}{'; ' if do else ''}{do}", 1, debug)
    sys.exit(status)


def fail(line: str, status: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    click.echo(f"error: {line}" if status != 130 else line, err=True)
    return status


def show_warning(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
    """Ours as one line; a library's in its own words, shortened to one."""
    text = str(message) if issubclass(category, AttireWarning) else f"{category.__name__}: {message}"
    click.echo(f"warning: {one_line(text.splitlines()[0] if text else '')}", err=True)
