"""Options that several commands share, and what their text stands for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from attire.blocks import ENDS
from attire.cli.shell import among
from attire.errors import AttireError, UsageError
from attire.recipes import BACKENDS, RECIPES, Recipe

if TYPE_CHECKING:
    from attire.cluster import Cluster

_Function = TypeVar("_Function", bound=Callable[..., Any])

# click itself would call a file that cannot be read a wrong usage, and refuse all of a command's other files with it.
PATH = click.Path(readable=False, path_type=Path)
NAME = click.Path(readable=False)


class _DataName(click.Path):
    """A file, folder or URL of images. That there is no such file is said before PyTorch is loaded."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from attire.storage.stores import is_url

        if not is_url(value) and _is_missing(value):
            raise AttireError(Path(value), "no such file")
        return super().convert(value, param, ctx)


class _BundlePath(click.Path):
    """A bundle or an exported file. That there is none is said before PyTorch is loaded."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from attire.inference.bundle_files import find_bundle
        from attire.inference.runtimes import format_of

        if _is_missing(value):
            if format_of(Path(value)):
                raise AttireError(Path(value), "no such file")
            find_bundle(value)
        return super().convert(value, param, ctx)


class _RunPath(click.Path):
    """A run's folder. That there is none is said before PyTorch is loaded."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if _is_missing(value):
            raise AttireError(Path(value), "no such run", do="give a run's folder such as runs/1")
        return super().convert(value, param, ctx)


def _is_missing(name: str) -> bool:
    """False also for what cannot be looked at: whoever reads it says why."""
    try:
        Path(name).stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


DATA = _DataName(readable=False)
BUNDLE = _BundlePath(readable=False, path_type=Path)
RUN = _RunPath(readable=False, path_type=Path)

# What a recipe's field is, and why its value is what it is. The figures are docs/results.md's.
_FIELD_HELP = {
    "freeze_to": "VGG16 block up to which everything is frozen and cached: block1..block5; none: nothing is.",
    "image_size": "Side in px of the picture VGG16 sees.",
    "pool": "Average the feature map to this side; 0 leaves it as it is.",
    "flips": "Also cache mirrored pictures and train on either.",
    "tta": "Views of a picture averaged for an answer: plain, mirrored, then shifted.",
    "standardise": "Scale each feature to mean 0, deviation 1.",
    "shifts": "Also cache this many shifted pictures of each (0 to 8).",
    "synthetic_drawings": "Also cache each picture as a drawing would show it, and train on it.",
    "outlier_exposure": "Also cache shapes that are no garment, and train to doubt them.",
    "finetune_blocks": "VGG16 blocks above the boundary that are trained on from ImageNet.",
    "batch_norm": "Batch normalisation in trained blocks; folded away in the bundle.",
    "head_epochs": "Of the epochs, those in which trained blocks wait for the classifier.",
    "layer_decay": "Factor on the learning rate for each block below the classifier.",
    "conv": "Widths of 3x3 convolutions in front of the hidden layers, such as 256,512.",
    "jitter": "Probability that a feature map is moved by one place.",
    "random_erasing": "Probability that a rectangle of a feature map is erased.",
    "cutmix": "Probability that a batch is mixed by CutMix.",
    "distill_weight": "With --teacher: share of the loss that its answers make up.",
    "distill_temperature": "With --teacher: temperature of its answers and ours in that share.",
    "ema": "Decay of the weights' moving average, which then ships; 0: none.",
    "clip_grad": "Largest norm of the gradient; 0: any.",
    "hidden": "Widths of the classifier's hidden layers, such as 1024,512.",
    "dropout": "Share of hidden values dropped in training.",
    "lr": "Adam's learning rate.",
    "schedule": "cosine (with warm-up) or constant.",
    "weight_decay": "Decoupled weight decay.",
    "label_smoothing": "Share of each label spread over all classes.",
    "batch_size": "Rows a step.",
    "epochs": "Passes over the training rows.",
    "val_size": "Rows cut from the training part for validation.",
    "stratify": "Keep each class's share when splitting.",
    "precision": "Of the frozen backbone and of training: auto (measured once), fp32 or bf16; answers are fp32.",
    "backend": "What runs the backbone during extraction: torch, openvino or openvino-int8 (an extra).",
    "seed": "Of initialisation, order and dropout.",
    "split_seed": "Decides which rows are validation, and test when one file is split.",
}

# What a shell offers for them; Recipe itself says what is allowed.
_FIELD_VALUES = {
    "freeze_to": tuple(ENDS),
    "schedule": ("cosine", "constant"),
    "precision": ("auto", "fp32", "bf16"),
    "backend": BACKENDS,
}


def recipe_options(command: _Function) -> _Function:
    """A flag for each field of Recipe; the effective default is the named recipe's."""
    for field in reversed([field for field in fields(Recipe) if field.name != "name"]):
        flag, kind = f"--{field.name.replace('_', '-')}", type(field.default)
        values = ", ".join(f"{name} {_shown(getattr(recipe, field.name))}" for name, recipe in RECIPES.items())
        told = f"{_FIELD_HELP[field.name]}  [{values}]"
        if kind is bool:
            command = click.option(f"{flag}/--no-{flag[2:]}", field.name, default=None, help=told)(command)
        else:
            converted = str if kind is tuple else kind
            offered = among(*_FIELD_VALUES.get(field.name, ()))
            option = click.option(flag, field.name, type=converted, default=None, help=told, shell_complete=offered)
            command = option(command)
    return command


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value}"


def data_options(command: _Function) -> _Function:
    for option in (
        click.option("--classes", help="Class names in the order of their labels, separated by commas."),
        click.option("--test", type=DATA, metavar="FILE", help="This file, folder or URL is the test set."),
        click.option(
            "--data",
            type=DATA,
            metavar="PATH",
            help="CSV, IDX or Parquet file, folder of these or of class folders, or a URL; default: the official set.",
        ),
    ):
        command = option(command)
    return command


def source_options(command: _Function) -> _Function:
    command = click.option("--weights-from", type=PATH, help="VGG16 weights from this .pth or .safetensors.")(command)
    return click.option("--data-from", type=PATH, help="The official IDX files from this folder.")(command)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else.")
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto, cpu, cuda or mps.",
    shell_complete=among("auto", "cpu", "cuda", "mps"),
)


def _limit_memory(context: click.Context, option: click.Parameter, value: str | None) -> None:
    """Until the command ends."""
    from attire.storage import memory

    context.with_resource(memory.limited(value))


memory_option = click.option(
    "--memory-limit",
    metavar="SIZE",
    expose_value=False,
    callback=_limit_memory,
    help="Plan to hold at most this, such as 2GB: smaller batches, features from the disk.  [default: none]",
)


cluster_option = click.option(
    "--cluster",
    metavar="ADDRESS",
    help="On a Ray cluster (an extra): HOST:PORT; auto: RAY_ADDRESS's, else one of this machine alone.",
)


@contextmanager
def cluster_at(address: str | None, workers: int = 0) -> Iterator["Cluster | None"]:
    """The cluster of --cluster; None where it was not given: all is done in this process."""
    if address is None:
        yield None
        return
    from attire.cluster import connect  # an optional extra, imported only where it is used

    with connect(address, workers) as found:
        yield found


def numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(width) for width in text.split(",") if width.strip())
    except ValueError:
        raise UsageError(flag, f"expected whole numbers such as 64,32, found {text!r}") from None


def class_names(value: Any) -> list[str] | None:
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def get_sources(data_from: Path | None, weights_from: Path | None) -> None:
    """Local files named on the command line are taken into the cache first, verified."""
    if data_from or weights_from:
        from attire.data import fashion_mnist as fetching
        from attire.model import pretrained

        if data_from:
            fetching.official_data(data_from)
        if weights_from:
            pretrained.vgg16_weights(weights_from)
