"""Manners of the command line: completion in real shells, near names, narrow terminals, help with examples."""

import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attire.cli import main, shell
from tests.command import attire

COMMANDS = sorted(main.cli.commands)
NO_JSON = {"completion"}  # prints a script for a shell


@pytest.fixture
def program(tmp_path: Path) -> dict[str, str]:
    """The environment of a shell that finds `attire` first on its PATH."""
    path = tmp_path / "bin" / "attire"
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\nfrom attire.cli.main import main\nmain()\n")
    path.chmod(0o755)
    place = f"{path.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": place, "PYTHONPATH": str(Path(shell.__file__).parents[2]), "HOME": str(tmp_path)}


def run(command: list[str], environment: dict[str, str], folder: Path) -> str:
    """What it printed. Skips where the shell is not installed."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


# A line to complete, and what must be offered.
LINES = [("attire tr", "train"), ("attire train --freeze-to block", "block3"), ("attire predict sh", "shoe.jpg")]


SETUP = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], 'eval "$(attire completion bash)"'),
    "zsh": (["zsh", "-f", "-i"], 'autoload -Uz compinit; compinit -u -D; eval "$(attire completion zsh)"'),
}


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("line", "offered"), LINES)
@pytest.mark.parametrize("name", SETUP)
def test_an_interactive_shell_completes(
    name: str, line: str, offered: str, program: dict[str, str], here: Path
) -> None:
    """Tab is pressed on a terminal of its own, until the shell shows what must be offered."""
    if shutil.which(name) is None:
        pytest.skip(f"needs {name}")
    import pty

    (here / "shoe.jpg").touch()
    command, setup = SETUP[name]
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command, env={**program, "TERM": "dumb"}, cwd=here, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True,
    ) as process:  # fmt: skip
        os.close(theirs)
        try:
            os.write(ours, f"{setup}; echo rea''dy\n".encode())
            read_until(ours, "ready\r\n")
            os.write(ours, f"{line}\t\t".encode())
            read_until(ours, offered)
        finally:
            process.kill()
            os.close(ours)


def read_until(terminal: int, wanted: str, seconds: float = 30) -> None:
    text, end = "", time.monotonic() + seconds
    while wanted not in text:
        assert select.select([terminal], [], [], max(0, end - time.monotonic()))[0], f"{wanted!r} is not in {text!r}"
        text += os.read(terminal, 4096).decode(errors="replace")


@pytest.mark.parametrize(("line", "offered"), LINES)
def test_fish_completes(line: str, offered: str, program: dict[str, str], here: Path) -> None:
    (here / "shoe.jpg").touch()
    script = f"attire completion fish | source; complete --do-complete '{line}'"
    told = run(["fish", "--no-config", "-c", script], program, here)
    assert offered in [entry.split("\t")[0] for entry in told.splitlines()]


def test_completion_prints_each_shell_s_script_and_refuses_others() -> None:
    for name in shell._SHELLS:
        done = attire("completion", name)
        assert (done.status, done.err) == (0, "")
        assert "_ATTIRE_COMPLETE" in done.out
    assert attire("completion", "tcsh").status == 2


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("train --batch_size 3", "attire train: No such option '--batch_size'; did you mean: --batch-size"),
        ("train --ephochs 3", "attire train: No such option '--ephochs'; did you mean: --epochs"),
        ("train --no-flip", "attire train: No such option '--no-flip'; did you mean: --no-flips"),
        ("train --version", "attire train: No such option '--version'; did you mean: attire --version train"),
        ("predict --xyzzy", "attire predict: No such option '--xyzzy'; see: attire predict --help"),
        ("--versoin", "attire: No such option '--versoin'; did you mean: --version"),
    ],
)
def test_an_unknown_option_suggests_the_near_one(typed: str, hint: str) -> None:
    done = attire(*typed.split())
    assert (done.status, done.error) == (2, hint)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example(name: str) -> None:
    assert re.search(rf"^  attire {name}\b", attire(name, "--help").out, re.M)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_answers_programs(name: str) -> None:
    assert shell._has_option(main.cli.commands[name], "--json") == (name not in NO_JSON)


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_a_narrow_terminal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty columns hold every line but one whose single word is longer; every option stands on a line of its own."""
    monkeypatch.setenv("COLUMNS", "40")
    lines = attire(*name.split(), "--help").out.splitlines()
    assert not [line for line in lines if len(line) > 40 and len(line.split()) > 1]
    if name:
        options = [line.split()[0].rstrip(",") for line in lines[lines.index("Options:") :] if re.match(r"  -", line)]
        assert len(options) == 1 + sum(p.param_type_name == "option" for p in main.cli.commands[name].params)


@pytest.mark.parametrize("columns", ["40", "80"])
def test_the_list_of_commands_says_what_each_does_without_cutting_it(
    columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    told = "".join(attire("--help").out.partition("Commands:")[2].split())
    for name in COMMANDS:
        assert "".join(f"{name} {main.cli.commands[name].get_short_help_str()}".split()) in told
    assert "..." not in told


def test_examples_fold_without_losing_a_word() -> None:
    text = "What it does.\n\n\b\nattire predict photos/ 'more/*.png' --format csv     answers for many\nattire x"
    assert shell._fold_examples(text, 36) == (
        "What it does.\n\n\b\nattire predict photos/ \\\n    'more/*.png' --format csv\n    answers for many\nattire x"
    )


def test_report_says_where_as_json(finished: tuple[Path, object], here: Path) -> None:
    assert json.loads(attire("report", finished[0], "--json").out) == {"page": str(finished[0] / "report.html")}
