"""sweep, plan: what to train, and how long it takes on machines that we have not."""

import json
from typing import Any

import click

from attire.cli.options import DATA, PATH, class_names, device_option, json_option, memory_option, numbers
from attire.shell import Command


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


@click.command(cls=Command)
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
