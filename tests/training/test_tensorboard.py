"""TensorBoard's files hold the curves of history.csv, and nothing needs it that does not ask for it."""

import sys
from pathlib import Path

import pytest

from attire.errors import AttireError, UsageError
from attire.recipes import Recipe
from attire.training import run as training_run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_the_curves_are_those_of_the_history(small_csv: Path, tiny: Recipe, weights: Path, tmp_path: Path) -> None:
    run = training_run.train(small_csv, tiny, run_dir=tmp_path / "run", log="tensorboard")
    found = curves(run.folder / "tensorboard")
    for tag, key in (("loss/train", "train_loss"), ("accuracy/validation", "val_accuracy")):
        assert [step for step, _ in found[tag]] == [1, 2, 3]
        assert [value for _, value in found[tag]] == pytest.approx([row[key] for row in run.result.history])
    (step, value), *more = found["accuracy/test"]
    assert (step, more) == (3, [])
    assert value == pytest.approx(run.accuracy.value)
    assert found["accuracy/test_low"][0][1] == pytest.approx(run.accuracy.low)


def test_without_it_a_run_writes_no_such_folder(small_csv: Path, tiny: Recipe, weights: Path, tmp_path: Path) -> None:
    assert not (training_run.train(small_csv, tiny, run_dir=tmp_path / "run").folder / "tensorboard").exists()


def test_where_it_is_not_installed_one_line_says_so(
    small_csv: Path, tiny: Recipe, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(AttireError, match=r"tensorboard: not installed; pip install 'attire\[tensorboard\]'"):
        training_run.train(small_csv, tiny, run_dir=tmp_path / "run", log="tensorboard")


def test_another_logger_is_refused(small_csv: Path, tiny: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--log: expected tensorboard, found 'wandb'"):
        training_run.train(small_csv, tiny, run_dir=tmp_path / "run", log="wandb")
