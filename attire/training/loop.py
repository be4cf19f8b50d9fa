"""`fit`: the training loop over cached or on-the-fly features, with history, checkpoints, exact resume and guards."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from attire.data.dataset import RowIndices, ViewIndices
from attire.errors import AttireError, Stopped
from attire.features.logits import distributed_logits, teacher_targets
from attire.features.sources import FeatureSource
from attire.model import distributed, heads
from attire.progress import Epoch
from attire.recipes import Recipe
from attire.storage import files
from attire.training import augment, checkpoints, guards
from attire.training.augment import Target
from attire.training.checkpoints import Checkpoints, TrainingState
from attire.training.loss import training_loss
from attire.training.optimiser import make_average, make_optimiser, set_learning_rate
from attire.training.sampler import epoch_order

_ReportCallback = Callable[[TrainingState, int, int], None]  # (state, rows done in this epoch, rows in an epoch)


@dataclass(frozen=True)
class TrainingData:
    """The rows of a feature source that a head is trained and validated on, and their labels.

    labels: (N,) over all rows of the source; soft_targets: a teacher's probabilities (V, N, K) for each view of each
    row, see `Teacher.soft_targets`. Validation uses the labels alone.
    """

    source: FeatureSource
    labels: NDArray[np.int64]
    train: RowIndices
    val: RowIndices
    soft_targets: NDArray[np.float32] | None = None


def fit(
    head: nn.Sequential,
    data: TrainingData,
    recipe: Recipe,
    folder: Path,
    report: _ReportCallback = lambda state, done, total: None,
) -> list[Epoch]:
    """Train `head`, validate it after each epoch, and return the history; checkpoints go into `folder`.

    Continues from the newest sound checkpoint in `folder`, bit for bit as if it had not been stopped (same machine,
    same thread count). Ctrl-C, SIGTERM and SIGHUP end it with a checkpoint and `Stopped`. Adam gets the head's
    parameters alone. A precision of `auto` is fp32 here: the caller has measured.

    Several processes (see `model.distributed`) call it alike, with one `folder` that all can read. They divide each
    batch among them, the loss is the mean over all its rows, and after each epoch all must have equal weights.
    """
    distributed.broadcast(head.state_dict().values())
    trainer = _Trainer(head, data, recipe, folder, report)
    if distributed.world_size() > 1:
        torch.manual_seed(distributed.process_seed(recipe.seed))  # each process drops other hidden values
    trainer.resume()
    with guards.stop_requests() as stop:
        while trainer.state.epoch < recipe.epochs:
            trainer.train_epoch(stop)
    return trainer.finish()


class _Trainer:
    """One training: the head, its optimiser, the moving average of its weights, and where the training stands."""

    def __init__(
        self, head: nn.Sequential, data: TrainingData, recipe: Recipe, folder: Path, report: _ReportCallback
    ) -> None:
        self.head, self.data, self.recipe, self.folder, self.report = head, data, recipe, folder, report
        self.optimiser, self.average = make_optimiser(head, recipe), make_average(head, recipe)
        self.checkpoints = Checkpoints(head, self.optimiser, folder, self.average)
        self.labels = torch.from_numpy(data.labels)
        self.device = next(head.parameters()).device
        self.steps_per_epoch = math.ceil(len(data.train) / recipe.batch_size)
        self.state = TrainingState()

    @property
    def evaluated_head(self) -> nn.Sequential:
        """The head that is validated and ships: the moving average, once it holds something."""
        if self.average is None or not int(self.average.n_averaged):
            return self.head
        return cast(nn.Sequential, self.average.module)

    def resume(self) -> None:
        self.state = self.checkpoints.restore()
        if distributed.world_size() > 1:
            self._check_same_inputs()

    def train_epoch(self, stop: list[int]) -> None:
        """Train, check and validate one epoch, or what a checkpoint left to do of it; then write a checkpoint."""
        first_of_phase = self.state.epoch in (0, self.recipe.head_epochs) and not self.state.resumed
        heads.set_train_mode(self.head, self.state.epoch < self.recipe.head_epochs)
        before = guards.parameter_digests(self.head) if first_of_phase else {}
        self.train_steps(stop)
        if before:
            guards.check_all_changed(before, self.head)
        if distributed.world_size() > 1:
            do = "one of them computes otherwise: give all the same PyTorch and the same kind of processor"
            what = f"the weights after epoch {self.state.epoch + 1}"
            distributed.check_equal(guards.weights_digest(self.head), what, do)
        self._end_epoch()
        self.checkpoints.save(self.state)
        if distributed.is_main_process():
            checkpoints.write_history(self.folder.parent / "history.csv", self.state.history)
        self.report(self.state, 0, len(self.data.train))

    def train_steps(self, stop: list[int]) -> None:
        """Take the steps left of this epoch; after each write a checkpoint, if `stop` or the clock asks for it."""
        state, batch_size, source = self.state, self.recipe.batch_size, self.data.source
        order, views = epoch_order(self.data.train, self.recipe, state.epoch, getattr(source, "stretch", None))
        start = min(state.step * batch_size, len(order))  # the last batch may have been a smaller one
        plan = distributed.plan_steps(len(order), start, batch_size, whole=augment.needs_whole_batches(self.recipe))
        own = np.concatenate([np.arange(0), *(np.arange(step.read.start, step.read.stop) for step in plan)])
        own_views = None if views is None else views[own]
        unread, began, saved = len(own), time.perf_counter() - state.seconds, time.perf_counter()
        batches = source.batches(order[own], distributed.read_batch_size(plan), own_views)
        for x, step in zip(batches, plan, strict=False):
            unread -= len(x)
            loss = self._train_batch(x, self._target(order, views, step.read), own=step.own, rows=step.rows)
            state.loss_sum += loss * step.rows
            state.step += 1
            state.seconds = time.perf_counter() - began
            self.report(state, min(state.step * batch_size, len(order)), len(order))
            saved = self._save_if_due(stop, saved)
        if unread:
            raise AttireError("training", f"an epoch saw {len(order) - unread:,} rows, expected {len(order):,}")

    def _target(self, order: RowIndices, views: ViewIndices | None, rows: slice) -> Target:
        """What these rows of the epoch's order are trained towards."""
        soft_targets = teacher_targets(self.data.soft_targets, order, views, rows, self.device)
        target = Target(self.labels[order[rows]].to(self.device), soft_targets=soft_targets)
        if self.recipe.outlier_exposure and views is not None:
            outliers = torch.from_numpy(views[rows] == self.recipe.training_views - 1)  # the last view
            target = replace(target, outliers=outliers.to(self.device))
        return target

    def _train_batch(self, x: Tensor, target: Target, *, own: slice, rows: int) -> float:
        """Augment a batch and train on this process's `own` part of it; returns the mean loss of all its `rows`."""
        recipe, state = self.recipe, self.state
        total_steps = state.epoch * self.steps_per_epoch + state.step
        set_learning_rate(self.optimiser, recipe, total_steps, self.steps_per_epoch)
        x, target = augment.augment(x.to(self.device), target, recipe, state.epoch, state.step)
        loss = _train_step(self.head, self.optimiser, x[own], target.select(own), recipe, rows)
        if self.average is not None and state.epoch >= recipe.head_epochs:
            self.average.update_parameters(self.head)
        if state.epoch == state.step == 0:
            guards.check_first_loss(loss, heads.last_linear(self.head).out_features)
        return loss

    def _save_if_due(self, stop: list[int], saved: float) -> float:
        """Returns when the last checkpoint was written. Raises Stopped where a process was asked to stop."""
        late = time.perf_counter() - saved > checkpoints.CHECKPOINT_SECONDS
        stopping, due = distributed.any_process(bool(stop), late)
        if stopping or due:
            self.checkpoints.save(self.state)
            saved = time.perf_counter()
        if stopping:
            steps = f"epoch {self.state.epoch + 1} after step {self.state.step} of {self.steps_per_epoch}"
            raise Stopped(self.folder.parent, f"stopped in {steps}")
        return saved

    def _end_epoch(self) -> None:
        """Validate, add a line to the history and go on to the next epoch."""
        state, val = self.state, self.data.val
        val_loss = val_accuracy = None
        if len(val):
            with _autocast(self.device, self.recipe):
                logits = distributed_logits(self.evaluated_head, self.data.source, val)
                val_loss = F.cross_entropy(logits, self.labels[val]).item()
            val_accuracy = (logits.argmax(1) == self.labels[val]).double().mean().item()
        train_loss, seconds = state.loss_sum / len(self.data.train), round(state.seconds, 3)
        state.history.append(Epoch(state.epoch + 1, train_loss, val_loss, val_accuracy, seconds))
        state.epoch, state.step, state.loss_sum, state.seconds = state.epoch + 1, 0, 0.0, 0.0

    def finish(self) -> list[Epoch]:
        """Put the weights that ship into the head, in evaluation mode, and return the history."""
        if distributed.is_main_process():
            self.checkpoints.remove_old()  # also one that an earlier start could not remove
        guards.check_loss_fell(self.state.history)
        if self.evaluated_head is not self.head:
            self.head.load_state_dict(self.evaluated_head.state_dict())
        self.optimiser.zero_grad(set_to_none=True)
        self.head.eval()
        return self.state.history

    def _check_same_inputs(self) -> None:
        """Before the first step: all processes must have the same inputs; features are compared by a sample."""
        data = self.data
        sample = next(iter(data.source.batches(data.train[:64], 64, None)))
        settings = files.canonical_json([self.recipe.to_json(), self.state.epoch, self.state.step])
        soft_targets = [] if data.soft_targets is None else [data.soft_targets]
        arrays = [sample.cpu().numpy(), data.labels, data.train, data.val, *soft_targets]
        distributed.check_equal(
            b"".join([settings, *(array.tobytes() for array in arrays)]),
            "features, rows, recipe or checkpoint",
            "give them one cache and one run folder, on a disk that they share",
        )


def _autocast(device: torch.device, recipe: Recipe) -> torch.autocast:
    """Matrix products in the recipe's precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16")


def _train_step(
    head: nn.Module,
    optimiser: torch.optim.Adam,
    x: Tensor,
    target: Target,
    recipe: Recipe,
    rows: int | None = None,
) -> float:
    """One step; in bf16 only products are rounded: weights, gradients and the loss stay fp32.

    rows: of the whole batch, where x is this process's part of it, which may be empty. Returns the batch's loss.
    """
    optimiser.zero_grad(set_to_none=True)
    with _autocast(x.device, recipe):
        logits = head(x).float()
    loss = training_loss(logits, target, recipe) if len(x) else logits.sum()  # the mean of no rows is NaN
    if rows is not None and len(x) != rows:
        loss = loss * (len(x) / rows)
    torch.autograd.backward(loss)
    if distributed.world_size() > 1:
        loss = distributed.sum_gradients(head.parameters(), loss)
    if recipe.clip_grad:
        nn.utils.clip_grad_norm_(head.parameters(), recipe.clip_grad)
    optimiser.step()
    return loss.item()
