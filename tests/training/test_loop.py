"""The loop: every row once, exact resume from any step, and nothing but the head trained."""

import csv
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attire.data.dataset import RowIndices
from attire.errors import AttireError, Stopped
from attire.features import logits as features_logits
from attire.training import guards, loop
from attire.training import optimiser as training_optimiser
from attire.training.augment import Target
from tests.small_training import RECIPE, TRAIN, VAL, Table, data, new_head, same, train, without_seconds


def test_training_learns_and_writes_its_history(tmp_path: Path) -> None:
    head, history = train(tmp_path, replace(RECIPE, epochs=30))
    assert history[-1].train_loss < 0.6 * history[0].train_loss
    assert history[-1].val_accuracy is not None
    assert history[-1].val_accuracy > 0.7
    assert not head.training
    rows = list(csv.DictReader((tmp_path / "history.csv").read_text().splitlines()))
    assert [int(row["epoch"]) for row in rows] == list(range(1, 31))
    assert [float(row["train_loss"]) for row in rows] == [epoch.train_loss for epoch in history]


def test_the_average_loss_of_an_epoch_is_over_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """68 rows are four batches of 16 and one of 4: the mean over batches would weigh those four too much."""
    losses = iter([2.0, 2.0, 2.0, 2.0, 6.0])
    monkeypatch.setattr(loop, "_train_step", lambda *given: next(losses))
    monkeypatch.setattr(guards, "check_all_changed", lambda *given: None)
    head = new_head()
    recipe = replace(RECIPE, epochs=1, flips=False)
    history = loop.fit(head, data(train=np.arange(68)), recipe, tmp_path / "checkpoints")
    assert history[0].train_loss == pytest.approx((64 * 2 + 4 * 6) / 68)


@pytest.mark.parametrize("stop_at", [1, 3, 5, 7, 10, 14])
def test_a_stopped_run_goes_on_bit_for_bit(stop_at: int, tmp_path: Path) -> None:
    """At the first step, in the middle of an epoch, and at an epoch's last step."""
    whole, history = train(tmp_path / "whole")
    with pytest.raises(Stopped, match="stopped in epoch"):
        train(tmp_path / "cut", stop_at=stop_at)
    torch.manual_seed(999)  # whatever happened in between
    again, resumed = train(tmp_path / "cut")
    assert same(whole, again)
    assert without_seconds(resumed) == without_seconds(history)


def test_a_run_stopped_twice_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole")
    for stop_at in (2, 6):
        with pytest.raises(Stopped):
            train(tmp_path / "cut", stop_at=stop_at)
    assert same(whole, train(tmp_path / "cut")[0])


def test_a_finished_run_trains_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, history = train(tmp_path)
    monkeypatch.setattr(loop, "_train_step", lambda *given: pytest.fail("a step was taken"))
    again, same_history = train(tmp_path)
    assert same(whole, again)
    assert same_history == history


def test_ctrl_c_is_handed_back_when_training_ends(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(tmp_path)
    with pytest.raises(Stopped):
        train(tmp_path / "other", stop_at=2)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_every_row_passes_once_an_epoch_and_validation_rows_never_train(tmp_path: Path) -> None:
    table, recipe = Table(), replace(RECIPE, epochs=1)
    loop.fit(new_head(), data(table), recipe, tmp_path / "checkpoints")
    assert sorted(table.seen[: len(TRAIN)]) == TRAIN.tolist()
    assert table.seen[len(TRAIN) :] == VAL.tolist()


def test_a_source_that_drops_rows_is_caught(tmp_path: Path) -> None:
    class Dropping(Table):
        def batches(self, order: RowIndices, batch_size: int, views: np.ndarray | None) -> Iterator[Tensor]:
            yield from list(super().batches(order, batch_size, views))[:-1]

    with pytest.raises(AttireError, match="training: an epoch saw 64 rows, expected 76"):
        loop.fit(new_head(), data(Dropping()), RECIPE, tmp_path / "checkpoints")


def test_logits_come_in_the_order_of_the_rows_without_dropout() -> None:
    head, table = new_head(), Table()
    rows = np.array([7, 99, 0, 7])
    found = features_logits.predict_logits(head, table, rows, batch_size=3)
    assert torch.allclose(found, features_logits.predict_logits(head, table, rows), atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(found, head.eval()(table.rows[rows]), atol=1e-6)


def test_without_validation_rows_nothing_is_validated(tmp_path: Path) -> None:
    nobody = np.empty(0, np.int64)
    history = loop.fit(new_head(), data(val=nobody), RECIPE, tmp_path / "checkpoints")
    assert all(epoch.val_loss is None and epoch.val_accuracy is None for epoch in history)
    assert "None" not in (tmp_path / "history.csv").read_text()


def test_each_row_learns_from_the_teacher_s_answer_for_its_view() -> None:
    soft = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    order, views = np.array([4, 0, 3]), np.array([True, False, True])
    found = features_logits.teacher_targets(soft, order, views, slice(1, 3), torch.device("cpu"))
    assert found is not None
    assert found.tolist() == [soft[0, 0].tolist(), soft[1, 3].tolist()]
    plain = features_logits.teacher_targets(soft, order, None, slice(0, 1), torch.device("cpu"))
    assert plain is not None
    assert plain.tolist() == [soft[0, 4].tolist()]


def test_logits_of_several_views_are_averaged() -> None:
    head, table, rows = new_head(), Table(), np.array([3, 1])
    both = features_logits.predict_logits(head, table, rows, views=(0, 1))
    with torch.no_grad():
        x = table.rows[rows]
        assert torch.allclose(both, (head.eval()(x) + head(0.9 * x)) / 2, atol=1e-6)


def test_in_bf16_the_products_alone_are_rounded() -> None:
    torch.manual_seed(0)
    head = new_head()
    seen: list[torch.dtype] = []
    linear = next(layer for layer in head.modules() if isinstance(layer, nn.Linear))
    linear.register_forward_hook(lambda layer, given, found: seen.append(found.dtype))
    adam = training_optimiser.make_optimiser(head, RECIPE)
    x, target = torch.rand(8, linear.in_features), Target(torch.arange(8))
    losses = [loop._train_step(head, adam, x, target, replace(RECIPE, precision=p)) for p in ("fp32", "bf16")]
    assert seen == [torch.float32, torch.bfloat16]
    assert losses[1] != losses[0]
    assert {p.dtype for p in head.parameters()} | {p.grad.dtype for p in head.parameters() if p.grad is not None} == {
        torch.float32
    }
    features_logits.predict_logits(head, Table(), np.arange(4))
    assert seen[2:] == [torch.float32]
