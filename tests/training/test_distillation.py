"""A student learns from a teacher's answers: the right ones, softened, the same ones after a stop."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attire.data.dataset import ImageDataset, Splits
from attire.errors import AttireError, AttireWarning, Stopped
from attire.features.views import OUTLIER, SYNTHETIC_DRAWING, apply_view, augmentation_views
from attire.inference.classifier import Classifier, load_bundle
from attire.progress import NoProgress
from attire.recipes import FAST, Recipe
from attire.storage import files
from attire.training import checkpoints, distillation, loop, run
from tests.command import TINY, attire

VIEWS = ("plain", "flip")


@pytest.fixture
def taught(bundle: Path, classifier: Classifier, synthetic: ImageDataset) -> Path:
    """A bundle that says it was trained as `tiny` is on `small_csv`: with the same validation and test rows."""
    test = {"test_digest": synthetic.image_digest, "test": {"n": 12}}
    classifier.metadata = {"recipe": FAST.to_json(), **test}
    classifier.save(bundle)
    return bundle


def split(data: ImageDataset, test: int = 12) -> Splits:
    rows = np.arange(len(data))
    return Splits(data, rows[test:], data, rows[:test], 0, {})


def answers(chosen: distillation.Teacher, data: ImageDataset, recipe: Recipe, folder: Path) -> Any:
    return chosen.soft_targets(split(data), VIEWS, recipe, folder, NoProgress())


def test_each_view_of_each_image_has_the_mean_of_the_members_answers(
    taught: Path, synthetic: ImageDataset, tiny: Recipe, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    hot = load_bundle(taught, "cpu")
    hot.temperature = 0.3
    hot.save(other)
    chosen = distillation.Teacher.find([taught, other])
    assert chosen is not None
    found, told = answers(chosen, synthetic, replace(tiny, distill_temperature=1.0), tmp_path)
    for number, view in enumerate(VIEWS):
        images = apply_view(synthetic.images, view)
        expected = np.mean([load_bundle(path, "cpu").predict_proba(images) for path in (taught, other)], 0)
        assert np.allclose(found[number], expected, atol=5e-3)
    assert told["digests"] == [files.sha256_file(path / "model.json") for path in (taught, other)]
    softer, again = answers(chosen, synthetic, replace(tiny, distill_temperature=3.0), tmp_path)
    assert again == told  # what is kept is not softened
    assert np.allclose(softer.sum(-1), 1)
    assert (softer.max(-1) < found.max(-1)).all()
    assert (softer.argmax(-1) == found.argmax(-1)).all()


def test_of_a_drawing_a_teacher_is_asked_for_what_was_drawn(
    taught: Path, synthetic: ImageDataset, tiny: Recipe, tmp_path: Path
) -> None:
    chosen = distillation.Teacher.find([taught])
    assert chosen is not None
    views = augmentation_views(True, 0, True, True)
    found, _ = chosen.soft_targets(split(synthetic), views, tiny, tmp_path, NoProgress())
    by_view = dict(zip(views, found, strict=True))
    assert np.array_equal(by_view[SYNTHETIC_DRAWING], by_view["plain"])
    assert np.array_equal(by_view[f"{SYNTHETIC_DRAWING} flip"], by_view["flip"])
    assert not np.array_equal(by_view["flip"], by_view["plain"])
    assert np.allclose(by_view[OUTLIER], 0.1)


def test_what_is_kept_is_used_and_what_is_damaged_is_made_again(
    taught: Path, synthetic: ImageDataset, tiny: Recipe, tmp_path: Path
) -> None:
    chosen = distillation.Teacher.find([taught])
    assert chosen is not None
    found, told = answers(chosen, synthetic, tiny, tmp_path)
    path = tmp_path / distillation._FILE
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
    assert np.array_equal(answers(chosen, synthetic, tiny, tmp_path)[0], found)
    shutil.rmtree(taught)
    assert np.array_equal(answers(chosen, synthetic, tiny, tmp_path)[0], found)
    with pytest.raises(AttireError, match=r"teacher.npy: lost, and made again it is not what the run began with"):
        chosen.soft_targets(split(synthetic), VIEWS, tiny, tmp_path, NoProgress(), {**told, "targets": "0" * 64})


def test_another_bundle_at_the_same_place_is_refused(
    taught: Path, classifier: Classifier, synthetic: ImageDataset, tiny: Recipe, tmp_path: Path
) -> None:
    chosen = distillation.Teacher.find([taught])
    assert chosen is not None
    assert distillation.Teacher.find(chosen.to_json()) == chosen
    classifier.temperature = 2.0
    classifier.save(taught)
    with pytest.raises(AttireError, match=r"model.json: not the teacher that was named: digest \w+, expected"):
        answers(chosen, synthetic, tiny, tmp_path)
    named = ImageDataset(synthetic.images, synthetic.labels, tuple("abcdefghij"), "letters")
    now = distillation.Teacher.find([taught])
    assert now is not None
    with pytest.raises(AttireError, match="its classes are not those of letters; choose another teacher"):
        answers(now, named, tiny, tmp_path)


def test_a_teacher_that_may_have_seen_rows_that_measure_is_a_warning(
    taught: Path, synthetic: ImageDataset, tiny: Recipe, tmp_path: Path
) -> None:
    chosen = distillation.Teacher.find([taught])
    assert chosen is not None
    with pytest.warns(
        AttireWarning, match=r"validation or test rows \(split_seed 42 there, 7 here\); what they measure"
    ):
        answers(chosen, synthetic, replace(tiny, split_seed=7), tmp_path)
    (tmp_path / distillation._FILE).unlink()
    with pytest.warns(AttireWarning, match=r"rows \(tested on other images\); what they measure may be too good"):
        chosen.soft_targets(split(synthetic, 20), VIEWS, tiny, tmp_path, NoProgress())


def test_a_distilled_run_goes_on_bit_for_bit_without_its_teacher(
    taught: Path, small_csv: Path, tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(tiny, random_erasing=0.5, cutmix=0.5, shifts=1, distill_weight=0.9)
    whole = run.train(small_csv, recipe, run_dir=tmp_path / "whole", teacher=[taught])
    step, calls = loop._train_step, 0

    def stopping(*given: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Stopped(tmp_path, "stopped")
        return step(*given)

    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(loop, "_train_step", stopping)
    with pytest.raises(Stopped):
        run.train(small_csv, recipe, run_dir=tmp_path / "cut", teacher=[taught])
    monkeypatch.setattr(loop, "_train_step", step)
    shutil.rmtree(taught)
    again = run.resume(tmp_path / "cut")
    name = "model.safetensors"
    assert (again.bundle / name).read_bytes() == (whole.bundle / name).read_bytes()
    told = files.read_json(tmp_path / "cut/data.json")["teacher"]
    assert told == files.read_json(tmp_path / "whole/data.json")["teacher"]
    kept = distillation._stored_probabilities(tmp_path / "cut" / distillation._FILE, (4, 60, 10))
    assert kept is not None
    assert told["targets"] == files.sha256(kept.tobytes())
    alone = run.train(small_csv, recipe, run_dir=tmp_path / "alone")
    assert (alone.bundle / name).read_bytes() != (whole.bundle / name).read_bytes()
    assert "teacher" not in files.read_json(tmp_path / "alone/data.json")


def test_the_command_takes_a_teacher_and_folds_do_not(taught: Path, small_csv: Path, here: Path) -> None:
    done = attire("train", "--data", small_csv, *TINY, "--teacher", taught, "--out", "student")
    assert done.status == 0, done
    assert "Teacher   one bundle: 70 % of the loss, softened at 2" in done.err
    again = attire("train", "--config", "student/config.json", "--out", "again")
    assert again.status == 0, again
    name = "model/model.safetensors"
    assert (here / "again" / name).read_bytes() == (here / "student" / name).read_bytes()
    seeds = attire("train", "--data", small_csv, *TINY, "--teacher", taught, "--seeds", "2", "--out", "seeds")
    assert seeds.status == 0, seeds
    assert (here / "seeds/seed-0" / name).read_bytes() == (here / "student" / name).read_bytes()
    said = "--teacher: given together with --folds; a teacher has seen the rows of every fold"
    assert attire("train", "--data", small_csv, *TINY, "--teacher", taught, "--folds", "2").error == said
