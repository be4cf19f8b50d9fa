"""The report's drawings, as bytes: SVG that is the same on every run, and PNG. Never pyplot, so no global state."""

import base64
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image

from attire.errors import one_line
from attire.evaluation.calibration import Bin, Ints

_INK, _BLUE, _ORANGE = (
    "#1b1c20",
    "#2f6fb3",
    "#c4661f",
)  # the two lines differ in lightness too, for colour-blind readers
_TAPS = ("#1b6e53", _BLUE, _ORANGE, "#7a3e9d", "#8a8f98")  # block2, block3 ...
_HEAT = LinearSegmentedColormap.from_list("attire", ["#ffffff", _BLUE])
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}


def svg(figure: Figure) -> bytes:
    """The figure as SVG without date or random ids: equal figures give equal bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "attire"}), _any_script():
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    return buffer.getvalue()


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE), _any_script():
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


@contextmanager
def _any_script() -> Iterator[None]:
    """A class name in a script that matplotlib's font lacks is drawn as boxes; that is no reason to warn or stop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


def inline(drawing: bytes, label: str) -> str:
    """An SVG file made fit for a page: no prologue, no size, ink in the page's own colour, no clashing ids."""
    text = drawing.decode()
    text = re.sub(r"<(style|metadata)\b.*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", text)
    own = re.sub(r"\W", "", label).lower()  # two drawings may hold the same marker
    text = re.sub(r'(url\(#|href="#| id=")', rf"\g<1>{own}-", text)
    text = re.sub(r'<svg\b[^>]*?(viewBox="[^"]+")[^>]*>', _opening(label), text, count=1)
    return text.replace(_INK, "currentColor")


def _opening(label: str) -> Any:
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return lambda match: f'<svg {names} {match[1]} role="img" aria-label="{label}">'


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


@matplotlib.rc_context(_STYLE)
def loss_curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    figure, plot = _axes(4.4, 2.9)
    _line(plot, history, "train_loss", "training", _BLUE, "-")
    _line(plot, history, "val_loss", "validation", _ORANGE, "--")
    plot.set(xlabel="epoch", ylabel="loss, nats")
    plot.set_ylim(bottom=0)
    plot.legend()
    return figure


@matplotlib.rc_context(_STYLE)
def accuracy_curve(history: Sequence[Mapping[str, Any]]) -> Figure:
    figure, plot = _axes(4.4, 2.9)
    rows = [{**row, "percent": None if row["val_accuracy"] is None else 100 * row["val_accuracy"]} for row in history]
    _line(plot, rows, "percent", "validation", _ORANGE, "--")
    plot.set(xlabel="epoch", ylabel="validation accuracy, %")
    return figure


def _line(plot: Axes, history: Sequence[Mapping[str, Any]], key: str, label: str, colour: str, dashes: str) -> None:
    points = [(row["epoch"], row[key]) for row in history if row[key] is not None]
    if points:
        x, y = zip(*points, strict=True)
        plot.plot(x, y, dashes, color=colour, label=label, marker="o" if len(points) < 40 else None, markersize=3)
        plot.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


@matplotlib.rc_context(_STYLE)
def reliability(bins: Sequence[Bin]) -> Figure:
    """Accuracy against confidence; the area of a dot is the share of rows in its bin."""
    figure, plot = _axes(4.4, 3.6)
    filled = [bar for bar in bins if bar.count]
    total = sum(bar.count for bar in filled)
    plot.plot([0, 100], [0, 100], color=_INK, linewidth=0.7, linestyle=":")
    told = [bar for bar in filled if bar.count >= 10]  # a line through a bin of one row would be all the eye sees
    plot.plot([100 * bar.confidence for bar in told], [100 * bar.accuracy for bar in told], color=_BLUE, linewidth=1)
    x, y = [100 * bar.confidence for bar in filled], [100 * bar.accuracy for bar in filled]
    plot.scatter(
        x, y, s=[12 + 400 * bar.count / total for bar in filled], color=_BLUE, alpha=0.75, linewidths=0, zorder=3
    )
    plot.set(xlabel="probability the model gave its answer, %", ylabel="answers that were right, %")
    plot.set(xlim=(0, 104), ylim=(0, 104))
    return figure


@matplotlib.rc_context(_STYLE)
def accuracy_by_speed(cells: Sequence[Any], front: Sequence[Any]) -> Figure:
    """Validation accuracy against images/s (log), a colour for each boundary; the Pareto front is joined and named."""
    figure, plot = _axes(6.4, 4.2)
    names = sorted({cell.freeze_to for cell in cells})
    for name, colour, marker in zip(names, _TAPS, "osD^v", strict=False):
        for background, filled in (("black", True), ("white", False)):
            own = [cell for cell in cells if (cell.freeze_to, cell.background) == (name, background)]
            if own:
                x, y = [cell.speed for cell in own], [100 * cell.accuracy for cell in own]
                label = name if filled else f"{name}, white background"
                plot.scatter(
                    x, y, 20, marker=marker, label=label, edgecolors=colour, facecolors=colour if filled else "none"
                )
    plot.plot([cell.speed for cell in front], [100 * cell.accuracy for cell in front], color=_INK, linewidth=0.8)
    for cell in front:
        place = (cell.speed, 100 * cell.accuracy)
        plot.annotate(f"{cell.image_size} px", place, (3, 4), textcoords="offset points", size=7.5)
    plot.set_xscale("log")
    plot.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plot.xaxis.set_major_formatter("{x:,.0f}")
    plot.xaxis.set_minor_locator(NullLocator())
    plot.set(xlabel="images/s through the frozen part", ylabel="validation accuracy, %")
    plot.legend(loc="lower left")
    return figure


@matplotlib.rc_context(_STYLE)
def speeds(candidates: Sequence[Any]) -> Figure:
    """Bars of images/s, the range over rounds as a line, with latency, size and accuracy in words."""
    figure, plot = _axes(7.2, 0.9 + 0.5 * len(candidates))
    for i, found in enumerate(candidates):
        plot.barh(i, found.speed, 0.6, color=_BLUE)
        plot.plot([min(found.speeds), max(found.speeds)], [i, i], color=_INK, linewidth=1)
        told = f"  {found.speed:,.0f}/s   {found.p50:.1f} ms   {found.size / 1e6:.1f} MB   "
        told += f"{100 * found.accuracy.value:.2f} %"
        plot.text(max(found.speeds), i, told, va="center", size=8)
    names = [_plain(f"{found.kind} {found.precision}") for found in candidates]
    plot.set_yticks(range(len(candidates)), names)
    plot.invert_yaxis()
    plot.set_xlim(0, 1.75 * max(max(found.speeds) for found in candidates))
    plot.set(xlabel="images/s at the best batch size; then latency of one image (median), size, accuracy")
    return figure


@matplotlib.rc_context(_STYLE)
def confusion(table: Ints, classes: Sequence[str]) -> Figure:
    """Counts, shaded by the share of the true class."""
    k = len(classes)
    figure, plot = _axes(2.4 + 0.46 * k, 2.0 + 0.42 * k)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    plot.imshow(np.sqrt(shares), cmap=_HEAT, vmin=0, vmax=1, aspect="auto")  # the root shows shares of a few percent
    for i, j in zip(*np.nonzero(table), strict=True):
        colour = "white" if shares[i, j] > 0.4 else _INK
        plot.text(j, i, str(table[i, j]), ha="center", va="center", size=7.5, color=colour)
    plot.set_xticks(range(k), [_plain(name) for name in classes], rotation=40, ha="right", rotation_mode="anchor")
    plot.set_yticks(range(k), [_plain(name) for name in classes])
    plot.set(xlabel="predicted", ylabel="true")
    plot.spines[:].set_visible(False)
    return figure


@matplotlib.rc_context(_STYLE)
def explanation(
    title: str, tops: Sequence[tuple[str, NDArray[Any]]], tiles: Sequence[tuple[str, NDArray[Any]]], tally: str
) -> Figure:
    """Named pictures in a row, grey (H, W) or colour (H, W, 3); below them smaller ones with what is said of them."""
    figure = Figure(figsize=(6.6, 4.6 if tiles else 2.9), layout="constrained")
    figure.suptitle(_plain(title), size=12)
    if not tiles:
        _row_of_pictures(figure, tops)
        return figure
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=(3, 2)))
    _row_of_pictures(above, tops)
    below.suptitle(_plain(f"nearest training images: {tally}"), size=9)
    _row_of_pictures(below, tiles)
    return figure


def _row_of_pictures(figure: Any, named: Sequence[tuple[str, NDArray[Any]]]) -> None:
    plots = figure.subplots(1, len(named), squeeze=False)[0]
    for plot, (name, pixels) in zip(plots, named, strict=True):
        plot.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        plot.set_title("\n".join(map(_plain, name.split("\n"))), size=9)
        plot.set_axis_off()


def _plain(name: str) -> str:
    """A class called '$x$' is a name, not mathematics, and control characters have no shape."""
    return one_line(name).replace("$", r"\$")


def tile(images: NDArray[np.uint8], across: int) -> bytes:
    """Images (m, 28, 28) as one lossless PNG, `across` to a row; `untile` gives them back."""
    m, side, _ = images.shape
    down = max(1, -(-m // across))
    sheet = np.zeros((down * across, side, side), dtype=np.uint8)
    sheet[:m] = images
    rows = sheet.reshape(down, across, side, side).swapaxes(1, 2).reshape(down * side, across * side)
    return grey_png(rows)


def untile(sheet: bytes, m: int, side: int = 28) -> NDArray[np.uint8]:
    pixels = np.asarray(Image.open(io.BytesIO(sheet)).convert("L"))
    height, width = pixels.shape
    images = pixels.reshape(height // side, side, width // side, side).swapaxes(1, 2)
    return images.reshape(-1, side, side)[:m]


def grey_png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()
