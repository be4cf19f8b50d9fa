"""Seeds and folds: what they leave, that they are honest, and that a stopped series goes on."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from attire.data.dataset import ImageDataset
from attire.data.loading import load_dataset, write_csv
from attire.errors import AttireError, Stopped, UsageError
from attire.evaluation.run_result import load_result
from attire.features import logits
from attire.recipes import Recipe
from attire.training import loop, seeds_and_folds
from attire.training import run as training_run


def test_seeds_are_runs_of_their_own_with_mean_and_deviation(
    small_csv: Path, tiny: Recipe, weights: Path, tmp_path: Path
) -> None:
    found = seeds_and_folds.train_seeds(3, tiny, data=small_csv, run_dir=tmp_path / "s")
    assert [run.name for run in found.runs] == ["seed-0", "seed-1", "seed-2"]
    assert [result.seed for result in found.results] == [0, 1, 2]
    one = training_run.train(small_csv, replace(tiny, seed=1), run_dir=tmp_path / "one")
    assert (found.runs[1] / "model/model.safetensors").read_bytes() == (one.bundle / "model.safetensors").read_bytes()
    stored = json.loads((tmp_path / "s/seeds.json").read_text())
    values = [load_result(run).test.accuracy.value for run in found.runs]
    assert stored["mean"] == pytest.approx(statistics.mean(values))
    assert stored["deviation"] == pytest.approx(statistics.stdev(values))
    assert "3 seeds, n = 12 each" in str(found)


def test_a_stopped_series_of_seeds_goes_on_where_it_stood(
    small_csv: Path, tiny: Recipe, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = seeds_and_folds.train_seeds(2, tiny, data=small_csv, run_dir=tmp_path / "whole")
    step, calls = loop._train_step, 0

    def stopping(*given: object) -> float:
        nonlocal calls
        calls += 1
        if calls == 11:  # in the second seed: the first takes nine steps
            raise Stopped(tmp_path, "stopped")
        return step(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_train_step", stopping)
    with pytest.raises(Stopped):
        seeds_and_folds.train_seeds(2, tiny, data=small_csv, run_dir=tmp_path / "cut")
    first = (tmp_path / "cut/seed-0/model/model.json").stat().st_mtime_ns
    monkeypatch.setattr(loop, "_train_step", step)
    found = seeds_and_folds.resume_series(tmp_path / "cut")
    assert isinstance(found, seeds_and_folds.Seeds)
    assert (tmp_path / "cut/seed-0/model/model.json").stat().st_mtime_ns == first
    assert found.accuracies == whole.accuracies


def test_folds_score_each_training_row_once_and_leave_the_test_rows_alone(
    small_csv: Path, tiny: Recipe, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[set[int]] = []
    scored: list[set[int]] = []
    fit, predict = loop.fit, logits.predict_logits

    def watched_fit(head: object, data: loop.TrainingData, *rest: object) -> object:
        trained.append({*data.train.tolist(), *data.val.tolist()})
        return fit(head, data, *rest)  # type: ignore[arg-type]

    def watched_predict(head: object, source: object, rows: object, *rest: object) -> object:
        scored.append(set(np.asarray(rows).tolist()))
        return predict(head, source, rows, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "fit", watched_fit)
    monkeypatch.setattr(logits, "predict_logits", watched_predict)
    found = seeds_and_folds.cross_validate(4, tiny, data=small_csv, run_dir=tmp_path / "f")
    everything = set().union(*trained)
    assert len(everything) == 48  # 12 of the 60 rows are the test set
    held_out = [rows for rows in scored if not any(rows <= seen for seen in trained[len(trained) - 1 :])]
    assert found.result.test.n == 48
    assert set().union(*scored) == everything  # no row outside the training part is ever scored
    for seen in trained:
        assert everything - seen in scored  # and each fold's rows by the classifier that did not see them
    assert held_out
    stored = load_result(tmp_path / "f")
    assert stored.test.correct == found.result.test.correct
    assert "Each image was scored once, by that one of 4 heads" in (tmp_path / "f/report.html").read_text()


def test_folds_that_were_finished_are_not_trained_again(
    small_csv: Path, tiny: Recipe, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = seeds_and_folds.cross_validate(3, tiny, data=small_csv, run_dir=tmp_path / "f")
    (tmp_path / "f/fold-2/probabilities.npy").write_bytes(b"torn")
    fits, fit = 0, loop.fit

    def counted(*given: object) -> object:
        nonlocal fits
        fits += 1
        return fit(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "fit", counted)
    again = seeds_and_folds.resume_series(tmp_path / "f")
    assert isinstance(again, seeds_and_folds.Folds)
    assert fits == 1
    assert np.array_equal(first.result.predictions.probabilities, again.result.predictions.probabilities)


def test_out_of_fold_probabilities_stand_in_the_order_of_the_training_rows(
    synthetic: ImageDataset, small_csv: Path, tiny: Recipe, weights: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.csv"
    write_csv(ImageDataset(255 - synthetic.images, synthetic.labels, synthetic.classes, "other"), other)
    found = seeds_and_folds.cross_validate(3, tiny, data=small_csv, test=other, run_dir=tmp_path / "f").result
    assert np.array_equal(found.predictions.labels, load_dataset(small_csv).labels)


@pytest.mark.parametrize("count", [1, 0, -2])
def test_one_seed_or_fold_is_no_series(count: int, tiny: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--seeds: expected 2 or more, found {count}"):
        seeds_and_folds.train_seeds(count, tiny, run_dir=tmp_path / "s")
    with pytest.raises(UsageError, match=f"--folds: expected 2 or more, found {count}"):
        seeds_and_folds.cross_validate(count, tiny, run_dir=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_more_folds_than_rows_of_a_class_are_refused(
    small_csv: Path, tiny: Recipe, weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(AttireError, match="a class has 4 rows, too few for 6 folds; use fewer --folds"):
        seeds_and_folds.cross_validate(6, tiny, data=small_csv, run_dir=tmp_path / "f")


def test_a_damaged_series_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "series.json").write_text('{"kind": "folds"}')
    assert seeds_and_folds.is_series(tmp_path)
    with pytest.raises(AttireError, match=r"series.json: not a series of runs"):
        seeds_and_folds.resume_series(tmp_path)
