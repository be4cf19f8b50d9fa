"""The tables that the terminal prints: what they hold, and that they fit."""

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console, RenderableType

from attire.analysis.bench import BenchmarkResult, _Candidate
from attire.analysis.sweep import Sweep, _Cell
from attire.cli.tables import bench_table, comparison_table, sweep_table, terminal_summary
from attire.evaluation.intervals import wilson
from attire.evaluation.metrics import evaluate
from attire.evaluation.run_result import Predictions, RunResult
from tests.results import CLASSES, NASTY, make_result


def printed(table: RenderableType, width: int) -> str:
    console = Console(width=width, no_color=True, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def summary(result: RunResult, width: int) -> str:
    return printed(terminal_summary(result, width), width)


def test_the_terminal_summary_fits_and_says_it_all() -> None:
    result = make_result()
    text = summary(result, 80)
    assert str(result.test.accuracy) in text
    assert f"training {100 * result.test.accuracy.value:.1f} %" in text
    assert "98.0 % was claimed; this run measures" in text
    assert "not confirmed (p < 0.001)" in " ".join(text.split())
    assert "Hardest" in text
    assert "true \\ predicted" in text
    for width in (50, 80, 120):
        narrow = summary(result, width)
        assert max(len(line) for line in narrow.splitlines()) <= width
        assert all(name in narrow for name in CLASSES)


def test_names_are_text_on_the_terminal() -> None:
    text = summary(make_result(NASTY), 100)
    assert "\x1b" not in text
    assert "[red]$x$[/red]" in text


def test_a_class_that_never_occurs_has_no_figures() -> None:
    labels = np.repeat([0, 1], 15)
    p = np.eye(3)[labels]
    predictions = Predictions.of_test_set(labels, p, np.zeros((30, 28, 28), np.uint8))
    result = make_result(test=evaluate(p, labels, CLASSES, resamples=20), train=None, predictions=predictions)
    assert "nan" not in summary(result, 90)


def test_a_comparison_has_a_line_for_each_run() -> None:
    lines = printed(comparison_table(["a", "b"], [make_result(), make_result(seconds={})]), 100).splitlines()
    accuracy = make_result().test.accuracy
    assert lines[1].split()[:3] == ["a", "fast", "3"]
    assert f"{100 * accuracy.value:.2f} ({accuracy.span()})" in lines[1]
    assert lines[1].split()[-4:] == ["1.0", "s", "5.0", "s"]
    assert lines[2].split()[-2:] == ["-", "-"]


def test_a_sweep_is_ranked_and_its_front_has_stars() -> None:
    correct = {"block2": (900, 500.0), "block3": (940, 400.0), "block4": (930, 100.0)}
    cells = [_Cell(name, 32, 0, "black", 100, 0.1, right, 1000, speed) for name, (right, speed) in correct.items()]
    lines = printed(sweep_table(Sweep(Path(), tuple(cells), 10, 1000)), 100).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["block3", "block4", "block2"]
    assert [line.rstrip().endswith("*") for line in lines[1:]] == [True, False, True]
    assert f"94.00 ({wilson(940, 1000).span()})" in lines[1]


@pytest.mark.parametrize(("kinds", "names"), [(("bundle", "onnx"), False), (("onnx", "onnx"), True)])
def test_a_benchmark_names_the_files_only_where_formats_repeat(kinds: tuple[str, str], names: bool) -> None:
    candidates = [
        _Candidate(f"file-{i}", kind, "fp32", 10**7, 100, 2.0, 3.5, 32, (100.0, 200.0), 2**28, 2**29, wilson(9, 10))
        for i, kind in enumerate(kinds)
    ]
    text = printed(bench_table(BenchmarkResult(tuple(candidates), {})), 120)
    assert f"{kinds[1]} fp32" in text
    assert "1.00 (1.00-1.00)" in text
    assert ("file-1" in text) == names
