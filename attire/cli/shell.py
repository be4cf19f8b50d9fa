"""How commands behave in a shell: help that fits the terminal, refusals in one line, completion; and `doctor`."""

import json
import shutil
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import click
from click.exceptions import NoSuchCommand
from click.shell_completion import CompletionItem, get_completion_class

from attire.errors import one_line

_NARROW = 60  # columns; below it two columns of help do not fit beside each other
_SHELLS = ("bash", "zsh", "fish")
_WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


class _Help(click.HelpFormatter):
    """click's, which never formats for fewer than 50 columns; this one also fits narrower terminals."""

    def __init__(self, indent_increment: int = 2, width: int | None = None, max_width: int | None = None) -> None:
        columns = min(shutil.get_terminal_size().columns, max_width or 80)
        super().__init__(indent_increment, width or max(columns - 2, 20), max_width)

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        if self.width < _NARROW:
            rows = [
                (names.replace(" / ", " /\n    ") if len(names) > self.width - 2 else names, text)
                for names, text in rows
            ]
        super().write_dl(list(rows), col_max if self.width >= _NARROW else 4, col_spacing)

    def write_text(self, text: str) -> None:
        narrow = self.width < _NARROW
        super().write_text(_fold_examples(text, self.width - 2 * self.current_indent) if narrow else text)


def _fold_examples(text: str, width: int) -> str:
    """The text, each comment of an example (paragraphs after a line of `\\b`) on lines of its own."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith("\b\n"):
            lines = ["\b"]
            for line in paragraph.splitlines()[1:]:
                command, _, comment = line.partition("   ")
                lines.append(" \\\n    ".join(textwrap.wrap(command, width - 6, **_WHOLE_WORDS)))
                lines += textwrap.wrap(
                    comment.strip(), width, initial_indent="    ", subsequent_indent="    ", **_WHOLE_WORDS
                )
            paragraph = "\n".join(lines)
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


class _Context(click.Context):
    formatter_class = _Help


class Command(click.Command):
    context_class = _Context

    def get_short_help_str(self, limit: int = 0) -> str:
        """The first paragraph of its help, whole: where it does not fit in a line, the list of commands wraps it."""
        return " ".join((self.help or "").partition("\n\n")[0].split()).removesuffix(".")


class CommandGroup(click.Group):
    context_class = _Context
    command_class = Command


def format_usage_error(error: click.UsageError) -> str:
    """What click refused and what to do about it, in one line: where the option belongs, a near name, or the help."""
    where = error.ctx.command_path if error.ctx else "attire"
    message, do = error.message, f"see: {where} --help"
    if isinstance(error, NoSuchCommand):
        where, message = f"{where} {error.command_name}", "no such command"
        if error.possibilities:
            do = f"did you mean: attire {error.possibilities[0]}"
    elif isinstance(error, click.NoSuchOption):
        if error.ctx and error.ctx.parent and _has_option(error.ctx.find_root().command, error.option_name):
            do = f"did you mean: attire {error.option_name} {error.ctx.info_name}"
        elif error.possibilities:
            do = f"did you mean: {error.possibilities[0]}"
    else:
        message = error.format_message()
    return one_line(f"{where}: {message.rstrip('.')}; {do}")


def _has_option(command: click.Command, name: str) -> bool:
    return any(name in option.opts or name in option.secondary_opts for option in command.params)


def among(*values: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """The completion of an option with a few values, which Attire itself checks, for messages of its own."""

    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(value) for value in values if value.startswith(incomplete)]

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
    completion_class = get_completion_class(shell)
    assert completion_class is not None
    click.echo(completion_class(root, {}, "attire", "_ATTIRE_COMPLETE").source())


@click.command(cls=Command)
@click.option("--offline", is_flag=True, help="Ask no mirror.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else.")
def doctor(offline: bool, as_json: bool) -> None:
    """Check all that Attire needs here: versions, device, cache, data, weights, mirrors, the bundled model.

    \b
    attire doctor
    attire doctor --json       for a bug report

    Nothing is fetched. A mirror is asked to accept a connection, for at most 3 s. The exit status is 1 where something
    is broken; a problem that only costs time or a feature is a note.
    """
    from attire.cli.doctor import format_findings, run_checks

    findings = run_checks(offline)
    sound = not any(finding.state == "failed" for finding in findings)
    if as_json:
        click.echo(json.dumps({"sound": sound, "findings": [asdict(finding) for finding in findings]}))
    else:
        click.echo(format_findings(findings, shutil.get_terminal_size().columns))
    if not sound:
        click.get_current_context().exit(1)
