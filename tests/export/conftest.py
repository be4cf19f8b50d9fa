"""A bundle as training writes it, its card included."""

from dataclasses import replace
from pathlib import Path

import pytest

from attire.recipes import Recipe
from attire.training import run


@pytest.fixture
def bundle(small_csv: Path, tiny: Recipe, weights: Path, tmp_path: Path) -> Path:
    return run.train(small_csv, replace(tiny, epochs=2), run_dir=tmp_path / "run").bundle
