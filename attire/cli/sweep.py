"""sweep: which freeze boundary, picture size and pooling to train with."""

import json
from contextlib import closing
from typing import Any

import click

from attire.cli.options import DATA, PATH, class_names, device_option, json_option, memory_option, numbers
from attire.cli.shell import Command


@click.command(cls=Command)
@click.option(
    "--data",
    type=DATA,
    metavar="PATH",
    help="As for train; only its training rows are used.  [default: the official set]",
)
@click.option("--classes", help="Class names in the order of their labels, separated by commas.")
@click.option("--sizes", default="32,48,64,96,112,160,224", show_default=True, help="Picture sides in px.")
@click.option("--boundaries", default="block2,block3,block4,block5", show_default=True, help="Where to tap VGG16.")
@click.option("--backgrounds", default="black", show_default=True, help="black, white or black,white.")
@click.option("--rows", type=click.IntRange(1), default=4000, show_default=True, help="Training images to fit on.")
@click.option("--val", type=click.IntRange(1), default=3000, show_default=True, help="Training images to score.")
@click.option(
    "--out", type=PATH, default="sweep", show_default=True, help="Output folder; an interrupted sweep resumes there."
)
@device_option
@memory_option
@json_option
def sweep(sizes: str, boundaries: str, backgrounds: str, classes: str | None, as_json: bool, **options: Any) -> None:
    """Try every freeze boundary, picture size and pooling on a subset, and propose a recipe.

    \b
    attire sweep                                           the official set
    attire sweep --data mine.csv --sizes 32,48 --out tried

    Each is scored by a closed-form linear classifier on rows held out from the training set. An interrupted sweep
    resumes with the same command.
    """
    from attire.analysis import sweep as sweeping
    from attire.cli.tables import sweep_table
    from attire.terminal import Terminal, print_result

    grid = sweeping.Grid(numbers("--sizes", sizes), boundaries.split(","), backgrounds.split(","))
    with closing(Terminal(as_json)) as progress:
        result = sweeping.sweep(classes=class_names(classes), grid=grid, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(result.to_json()))
        return
    print_result(sweep_table(result))
    click.echo(f"\nPicture         {result.folder}/sweep.png   (all {len(result.cells)} lines: sweep.csv)")
    click.echo(f"Proposed        {result.command()}   (the fastest within a standard error of the best)")
