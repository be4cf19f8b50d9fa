"""predict, explain: answers for pictures, and where they come from."""

import json
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attire.cli.options import BUNDLE, NAME, PATH, cluster_at, cluster_option, device_option, json_option
from attire.cli.shell import Command
from attire.errors import AttireError, UsageError, one_line

if TYPE_CHECKING:
    from attire.inference.classifier import Classifier
    from attire.inference.predict import Model


_NO_NEIGHBOURS = "this bundle holds no training images to show beside the answer; train it again"


@click.command(cls=Command)
@click.argument("arguments", nargs=-1, type=NAME, metavar="FILE...")
@click.option("--model", type=PATH, help="A bundle, a run or an exported file.  [default: the bundled model]")
@click.option("--format", "form", type=click.Choice(["table", "jsonl", "csv"]), help="Output format.  [default: table]")
@click.option("--top-k", type=click.IntRange(1), default=3, show_default=True, help="Number of classes to show.")
@click.option("--save-inputs", type=PATH, metavar="FOLDER", help="Save what the model sees of each picture, as PNG.")
@click.option("--out", type=NAME, metavar="PATH", help="For Parquet input: a Parquet file or a folder of parts.")
@device_option
@cluster_option
@click.option("--json", "as_json", is_flag=True, help="The same as --format jsonl: one object a line.")
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
    status is 1. A CSV file holds pixel1 .. pixel784, with or without labels. --save-inputs writes one strip a picture,
    into a folder, or into a file for a single picture.
    """
    from attire.inference.predict import ood_warning, open_model, print_answers, split_model

    if as_json and form not in (None, "jsonl"):
        raise UsageError("--json", f"given together with --format {form}", do="give one of them")
    path, inputs = split_model(arguments, model)
    if out is not None:
        _check_parquet_options(inputs, bool(form or options["save_inputs"]))
    opened = open_model(path, device)
    if warning := ood_warning(opened):
        click.echo(f"warning: {one_line(str(path))}: {warning}", err=True)
    if out is not None:
        if cluster is not None:
            raise UsageError("--cluster", "given together with --out", do="give one of them")
        errors = _predict_parquet(inputs[0], out, opened, path, options["top_k"], as_json)
    else:
        with cluster_at(cluster) as machines:
            answer = partial(machines.answer, path, device) if machines else None
            form = "jsonl" if as_json else form or "table"
            errors = print_answers(inputs, opened, form=form, answer=answer, **options)
    if errors:
        click.get_current_context().exit(1)


def _check_parquet_options(inputs: list[str], formatted: bool) -> None:
    """Raises UsageError for what does not go with --out."""
    if len(inputs) != 1:
        raise UsageError("--out", f"{len(inputs)} inputs, expected one")
    if formatted:
        raise UsageError("--out", "neither --format nor --save-inputs goes with it")


def _predict_parquet(source: str, out: str, model: "Model", path: Path | None, top_k: int, as_json: bool) -> int:
    """Parquet to Parquet; returns how many rows have no answer."""
    from attire.inference.parquet_predict import model_digest, predict_parquet
    from attire.terminal import Terminal

    with closing(Terminal(as_json)) as terminal:
        summary = predict_parquet(
            source,
            out,
            model,
            model_digest(path),
            top_k=top_k,
            progress=lambda done, total: terminal.advance("Pictures", done, total),
            warn=lambda line: click.echo(f"error: {line}", err=True),
        )
    click.echo(json.dumps(summary.to_json()) if as_json else f"{summary}")
    return summary.errors


@click.command(cls=Command)
@click.argument("paths", nargs=-1, required=True, type=PATH, metavar="FILE...")
@click.option("--model", type=BUNDLE, metavar="BUNDLE", help="Model bundle.  [default: the bundled model]")
@click.option("--out", type=PATH, default=".", help="Output folder for the pictures.  [default: here]")
@click.option("--label", metavar="CLASS", help="Class to explain.  [default: the answer]")
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
    from attire.inference.classifier import load_bundle

    classifier, errors, names = load_bundle(model, device), 0, set[str]()
    if classifier.neighbours is None:
        click.echo(f"warning: {one_line(str(model or 'shipped'))}: {_NO_NEIGHBOURS}", err=True)
    for path in paths:
        try:
            _explain_file(classifier, path, out, label, as_json, names)
        except UsageError:
            raise
        except AttireError as error:
            click.echo(f"error: {error}", err=True)
            errors += 1
    if errors:
        click.get_current_context().exit(1)


def _explain_file(
    classifier: "Classifier", path: Path, out: Path, label: str | None, as_json: bool, names: set[str]
) -> None:
    from attire.data import photos
    from attire.inference import explain

    photo = photos.prepare(path)
    explanation = explain.explain(classifier, photo.image, label)
    sheet = out / _free_name(path.stem, names)
    explanation.write_sheet(sheet, photo.original)
    if as_json:
        click.echo(json.dumps({"file": str(path), **explanation.to_json(), "picture": str(sheet)}))
        return
    click.echo(f"{one_line(str(path)):24} {explanation.prediction}")
    if explanation.neighbours:
        near = ", ".join(f"{neighbour.label} {neighbour.distance:.2f}" for neighbour in explanation.neighbours)
        click.echo(f"{'':24} nearest      {explanation.tally}   ({near})")
    click.echo(f"{'':24} picture      {one_line(str(sheet))}")


def _free_name(stem: str, names: set[str]) -> str:
    """`shoe-explained.png`; `shoe-2-explained.png` where another picture of this call has that name."""
    numbered = (f"{stem}{f'-{i}' if i > 1 else ''}-explained.png" for i in range(1, len(names) + 2))
    name = next(name for name in numbered if name not in names)
    names.add(name)
    return name
