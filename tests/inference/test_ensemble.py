"""Bundles through the cache answer as they do by themselves; an ensemble is the mean of its members, told by digest."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from attire.data.dataset import FASHION_CLASSES, ImageDataset
from attire.data.loading import write_csv
from attire.errors import AttireError, UsageError
from attire.evaluation.run_result import load_result
from attire.features import cache
from attire.inference import scoring
from attire.inference.classifier import Classifier, load_bundle
from attire.inference.ensemble import Ensemble, cached_probabilities, open_ensemble
from attire.model import devices
from attire.recipes import Recipe
from attire.training import run as training_run
from tests.command import attire
from tests.model.test_heads import TUNED


@pytest.fixture
def pair(classifier: Classifier, tmp_path: Path) -> tuple[Path, Path]:
    """Two bundles on one backbone whose heads differ; the second averages two views."""
    classifier.save(tmp_path / "first")
    head = classifier.architecture.build_head(10)
    architecture = replace(classifier.architecture, tta=2)
    classifier.model.classifier = head
    other = Classifier(classifier.model, architecture, FASHION_CLASSES, 0.4, {"recipe": {"name": "other", "seed": 3}})
    other.save(tmp_path / "second")
    return tmp_path / "first", tmp_path / "second"


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features in fp32 on every processor, so that what comes through the cache is what comes without."""
    monkeypatch.setattr(devices, "has_bf16", lambda: False)


@pytest.fixture
def everything(synthetic: ImageDataset, tmp_path: Path) -> Path:
    write_csv(synthetic, tmp_path / "all.csv")
    return tmp_path / "all.csv"


def test_a_bundle_answers_through_the_cache_as_by_itself(pair: tuple[Path, Path], synthetic: ImageDataset) -> None:
    for path in pair:
        model = load_bundle(path, "cpu")
        assert np.allclose(cached_probabilities(model, synthetic), model.predict_proba(synthetic.images), atol=2e-3)


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        (replace(TUNED, tta=2), ("block1", 64 * 8 * 8)),
        (replace(TUNED, finetune_blocks=1, pool=0), ("block1", 64 * 8 * 8)),
        (replace(TUNED, freeze_to="none"), ("none", 3 * 16 * 16)),
    ],
)
def test_a_bundle_with_trained_blocks_takes_only_what_is_frozen_from_the_cache(
    small_csv: Path, synthetic: ImageDataset, tmp_path: Path, recipe: Recipe, key: tuple[str, int]
) -> None:
    run = training_run.train(small_csv, recipe, run_dir=tmp_path / "run")
    evaluation = scoring.evaluate_bundle(run.bundle, small_csv)
    expected = load_bundle(run.bundle, "cpu").predict_proba(synthetic.images)
    assert np.allclose(evaluation.predictions.probabilities, expected, atol=5e-3)
    assert {(entry.manifest["freeze_to"], entry.manifest["width"]) for entry in cache.cache_entries()} == {key}
    assert evaluation.config["tta"] == recipe.tta


def test_an_ensemble_is_the_mean_of_its_members(
    pair: tuple[Path, Path], everything: Path, synthetic: ImageDataset
) -> None:
    evaluation = scoring.evaluate_ensemble(pair, everything)
    alone = [load_bundle(path, "cpu").predict_proba(synthetic.images) for path in pair]
    assert np.allclose(evaluation.result.predictions.probabilities, np.mean(alone, 0), atol=2e-3)
    assert np.allclose(evaluation.ensemble.predict_proba(synthetic.images), np.mean(alone, 0), atol=1e-6)
    assert [entry.manifest["view"] for entry in cache.cache_entries()].count("plain") == 1  # one backbone, one entry
    assert [member.config["tta"] for member in evaluation.members] == [1, 2]
    assert evaluation.result.config["tta"] == 3
    right = [member.test.correct for member in evaluation.members]
    gained = evaluation.result.test.correct - max(right)
    assert evaluation.pair.only_second - evaluation.pair.only_first == gained
    assert evaluation.pair.first == str(pair[int(np.argmax(right))])


def test_every_member_can_be_given_the_same_views(pair: tuple[Path, Path], everything: Path) -> None:
    evaluation = scoring.evaluate_ensemble(pair, everything, tta=2)
    one = scoring.evaluate_bundle(pair[0], everything, tta=2)
    assert np.array_equal(evaluation.members[0].predictions.probabilities, one.predictions.probabilities)
    plain = scoring.evaluate_bundle(pair[0], everything)
    assert not np.allclose(plain.predictions.probabilities, one.predictions.probabilities)
    assert one.command == f"attire evaluate {pair[0]} --data {everything} --tta 2"
    for count in (0, 19):
        with pytest.raises(UsageError, match=f"--tta: expected 1 to 18, found {count}"):
            scoring.evaluate_bundle(pair[0], everything, tta=count)


def test_an_ensemble_s_file_names_its_members_by_digest(pair: tuple[Path, Path], tmp_path: Path) -> None:
    open_ensemble(pair).save(tmp_path / "both.json")
    again = open_ensemble([tmp_path / "both.json"])
    assert again.bundles == pair
    load_bundle(pair[0]).save(pair[1])
    with pytest.raises(AttireError, match=r"second/model.json: changed since it was named: digest \w+, expected \w+"):
        open_ensemble([tmp_path / "both.json"])
    (tmp_path / "both.json").write_text('{"kind": "other", "schema": 1}')
    with pytest.raises(AttireError, match=r"both.json: not a file that `attire ensemble` wrote"):
        open_ensemble([tmp_path / "both.json"])


def test_members_are_two_or_more_of_the_same_classes(classifier: Classifier, pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="ensemble: expected two bundles or more, found 1"):
        open_ensemble(pair[:1])
    named = Classifier(classifier.model, classifier.architecture, tuple("abcdefghij"))
    with pytest.raises(AttireError, match="second: its classes are not those of"):
        Ensemble((classifier, named), pair)


def test_the_command_tells_and_writes_what_compare_reads(pair: tuple[Path, Path], everything: Path, here: Path) -> None:
    names = [f"../{path.name}" for path in pair]  # short enough for the table's column
    done = attire("ensemble", *names, "--data", everything, "--out", "both")
    assert done.status == 0, done
    for part in ("Accuracy", "Claim check", "an answer takes 3 forward passes", "McNemar", *names):
        assert part in done.out
    assert attire("evaluate", pair[0], "--data", everything, "--out", "one").status == 0
    assert "McNemar" in attire("compare", "one", "both").out
    values = json.loads(attire("ensemble", "both/ensemble.json", "--data", everything, "--json").out)
    assert values["test"]["correct"] == load_result(here / "both").test.correct
    assert [Path(row["bundle"]).resolve() for row in values["members"]] == [path.resolve() for path in pair]
    assert "averages 2 bundles and takes 3 forward passes" in (here / "both/report.html").read_text()
