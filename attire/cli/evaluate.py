"""evaluate, ensemble, compare, report, audit: how good models are, and the data that says so."""

import json
from pathlib import Path
from typing import Any

import click

from attire.cli.options import (
    BUNDLE,
    DATA,
    PATH,
    RUN,
    class_names,
    data_options,
    device_option,
    json_option,
    memory_option,
)
from attire.cli.shell import Command, among
from attire.errors import UsageError
from attire.recipes import BACKENDS
from attire.storage import files
from attire.storage.run_folder import find_free_folder

_part_option = click.option(
    "--part", type=click.Choice(["train", "test"]), default="test", show_default=True, help="Of data that has both."
)


@click.command(cls=Command)
@click.argument("bundle", type=BUNDLE)
@data_options
@_part_option
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
    folder = find_free_folder(out) if out else None

    from attire.cli.tables import class_table
    from attire.evaluation.report import write_report
    from attire.evaluation.run_result import metrics, save_result
    from attire.inference.scoring import evaluate_bundle
    from attire.terminal import Terminal, columns, print_result

    watch = Terminal(as_json)
    try:
        result = evaluate_bundle(bundle, test or data, part, class_names(classes), backend, device, watch, views)
    finally:
        watch.close()
    if folder:
        with files.atomic_folder(folder) as part:
            save_result(part, result)
            write_report(part, result)
    if as_json:
        click.echo(json.dumps(metrics(result)))
        return
    print_result(f"Accuracy        {result.test.accuracy}\nClaim check     {result.claim}\n{_passes(result.config)}")
    print_result(class_table(result.test, columns()))


@click.command(cls=Command)
@click.argument("models", nargs=-1, required=True, type=BUNDLE, metavar="RUN RUN...")
@click.option("--data", type=DATA, metavar="PATH", help="As for evaluate.  [default: the official test images]")
@click.option("--classes", help="Class names in the order of their labels, separated by commas.")
@_part_option
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
    folder = find_free_folder(out) if out else None

    from attire.cli.tables import comparison_table
    from attire.evaluation.report import write_report
    from attire.evaluation.run_result import save_result
    from attire.inference.scoring import evaluate_ensemble
    from attire.terminal import Terminal, print_result

    watch = Terminal(as_json)
    try:
        found = evaluate_ensemble(models, data, classes=class_names(classes), progress=watch, **options)
    finally:
        watch.close()
    if folder:
        with files.atomic_folder(folder) as part:
            save_result(part, found.result)
            write_report(part, found.result)
            found.ensemble.save(part / "ensemble.json")
    if as_json:
        click.echo(json.dumps(found.to_json()))
        return
    print_result(comparison_table(found.names, (found.result, *found.members)))
    click.echo(f"\nAccuracy        {found.result.test.accuracy}\nClaim check     {found.result.claim}")
    click.echo(f"{_passes(found.result.config)}{found.pair}")


def _passes(config: Any) -> str:
    """What an answer costs where it takes more than one forward pass."""
    return f"Views           an answer takes {config['views']} forward passes\n" if config["views"] > 1 else ""


@click.command(cls=Command)
@click.argument("run", type=RUN)
@json_option
def report(run: Path, as_json: bool) -> None:
    """Write a finished run's report.html again, from the run's own files.

    \b
    attire report runs/1
    """
    from attire.evaluation.report import write_report
    from attire.evaluation.run_result import load_result

    page = write_report(run, load_result(run))
    click.echo(json.dumps({"page": str(page)}) if as_json else page)


@click.command(cls=Command)
@click.argument("compared", nargs=-1, required=True, type=RUN, metavar="RUN RUN...")
@click.option("--out", type=PATH, help="The page.  [default: compare-A-B.html beside the first]")
@json_option
def compare(compared: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Compare runs on the same test images: paired test, interval of the difference, where they disagree.

    \b
    attire compare runs/1 runs/2
    attire compare runs/1 measured          a folder that `attire evaluate --out` wrote
    """
    from attire.cli.tables import comparison_table
    from attire.evaluation.compare import compare as paired
    from attire.evaluation.compare import write_comparison
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


@click.command(cls=Command)
@click.argument("data", required=False, type=DATA)
@click.option("--test", type=DATA, metavar="FILE", help="This file or folder is the test set.")
@click.option("--classes", help="Class names in the order of their labels, separated by commas.")
@click.option("--run", type=RUN, help="Take this run's accuracy apart; tested on the same set.")
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
    folder = find_free_folder(out)

    from attire.analysis.audit import audit as look_through
    from attire.analysis.audit import write_audit
    from attire.cli.tables import audit_table
    from attire.terminal import Terminal, print_result

    watch = Terminal(as_json)
    try:
        found = look_through(data, test=test, classes=class_names(classes), run=run, device=device, progress=watch)
    finally:
        watch.close()
    with files.atomic_folder(folder) as part:
        page = folder / write_audit(found, part).name
    if as_json:
        click.echo(json.dumps({"page": str(page), **found.to_json()}))
        return
    print_result(audit_table(found.counts(), found.accuracies))
    click.echo(f"\nReport          {page}")
