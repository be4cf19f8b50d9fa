"""evaluate, ensemble, compare, report, audit: how good models are, and the data that says so."""

import json
from collections.abc import Mapping
from contextlib import closing
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
    "--part",
    type=click.Choice(["train", "test"]),
    default="test",
    show_default=True,
    help="Which part of data that has both.",
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
@click.option(
    "--tta",
    type=int,
    help="Test-time augmentation: views averaged for an answer.  [default: the bundle's own number]",
)
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
    tta: int | None,
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
    from attire.evaluation.run_result import save_result
    from attire.inference.scoring import evaluate_bundle
    from attire.terminal import Terminal, columns, print_result

    names = class_names(classes)
    with closing(Terminal(as_json)) as progress:
        result = evaluate_bundle(bundle, test or data, part, names, backend, device, progress, tta)
    if folder:
        with files.atomic_folder(folder) as unfinished:
            save_result(unfinished, result)
            write_report(unfinished, result)
    if as_json:
        click.echo(json.dumps(result.metrics()))
        return
    print_result(
        f"Accuracy        {result.test.accuracy}\nClaim check     {result.claim}\n{_describe_passes(result.config)}"
    )
    print_result(class_table(result.test, columns()))


@click.command(cls=Command)
@click.argument("models", nargs=-1, required=True, type=BUNDLE, metavar="RUN RUN...")
@click.option("--data", type=DATA, metavar="PATH", help="As for evaluate.  [default: the official test images]")
@click.option("--classes", help="Class names in the order of their labels, separated by commas.")
@_part_option
@click.option(
    "--tta", type=int, help="Test-time augmentation: views averaged by each member.  [default: its own number]"
)
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
    attire ensemble runs/1 runs/2 --tta 2 --out both    then: attire ensemble both/ensemble.json
    """
    folder = find_free_folder(out) if out else None

    from attire.cli.tables import comparison_table
    from attire.evaluation.report import write_report
    from attire.evaluation.run_result import save_result
    from attire.inference.scoring import evaluate_ensemble
    from attire.terminal import Terminal, print_result

    with closing(Terminal(as_json)) as progress:
        evaluation = evaluate_ensemble(models, data, classes=class_names(classes), progress=progress, **options)
    result = evaluation.result
    if folder:
        with files.atomic_folder(folder) as unfinished:
            save_result(unfinished, result)
            write_report(unfinished, result)
            evaluation.ensemble.save(unfinished / "ensemble.json")
    if as_json:
        click.echo(json.dumps(evaluation.to_json()))
        return
    print_result(comparison_table(evaluation.names, (result, *evaluation.members)))
    click.echo(f"\nAccuracy        {result.test.accuracy}\nClaim check     {result.claim}")
    click.echo(f"{_describe_passes(result.config)}{evaluation.pair}")


def _describe_passes(config: Mapping[str, Any]) -> str:
    """A line about test-time augmentation, where an answer takes more than one forward pass."""
    return f"Views           an answer takes {config['tta']} forward passes\n" if config["tta"] > 1 else ""


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
    """Compare runs on the same test images: a paired test, the difference and its 95 % confidence interval.

    \b
    attire compare runs/1 runs/2
    attire compare runs/1 measured          a folder that `attire evaluate --out` wrote
    """
    from attire.cli.tables import comparison_table
    from attire.evaluation import compare as comparing
    from attire.terminal import print_result

    if out and out.suffix == ".json":
        raise UsageError(
            "--out", f"names the page, found {out.name!r}", do="end it in .html; the same in JSON lies beside it"
        )
    comparison = comparing.compare(compared)
    page = out or compared[0].parent / f"compare-{'-'.join(path.name for path in compared)}.html"
    comparing.write_comparison(comparison, page)
    if as_json:
        click.echo(json.dumps({"page": str(page), **comparison.to_json()}))
        return
    print_result(comparison_table(comparison.names, comparison.results))
    for pair in comparison.pairs:
        click.echo(f"{pair}")
    click.echo(f"\nReport          {page}")


@click.command(cls=Command)
@click.argument("data", required=False, type=DATA)
@click.option("--test", type=DATA, metavar="FILE", help="This file or folder is the test set.")
@click.option("--classes", help="Class names in the order of their labels, separated by commas.")
@click.option("--run", type=RUN, help="Break down the accuracy of this run, tested on the same set.")
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
    """Look for duplicates, leaks between training and test part, odd images and wrong labels in DATA.

    \b
    attire audit                       the official data
    attire audit mine.csv              a file, as for train
    attire audit --run runs/1          and what that does to the accuracy of a run
    """
    folder = find_free_folder(out)

    from attire.analysis import audit as auditing
    from attire.analysis.audit_report import write_audit
    from attire.cli.tables import audit_table
    from attire.terminal import Terminal, print_result

    names = class_names(classes)
    with closing(Terminal(as_json)) as progress:
        result = auditing.audit(data, test=test, classes=names, run=run, device=device, progress=progress)
    with files.atomic_folder(folder) as unfinished:
        page = folder / write_audit(result, unfinished).name
    if as_json:
        click.echo(json.dumps({"page": str(page), **result.to_json()}))
        return
    print_result(audit_table(result))
    click.echo(f"\nReport          {page}")
