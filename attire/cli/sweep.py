"""sweep, plan: what to train, and how long it takes on machines that we have not."""

import json
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
    from attire.analysis.sweep import sweep as run_sweep
    from attire.cli.tables import sweep_table
    from attire.terminal import Terminal, print_result

    watch = Terminal(as_json)
    lists: dict[str, Any] = {
        "boundaries": boundaries.split(","),
        "backgrounds": backgrounds.split(","),
        "sizes": numbers("--sizes", sizes),
    }
    try:
        found = run_sweep(classes=class_names(classes), progress=watch, **lists, **options)
    finally:
        watch.close()
    if as_json:
        click.echo(json.dumps(found.to_json()))
        return
    print_result(sweep_table(found.ranked[:20], found.front))
    click.echo(f"\nPicture         {found.folder}/sweep.png   (all {len(found.cells)} lines: sweep.csv)")
    click.echo(f"Proposed        {found.command()}   (the fastest within a standard error of the best)")
