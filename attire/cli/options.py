"""Options that several commands share, and how their text is parsed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from attire.cli.shell import among
from attire.errors import AttireError, UsageError
from attire.recipes import FAST, RECIPES, SETTINGS

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
    """Whether there is no such file. False also where that cannot be known: who reads it says why."""
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


def recipe_options(command: _Function) -> _Function:
    """A flag for each field of Recipe; the effective default is the named recipe's."""
    for name, setting in reversed(SETTINGS.items()):
        flag, kind = f"--{name.replace('_', '-')}", type(getattr(FAST, name))
        values = ", ".join(f"{recipe.name} {format_setting(getattr(recipe, name))}" for recipe in RECIPES.values())
        text = f"{setting.metadata['help']}  [{values}]"
        if kind is bool:
            command = click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)(command)
            continue
        choices = among(*setting.metadata["choices"])
        kind = str if kind is tuple else kind
        command = click.option(flag, name, type=kind, default=None, help=text, shell_complete=choices)(command)
    return command


def format_setting(value: Any) -> str:
    """A recipe's value as help and documentation print it."""
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value}"


def data_options(command: _Function) -> _Function:
    for option in (
        click.option("--classes", help="Class names in the order of their labels, separated by commas."),
        click.option("--test", type=DATA, metavar="FILE", help="Test set: a file, folder or URL."),
        click.option(
            "--data",
            type=DATA,
            metavar="PATH",
            help="CSV, IDX or Parquet file, folder of these or of class folders, or URL.  [default: Fashion-MNIST]",
        ),
    ):
        command = option(command)
    return command


def source_options(command: _Function) -> _Function:
    command = click.option(
        "--weights-from", type=PATH, help="File that holds the VGG16 weights: .pth or .safetensors."
    )(command)
    return click.option("--data-from", type=PATH, help="Folder that holds the official IDX files.")(command)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else.")
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto, cpu, cuda or mps.",
    shell_complete=among("auto", "cpu", "cuda", "mps"),
)


def _limit_memory(context: click.Context, option: click.Parameter, value: str | None) -> None:
    """Limit memory until the command ends."""
    from attire.storage import memory

    context.with_resource(memory.limit_memory(value))


memory_option = click.option(
    "--memory-limit",
    metavar="SIZE",
    expose_value=False,
    callback=_limit_memory,
    help="Most memory to plan for, such as 2GB: smaller batches, features read from the disk.  [default: none]",
)


cluster_option = click.option(
    "--cluster",
    metavar="ADDRESS",
    help="Address of a Ray cluster (an extra), HOST:PORT; auto: RAY_ADDRESS, else a cluster of this machine alone.",
)


@contextmanager
def cluster_at(address: str | None, workers: int = 0) -> Iterator["Cluster | None"]:
    """The cluster of --cluster; None without that option: then this process does all the work."""
    if address is None:
        yield None
        return
    from attire.cluster import connect  # an optional extra, imported only where it is used

    with connect(address, workers) as cluster:
        yield cluster


def numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(width) for width in text.split(",") if width.strip())
    except ValueError:
        raise UsageError(flag, f"expected whole numbers such as 64,32, found {text!r}") from None


def class_names(value: Any) -> list[str] | None:
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def get_sources(data_from: Path | None, weights_from: Path | None) -> None:
    """Verify the local files named on the command line and copy them into the cache."""
    if data_from or weights_from:
        from attire.data import fashion_mnist
        from attire.model import pretrained

        if data_from:
            fashion_mnist.official_data(data_from)
        if weights_from:
            pretrained.vgg16_weights(weights_from)
