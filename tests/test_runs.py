"""A run from a CSV to a bundle: what it leaves on disk, that it resumes, and that the cache changes nothing."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import attire
from attire import recipes, runs
from attire.data import load_dataset, write_csv
from attire.errors import AttireError
from attire.results import load_result
from attire.training import read_checkpoint

TINY = replace(recipes.FAST, epochs=2, batch_size=32, hidden=(16,), flips=False)


@pytest.fixture
def real_csv(tmp_path: Path) -> Path:
    """300 official training images as a CSV."""
    path = tmp_path / "some.csv"
    write_csv(load_dataset().subset(range(300)), path)
    return path


@pytest.mark.real
def test_a_run_leaves_everything_and_its_bundle_predicts(real_csv: Path, tmp_path: Path) -> None:
    run = runs.train(real_csv, TINY, run_dir=tmp_path / "run")
    for name in ("config.json", "data.json", "history.csv", "model/model.json", "evaluation/confusion.png"):
        assert (run.folder / name).exists(), name
    metrics = json.loads((run.folder / "evaluation/metrics.json").read_text())
    assert {"n", "correct", "accuracy", "accuracy_low", "accuracy_high"} <= set(metrics["test"])
    assert {"extract", "fit", "total"} <= set(metrics["seconds"])
    assert metrics["test"]["n"] == 60
    assert metrics["claim"]["claimed"] == 0.98
    assert load_result(run.folder).test.correct == metrics["test"]["correct"]
    images = load_dataset(real_csv).images
    probabilities = attire.load(run.bundle).predict_proba(images)
    assert probabilities.shape == (300, 10)
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)


@pytest.mark.real
def test_cached_and_uncached_training_give_the_same_losses(real_csv: Path, tmp_path: Path) -> None:
    cached = runs.train(real_csv, TINY, run_dir=tmp_path / "cached").result.history
    fresh = runs.train(real_csv, TINY, run_dir=tmp_path / "fresh", cache=False).result.history
    losses = [np.array([row["train_loss"] for row in history]) for history in (cached, fresh)]
    assert np.allclose(losses[0], losses[1], rtol=1e-3)  # features are rounded to 16 bits either way


@pytest.mark.real
def test_a_run_resumed_at_an_epoch_s_edge_ends_with_the_same_weights(real_csv: Path, tmp_path: Path) -> None:
    whole = runs.train(real_csv, TINY, run_dir=tmp_path / "whole")
    again = runs.train(real_csv, TINY, run_dir=tmp_path / "again")
    newest, edge = sorted((again.folder / "checkpoints").glob("*.ckpt"), reverse=True)
    newest.unlink()
    assert read_checkpoint(edge)[0].epoch == 1
    resumed = runs.resume(again.folder)
    first, second = (run.bundle / "model.safetensors" for run in (whole, resumed))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.real
def test_only_the_classifier_is_trained(real_csv: Path, tmp_path: Path) -> None:
    model = runs.train(real_csv, TINY, run_dir=tmp_path / "run").load().model
    assert not any(parameter.requires_grad for parameter in model.features.parameters())
    assert all(parameter.requires_grad for parameter in model.classifier.parameters())


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(AttireError, match="the folder is not empty"):
        runs.train(tmp_path / "none.csv", TINY, run_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_recipe_survives_its_json() -> None:
    for recipe in recipes.RECIPES.values():
        assert recipes.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
