"""The arithmetic of benchmarks/: what is counted, what is extrapolated, what the document says of gaps."""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def performance(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return import_module("performance")


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return import_module("measuring")


def spread(value: float) -> dict[str, float]:
    return {"median": value, "low": value, "high": value, "n": 5}


HEAD = [{"kind": "head", "seconds": 50.0 * e, "images": 480 * e, "accuracy": 0.9 + e / 100, "n": 100} for e in (1, 2)]
ENVIRONMENT: dict[str, Any] = dict.fromkeys(("processor", "cores", "device", "python", "torch", "threads"), "x") | {
    "load": 1
}
LINES: dict[str, list[dict[str, Any]]] = {
    "attire-fast": [
        {"kind": "point", "seconds": 10.0, "images": 1, "accuracy": 0.89, "n": 100},
        {"kind": "point", "seconds": 20.0, "images": 2, "accuracy": 0.945, "n": 100},
        {"kind": "point", "seconds": 30.0, "images": 3, "accuracy": 0.94, "n": 100},
        {
            "kind": "finished",
            "peak": 2**30,
            "cap": 600,
            "train": 9,
            "test": 100,
            "environment": {**ENVIRONMENT, "load": 1},
        },
    ],
    "attire-classic": [{**line, "epoch": e} for e, line in enumerate(HEAD, 1)],
    "rates": [
        {"kind": "rate", "what": "plain script, a training epoch", "rate": spread(4.0), "ratio": spread(1.0)},
        {"kind": "rate", "what": "Attire, extraction, torch", "rate": spread(8.0), "ratio": spread(2.0)},
    ],
}

WHOLE = {
    "backend": "openvino-int8",
    "rows": {"train": 480, "val": 0, "test": 120},
    "epochs": 2,
    "seconds": {"extract": 30.0, "fit": 15.0, "total": 50.0},
    "accuracy": {"value": 0.93, "low": 0.9, "high": 0.95, "n": 120},
}


def test_flop_of_vgg16_are_those_of_its_thirteen_convolutions(measuring: Any) -> None:
    assert measuring.flop_per_image("block5", 224) == pytest.approx(30.69e9, rel=1e-3)
    assert measuring.flop_per_image("block3", 64) == pytest.approx(1.53e9, rel=0.01)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1,234"), (12.34, "12.3"), (0.01234, "0.0123"), (0.5, "0.500"), (99.96, "100.0")],
)
def test_figures_have_three_significant_digits(measuring: Any, value: float, text: str) -> None:
    assert measuring.significant(value) == text


def test_the_first_evaluation_at_a_mark_counts_and_the_best_is_told(performance: Any) -> None:
    (fast, *_) = performance.curves(LINES)
    assert [fast.reached(mark) for mark in (0.89, 0.9, 0.945, 0.95)] == [10, 20, 20, None]
    assert fast.best == (20, 0.945, 100)
    assert not fast.extrapolated


def test_extrapolated_seconds_are_images_over_the_rate(performance: Any) -> None:
    found = {curve.name: curve for curve in performance.curves(LINES)}
    assert set(found) == {"attire-fast", "attire-classic", "plain-script"}
    assert [point[0] for point in found["plain-script"].points] == [120, 240]  # VGG16 in every epoch
    assert [point[0] for point in found["attire-classic"].points] == [60 + 50, 60 + 100]  # once
    assert found["plain-script"].extrapolated
    assert found["attire-classic"].extrapolated


def test_the_document_marks_what_is_extrapolated_and_names_what_is_missing(
    performance: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "peers").mkdir()
    for name, lines in LINES.items():
        (tmp_path / "peers" / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    monkeypatch.setattr(sys, "argv", ["x", "--results", str(tmp_path), "--out", str(tmp_path / "performance.md")])
    (tmp_path / "classic.json").write_text(json.dumps({"runs": [WHOLE]}))
    performance.main()
    text = (tmp_path / "performance.md").read_text()
    assert "- openvino-int8: 50 s, of them 30 s for the features of 600 images and 15 s for 2 epochs; 93.00 %" in text
    assert "The plain script's epochs alone, at its measured rate: 4.0 min, **4.8 times as long** (4.8-4.8)." in text
    assert "| Attire, `fast` | 20 s | 20 s | 20 s | 20 s | 20 s | 94.50 %" in text
    assert "| plain script, 224 px | *~ 2.0 min* | *~ 4.0 min* | - |" in text
    assert (
        "Attire, extraction, torch: 2.7 min, 60 s and 100 s for the classifier (measured): 1.5 times as fast." in text
    )
    assert "Not measured: fastai" in text
    assert "Not measured yet: `python benchmarks/growth.py`." in text
    assert (tmp_path / "pictures" / "performance.png").read_bytes().startswith(b"\x89PNG")
