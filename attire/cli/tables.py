"""Tables that the terminal prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attire.errors import one_line
from attire.evaluation.intervals import Interval, p_text, wilson
from attire.evaluation.metrics import Evaluation
from attire.evaluation.pages import percent
from attire.evaluation.report import duration, hardest
from attire.evaluation.run_result import RunResult


def terminal_summary(result: RunResult, width: int = 80) -> RenderableType:
    """The end of `attire train`: accuracy, claim check, hardest class, per-class table, confusion table if it fits."""
    test, claim = result.test, result.claim
    beside = f"training {percent(result.train.accuracy.value)}   " if result.train else ""
    beside += f"calibration error {percent(test.calibration_error.value)}"
    told = f"{percent(claim.claimed)} was claimed; this run measures {percent(test.accuracy.value)}"
    lines = Table.grid(padding=(0, 2, 0, 0))
    lines.add_column(no_wrap=True)
    lines.add_column()
    lines.add_row(
        "Out of fold" if result.config.get("folds") else "Test accuracy", Text(str(test.accuracy), style="bold")
    )
    lines.add_row("", beside)
    lines.add_row("Claim check", f"{told}: {claim.verdict} ({p_text(claim.p_value)})")
    lines.add_row("Hardest", Text(one_line(hardest(test))))
    parts: list[RenderableType] = [lines, "", class_table(test, width)]
    if 16 + 6 * len(test.classes) <= width:
        parts += ["", _confusion_table(test)]
    return Group(*parts)


def comparison_table(names: Sequence[str], results: Sequence[RunResult]) -> Table:
    """One line a run: accuracy beside what it cost."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("Run", "recipe", "seed", "accuracy, %", "training", "in all"):
        table.add_column(name, justify="left" if name in ("Run", "recipe") else "right", no_wrap=name != "Run")
    for name, result in zip(names, results, strict=True):
        found, spent = result.test.accuracy, result.seconds
        cells = [f"{100 * found.value:.2f} ({found.span()})"]
        cells += [duration(spent[key]) if key in spent else "-" for key in ("fit", "total")]
        table.add_row(Text(name), Text(one_line(result.recipe)), str(result.seed), *cells)
    return table


def sweep_table(cells: Sequence[Any], front: Sequence[Any]) -> Table:
    """Cells of a sweep, best first; a star marks the Pareto front of accuracy against speed."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("boundary", "px", "pool", "background", "features", "validation, %", "images/s", ""):
        table.add_column(name, justify="left" if name in ("boundary", "background") else "right", no_wrap=True)
    for cell in cells:
        span = f"{100 * cell.accuracy:.2f} ({wilson(cell.correct, cell.val).span()})"
        shape = (str(cell.image_size), str(cell.pool or "-"), cell.background, f"{cell.width:,}")
        table.add_row(cell.freeze_to, *shape, span, f"{cell.speed:,.0f}", "*" if cell in front else "")
    return table


def audit_table(counts: Mapping[str, Any], accuracies: Sequence[tuple[str, Interval]]) -> Table:
    """What an audit found, a line each, then the accuracies with and without the rows in question."""
    lines = Table.grid(padding=(0, 2, 0, 0))
    lines.add_column(no_wrap=True)
    lines.add_column()
    for key, value in counts.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{n:,} in {part}" for part, n in value.items())
        lines.add_row(key.replace("_", " ").capitalize(), Text(f"{value}"))
    for name, found in accuracies:
        lines.add_row(f"Accuracy, {name}", Text(str(found)))
    return lines


def bench_table(found: Any) -> Table:
    """A line for each candidate of a `bench.Bench`."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("Model", "p50, ms", "p99, ms", "images/s", "times", "MB", "peak MiB", "accuracy, %"):
        table.add_column(name, justify="left" if name == "Model" else "right", no_wrap=name != "Model")
    kinds = [f"{one.kind} {one.precision}" for one in found.candidates]
    for one in found.candidates:
        ratio, low, high = found.ratio(one)
        kind = f"{one.kind} {one.precision}"
        name = kind if kinds.count(kind) == 1 else f"{kind} {one_line(one.name)}"
        cells = [f"{one.p50:.1f}", f"{one.p99:.1f}", f"{one.speed:,.0f}"]
        cells += [f"{ratio:.2f} ({low:.2f}-{high:.2f})", f"{one.size / 1e6:.1f}", f"{one.memory / 2**20:,.0f}"]
        cells.append(f"{100 * one.accuracy.value:.2f} ({one.accuracy.span()})")
        table.add_row(Text(name), *cells)
    return table


def class_table(found: Evaluation, width: int) -> Table:
    """Every score with its interval; on a narrow terminal only recall keeps one."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("Class", min_width=8)
    for name in ("rows", "precision, %", "recall, %", "F1, %"):
        table.add_column(name, justify="right", no_wrap=True)
    for score in found.per_class:
        scores = (score.precision, score.recall, score.f1)
        spans = [f" ({x.span()})" if width >= 76 or x is score.recall else "" for x in scores]
        cells = [
            f"{100 * x.value:.1f}{span}" if x.value == x.value else "-" for x, span in zip(scores, spans, strict=True)
        ]
        table.add_row(Text(one_line(score.name)), f"{score.support:,}", *cells)
    return table


def _confusion_table(found: Evaluation) -> Table:
    """Counts, rows true, columns predicted; column names are cut to five letters."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("true \\ predicted", max_width=16)
    for name in found.classes:
        table.add_column(Text(one_line(name)[:5]), justify="right", no_wrap=True)
    for i, (name, counts) in enumerate(zip(found.classes, found.confusion, strict=True)):
        styles = ["bold" if j == i else "" for j in range(len(counts))]
        cells = [Text(str(c) if c else "·", style=s) for c, s in zip(counts, styles, strict=True)]
        table.add_row(Text(one_line(name)), *cells)
    return table
