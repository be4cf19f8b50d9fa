"""An audit on disk: a page, every list in full as CSV, and the figures as JSON."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attire.analysis.audit import Audit
from attire.evaluation.pages import render
from attire.evaluation.png import data_uri, grey_png
from attire.evaluation.run_result import csv_text
from attire.storage.files import write_json, write_text

_SHOWN = 48  # pictures in a gallery; the CSV files hold all


def write_audit(audit: Audit, folder: Path) -> Path:
    """Write audit.html, and every list in full as CSV; the figures in audit.json, written last. Returns the page."""
    for name, (header, rows) in _lists(audit).items():
        write_text(folder / f"{name}.csv", csv_text(header, rows))
    page = render(
        "analysis/audit.html",
        a=audit,
        sources=" and ".join(dict.fromkeys(data.source for data in audit.parts.values())),
        counts=audit.counts(),
        balance=_class_balance(audit),
        **_galleries(audit),
    )
    path = folder / "audit.html"
    write_text(path, page)
    write_json(folder / "audit.json", audit.to_json())
    return path


def _lists(audit: Audit) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Name, header and rows of each CSV file."""
    findings, near = audit.findings, audit.findings.near

    def describe(row: int) -> list[Any]:
        return [*audit.locate(row), audit.label(row)]

    pairs = zip(near.first, near.second, near.distance, strict=True)
    kinds = (("blank", findings.blank), ("inverted", findings.inverted), ("outlier", findings.outliers))
    scores = findings.outlier_scores
    return {
        "exact_duplicates": (
            ["group", "part", "row", "label"],
            [[i, *describe(row)] for i, rows in enumerate(findings.groups) for row in rows],
        ),
        "near_duplicates": (
            ["part", "row", "label", "part_2", "row_2", "label_2", "distance"],
            [[*describe(a), *describe(b), f"{distance:.4f}"] for a, b, distance in pairs],
        ),
        "odd": (
            ["kind", "part", "row", "label", "outlier_score"],
            [[kind, *describe(row), f"{scores[row]:.2f}"] for kind, rows in kinds for row in rows],
        ),
        "suspect_labels": (
            ["part", "row", "label", "more_likely", "p_label", "p_more_likely"],
            [[*describe(row), *_likelihoods(audit, row)] for row in findings.suspect_labels],
        ),
        "classes": (["class", *audit.parts], _class_balance(audit)),
    }


def _likelihoods(audit: Audit, row: int) -> list[str]:
    """The most likely class of a row, the probability of its label, and that of the class."""
    p = audit.findings.probabilities[row]
    given = p[audit.classes.index(audit.label(row))]
    return [audit.classes[p.argmax()], f"{given:.4f}", f"{p.max():.4f}"]


def _class_balance(audit: Audit) -> list[list[Any]]:
    counts = audit.class_counts()
    return [[name, *(counts[part][i] for part in audit.parts)] for i, name in enumerate(audit.classes)]


def _galleries(audit: Audit) -> dict[str, Any]:
    findings, near = audit.findings, audit.findings.near
    odd = [(row, "blank") for row in findings.blank] + [(row, "inverted") for row in findings.inverted]
    odd += [(row, f"{findings.outlier_scores[row]:.1f} x") for row in findings.outliers]
    groups = sorted(findings.groups, key=lambda rows: _count_parts(audit, rows), reverse=True)
    pairs = list(zip(near.first, near.second, near.distance, strict=True))[: _SHOWN // 2]
    likely = [(row, findings.probabilities[row]) for row in findings.suspect_labels[:_SHOWN]]
    return {
        "exact": [[_item(audit, row) for row in rows[:6]] for rows in groups[: _SHOWN // 2]],
        "near": [[_item(audit, a), _item(audit, b, [f"distance {d:.3f}"])] for a, b, d in pairs],
        "suspect": [_item(audit, row, [f"{audit.classes[p.argmax()]} {p.max():.2f}"]) for row, p in likely],
        "odd": [_item(audit, row, [reason]) for row, reason in odd[:_SHOWN]],
        "odd_count": len(odd),
        "exact_count": len(groups),
    }


def _count_parts(audit: Audit, rows: Iterable[int]) -> int:
    return len({audit.locate(int(row))[0] for row in rows})


def _item(audit: Audit, row: int, more: Sequence[str] = ()) -> dict[str, Any]:
    part, own_row = audit.locate(row)
    uri = data_uri(grey_png(audit.image(row)))
    return {"uri": uri, "where": f"{part} {own_row:,}", "label": audit.label(row), "more": more}
