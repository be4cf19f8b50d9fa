"""How the command line behaves in a shell: help that fits, near names, completion; the commands about Attire itself."""

import json
import shutil
import textwrap
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from attire.errors import UsageError

_NARROW = 60  # columns; below it two columns of help do not fit beside each other
_SHELLS = ("bash", "zsh", "fish")


class _Help(click.HelpFormatter):
    """click's, which never formats for fewer than 50 columns; here a narrow terminal gets lines of its own width."""

    def __init__(self, indent_increment: int = 2, width: int | None = None, max_width: int | None = None) -> None:
        columns = min(shutil.get_terminal_size().columns, max_width or 80)
        super().__init__(indent_increment, width or max(columns - 2, 20), max_width)

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl(list(rows), col_max if self.width >= _NARROW else 4, col_spacing)

    def write_text(self, text: str) -> None:
        super().write_text(text if self.width >= _NARROW else _folded(text, self.width - 2 * self.current_indent))


def _folded(text: str, width: int) -> str:
    """Examples (paragraphs after a line of `\\b`) one under the other: the command, then what it does, indented."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith("\b\n"):
            lines = []
            for line in paragraph.splitlines()[1:]:
                command, _, told = line.partition("   ")
                lines.append(" \\\n    ".join(textwrap.wrap(command, width - 6, **_WHOLE)))
                lines += textwrap.wrap(told.strip(), width, initial_indent="    ", subsequent_indent="    ", **_WHOLE)
            paragraph = "\n".join(["\b", *lines])
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


_WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


class _Context(click.Context):
    formatter_class = _Help


class Command(click.Command):
    context_class = _Context

    def get_short_help_str(self, limit: int = 0) -> str:
        """The first paragraph of its help, whole: where it does not fit in a line, the list of commands wraps it."""
        return " ".join((self.help or "").partition("\n\n")[0].split()).removesuffix(".")


class Commands(click.Group):
    """A group that suggests the near command for an unknown one."""

    context_class = _Context
    command_class = Command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f"did you mean: attire {near[0]}" if near else "see: attire --help"
            raise UsageError(f"attire {args[0]}", "no such command", do=hint) from error


def hint(error: click.UsageError) -> str:
    """What to do about a usage that click refused: the near option, the option's own place, or the help."""
    where = error.ctx.command_path if error.ctx else "attire"
    if isinstance(error, click.NoSuchOption) and error.ctx:
        root = error.ctx.find_root()
        if error.ctx is not root and error.option_name in _options(root.command):
            return f"did you mean: attire {error.option_name} {error.ctx.info_name}"
        if near := get_close_matches(error.option_name, _options(error.ctx.command), n=1):
            return f"did you mean: {near[0]}"
    return f"see: {where} --help"


def _options(command: click.Command) -> list[str]:
    return [name for option in command.params for name in (*option.opts, *option.secondary_opts) if name[0] == "-"]


def what(error: click.UsageError) -> str:
    """click's own words, without its suggestion, which `hint` makes."""
    message = error.message if isinstance(error, click.NoSuchOption) else error.format_message()
    return message.rstrip(".")


def among(*values: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """What a shell offers for an option whose few values Attire itself checks, with words of its own."""

    def complete(ctx: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
        return [CompletionItem(value) for value in values if value.startswith(begun)]

    return complete


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(_SHELLS))
def completion(shell: str) -> None:
    """Print the script that makes SHELL complete Attire's commands, options and files.

    \b
    attire completion bash > ~/.local/share/bash-completion/completions/attire
    attire completion zsh > ~/.zfunc/_attire      a folder of $fpath
    attire completion fish > ~/.config/fish/completions/attire.fish

    The script asks `attire` itself, so that it never needs to be written again.
    """
    root = click.get_current_context().find_root().command
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(root, {}, "attire", "_ATTIRE_COMPLETE").source())


@click.command(cls=Command)
@click.option("--offline", is_flag=True, help="Ask no mirror.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else.")
def doctor(offline: bool, as_json: bool) -> None:
    """Look at all that Attire needs here: versions, device, cache, data, weights, mirrors, the model that ships.

    \b
    attire doctor
    attire doctor --json       for a bug report

    Nothing is fetched; a mirror is asked for its name and a first answer, with at most 3 s of patience. The exit status
    is 1 where something is broken; what only costs time or a feature is a note.
    """
    from attire.cli.doctor import examine, failed, lines

    found = examine(offline)
    if as_json:
        told = [finding.to_json() for finding in found]
        click.echo(json.dumps({"sound": not failed(found), "findings": told}))
    else:
        for line in lines(found, shutil.get_terminal_size().columns):
            click.echo(line)
    if failed(found):
        click.get_current_context().exit(1)
