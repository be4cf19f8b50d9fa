"""release, export, bench: a bundle made fit to ship, written for other runtimes, timed beside them."""

import json
from contextlib import closing
from pathlib import Path

import click

from attire.cli.options import BUNDLE, DATA, PATH, RUN, json_option
from attire.cli.shell import Command, among
from attire.errors import UsageError
from attire.storage import files
from attire.storage.run_folder import find_free_folder


@click.command(cls=Command)
@click.argument("run", type=RUN)
@click.option("--out", type=PATH, default="release", show_default=True, help="Output folder.")
@json_option
def release(run: Path, out: Path, as_json: bool) -> None:
    """Make a run's bundle fit to ship: 16-bit weights, ONNX Runtime's graph, card and report, measured again.

    \b
    attire release runs/1 --out release

    Refused where it does not answer as the run's bundle does on the official test images. What is at --out is replaced
    once all of it is written.
    """
    from attire.export.release import release as write_release
    from attire.terminal import Terminal

    with closing(Terminal(as_json)) as terminal:
        measured = write_release(run, out, terminal)
    click.echo(json.dumps({"bundle": str(out), **measured}) if as_json else f"{out}")


@click.command(cls=Command)
@click.argument("bundle", type=BUNDLE)
@click.option(
    "--format",
    "kind",
    default="onnx",
    show_default=True,
    help="onnx, openvino or torch-export.",
    shell_complete=among("onnx", "openvino", "torch-export"),
)
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    help="fp32, bf16 or int8; not every format has each.",
    shell_complete=among("fp32", "bf16", "int8"),
)
@click.option("--out", type=PATH, help="Output file.  [default: the bundle's name and .onnx ...]")
@click.option("--max-drop", default=0.3, show_default=True, help="Points of accuracy that bf16 and int8 may lose.")
@json_option
def export(bundle: Path, kind: str, precision: str, out: Path | None, max_drop: float, as_json: bool) -> None:
    """Write a bundle for another runtime, preprocessing inside, if it is proved equal on 2,000 test images.

    \b
    attire export runs/1/model                    model.onnx, fp32: probabilities within 0.0001
    attire export runs/1/model --precision int8   a quarter of the size; its accuracy is measured
    """
    from attire.export.export import export as write_export
    from attire.terminal import Terminal

    with closing(Terminal(as_json)) as terminal:
        model = write_export(bundle, kind, out=out, precision=precision, max_drop=max_drop / 100, progress=terminal)
    click.echo(json.dumps({"file": str(model.path), **model.metadata}) if as_json else f"{model.path}")


@click.command(cls=Command)
@click.argument("models", nargs=-1, type=BUNDLE, metavar="BUNDLE EXPORT...")
@click.option("--data", type=DATA, metavar="PATH", help="Test images, as for evaluate.  [default: the official set]")
@click.option("--images", type=click.IntRange(0), default=0, help="Accuracy on so many of them.  [default: all]")
@click.option("--threads", type=click.IntRange(0), default=0, help="For PyTorch.  [default: the machine's]")
@click.option("--out", type=PATH, default="bench", show_default=True, help="Output folder, a new one.")
@json_option
def bench(models: tuple[Path, ...], data: str | None, images: int, threads: int, out: Path, as_json: bool) -> None:
    """Latency, throughput, memory, size and accuracy of a bundle and its exports, side by side in one run.

    \b
    attire bench runs/1/model model.onnx model.openvino
    """
    if not models:
        raise UsageError("attire bench", "name a bundle, and the exports to compare with it")
    folder = find_free_folder(out)

    from attire.analysis.bench import bench as run_bench
    from attire.analysis.bench import write_bench
    from attire.cli.tables import bench_table
    from attire.terminal import Terminal, print_result

    with closing(Terminal(as_json)) as terminal:
        result = run_bench(models, data, images=images, threads=threads, progress=terminal)
    with files.atomic_folder(folder) as part:
        picture = folder / write_bench(result, part).name
    if as_json:
        click.echo(json.dumps({"picture": str(picture), **result.to_json()}))
        return
    print_result(bench_table(result))
    click.echo(f"\nPicture         {picture}")
