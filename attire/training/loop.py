"""`fit`: the loop over cached or on-the-fly features, with history, checkpoints, exact resume and guards."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from attire.data.dataset import RowIndices, Views
from attire.errors import AttireError, Stopped
from attire.features.logits import answers, shared_logits
from attire.features.sources import FeatureSource
from attire.model import distributed, heads
from attire.progress import Epoch
from attire.recipes import Recipe
from attire.training import augment
from attire.training.checkpoints import (
    CHECKPOINT_SECONDS,
    State,
    digests,
    forget_old,
    resume,
    save_checkpoint,
    write_history,
)
from attire.training.guards import (
    check_agreement,
    check_all_changed,
    check_first_loss,
    check_loss_fell,
    stop_requests,
    weights_digest,
)

_WARM_UP = 0.1  # share of the steps of a cosine schedule that rise to the full learning rate


_Report = Callable[[State, int, int], None]  # (state, rows done in this epoch, rows in an epoch)


def fit(
    classifier: nn.Sequential,
    source: FeatureSource,
    labels: NDArray[np.int64],
    train: RowIndices,
    val: RowIndices,
    recipe: Recipe,
    folder: Path,
    report: _Report = lambda state, done, total: None,
    soft: NDArray[np.float32] | None = None,
) -> list[Epoch]:
    """Train `classifier` on the rows `train` of `source`, measuring it on the rows `val` after each epoch.

    Continues from the newest sound checkpoint in `folder`, bit for bit as if it had not been stopped (same machine,
    same thread count). Ctrl-C, SIGTERM and SIGHUP end it with a checkpoint and `Stopped`. Only the classifier's
    parameters are given to Adam; `labels` is (N,) over all rows of the source. soft: what a teacher answers,
    (V, N, K), see `teacher.targets`; validation stays by the labels alone. precision: `auto` is fp32 here, who calls
    has measured.

    Several processes (see `ranks`) call it alike, with one `folder` that all can read. Each batch is divided among
    them, its loss the mean over all its rows; after each epoch their weights are the same bits, which is checked.
    """
    distributed.spread(classifier.state_dict().values())
    optimiser, average = _make_optimiser(classifier, recipe), _make_average(classifier, recipe)
    if distributed.count() > 1:
        torch.manual_seed(distributed.own_seed(recipe.seed))  # each process drops other hidden values
    state = resume(classifier, optimiser, folder, average)
    if distributed.count() > 1:
        check_agreement(source, labels, train, val, recipe, state, soft)
    with stop_requests() as stop:
        while state.epoch < recipe.epochs:
            heads.set_phase(classifier, state.epoch < recipe.head_epochs)
            first = state.epoch in (0, recipe.head_epochs) and not state.resumed
            before = digests(classifier) if first else {}
            targets = torch.from_numpy(labels)
            _run_epoch(
                classifier, optimiser, source, targets, train, recipe, state, folder, stop, report, average, soft
            )
            if before:
                check_all_changed(before, classifier)
            if distributed.count() > 1:
                do = "one of them computes otherwise: give all the same PyTorch and the same kind of processor"
                distributed.agree(weights_digest(classifier), f"the weights after epoch {state.epoch + 1}", do)
            with _products(next(classifier.parameters()).device, recipe):
                _end_epoch(_measured(classifier, average), source, targets, val, state, len(train))
            save_checkpoint(classifier, optimiser, state, folder, average)
            if distributed.leads():
                write_history(folder.parent / "history.csv", state.history)
            report(state, 0, len(train))
    if distributed.leads():
        forget_old(folder)  # also one that a run before could not remove
    check_loss_fell(state.history)
    if _measured(classifier, average) is not classifier:
        classifier.load_state_dict(_measured(classifier, average).state_dict())
    optimiser.zero_grad(set_to_none=True)
    classifier.eval()
    return state.history


def _run_epoch(
    classifier: nn.Sequential,
    optimiser: torch.optim.Adam,
    source: FeatureSource,
    targets: Tensor,
    train: RowIndices,
    recipe: Recipe,
    state: State,
    folder: Path,
    stop: list[int],
    report: _Report,
    average: AveragedModel | None = None,
    soft: NDArray[np.float32] | None = None,
) -> None:
    """The steps of one epoch that are still to do, each followed by a look at the clock and at `stop`."""
    heads.set_phase(classifier, state.epoch < recipe.head_epochs)
    order, mirrored = _epoch_order(train, recipe, state.epoch, getattr(source, "stretch", None))
    steps = math.ceil(len(train) / recipe.batch_size)
    position = min(state.step * recipe.batch_size, len(order))  # the last batch may have been a smaller one
    plan = distributed.shares(len(order), position, recipe.batch_size, whole=augment.is_drawn_for_batches(recipe))
    read = np.concatenate([np.arange(0), *(np.arange(share.read.start, share.read.stop) for share in plan)])
    views, left, device = None if mirrored is None else mirrored[read], len(read), next(classifier.parameters()).device
    start, saved = time.perf_counter() - state.seconds, time.perf_counter()
    for x, share in zip(source.batches(order[read], distributed.most_read(plan), views), plan, strict=False):
        _set_learning_rate(optimiser, recipe, state.epoch * steps + state.step, steps)
        left -= len(x)
        taught = answers(soft, order, mirrored, share.read, device)
        given = augment.Target(targets[order[share.read]].to(device), soft=taught)
        if recipe.outlier_exposure and mirrored is not None:
            given = replace(given, none=torch.from_numpy(mirrored[share.read] == recipe.training_views - 1).to(device))
        x, target = augment.augment(x.to(device), given, recipe, state.epoch, state.step)
        loss = _train_step(classifier, optimiser, x[share.own], target.part(share.own), recipe, share.rows)
        if average is not None and state.epoch >= recipe.head_epochs:
            average.update_parameters(classifier)
        if state.epoch == state.step == 0:
            check_first_loss(loss, heads.classes_of(classifier))
        position, state.step = position + share.rows, state.step + 1
        state.loss_sum += loss * share.rows
        state.seconds = time.perf_counter() - start
        report(state, position, len(train))
        stopping, due = distributed.any_of(bool(stop), time.perf_counter() - saved > CHECKPOINT_SECONDS)
        if stopping or due:
            save_checkpoint(classifier, optimiser, state, folder, average)
            saved = time.perf_counter()
        if stopping:
            raise Stopped(folder.parent, f"stopped in epoch {state.epoch + 1} after step {state.step} of {steps}")
    if left:
        raise AttireError("training", f"an epoch saw {len(train) - left:,} rows, expected {len(train):,}")


def _make_optimiser(classifier: nn.Module, recipe: Recipe) -> torch.optim.Adam:
    """Adam over what is trained only; AdamW's decoupled decay where the recipe asks for decay."""
    parameters = heads.parameter_groups(classifier, recipe.layer_decay)
    if recipe.weight_decay:
        return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.Adam(parameters, lr=recipe.lr, fused=True)


def _make_average(classifier: nn.Module, recipe: Recipe) -> AveragedModel | None:
    """The exponential moving average of weights and batch statistics, where the recipe asks for one."""
    if not recipe.ema:
        return None
    moving = get_ema_multi_avg_fn(recipe.ema)  # type: ignore[no-untyped-call]
    return AveragedModel(classifier, multi_avg_fn=moving, use_buffers=True)


def _measured(classifier: nn.Sequential, average: AveragedModel | None) -> nn.Sequential:
    """What validation sees and what ships: the average, once it holds something."""
    if average is None or not int(average.n_averaged):
        return classifier
    return cast(nn.Sequential, average.module)


def _products(device: torch.device, recipe: Recipe) -> torch.autocast:
    """In which products are of the recipe's precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16")


def _train_step(
    classifier: nn.Module,
    optimiser: torch.optim.Adam,
    x: Tensor,
    target: augment.Target,
    recipe: Recipe,
    rows: int | None = None,
) -> float:
    """One step; in bf16 the products alone are, weights, their gradients and the loss stay fp32.

    rows: of the whole batch, where x is this process's share of it, which may be empty. Returns the batch's loss.
    """
    optimiser.zero_grad(set_to_none=True)
    with _products(x.device, recipe):
        logits = classifier(x)
    loss = _loss_of(logits.float(), target, recipe) if len(x) else logits.float().sum()  # the mean of nothing is NaN
    if rows is not None and len(x) != rows:
        loss = loss * (len(x) / rows)
    torch.autograd.backward(loss)
    if distributed.count() > 1:
        loss = distributed.add_up(classifier.parameters(), loss)
    if recipe.clip_grad:
        nn.utils.clip_grad_norm_(classifier.parameters(), recipe.clip_grad)
    optimiser.step()
    return loss.item()


def _loss_of(logits: Tensor, target: augment.Target, recipe: Recipe) -> Tensor:
    """Cross-entropy by the labels; with a teacher, `distil` of it by the teacher's answers (Hinton et al. 2015).

    There both sides are softened by one temperature. The paper's factor T^2 is part of `distil`, so that the loss of
    who guesses is ln K, whatever the share. Rows that are none of the classes are to be answered with each class alike.
    """
    if target.none is not None:
        alike = -F.log_softmax(logits[target.none], 1).mean(1).sum()
        known = logits[~target.none]
        rest = _loss_of(known, replace(target.part(~target.none), none=None), recipe) if len(known) else known.sum()
        return (len(known) * rest + alike) / len(logits)
    smoothing = recipe.label_smoothing
    loss = F.cross_entropy(logits, target.labels, label_smoothing=smoothing)
    if target.others is not None:
        rest = F.cross_entropy(logits, target.others, label_smoothing=smoothing)
        loss = target.share * loss + (1 - target.share) * rest
    if target.soft is None:
        return loss
    taught = F.cross_entropy(logits / recipe.distill_temperature, target.soft)
    return (1 - recipe.distill_weight) * loss + recipe.distill_weight * taught


def _epoch_order(
    train: RowIndices, recipe: Recipe, epoch: int, stretch: tuple[int, int] | None = None
) -> tuple[RowIndices, Views | None]:
    """A permutation of the training rows, and the view of each, from the seed and the epoch alone.

    stretch: for a source that reads rows from the disk, see `shuffled_stretches`.
    """
    rng = np.random.default_rng([recipe.seed, epoch])
    order = _shuffled_stretches(train, rng, *stretch) if stretch else rng.permutation(train)
    if not np.array_equal(np.sort(order), np.sort(train)):
        raise AttireError("training", "an epoch's order does not hold each row once")
    if recipe.shifts or recipe.synthetic_drawings or recipe.outlier_exposure:
        return order, _drawn_views(rng, recipe, len(order))
    return order, rng.random(len(order)) < 0.5 if recipe.flips else None


def _drawn_views(rng: np.random.Generator, recipe: Recipe, count: int) -> Views:
    """The numbers of `count` views. Beside drawn and strange ones each of the pictures' own counts twice: with as many
    of each, 24 epochs came to 95.0 % of validation rows, where 15 of `fast` come to 95.6 % (docs/log.md)."""
    views, own = recipe.training_views, (1 + recipe.flips) * (1 + recipe.shifts)
    return rng.integers(0, views + (own if recipe.synthetic_drawings or recipe.outlier_exposure else 0), count) % views


def _shuffled_stretches(train: RowIndices, rng: np.random.Generator, length: int, window: int) -> RowIndices:
    """A permutation that a disk can follow: stretches of `length` neighbours, drawn from anywhere, `window` rows of
    them at a time, and within those the rows in any order."""
    rows = np.sort(train)
    starts = rng.permutation(np.arange(0, len(rows), length))
    drawn = np.concatenate([rows[start : start + length] for start in starts])
    return np.concatenate([rng.permutation(drawn[i : i + window]) for i in range(0, len(drawn), window)])


def _set_learning_rate(optimiser: torch.optim.Adam, recipe: Recipe, step: int, steps: int) -> None:
    """The schedule runs over the epochs after the probe, which has the full rate; steps: in an epoch."""
    probe = recipe.head_epochs * steps
    factor = 1.0
    if step >= probe:
        factor = _learning_rate_factor(recipe.schedule, step - probe, recipe.epochs * steps - probe)
    for group in optimiser.param_groups:
        group["lr"] = recipe.lr * group["scale"] * factor


def _learning_rate_factor(schedule: str, step: int, total: int) -> float:
    """Constant, or a linear warm-up followed by half a cosine (Loshchilov and Hutter, 2017)."""
    if schedule == "constant":
        return 1.0
    warm = max(1, round(_WARM_UP * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def _end_epoch(
    classifier: nn.Sequential, source: FeatureSource, targets: Tensor, val: RowIndices, state: State, rows: int
) -> None:
    val_loss = val_accuracy = None
    if len(val):
        logits = shared_logits(classifier, source, val)
        val_loss = F.cross_entropy(logits, targets[val]).item()
        val_accuracy = (logits.argmax(1) == targets[val]).double().mean().item()
    state.history.append(Epoch(state.epoch + 1, state.loss_sum / rows, val_loss, val_accuracy, round(state.seconds, 3)))
    state.epoch, state.step, state.loss_sum, state.seconds = state.epoch + 1, 0, 0.0, 0.0
