"""What people read at the end of a run: the HTML page and the terminal summary. The files are written by results.py."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from attire.evaluation import figures
from attire.evaluation.intervals import Claim, Interval, p_text
from attire.evaluation.metrics import Evaluation
from attire.evaluation.pages import percent, render
from attire.evaluation.run_result import RunResult, shown_images
from attire.storage.files import write_text

# name on the page, attribute of Evaluation, shown in percent
FIGURES = (
    ("Accuracy", "accuracy", True),
    ("Balanced accuracy", "balanced_accuracy", True),
    ("Right answer among the first two", "top2", True),
    ("Macro F1", "macro_f1", True),
    ("Calibration error", "calibration_error", True),
    ("Log loss, nats", "log_loss", False),
    ("Brier score, 0 to 2", "brier", False),
)
_STAGES = {"extract": "computing features", "fit": "training the head", "evaluate": "scoring", "total": "everything"}


def write_report(run_dir: Path, result: RunResult) -> Path:
    """`report.html`, one page that needs nothing else: no script, no network, every picture inside."""
    path = run_dir / "report.html"
    write_text(path, page(result))
    return path


def page(result: RunResult) -> str:
    """The report as HTML; equal results give equal pages."""
    test = result.test
    sets = [found for found in (test, result.val, result.train) if found]
    return render(
        "evaluation/report.html",
        r=result,
        sets=sets,
        bare=lambda share: "-" if share != share else f"{100 * share:.1f}",
        claim_meaning=_claim_meaning(result.claim),
        hardest=hardest(test),
        once=_scored_once(result),
        figures=[(name, [cell(getattr(found, key), share) for found in sets]) for name, key, share in FIGURES],
        methods=_methods(test),
        curves=list(_curves(result)),
        confusion=list(_shaded(test)),
        reliability=_drawing(figures.reliability_diagram(test.reliability), "Reliability diagram"),
        galleries=[(title, _gallery(result, rows)) for title, rows in result.galleries.items()],
        facts=[("Recipe", flat(result.config)), ("Data", flat(result.data)), ("Environment", flat(result.environment))],
        times=_times(result.seconds),
    )


def cell(found: Interval, share: bool) -> tuple[str, str]:
    """The value and its bounds, as text."""
    if share:
        return percent(found.value), found.span()
    return f"{found.value:.3f}", f"{found.low:.3f}-{found.high:.3f}"


def _claim_meaning(claim: Claim) -> str:
    odds = (
        f"If the true accuracy were {percent(claim.claimed)}, a result at least as unlikely as this one would come up"
    )
    odds += f" with {p_text(claim.p_value)} (exact binomial test, n = {claim.measured.n:,})."
    return odds + (" The test set is too small to tell." if claim.verdict == "undecided" else "")


def hardest(found: Evaluation) -> str:
    """'Shirt 83.1 % (13.0 % called T-shirt/top)'."""
    score = found.hardest
    row = found.confusion[found.classes.index(score.name)].copy()
    row[found.classes.index(score.name)] = 0
    text = f"{score.name} {percent(score.recall.value)}"
    return text + (f" ({percent(row.max() / score.support)} called {found.classes[row.argmax()]})" if row.any() else "")


def _scored_once(result: RunResult) -> str:
    if folds := result.config.get("folds"):
        return f"Each image was scored once, by that one of {folds} classifiers that had not been trained on it."
    told = "The test set was scored once, after training had ended; this page is drawn from the stored predictions."
    return told + _cost(result)


def _cost(result: RunResult) -> str:
    """What answers cost where they are the mean of several, else nothing."""
    recipe = result.config.get("recipe", {})
    count = result.config.get("views", recipe.get("tta", 1) if isinstance(recipe, Mapping) else 1)
    if members := result.config.get("ensemble"):
        return f" An answer is the mean of {len(members)} bundles, {count} forward passes in all."
    if count == 1:
        return ""
    return f" An answer is the mean over {count} views of the picture and takes {count} times the forward passes."


def _methods(found: Evaluation) -> str:
    boot = found.log_loss.method
    return (
        f"Intervals: {found.accuracy.method} for accuracy, the first two, precision and recall; {boot}, rows drawn with"
        " replacement, for the rest. Calibration error: 15 equal-width bins; its resamples are shifted by their bias."
    )


def _curves(result: RunResult) -> Iterator[tuple[str, Markup]]:
    history = result.history
    if history:
        yield "Loss by epoch", _drawing(figures.loss_curve(history), "Loss by epoch")
    if any(row["val_accuracy"] is not None for row in history):
        yield "Validation accuracy by epoch", _drawing(figures.accuracy_curve(history), "Validation accuracy by epoch")


def _drawing(figure: Any, label: str) -> Markup:
    return Markup(figures.inline(figures.svg(figure), label))  # our own drawing; its only free text is this label


def _shaded(found: Evaluation) -> Iterator[tuple[str, list[tuple[int, int, bool]]]]:
    """Each row of the confusion matrix: class, then count, shade from 0 to 100, and whether ink must be white."""
    for name, counts in zip(found.classes, found.confusion, strict=True):
        shade = 100 * np.sqrt(counts / max(1, counts.sum()))
        yield name, [(int(c), round(s), bool(s > 60)) for c, s in zip(counts, shade, strict=True)]


def _gallery(result: RunResult, rows: Sequence[int]) -> list[dict[str, Any]]:
    found, items = result.predictions, []
    for row, image in zip(rows, shown_images(result, rows), strict=True):
        first, second = np.argsort(-found.probabilities[row], kind="stable")[:2]
        p = found.probabilities[row]
        items.append(
            {
                "row": row,
                "uri": figures.data_uri(figures.grey_png(image)),
                "true": result.classes[found.labels[row]],
                "answer": result.classes[first],
                "probability": f"{p[first]:.2f}",
                "wrong": first != found.labels[row],
                "second": f"{result.classes[second]} {p[second]:.2f}" if p[second] >= 0.005 else "",
            }
        )
    return items


def flat(value: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines: 'head.hidden', '512'."""
    lines: list[tuple[str, str]] = []
    for key, item in value.items():
        if key == "rows_per_class":
            lines.append((f"{before}{key}", _counts_text(item)))
        elif isinstance(item, Mapping):
            lines += flat(item, f"{before}{key}.")
        else:
            lines.append((f"{before}{key}", _shown(item)))
    return lines


def _counts_text(counts: Mapping[str, int]) -> str:
    """'6,000 each', or 'Bag 12, Coat 9'."""
    if len(set(counts.values())) == 1:
        return f"{next(iter(counts.values())):,} each"
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _shown(item: Any) -> str:
    if isinstance(item, bool) or item is None:
        return {True: "yes", False: "no", None: "-"}[item]
    if isinstance(item, list | tuple):
        return ", ".join(_shown(part) for part in item)
    return f"{item:g}" if isinstance(item, float) else f"{item:,}" if isinstance(item, int) else str(item)


def _times(seconds: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """Stage, duration and percent of the whole; what no stage accounts for is 'the rest'."""
    stages = {key: value for key, value in seconds.items() if key != "total"}
    total = max(seconds.get("total", 0), sum(stages.values()))
    stages["the rest"] = total - sum(stages.values())
    lines = [(_STAGES.get(key, key), duration(value), value) for key, value in {**stages, "total": total}.items()]
    return [(name, text, round(100 * value / total, 1) if total else 0) for name, text, value in lines]


def duration(seconds: float) -> str:
    """'0.4 s', '42 s', '2 min 7 s', '1 h 4 min'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
