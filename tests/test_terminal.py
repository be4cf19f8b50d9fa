"""What a person sees: nothing when quiet, lines when piped or narrow, bars that fit on a terminal, colour or none."""

import io
import re
import sys
from itertools import count

import pytest
from rich.console import Group
from rich.table import Table

from attire.progress import Epoch
from attire.terminal import _NARROW, Terminal, print_result

CODE = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3|4|9|10)\d[\d;]*m")
EPOCH = Epoch(2, 0.0311, 0.21, 0.9455, 2.13)
TEXT = "epoch 3/15  loss 0.0311  val 94.6 %"


class Screen(io.StringIO):
    """A terminal, as far as a program can tell."""

    def isatty(self) -> bool:
        return True

    def rows(self) -> list[str]:
        """Every line that was drawn, one over the other or not, without its codes."""
        return [CODE.sub("", line).rstrip() for line in re.split(r"[\r\n]+", self.getvalue())]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)


def screen(monkeypatch: pytest.MonkeyPatch, width: int) -> Screen:
    """stderr becomes a terminal of this width."""
    drawn = Screen()
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "stderr", drawn)
    return drawn


def draw(watch: Terminal) -> None:
    """Now, not at the next tenth of a second."""
    if watch.bars:
        watch.bars.refresh()


def work(watch: Terminal) -> None:
    """A run as it reports itself: features, two views of them, then training. Each look at the clock takes 20 s."""
    watch.console.get_time = count(step=20.0).__next__
    watch.note("Data", "Fashion-MNIST, 60,000 + 10,000 images   verified")
    for stage in ("Features  all", "Features  train, mirrored"):
        for done in (0, 35_000, 70_000):
            watch.advance(stage, done, 70_000)
            draw(watch)
    for done in (60_000, 825_000):
        watch.advance("Training", done, 900_000, TEXT)
        draw(watch)
    watch.epoch(EPOCH)
    watch.tested(0.9, 0.6, 0.98, 2)
    watch.close()


def test_a_quiet_terminal_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    work(Terminal(quiet=True))
    drawn = screen(monkeypatch, 100)
    work(Terminal(quiet=True))
    assert (drawn.getvalue(), capsys.readouterr()) == ("", ("", ""))


def test_piped_progress_is_one_line_a_stage_and_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Terminal()
    work(watch)
    watch.advance("Features  all", 70_000, 70_000)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "Data      Fashion-MNIST, 60,000 + 10,000 images   verified",
        "Features  all                70,000 to do",
        "Features  all                70,000 in 0 s",
        "Features  train, mirrored    70,000 to do",
        "Features  train, mirrored    70,000 in 0 s",
        "epoch   2   average loss 0.0311   val loss 0.2100   val 94.55 %   2.1 s",
        "Features  all                70,000 cached",  # of the next run, after `close`
    ]


def test_an_epoch_without_validation_has_no_validation_figures(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().epoch(Epoch(10, 2.5, None, None, 61.04))
    assert capsys.readouterr().err == "epoch  10   average loss 2.5000   61.0 s\n"


def test_long_lines_and_markup_are_left_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    Terminal().note("Data", "[red]mine[/red].csv " + 30 * "long ")
    assert capsys.readouterr().err == f"Data      [red]mine[/red].csv {30 * 'long '}\n"


@pytest.mark.parametrize("width", [_NARROW, 80, 100, 200])
def test_bars_fit_and_cut_nothing_off(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    drawn = screen(monkeypatch, width)
    work(Terminal())
    rows = drawn.rows()
    assert max(len(row) for row in rows) <= width
    assert not [row for row in rows if "…" in row]
    assert [row for row in rows if re.match(r"Features  train, mirrored [━╸╺]+ 35,000/70,000 ", row)]
    assert [row for row in rows if re.match(r"Training [━╸╺]+ .*epoch 3/15  loss 0.0311  val 94.6 %$", row)]
    assert "epoch   2   average loss 0.0311   val loss 0.2100   val 94.55 %   2.1 s" in rows


def test_a_narrow_terminal_gets_lines_instead_of_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = screen(monkeypatch, _NARROW - 1)
    work(Terminal())
    assert "━" not in drawn.getvalue()
    assert "Features  all                70,000 to do" in drawn.rows()


def test_the_cursor_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = screen(monkeypatch, 80)
    watch = Terminal()
    watch.advance("Features  all", 1, 2)
    assert drawn.getvalue().count("\x1b[?25l") == 1
    watch.close()
    watch.close()
    assert drawn.getvalue().count("\x1b[?25h") == 1


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch, no_color: bool) -> None:
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    drawn = screen(monkeypatch, 80)
    work(Terminal())
    assert bool(COLOUR.search(drawn.getvalue())) is not no_color


def table() -> Table:
    found = Table.grid()
    found.add_column(style="red")
    found.add_row(" ".join(f"word{i}" for i in range(40)))
    return found


def test_a_piped_result_is_plain_and_a_hundred_columns_wide(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    print_result(table())
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert 90 < max(len(line.rstrip()) for line in out.splitlines()) <= 100


@pytest.mark.parametrize("no_color", [False, True])
def test_a_result_on_a_terminal_is_as_wide_as_it_and_coloured_unless_told_not_to(
    monkeypatch: pytest.MonkeyPatch, no_color: bool
) -> None:
    drawn = Screen()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stdout", drawn)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    print_result(table())
    assert bool(COLOUR.search(drawn.getvalue())) is not no_color
    assert 30 < max(len(row) for row in drawn.rows()) <= 40


@pytest.mark.parametrize("columns", [40, 80])
def test_a_table_too_wide_for_its_terminal_loses_no_digit(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    drawn, found = Screen(), Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("Class", "precision, %", "recall, %"):
        found.add_column(name, no_wrap=name != "Class")
    found.add_row("Ankle boot", "90.1 (88.1-91.9)", "89.2 (87.1-91.0)")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", drawn)
    print_result(Group("first", found))
    below = ["first", "Ankle boot", "  precision, %  90.1 (88.1-91.9)", "  recall, %     89.2 (87.1-91.0)", ""]
    beside = ["first", "Class       precision, %      recall, %", "Ankle boot  90.1 (88.1-91.9)  89.2 (87.1-91.0)", ""]
    assert drawn.rows() == (below if columns == 40 else beside)
