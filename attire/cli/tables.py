"""Tables that the terminal prints."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attire.errors import one_line
from attire.evaluation.intervals import Interval, p_text, percent, wilson
from attire.evaluation.metrics import Evaluation
from attire.evaluation.report import format_duration
from attire.evaluation.run_result import RunResult

if TYPE_CHECKING:
    from attire.analysis.audit import Audit
    from attire.analysis.bench import BenchmarkResult
    from attire.analysis.sweep import Sweep

_BEST_CELLS = 20  # lines of a sweep's table; sweep.csv holds all


def terminal_summary(result: RunResult, width: int = 80) -> RenderableType:
    """The end of `attire train`: accuracy, claim check, hardest class, per-class table, confusion table if it fits."""
    test, claim = result.test, result.claim
    others = f"training {percent(result.train.accuracy.value)}   " if result.train else ""
    others += f"calibration error {percent(test.calibration_error.value)}"
    name = "Out of fold" if result.config.get("folds") else "Test accuracy"
    check = f"{percent(claim.claimed)} was claimed; this run measures {percent(test.accuracy.value)}: {claim.verdict}"
    lines = _fact_lines()
    lines.add_row(name, Text(str(test.accuracy), style="bold"))
    lines.add_row("", others)
    lines.add_row("Claim check", f"{check} ({p_text(claim.p_value)})")
    lines.add_row("Hardest", Text(one_line(test.describe_hardest())))
    parts: list[RenderableType] = [lines, "", class_table(test, width)]
    if 16 + 6 * len(test.classes) <= width:
        parts += ["", _confusion_table(test)]
    return Group(*parts)


def comparison_table(names: Sequence[str], results: Sequence[RunResult]) -> Table:
    """One line a run: accuracy beside what it cost."""
    table = _columns("Run", "recipe", "seed", "accuracy, %", "training", "in all", left=("Run", "recipe"))
    for name, result in zip(names, results, strict=True):
        seconds = result.seconds
        training, total = (format_duration(seconds[key]) if key in seconds else "-" for key in ("fit", "total"))
        accuracy = _with_span(result.test.accuracy, digits=2)
        table.add_row(Text(name), Text(one_line(result.recipe)), str(result.seed), accuracy, training, total)
    return table


def sweep_table(sweep: "Sweep") -> Table:
    """The best cells, best first; a star marks the Pareto front of accuracy against speed."""
    header = ("boundary", "px", "pool", "background", "features", "validation, %", "images/s", "")
    table, front = _columns(*header, left=("boundary", "background")), sweep.front
    for cell in sweep.ranked[:_BEST_CELLS]:
        table.add_row(
            cell.freeze_to,
            str(cell.image_size),
            str(cell.pool or "-"),
            cell.background,
            f"{cell.width:,}",
            _with_span(wilson(cell.correct, cell.val), digits=2),
            f"{cell.speed:,.0f}",
            "*" if cell in front else "",
        )
    return table


def audit_table(audit: "Audit") -> Table:
    """The counts of an audit, a line each, then the accuracies with and without the rows in question."""
    lines = _fact_lines()
    for key, value in audit.counts().items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{n:,} in {part}" for part, n in value.items())
        lines.add_row(key.replace("_", " ").capitalize(), Text(f"{value}"))
    for name, accuracy in audit.accuracies:
        lines.add_row(f"Accuracy, {name}", Text(str(accuracy)))
    return lines


def bench_table(result: "BenchmarkResult") -> Table:
    """One line a candidate."""
    header = ("Model", "p50, ms", "p99, ms", "images/s", "times", "MB", "peak MiB", "accuracy, %")
    table, kinds = _columns(*header, left=("Model",)), [one.label for one in result.candidates]
    for candidate in result.candidates:
        ratio, low, high = result.ratio(candidate)
        unique = kinds.count(candidate.label) == 1
        table.add_row(
            Text(candidate.label if unique else f"{candidate.label} {one_line(candidate.name)}"),
            f"{candidate.p50:.1f}",
            f"{candidate.p99:.1f}",
            f"{candidate.speed:,.0f}",
            f"{ratio:.2f} ({low:.2f}-{high:.2f})",
            f"{candidate.size / 1e6:.1f}",
            f"{candidate.memory / 2**20:,.0f}",
            _with_span(candidate.accuracy, digits=2),
        )
    return table


def class_table(evaluation: Evaluation, width: int) -> Table:
    """The scores of each class with their confidence intervals; on a narrow terminal only recall keeps one."""
    table = _columns("Class", "rows", "precision, %", "recall, %", "F1, %", left=("Class",))
    table.columns[0].min_width = 8
    for score in evaluation.per_class:
        scores = (score.precision, score.recall, score.f1)
        precision, recall, f1 = (
            _with_span(x) if width >= 76 or x is score.recall else f"{100 * x.value:.1f}" if x.value == x.value else "-"
            for x in scores
        )
        table.add_row(Text(one_line(score.name)), f"{score.support:,}", precision, recall, f1)
    return table


def _confusion_table(evaluation: Evaluation) -> Table:
    """Counts, rows true, columns predicted; column names are cut to five letters."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("true \\ predicted", max_width=16)
    for name in evaluation.classes:
        table.add_column(Text(one_line(name)[:5]), justify="right", no_wrap=True)
    for i, (name, counts) in enumerate(zip(evaluation.classes, evaluation.confusion, strict=True)):
        cells = (Text(str(c) if c else "·", style="bold" if j == i else "") for j, c in enumerate(counts))
        table.add_row(Text(one_line(name)), *cells)
    return table


def _columns(*names: str, left: Sequence[str]) -> Table:
    """An empty table without lines; its first column may wrap, and those in `left` are not aligned to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if name in left else "right", no_wrap=i > 0)
    return table


def _fact_lines() -> Table:
    """An empty table of names and values."""
    lines = Table.grid(padding=(0, 2, 0, 0))
    lines.add_column(no_wrap=True)
    lines.add_column()
    return lines


def _with_span(interval: Interval, digits: int = 1) -> str:
    """'94.5 (94.0-94.9)', in percent; '-' where it is undefined."""
    return "-" if interval.value != interval.value else f"{100 * interval.value:.{digits}f} ({interval.span()})"
