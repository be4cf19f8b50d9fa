"""Figures of the report as matplotlib draws them, and as bytes. Never pyplot, so no global state."""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from attire.errors import one_line
from attire.evaluation.calibration import Ints, ReliabilityBin
from attire.storage.files import write_bytes

INK = "#1b1c20"
BLUE, _ORANGE = "#2f6fb3", "#c4661f"  # they differ in lightness too, for colour-blind readers
COLOURS = ("#1b6e53", BLUE, _ORANGE, "#7a3e9d", "#8a8f98")  # of several series: block2, block3 ...
_HEAT = LinearSegmentedColormap.from_list("attire", ["#ffffff", BLUE])
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}


def _svg(figure: Figure) -> bytes:
    """The figure as SVG without date or random ids: equal figures give equal bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "attire"}), _ignore_missing_glyphs():
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    return buffer.getvalue()


def write_figure(stem: Path, figure: Figure) -> Path:
    """`stem`.svg and, for where SVG is not welcome, `stem`.png; returns the latter's path."""
    write_bytes(stem.with_suffix(".svg"), _svg(figure))
    picture = stem.with_suffix(".png")
    write_bytes(picture, png(figure))
    return picture


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE), _ignore_missing_glyphs():
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


@contextmanager
def _ignore_missing_glyphs() -> Iterator[None]:
    """matplotlib draws boxes for a script that its font lacks; a class name in one must not end a run."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


def inline_svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element of a page: no prologue, no size, ink in the page's own colour, no clashing ids."""
    text = _svg(figure).decode()
    text = re.sub(r"<(style|metadata)\b.*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", text)
    prefix = re.sub(r"\W", "", label).lower()  # two figures may hold the same marker
    text = re.sub(r'(url\(#|href="#| id=")', rf"\g<1>{prefix}-", text)
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    opening = rf'<svg {namespaces} \1 role="img" aria-label="{label}">'
    return re.sub(r'<svg\b[^>]*?(viewBox="[^"]+")[^>]*>', opening, text, count=1).replace(INK, "currentColor")


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


@matplotlib.rc_context(STYLE)
def loss_curve(history: Sequence[Mapping[str, Any]]) -> Figure:
    figure, plot = new_axes(4.4, 2.9)
    _line(plot, history, "train_loss", "training", BLUE, "-")
    _line(plot, history, "val_loss", "validation", _ORANGE, "--")
    plot.set(xlabel="epoch", ylabel="loss, nats")
    plot.set_ylim(bottom=0)
    plot.legend()
    return figure


@matplotlib.rc_context(STYLE)
def accuracy_curve(history: Sequence[Mapping[str, Any]]) -> Figure:
    figure, plot = new_axes(4.4, 2.9)
    rows = [{**row, "percent": None if row["val_accuracy"] is None else 100 * row["val_accuracy"]} for row in history]
    _line(plot, rows, "percent", "validation", _ORANGE, "--")
    plot.set(xlabel="epoch", ylabel="validation accuracy, %")
    return figure


def _line(plot: Axes, history: Sequence[Mapping[str, Any]], key: str, label: str, colour: str, dashes: str) -> None:
    measured = [row for row in history if row[key] is not None]
    if measured:
        epochs, values = [row["epoch"] for row in measured], [row[key] for row in measured]
        marker = "o" if len(measured) < 40 else None
        plot.plot(epochs, values, dashes, color=colour, label=label, marker=marker, markersize=3)
        plot.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


@matplotlib.rc_context(STYLE)
def reliability_diagram(bins: Sequence[ReliabilityBin]) -> Figure:
    """Accuracy against confidence; the area of a dot is the share of rows in its bin."""
    figure, plot = new_axes(4.4, 3.6)
    filled = [bar for bar in bins if bar.count]
    total = sum(bar.count for bar in filled)
    plot.plot([0, 100], [0, 100], color=INK, linewidth=0.7, linestyle=":")
    x, y = np.array([(100 * bar.confidence, 100 * bar.accuracy) for bar in filled]).T
    steady = [bar.count >= 10 for bar in filled]  # a line through a bin of one row would be all the eye sees
    plot.plot(x[steady], y[steady], color=BLUE, linewidth=1)
    areas = [12 + 400 * bar.count / total for bar in filled]
    plot.scatter(x, y, s=areas, color=BLUE, alpha=0.75, linewidths=0, zorder=3)
    plot.set(xlabel="probability the model gave its answer, %", ylabel="answers that were right, %")
    plot.set(xlim=(0, 104), ylim=(0, 104))
    return figure


@matplotlib.rc_context(STYLE)
def confusion_matrix(table: Ints, classes: Sequence[str]) -> Figure:
    """Counts, shaded by the share of the true class."""
    k = len(classes)
    figure, plot = new_axes(2.4 + 0.46 * k, 2.0 + 0.42 * k)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    plot.imshow(np.sqrt(shares), cmap=_HEAT, vmin=0, vmax=1, aspect="auto")  # the root shows shares of a few percent
    for i, j in zip(*np.nonzero(table), strict=True):
        colour = "white" if shares[i, j] > 0.4 else INK
        plot.text(j, i, str(table[i, j]), ha="center", va="center", size=7.5, color=colour)
    plot.set_xticks(range(k), [_as_label(name) for name in classes], rotation=40, ha="right", rotation_mode="anchor")
    plot.set_yticks(range(k), [_as_label(name) for name in classes])
    plot.set(xlabel="predicted", ylabel="true")
    plot.spines[:].set_visible(False)
    return figure


@matplotlib.rc_context(STYLE)
def explanation(
    title: str, tops: Sequence[tuple[str, NDArray[Any]]], tiles: Sequence[tuple[str, NDArray[Any]]], tally: str
) -> Figure:
    """Named pictures in a row, grey (H, W) or colour (H, W, 3); below them smaller ones with what is said of them."""
    figure = Figure(figsize=(6.6, 4.6 if tiles else 2.9), layout="constrained")
    figure.suptitle(_as_label(title), size=12)
    if not tiles:
        _row_of_pictures(figure, tops)
        return figure
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=(3, 2)))
    _row_of_pictures(above, tops)
    below.suptitle(_as_label(f"nearest training images: {tally}"), size=9)
    _row_of_pictures(below, tiles)
    return figure


def _row_of_pictures(figure: Any, named: Sequence[tuple[str, NDArray[Any]]]) -> None:
    plots = figure.subplots(1, len(named), squeeze=False)[0]
    for plot, (name, pixels) in zip(plots, named, strict=True):
        plot.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        plot.set_title("\n".join(map(_as_label, name.split("\n"))), size=9)
        plot.set_axis_off()


def _as_label(name: str) -> str:
    """A class called '$x$' is a name, not mathematics, and control characters have no shape."""
    return one_line(name).replace("$", r"\$")
