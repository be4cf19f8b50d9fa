"""The report of a finished run: one HTML page."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from attire.evaluation import figures
from attire.evaluation.intervals import Claim, Interval, p_text, percent
from attire.evaluation.metrics import Evaluation
from attire.evaluation.pages import render
from attire.evaluation.png import data_uri, grey_png
from attire.evaluation.run_result import RunResult
from attire.storage.files import write_text

# name on the page, attribute of Evaluation, whether it is shown in percent
_FIGURES = (
    ("Accuracy", "accuracy", True),
    ("Balanced accuracy", "balanced_accuracy", True),
    ("Right answer among the first two", "top2", True),
    ("Macro F1", "macro_f1", True),
    ("Calibration error", "calibration_error", True),
    ("Log loss, nats", "log_loss", False),
    ("Brier score, 0 to 2", "brier", False),
)
_AUGMENTATIONS = {
    "flips": "mirrored pictures",
    "shifts": "shifted pictures",
    "synthetic_drawings": "synthetic drawings",
    "random_erasing": "random erasing",
    "cutmix": "CutMix",
}
_STAGES = {"extract": "computing features", "fit": "training the head", "evaluate": "scoring", "total": "everything"}


def write_report(run_dir: Path, result: RunResult) -> Path:
    """Write `report.html`, one page that needs nothing else: no script, no network, every picture inside."""
    path = run_dir / "report.html"
    write_text(path, report_page(result))
    return path


def report_page(result: RunResult) -> str:
    """The report as HTML; equal results give equal pages."""
    test = result.test
    sets = [evaluation for evaluation in (test, result.val, result.train) if evaluation]
    settings = (("Recipe", result.config), ("Data", result.data), ("Environment", result.environment))
    return render(
        "evaluation/report.html",
        r=result,
        sets=sets,
        bare=lambda share: "-" if share != share else f"{100 * share:.1f}",
        claim_meaning=_explain_claim(result.claim),
        scoring=_describe_scoring(result),
        training=describe_training(result.config),
        figures=figure_rows(sets),
        methods=_describe_intervals(test),
        curves=list(_curves(result)),
        confusion=list(_shaded_confusion(test)),
        reliability=_inline(figures.reliability_diagram(test.reliability), "Reliability diagram"),
        galleries=[(title, _gallery_items(result, rows)) for title, rows in result.galleries.items()],
        settings=[(heading, flatten_settings(values)) for heading, values in settings],
        times=_times(result.seconds),
    )


def figure_rows(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Name of each figure, and its value and bounds, as text, in each evaluation."""
    return [
        (name, [_format_interval(getattr(evaluation, key), in_percent) for evaluation in evaluations])
        for name, key, in_percent in _FIGURES
    ]


def _format_interval(interval: Interval, in_percent: bool) -> tuple[str, str]:
    if in_percent:
        return percent(interval.value), interval.span()
    return f"{interval.value:.3f}", f"{interval.low:.3f}-{interval.high:.3f}"


def _explain_claim(claim: Claim) -> str:
    text = (
        f"If the true accuracy were {percent(claim.claimed)}, a result at least as unlikely as this one would occur"
        f" with {p_text(claim.p_value)} (exact binomial test, n = {claim.measured.n:,})."
    )
    return f"{text} The test set is too small to tell." if claim.verdict == "undecided" else text


def describe_training(config: Mapping[str, Any]) -> str:
    """What a training run froze, fine-tuned, augmented and distilled, by its config.json; else empty."""
    recipe = config.get("recipe")
    if not isinstance(recipe, Mapping) or "freeze_to" not in recipe:
        return ""
    start, count = recipe["freeze_to"], recipe["finetune_blocks"]
    text = "No block of VGG16 is frozen" if start == "none" else f"VGG16 is frozen up to {start}"
    where = "first" if start == "none" else "next"
    blocks = f"{where} block is" if count == 1 else f"{where} {count} blocks are"
    text += f"; the {blocks} fine-tuned." if count else "; only the head is trained."
    augmentations = [name for key, name in _AUGMENTATIONS.items() if recipe.get(key)]
    text += f" Augmentation: {', '.join(augmentations) or 'none'}."
    if config.get("teacher"):
        text += " Distillation: the head also learns from a teacher's probabilities."
    return text


def _describe_scoring(result: RunResult) -> str:
    """How often the test images were scored, and what an answer costs where it averages several forward passes."""
    if folds := result.config.get("folds"):
        return f"Each image was scored once, by that one of {folds} heads that had not been trained on it."
    text = "The test set was scored once, after training had ended; this page is made from the stored predictions."
    recipe = result.config.get("recipe", {})
    count = result.config.get("tta", recipe.get("tta", 1) if isinstance(recipe, Mapping) else 1)
    if members := result.config.get("ensemble"):
        return f"{text} Each answer averages {len(members)} bundles and takes {count} forward passes."
    if count == 1:
        return text
    return f"{text} Test-time augmentation: each answer averages {count} views of the image, a forward pass each."


def _describe_intervals(evaluation: Evaluation) -> str:
    return (
        "Small figures are 95 % confidence intervals. For accuracy, the first two, precision and recall the method is"
        f" {evaluation.accuracy.method}; for the rest {evaluation.log_loss.method}, rows drawn with replacement. The"
        " calibration error is taken over 15 bins of equal width, and the bias of its resamples is removed."
    )


def _curves(result: RunResult) -> Iterator[tuple[str, Markup]]:
    history = result.history
    if history:
        yield "Loss by epoch", _inline(figures.loss_curve(history), "Loss by epoch")
    if any(row["val_accuracy"] is not None for row in history):
        yield "Validation accuracy by epoch", _inline(figures.accuracy_curve(history), "Validation accuracy by epoch")


def _inline(figure: Figure, label: str) -> Markup:
    return Markup(figures.inline_svg(figure, label))  # our own drawing; its only free text is this label


def _shaded_confusion(evaluation: Evaluation) -> Iterator[tuple[str, list[tuple[int, int, bool]]]]:
    """Each row of the confusion matrix: class, then count, shade from 0 to 100, and whether ink must be white."""
    for name, counts in zip(evaluation.classes, evaluation.confusion, strict=True):
        shade = 100 * np.sqrt(counts / max(1, counts.sum()))
        yield name, [(int(c), round(s), bool(s > 60)) for c, s in zip(counts, shade, strict=True)]


def _gallery_items(result: RunResult, rows: Sequence[int]) -> list[dict[str, Any]]:
    predictions, items = result.predictions, []
    for row, image in zip(rows, predictions.images_of(rows), strict=True):
        p, label = predictions.probabilities[row], predictions.labels[row]
        first, second = np.argsort(-p, kind="stable")[:2]
        items.append(
            {
                "row": row,
                "uri": data_uri(grey_png(image)),
                "true": result.classes[label],
                "predicted": result.classes[first],
                "probability": f"{p[first]:.2f}",
                "wrong": first != label,
                "second": f"{result.classes[second]} {p[second]:.2f}" if p[second] >= 0.005 else "",
            }
        )
    return items


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines: 'head.hidden', '512'."""
    lines: list[tuple[str, str]] = []
    for key, item in settings.items():
        if key == "rows_per_class":
            lines.append((f"{prefix}{key}", _format_counts(item)))
        elif isinstance(item, Mapping):
            lines += flatten_settings(item, f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", _format_value(item)))
    return lines


def _format_counts(counts: Mapping[str, int]) -> str:
    """'6,000 each', or 'Bag 12, Coat 9'."""
    if len(set(counts.values())) == 1:
        return f"{next(iter(counts.values())):,} each"
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _format_value(item: Any) -> str:
    if isinstance(item, bool) or item is None:
        return {True: "yes", False: "no", None: "-"}[item]
    if isinstance(item, list | tuple):
        return ", ".join(_format_value(part) for part in item)
    return f"{item:g}" if isinstance(item, float) else f"{item:,}" if isinstance(item, int) else str(item)


def _times(seconds: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """Name, duration and percent of the whole of each stage; what no stage accounts for is 'the rest'."""
    stages = {key: value for key, value in seconds.items() if key != "total"}
    total = max(seconds.get("total", 0), sum(stages.values()))
    stages["the rest"] = total - sum(stages.values())
    lines = {**stages, "total": total}.items()
    return [(_STAGES.get(k, k), format_duration(s), round(100 * s / total, 1) if total else 0) for k, s in lines]


def format_duration(seconds: float) -> str:
    """'0.4 s', '42 s', '2 min 7 s', '1 h 4 min'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
