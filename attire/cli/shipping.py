"""release, export, bench: a bundle made fit to ship, written for other runtimes, timed beside them."""

import json
from pathlib import Path
from typing import Any

import click

from attire import files
from attire.cli.options import BUNDLE, DATA, PATH, RUN, json_option
from attire.errors import UsageError
from attire.folders import free_folder
from attire.shell import Command, among


@click.command(cls=Command)
@click.argument("run", type=RUN)
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


@click.command(cls=Command)
@click.argument("bundle", type=BUNDLE)
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


@click.command(cls=Command)
@click.argument("models", nargs=-1, type=BUNDLE, metavar="BUNDLE EXPORT...")
@click.option("--data", type=DATA, metavar="PATH", help="Test images, as for evaluate.  [default: the official set]")
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
    folder = free_folder(out)

    from attire.bench import bench as measure
    from attire.bench import write_bench
    from attire.report import bench_table
    from attire.terminal import Terminal, print_result

    watch = Terminal(as_json)
    try:
        found = measure(models, data, images=images, threads=threads, watcher=watch)
    finally:
        watch.close()
    with files.atomic_folder(folder) as part:
        picture = folder / write_bench(found, part).name
    if as_json:
        click.echo(json.dumps({"picture": str(picture), **found.to_json()}))
        return
    print_result(bench_table(found))
    click.echo(f"\nPicture         {picture}")
