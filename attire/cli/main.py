"""The command line: one short function per command. The only code that knows argv."""

import io
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import click

from attire.cli import shell
from attire.cli.cache import cache, export_csv, fetch
from attire.cli.evaluate import audit, compare, ensemble, evaluate, report
from attire.cli.export import bench, export, release
from attire.cli.predict import explain, predict
from attire.cli.serve import serve
from attire.cli.sweep import sweep
from attire.cli.train import extract, train
from attire.errors import AttireError, AttireWarning, one_line
from attire.version import __version__


@click.group(cls=shell.CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="attire")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Garment classification by transfer learning with VGG16, measured honestly.

    \b
    attire train                       the official Fashion-MNIST, recipe fast
    attire train --data mine.csv       your own labelled images
    attire predict a.png               the answer for a picture, by the model that ships
    """


for command in (
    audit,
    bench,
    cache,
    compare,
    ensemble,
    evaluate,
    explain,
    export,
    export_csv,
    extract,
    fetch,
    predict,
    release,
    report,
    serve,
    shell.completion,
    shell.doctor,
    sweep,
    train,
):
    cli.add_command(command)


def main() -> NoReturn:
    """The one place where errors become a line and an exit status."""
    debug = "--debug" in sys.argv
    warnings.showwarning = _show_warning
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()  # None where the caller closed it
    try:
        status = cli.main(prog_name="attire", standalone_mode=False) or 0
    except SystemExit:  # what click and rich make of a pipe that is closed: `attire ... | head`
        status = 0
    except AttireError as error:
        status = _fail(str(error), error.status, debug)
    except click.UsageError as error:
        status = _fail(shell.format_usage_error(error), 2, debug)
    except click.ClickException as error:
        status = _fail(one_line(error.format_message()), 1, debug)
    except (KeyboardInterrupt, click.Abort):
        status = _fail("stopped; what was finished is kept", 130, debug)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("allocate|out of memory", str(error)):
            raise
        status = _fail("out of memory; try a smaller --image-size or --batch-size", 1, debug)
    except OSError as error:
        from attire.storage import files

        name = str(error.filename or "attire")
        do = files.disk_full_advice(Path(name), error)
        status = _fail(f"{one_line(name)}: {error.strerror or error}{'; ' if do else ''}{do}", 1, debug)
    sys.exit(status)


def _fail(line: str, status: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    click.echo(f"error: {line}" if status != 130 else line, err=True)
    return status


def _show_warning(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
    """Ours as one line; a library's in its own words, shortened to one."""
    text = str(message) if issubclass(category, AttireWarning) else f"{category.__name__}: {message}"
    click.echo(f"warning: {one_line(text.splitlines()[0] if text else '')}", err=True)
