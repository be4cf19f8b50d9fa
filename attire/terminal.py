"""Progress on a terminal as bars, in a pipe as plain lines, and nothing when quiet; results on stdout."""

import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from attire.progress import Epoch

_PIPED = 100  # columns of a result that goes into a pipe or a file
_NARROW = 72  # columns; below it a bar and its figures do not fit in a line


class _RowCount(ProgressColumn):
    """`35,000/70,000`; nothing where a stage has a text of its own, such as its epoch."""

    def render(self, task: Task) -> Text:
        return Text("" if task.fields["text"] else f"{task.completed:,.0f}/{task.total:,.0f}")


class _RowsPerSecond(ProgressColumn):
    """Rows a second so far, `553 /s`."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed else "", style="progress.data.speed")


class Terminal:
    """Implements `progress.Progress`. Bars go to stderr, so that stdout holds results alone."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.quiet = quiet
        self.bars: Bars | None = None
        self.tasks: dict[str, Any] = {}
        self.began: dict[str, float] = {}

    def note(self, name: str, text: str) -> None:
        if not self.quiet:
            self.console.print(f"{name:9} {text}", markup=False, soft_wrap=True)

    def advance(self, stage: str, done: int, total: int, text: str = "") -> None:
        if self.quiet:
            return
        if not self.console.is_terminal or self.console.width < _NARROW:
            self._print_line(stage, done, total)
            return
        if stage not in self.tasks and self.bars and self.bars.finished:
            self._stop()  # bars that are shown together share columns; alone, a stage has room for its text
        bars = self._start()
        if stage not in self.tasks:
            self.tasks[stage] = bars.add_task(stage, total=total, text="")
        bars.update(self.tasks[stage], completed=done, total=total, text=text)
        if done >= total:
            bars.stop_task(self.tasks[stage])

    def epoch(self, line: "Epoch") -> None:
        if self.quiet:
            return
        text = f"epoch {line.epoch:3}   average loss {line.train_loss:.4f}"
        if line.val_accuracy is not None:
            text += f"   val loss {line.val_loss:.4f}   val {100 * line.val_accuracy:.2f} %"
        self.console.print(f"{text}   {line.seconds:.1f} s", markup=False, soft_wrap=True)

    def tested(self, accuracy: float, low: float, high: float, epoch: int) -> None:
        """Nothing: it is printed with the result."""

    def close(self) -> None:
        self._stop()
        self.began.clear()

    def _stop(self) -> None:
        if self.bars:
            self.bars.stop()
            self.bars = None
        self.tasks.clear()

    def _start(self) -> Bars:
        if self.bars is None:
            self.bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=min(24, self.console.width - _NARROW + 8)),
                _RowCount(),
                _RowsPerSecond(),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[text]}"),
                console=self.console,
            )
            self.bars.start()
        return self.bars

    def _print_line(self, stage: str, done: int, total: int) -> None:
        """In a pipe: one line when a long stage begins and one when it ends."""
        if stage.startswith("Training"):
            return
        if stage not in self.began:
            self.began[stage] = time.perf_counter()
            status = "to do" if done < total else "cached"
            self.console.print(f"{stage:28} {total:,} {status}", markup=False, soft_wrap=True)
        elif done >= total and self.began[stage]:
            seconds = time.perf_counter() - self.began[stage]
            self.console.print(f"{stage:28} {total:,} in {seconds:.0f} s", markup=False, soft_wrap=True)
            self.began[stage] = 0.0


def columns() -> int:
    """Columns that a result may take: those of the terminal, 100 in a pipe."""
    return Console().width if sys.stdout.isatty() else _PIPED


def print_result(renderable: Any) -> None:
    """Print a result to stdout, at most `columns` wide, in colour only on a terminal; too wide tables are stacked."""
    console = Console(highlight=False, width=columns())
    for part in renderable.renderables if isinstance(renderable, Group) else [renderable]:
        if isinstance(part, Table) and part.show_header and _least_width(console, part) > console.width:
            part = _stacked(part)
        console.print(part)


def _least_width(console: Console, table: Table) -> int:
    """Columns of the terminal that the table needs, so that no cell is cut that may not be wrapped."""
    room, total = console.options.update(max_width=1000), 0
    for column in table.columns:
        parts = [console.measure(cell, options=room) for cell in (column.header, *column.cells)]
        total += max(column.min_width or 0, *(x.maximum if column.no_wrap else x.minimum for x in parts))
    return total + table.padding[1] * (len(table.columns) - 1)


def _stacked(table: Table) -> Table:
    """A table for a narrow terminal: the first cell of each row, then a line for each other cell."""
    lines = Table.grid(padding=(0, 2, 0, 0))
    headers = [column.header for column in table.columns]
    for first, *cells in zip(*(column.cells for column in table.columns), strict=True):
        lines.add_row(first)
        for header, cell in zip(headers[1:], cells, strict=True):
            lines.add_row(Text(f"  {header}"), cell)
    return lines
