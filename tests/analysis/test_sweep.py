"""The sweep: its cells, that taps equal the features of training, the choice, resuming, and the speed column."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from attire.analysis import sweep, taps
from attire.analysis.sweep import Grid, Sweep, _Cell
from attire.data.dataset import ImageDataset
from attire.errors import AttireError, Stopped, UsageError
from attire.features import cache
from attire.model import vgg

SMALL = {"sizes": (16, 20), "boundaries": ("block2", "block3")}


def run_sweep(data: Path, folder: Path, rows: int = 30, **changes: Any) -> Sweep:
    return sweep.sweep(data, grid=Grid(**(SMALL | changes)), rows=rows, val=18, out=folder)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps, "_PASS_SECONDS", 0.001)


def cell(name: str, size: int, correct: int, speed: float, background: str = "black") -> _Cell:
    return _Cell(name, size, 0, background, 100, 0.1, correct, 1000, speed)


def test_every_size_boundary_and_pooling_gets_a_line(small_csv: Path, weights: Path, tmp_path: Path) -> None:
    result = run_sweep(small_csv, tmp_path / "s")
    lines = {(c.freeze_to, c.image_size, c.pool, c.width) for c in result.cells}
    assert lines == {
        *(("block2", 16, 1, 128), ("block2", 16, 2, 512), ("block2", 16, 0, 2048)),
        *(("block3", 16, 1, 256), ("block3", 16, 0, 1024)),
        *(("block2", 20, 1, 128), ("block2", 20, 2, 512), ("block2", 20, 4, 2048), ("block2", 20, 0, 3200)),
        *(("block3", 20, 1, 256), ("block3", 20, 0, 1024)),
    }
    assert all(c.val == 18 and c.speed > 0 for c in result.cells)
    rows = list(csv.DictReader((tmp_path / "s/sweep.csv").read_text().splitlines()))
    assert [int(row["correct"]) for row in rows] == sorted((c.correct for c in result.cells), reverse=True)
    for name in ("sweep.png", "sweep.svg"):
        assert (tmp_path / "s" / name).stat().st_size > 1000
    assert not cache.cache_entries()  # the wide tables of taps are not kept


def test_a_tap_gives_the_features_that_training_at_that_boundary_uses(weights: Path, synthetic: ImageDataset) -> None:
    pictures = vgg.preprocess(synthetic.images[:5], 20)
    deep = vgg.Backbone(vgg.vgg16(weights, "block3", 0, nn.Sequential()), torch.device("cpu"), "fp32")
    with torch.inference_mode():
        both = taps._TapBackbone(deep, [("block2", 2), ("block3", 2)])(pictures)
        for name, part in (("block2", both[:, :512]), ("block3", both[:, 512:])):
            alone = vgg.Backbone(vgg.vgg16(weights, name, 2, nn.Sequential()), torch.device("cpu"), "fp32")(pictures)
            assert torch.allclose(part, alone, rtol=1e-4, atol=1e-4), name


def test_the_test_rows_are_never_drawn(synthetic: ImageDataset) -> None:
    data, fit = sweep._draw(synthetic, 30, 20)
    assert (len(data), fit) == (50, 30)
    assert len(np.unique(data.images, axis=0)) == 50
    few, fit = sweep._draw(synthetic, 4000, 3000)
    assert len(few) <= 60
    assert fit > len(few) - fit > 0


def test_a_stopped_sweep_goes_on_and_scores_no_size_twice(
    small_csv: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = sweep._Scorer.score
    sizes: list[object] = []

    def stopping(self: sweep._Scorer, size: int, background: str) -> list[_Cell]:
        if size == 20 and not sizes.count("resumed"):
            raise KeyboardInterrupt
        sizes.append(size)
        return score(self, size, background)

    monkeypatch.setattr(sweep._Scorer, "score", stopping)
    with pytest.raises(Stopped):
        run_sweep(small_csv, tmp_path / "s")
    sizes.append("resumed")
    result = run_sweep(small_csv, tmp_path / "s")
    assert sizes == [16, "resumed", 20]
    assert len(result.cells) == 11


def test_a_folder_of_another_sweep_is_refused(small_csv: Path, weights: Path, tmp_path: Path) -> None:
    run_sweep(small_csv, tmp_path / "s", sizes=(16,))
    before = (tmp_path / "s/sweep.json").read_bytes()
    with pytest.raises(AttireError, match="it holds a sweep over other images, boundaries or weights"):
        run_sweep(small_csv, tmp_path / "s", rows=20)
    assert (tmp_path / "s/sweep.json").read_bytes() == before
    (tmp_path / "s/sweep.json").write_text(json.dumps({"cells": []}))
    with pytest.raises(AttireError, match=r"sweep.json: not what a finished run writes"):
        run_sweep(small_csv, tmp_path / "s")


def test_the_front_holds_what_nothing_faster_matches() -> None:
    cells = (cell("block2", 32, 900, 500), cell("block3", 32, 940, 400), cell("block4", 64, 930, 100))
    slow_best = cell("block3", 224, 945, 10)
    result = Sweep(Path(), (*cells, slow_best), 10, 1000)
    assert result.front == [cells[0], cells[1], slow_best]


def test_the_fastest_within_a_standard_error_is_proposed() -> None:
    near, best, far = cell("block3", 32, 940, 400), cell("block3", 64, 945, 90), cell("block2", 32, 930, 900)
    result = Sweep(Path(), (best, near, far), 10, 1000)
    assert result.proposed == near  # one standard error of 94.5 % on 1,000 rows is 0.7 points
    assert result.command() == "attire train --freeze-to block3 --image-size 32 --pool 0"
    white = Sweep(Path(), (best, near, far, cell("block3", 32, 990, 900, "white")), 10, 1000)
    assert white.proposed == near  # training has no white background to offer


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"sizes": (4,)}, "--sizes: expected 8 to 1024 px, found 4"),
        ({"sizes": ()}, "expected at least one size"),
        ({"boundaries": ("block6",)}, "--boundaries: expected some of block1"),
        ({"boundaries": ("none",)}, "--boundaries: expected some of block1, .*, found .none."),
        ({"boundaries": ("block5",)}, "--image-size: 20 px leaves no feature at block5"),
        ({"backgrounds": ("grey",)}, "--backgrounds: expected black or white, found 'grey'"),
        ({"rows": 0}, "expected 1 or more to fit and to score"),
    ],
)
def test_what_cannot_be_swept_is_one_clear_line(
    change: dict[str, Any], line: str, small_csv: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=line):
        run_sweep(small_csv, tmp_path / "s", **change)


def test_the_white_background_is_the_negative_image(small_csv: Path, weights: Path, tmp_path: Path) -> None:
    result = run_sweep(small_csv, tmp_path / "s", sizes=(16,), backgrounds=("black", "white"))
    assert [c.background for c in result.cells].count("white") == len(result.cells) / 2
