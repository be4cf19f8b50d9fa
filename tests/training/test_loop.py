"""The loop: every row once, exact resume from any step, guards that fire, and nothing but the classifier trained."""

import csv
import json
import math
import shutil
import signal
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attire.data.dataset import RowIndices
from attire.errors import AttireError, AttireWarning, Stopped
from attire.features import logits as features_logits
from attire.model.heads import build_mlp
from attire.progress import Epoch
from attire.recipes import FAST, Recipe
from attire.storage import files
from attire.training import checkpoints, guards, loop
from attire.training.augment import Target
from attire.training.checkpoints import State

RECIPE = replace(FAST, epochs=3, batch_size=16, hidden=(8,), lr=0.01, flips=True)
LABELS = np.arange(100) % 10
TRAIN, VAL = np.arange(76), np.arange(80, 100)  # five steps an epoch, the last of them smaller


class Table:
    """Feature rows from a table of 100 x 12 that can be learnt; the mirrored view is its negative."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        rows = 2 * np.eye(10, 12)[LABELS] + rng.normal(size=(100, 12)) / 4
        self.rows = torch.from_numpy(rows).float()
        self.seen: list[int] = []

    def batches(self, order: RowIndices, batch_size: int, views: np.ndarray | None) -> Iterator[Tensor]:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            self.seen += part.tolist()
            x = self.rows[part].clone()
            if views is not None:
                x[torch.from_numpy(views.astype(bool)[start : start + batch_size])] *= 0.9
            yield x


def new_head() -> nn.Sequential:
    torch.manual_seed(0)
    return build_mlp(12, (8,), 10, 0.5)


def train(folder: Path, recipe: Recipe = RECIPE, stop_at: int = 0) -> tuple[nn.Sequential, list[Epoch]]:
    """Train in `folder`, from its checkpoint where it has one; Ctrl-C comes while step `stop_at` is reported."""
    head, steps = new_head(), 0

    def report(state: State, done: int, total: int) -> None:
        nonlocal steps
        steps += bool(done)
        if done and steps == stop_at:
            signal.raise_signal(signal.SIGINT)

    history = loop.fit(head, Table(), LABELS, TRAIN, VAL, recipe, folder / "checkpoints", report)
    return head, history


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def without_seconds(history: list[Epoch]) -> list[Epoch]:
    return [replace(epoch, seconds=0.0) for epoch in history]


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
    history = loop.fit(head, Table(), LABELS, np.arange(68), VAL, recipe, tmp_path / "checkpoints")
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


def test_at_an_epoch_s_edge_the_checkpoint_is_enough(tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    newest, edge = checkpoints._checkpoints(tmp_path / "cut/checkpoints")
    assert checkpoints._read_checkpoint(edge)[0].epoch == 2
    newest.unlink()
    assert same(whole, train(tmp_path / "cut")[0])


def test_a_finished_run_trains_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, history = train(tmp_path)
    monkeypatch.setattr(loop, "_train_step", lambda *given: pytest.fail("a step was taken"))
    again, same_history = train(tmp_path)
    assert same(whole, again)
    assert same_history == history


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_byte, cut, empty])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage: object, tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole")
    with pytest.raises(Stopped):
        train(tmp_path / "cut", stop_at=12)
    newest, before = checkpoints._checkpoints(tmp_path / "cut/checkpoints")
    assert (newest.name, before.name) == ("epoch-002-step-000002.ckpt", "epoch-002-step-000000.ckpt")
    damage(newest)  # type: ignore[operator]
    with pytest.warns(AttireWarning, match="its digest does not match; going on from the one before") as caught:
        again, _ = train(tmp_path / "cut")
    assert len(caught) == 1
    assert same(whole, again)


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    train(tmp_path, replace(RECIPE, epochs=5))
    names = [path.name for path in checkpoints._checkpoints(tmp_path / "checkpoints")]
    assert names == ["epoch-005-step-000000.ckpt", "epoch-004-step-000000.ckpt"]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "checkpoints").iterdir())


def test_a_long_epoch_is_saved_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, save = [], checkpoints.save_checkpoint

    def noting(head: nn.Module, optimiser: torch.optim.Adam, state: State, folder: Path, *average: Any) -> None:
        saved.append((state.epoch, state.step))
        save(head, optimiser, state, folder, *average)

    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "save_checkpoint", noting)
    train(tmp_path, replace(RECIPE, epochs=1))
    assert saved == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 0)]


def test_a_checkpoint_of_another_classifier_is_named(tmp_path: Path) -> None:
    train(tmp_path)
    wider = build_mlp(12, (9,), 10, 0.5)
    with pytest.raises(AttireError, match=r"classifier.0.weight does not fit the recipe's classifier; resume with"):
        loop.fit(wider, Table(), LABELS, TRAIN, VAL, RECIPE, tmp_path / "checkpoints")
    deeper = build_mlp(12, (8, 8), 10, 0.5)
    with pytest.raises(AttireError, match=r"does not fit|is missing"):
        loop.fit(deeper, Table(), LABELS, TRAIN, VAL, RECIPE, tmp_path / "checkpoints")


def test_a_checkpoint_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "epoch-001-step-000000.ckpt"
    with files.sealed_file(path) as file, zipfile.ZipFile(file, "w") as archive:  # type: ignore[call-overload]
        archive.writestr("about.json", json.dumps({"schema": 2}))
    with pytest.raises(AttireError, match="a checkpoint of another schema version than 1"):
        checkpoints._read_checkpoint(path)


def test_a_pickle_named_checkpoint_is_refused_and_never_run(tmp_path: Path) -> None:
    path = tmp_path / "epoch-001-step-000000.ckpt"
    payload = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    path.write_bytes(payload)
    with pytest.raises(AttireError, match="not a whole Attire checkpoint"):
        checkpoints._read_checkpoint(path)
    with files.sealed_file(path) as file:
        file.write(payload)
    with pytest.raises(AttireError, match="not an Attire checkpoint"):
        checkpoints._read_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_ctrl_c_is_handed_back_when_training_ends(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(tmp_path)
    with pytest.raises(Stopped):
        train(tmp_path / "other", stop_at=2)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As under nohup, where the end of the terminal is no reason to stop."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with guards.stop_requests():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) is not before
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_epoch_holds_each_row_once_in_an_order_of_its_own() -> None:
    first, mirrored = loop._epoch_order(TRAIN, RECIPE, 0)
    assert sorted(first) == TRAIN.tolist()
    assert mirrored is not None
    assert 0.2 < mirrored.mean() < 0.8
    assert np.array_equal(first, loop._epoch_order(TRAIN, RECIPE, 0)[0])
    assert not np.array_equal(first, loop._epoch_order(TRAIN, RECIPE, 1)[0])
    assert not np.array_equal(first, loop._epoch_order(TRAIN, replace(RECIPE, seed=1), 0)[0])
    assert loop._epoch_order(TRAIN, replace(RECIPE, flips=False), 0)[1] is None


def test_every_row_passes_once_an_epoch_and_validation_rows_never_train(tmp_path: Path) -> None:
    table, recipe = Table(), replace(RECIPE, epochs=1)
    loop.fit(new_head(), table, LABELS, TRAIN, VAL, recipe, tmp_path / "checkpoints")
    assert sorted(table.seen[: len(TRAIN)]) == TRAIN.tolist()
    assert table.seen[len(TRAIN) :] == VAL.tolist()


def test_a_source_that_drops_rows_is_caught(tmp_path: Path) -> None:
    class Dropping(Table):
        def batches(self, order: RowIndices, batch_size: int, views: np.ndarray | None) -> Iterator[Tensor]:
            yield from list(super().batches(order, batch_size, views))[:-1]

    with pytest.raises(AttireError, match="training: an epoch saw 64 rows, expected 76"):
        loop.fit(new_head(), Dropping(), LABELS, TRAIN, VAL, RECIPE, tmp_path / "checkpoints")


def test_the_cosine_schedule_warms_up_and_ends_near_nothing() -> None:
    factors = [loop._learning_rate_factor("cosine", step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[99] < 0.001
    assert loop._learning_rate_factor("constant", 50, 100) == 1
    assert loop._learning_rate_factor("cosine", 0, 1) == 1


def test_adam_gets_the_classifier_s_parameters_and_decay_only_where_asked() -> None:
    head = new_head()
    plain = loop._make_optimiser(head, replace(RECIPE, weight_decay=0))
    assert type(plain) is torch.optim.Adam
    assert [id(p) for p in plain.param_groups[0]["params"]] == [id(p) for p in head.parameters()]
    decayed = loop._make_optimiser(head, replace(RECIPE, weight_decay=0.1))
    assert type(decayed) is torch.optim.AdamW
    assert decayed.param_groups[0]["weight_decay"] == 0.1


def test_a_first_loss_far_from_a_guess_is_a_warning() -> None:
    guards.check_first_loss(math.log(10), 10)
    for loss in (0.5, 9.0, float("nan")):
        with pytest.warns(AttireWarning, match=r"expected about ln\(10\) = 2.30"):
            guards.check_first_loss(loss, 10)


def test_a_parameter_that_does_not_change_is_an_error() -> None:
    head = new_head()
    before = checkpoints.digests(head)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name != "3.bias":
                parameter.add_(1)
    with pytest.raises(AttireError, match=r"classifier\.3\.bias did not change in an epoch; it is not being trained"):
        guards.check_all_changed(before, head)


def test_a_parameter_that_is_no_longer_finite_is_an_error() -> None:
    head = new_head()
    before = checkpoints.digests(head)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(float("nan"))
    with pytest.raises(AttireError, match=r"classifier\.0\.weight is no longer finite; lower --lr"):
        guards.check_all_changed(before, head)


def test_a_loss_that_does_not_fall_is_a_warning() -> None:
    flat = [Epoch(1, 1.0, None, None, 1.0), Epoch(2, 1.0, None, None, 1.0)]
    with pytest.warns(AttireWarning, match=r"the loss did not fall \(1.000 to 1.000\): lower --lr"):
        guards.check_loss_fell(flat)
    guards.check_loss_fell(flat[:1])


def test_logits_come_in_the_order_of_the_rows_without_dropout() -> None:
    head, table = new_head(), Table()
    rows = np.array([7, 99, 0, 7])
    found = features_logits.predict_logits(head, table, rows, batch_size=3)
    assert torch.allclose(found, features_logits.predict_logits(head, table, rows), atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(found, head.eval()(table.rows[rows]), atol=1e-6)


def test_without_validation_rows_nothing_is_validated(tmp_path: Path) -> None:
    nobody = np.empty(0, np.int64)
    history = loop.fit(new_head(), Table(), LABELS, TRAIN, nobody, RECIPE, tmp_path / "checkpoints")
    assert all(epoch.val_loss is None and epoch.val_accuracy is None for epoch in history)
    assert "None" not in (tmp_path / "history.csv").read_text()


def test_the_order_of_a_streamed_source_keeps_neighbours_within_a_window() -> None:
    rows = np.random.default_rng(0).permutation(1000)[:700]
    stretch = (10, 100)
    order, _ = loop._epoch_order(rows, RECIPE, 0, stretch)
    assert np.array_equal(np.sort(order), np.sort(rows))
    assert np.array_equal(order, loop._epoch_order(rows, RECIPE, 0, stretch)[0])
    assert not np.array_equal(order, loop._epoch_order(rows, RECIPE, 1, stretch)[0])
    place = np.searchsorted(np.sort(rows), order)
    for start in range(0, 700, 100):  # ten stretches each, from anywhere, their rows mixed
        window = place[start : start + 100]
        assert len(np.unique(window // 10)) == 10
        assert np.ptp(window) > 300
        assert not np.array_equal(window // 10, np.repeat(window[::10] // 10, 10))


def test_a_teacher_s_answers_are_a_share_of_the_loss() -> None:
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(6, 10), torch.arange(6)
    recipe = replace(RECIPE, label_smoothing=0.0, distill_weight=0.7, distill_temperature=2.0)
    hard = F.cross_entropy(logits, labels)
    sure = F.one_hot(labels, 10).float()
    same = loop._loss_of(logits, Target(labels, soft=sure), replace(recipe, distill_temperature=1.0))
    assert same.item() == pytest.approx(hard.item())
    soft = (logits / 2).softmax(1)
    alone = loop._loss_of(logits, Target(labels, soft=soft), replace(recipe, distill_weight=1.0))
    entropy = -(soft * soft.log()).sum(1).mean()
    assert alone.item() == pytest.approx(entropy.item(), rel=1e-5)  # no loss beyond the teacher's own doubt
    both = loop._loss_of(logits, Target(labels, soft=soft), recipe)
    assert both.item() == pytest.approx(0.3 * hard.item() + 0.7 * entropy.item(), rel=1e-5)
    guess = loop._loss_of(torch.zeros(6, 10), Target(labels, soft=soft), recipe)
    assert guess.item() == pytest.approx(math.log(10))


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
    optimiser = loop._make_optimiser(head, RECIPE)
    x, target = torch.rand(8, linear.in_features), Target(torch.arange(8))
    losses = [loop._train_step(head, optimiser, x, target, replace(RECIPE, precision=p)) for p in ("fp32", "bf16")]
    assert seen == [torch.float32, torch.bfloat16]
    assert losses[1] != losses[0]
    assert {p.dtype for p in head.parameters()} | {p.grad.dtype for p in head.parameters() if p.grad is not None} == {
        torch.float32
    }
    features_logits.predict_logits(head, Table(), np.arange(4))
    assert seen[2:] == [torch.float32]
