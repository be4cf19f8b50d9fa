"""`fit`: the loop over cached or on-the-fly features, with history, checkpoints, exact resume and guards."""

import csv
import io
import json
import math
import re
import signal
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from attire import augment, files, heads, ranks
from attire.errors import AttireError, AttireWarning, Stopped
from attire.recipes import Recipe

CHECKPOINT_SECONDS = 300.0  # inside a long epoch; every epoch ends with one anyway
STOPS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
WRONG_VALUES = (ValueError, KeyError, TypeError, AttributeError)  # of JSON that is not what was written
SCHEMA = 1
KEPT_CHECKPOINTS = 2  # the newest, and the one to fall back on
WARM_UP = 0.1  # share of the steps of a cosine schedule that rise to the full learning rate

Rows = NDArray[np.int64]
Views = NDArray[np.bool_] | NDArray[np.int64]


class Source(Protocol):
    """Where feature rows come from: the cache, or the trunk on the fly."""

    def batches(self, order: Rows, batch_size: int, views: Views | None) -> Iterator[Tensor]:
        """Feature rows (b, D) float in this order, each of its view: 0 the picture, 1 mirrored, then shifted ones."""


@dataclass(frozen=True)
class Epoch:
    """One line of `history.csv`. Losses are averages over rows; seconds exclude validation."""

    epoch: int
    train_loss: float
    val_loss: float | None
    val_accuracy: float | None
    seconds: float


@dataclass
class State:
    """All that a checkpoint restores besides the tensors: where the run stands."""

    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the next epoch
    loss_sum: float = 0.0  # over the rows of those steps
    seconds: float = 0.0  # spent on those steps
    history: list[Epoch] = field(default_factory=list)
    resumed: bool = False  # whether it came from a checkpoint
    ranks: int = 1  # processes that train together


Report = Callable[[State, int, int], None]  # (state, rows done in this epoch, rows in an epoch)


def fit(
    classifier: nn.Sequential,
    source: Source,
    labels: NDArray[np.int64],
    train: Rows,
    val: Rows,
    recipe: Recipe,
    folder: Path,
    report: Report = lambda state, done, total: None,
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
    ranks.spread(classifier.state_dict().values())
    optimiser, average = make_optimiser(classifier, recipe), make_average(classifier, recipe)
    if ranks.count() > 1:
        torch.manual_seed(ranks.own_seed(recipe.seed))  # each process drops other hidden values
    state = resume(classifier, optimiser, folder, average)
    if ranks.count() > 1:
        check_agreement(source, labels, train, val, recipe, state, soft)
    with stop_requests() as stop:
        while state.epoch < recipe.epochs:
            heads.set_phase(classifier, state.epoch < recipe.probe_epochs)
            first = state.epoch in (0, recipe.probe_epochs) and not state.resumed
            before = digests(classifier) if first else {}
            targets = torch.from_numpy(labels)
            run_epoch(classifier, optimiser, source, targets, train, recipe, state, folder, stop, report, average, soft)
            if before:
                check_all_changed(before, classifier)
            if ranks.count() > 1:
                do = "one of them computes otherwise: give all the same PyTorch and the same kind of processor"
                ranks.agree(weights_digest(classifier), f"the weights after epoch {state.epoch + 1}", do)
            with products(next(classifier.parameters()).device, recipe):
                end_epoch(measured(classifier, average), source, targets, val, state, len(train))
            save_checkpoint(classifier, optimiser, state, folder, average)
            if ranks.leads():
                write_history(folder.parent / "history.csv", state.history)
            report(state, 0, len(train))
    if ranks.leads():
        forget_old(folder)  # also one that a run before could not remove
    check_loss_fell(state.history)
    if measured(classifier, average) is not classifier:
        classifier.load_state_dict(measured(classifier, average).state_dict())
    optimiser.zero_grad(set_to_none=True)
    classifier.eval()
    return state.history


def run_epoch(
    classifier: nn.Sequential,
    optimiser: torch.optim.Adam,
    source: Source,
    targets: Tensor,
    train: Rows,
    recipe: Recipe,
    state: State,
    folder: Path,
    stop: list[int],
    report: Report,
    average: AveragedModel | None = None,
    soft: NDArray[np.float32] | None = None,
) -> None:
    """The steps of one epoch that are still to do, each followed by a look at the clock and at `stop`."""
    heads.set_phase(classifier, state.epoch < recipe.probe_epochs)
    order, mirrored = epoch_order(train, recipe, state.epoch, getattr(source, "stretch", None))
    steps = math.ceil(len(train) / recipe.batch_size)
    position = min(state.step * recipe.batch_size, len(order))  # the last batch may have been a smaller one
    plan = ranks.shares(len(order), position, recipe.batch_size, whole=augment.is_drawn_for_batches(recipe))
    read = np.concatenate([np.arange(0), *(np.arange(share.read.start, share.read.stop) for share in plan)])
    views, left, device = None if mirrored is None else mirrored[read], len(read), next(classifier.parameters()).device
    start, saved = time.perf_counter() - state.seconds, time.perf_counter()
    for x, share in zip(source.batches(order[read], ranks.most_read(plan), views), plan, strict=False):
        set_learning_rate(optimiser, recipe, state.epoch * steps + state.step, steps)
        left -= len(x)
        taught = answers(soft, order, mirrored, share.read, device)
        given = augment.Target(targets[order[share.read]].to(device), soft=taught)
        if recipe.strange and mirrored is not None:
            given = replace(given, none=torch.from_numpy(mirrored[share.read] == recipe.training_views - 1).to(device))
        x, target = augment.augment(x.to(device), given, recipe, state.epoch, state.step)
        loss = train_step(classifier, optimiser, x[share.own], target.part(share.own), recipe, share.rows)
        if average is not None and state.epoch >= recipe.probe_epochs:
            average.update_parameters(classifier)
        if state.epoch == state.step == 0:
            check_first_loss(loss, heads.classes_of(classifier))
        position, state.step = position + share.rows, state.step + 1
        state.loss_sum += loss * share.rows
        state.seconds = time.perf_counter() - start
        report(state, position, len(train))
        stopping, due = ranks.any_of(bool(stop), time.perf_counter() - saved > CHECKPOINT_SECONDS)
        if stopping or due:
            save_checkpoint(classifier, optimiser, state, folder, average)
            saved = time.perf_counter()
        if stopping:
            raise Stopped(folder.parent, f"stopped in epoch {state.epoch + 1} after step {state.step} of {steps}")
    if left:
        raise AttireError("training", f"an epoch saw {len(train) - left:,} rows, expected {len(train):,}")


def make_optimiser(classifier: nn.Module, recipe: Recipe) -> torch.optim.Adam:
    """Adam over what is trained only; AdamW's decoupled decay where the recipe asks for decay."""
    parameters = heads.parameter_groups(classifier, recipe.block_lr)
    if recipe.weight_decay:
        return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.Adam(parameters, lr=recipe.lr, fused=True)


def make_average(classifier: nn.Module, recipe: Recipe) -> AveragedModel | None:
    """The exponential moving average of weights and batch statistics, where the recipe asks for one."""
    if not recipe.ema:
        return None
    moving = get_ema_multi_avg_fn(recipe.ema)  # type: ignore[no-untyped-call]
    return AveragedModel(classifier, multi_avg_fn=moving, use_buffers=True)


def measured(classifier: nn.Sequential, average: AveragedModel | None) -> nn.Sequential:
    """What validation sees and what ships: the average, once it holds something."""
    if average is None or not int(average.n_averaged):
        return classifier
    return cast(nn.Sequential, average.module)


def products(device: torch.device, recipe: Recipe) -> torch.autocast:
    """In which products are of the recipe's precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16")


def train_step(
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
    with products(x.device, recipe):
        logits = classifier(x)
    loss = loss_of(logits.float(), target, recipe) if len(x) else logits.float().sum()  # the mean of nothing is NaN
    if rows is not None and len(x) != rows:
        loss = loss * (len(x) / rows)
    torch.autograd.backward(loss)
    if ranks.count() > 1:
        loss = ranks.add_up(classifier.parameters(), loss)
    if recipe.clip:
        nn.utils.clip_grad_norm_(classifier.parameters(), recipe.clip)
    optimiser.step()
    return loss.item()


def loss_of(logits: Tensor, target: augment.Target, recipe: Recipe) -> Tensor:
    """Cross-entropy by the labels; with a teacher, `distil` of it by the teacher's answers (Hinton et al. 2015).

    There both sides are softened by one temperature. The paper's factor T^2 is part of `distil`, so that the loss of
    who guesses is ln K, whatever the share. Rows that are none of the classes are to be answered with each class alike.
    """
    if target.none is not None:
        alike = -F.log_softmax(logits[target.none], 1).mean(1).sum()
        known = logits[~target.none]
        rest = loss_of(known, replace(target.part(~target.none), none=None), recipe) if len(known) else known.sum()
        return (len(known) * rest + alike) / len(logits)
    smoothing = recipe.label_smoothing
    loss = F.cross_entropy(logits, target.labels, label_smoothing=smoothing)
    if target.others is not None:
        rest = F.cross_entropy(logits, target.others, label_smoothing=smoothing)
        loss = target.share * loss + (1 - target.share) * rest
    if target.soft is None:
        return loss
    taught = F.cross_entropy(logits / recipe.soften, target.soft)
    return (1 - recipe.distil) * loss + recipe.distil * taught


def answers(
    soft: NDArray[np.float32] | None, order: Rows, views: Views | None, part: slice, device: torch.device
) -> Tensor | None:
    """What the teacher says of this part of the epoch's order, (b, K), of each row in its view."""
    if soft is None:
        return None
    rows = order[part]
    numbers = np.zeros(len(rows), np.int64) if views is None else views[part].astype(np.int64)
    return torch.from_numpy(soft[numbers, rows]).to(device)


def epoch_order(
    train: Rows, recipe: Recipe, epoch: int, stretch: tuple[int, int] | None = None
) -> tuple[Rows, Views | None]:
    """A permutation of the training rows, and the view of each, from the seed and the epoch alone.

    stretch: for a source that reads rows from the disk, see `shuffled_stretches`.
    """
    rng = np.random.default_rng([recipe.seed, epoch])
    order = shuffled_stretches(train, rng, *stretch) if stretch else rng.permutation(train)
    if not np.array_equal(np.sort(order), np.sort(train)):
        raise AttireError("training", "an epoch's order does not hold each row once")
    if recipe.shifts or recipe.drawn or recipe.strange:
        return order, drawn_views(rng, recipe, len(order))
    return order, rng.random(len(order)) < 0.5 if recipe.flips else None


def drawn_views(rng: np.random.Generator, recipe: Recipe, count: int) -> Views:
    """The numbers of `count` views. Beside drawn and strange ones each of the pictures' own counts twice: with as many
    of each, 24 epochs came to 95.0 % of validation rows, where 15 of `fast` come to 95.6 % (docs/log.md)."""
    views, own = recipe.training_views, (1 + recipe.flips) * (1 + recipe.shifts)
    return rng.integers(0, views + (own if recipe.drawn or recipe.strange else 0), count) % views


def shuffled_stretches(train: Rows, rng: np.random.Generator, length: int, window: int) -> Rows:
    """A permutation that a disk can follow: stretches of `length` neighbours, drawn from anywhere, `window` rows of
    them at a time, and within those the rows in any order."""
    rows = np.sort(train)
    starts = rng.permutation(np.arange(0, len(rows), length))
    drawn = np.concatenate([rows[start : start + length] for start in starts])
    return np.concatenate([rng.permutation(drawn[i : i + window]) for i in range(0, len(drawn), window)])


def set_learning_rate(optimiser: torch.optim.Adam, recipe: Recipe, step: int, steps: int) -> None:
    """The schedule runs over the epochs after the probe, which has the full rate; steps: in an epoch."""
    probe = recipe.probe_epochs * steps
    factor = 1.0
    if step >= probe:
        factor = learning_rate_factor(recipe.schedule, step - probe, recipe.epochs * steps - probe)
    for group in optimiser.param_groups:
        group["lr"] = recipe.lr * group["scale"] * factor


def learning_rate_factor(schedule: str, step: int, total: int) -> float:
    """Constant, or a linear warm-up followed by half a cosine (Loshchilov and Hutter, 2017)."""
    if schedule == "constant":
        return 1.0
    warm = max(1, round(WARM_UP * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def end_epoch(classifier: nn.Sequential, source: Source, targets: Tensor, val: Rows, state: State, rows: int) -> None:
    val_loss = val_accuracy = None
    if len(val):
        logits = shared_logits(classifier, source, val)
        val_loss = F.cross_entropy(logits, targets[val]).item()
        val_accuracy = (logits.argmax(1) == targets[val]).double().mean().item()
    state.history.append(Epoch(state.epoch + 1, state.loss_sum / rows, val_loss, val_accuracy, round(state.seconds, 3)))
    state.epoch, state.step, state.loss_sum, state.seconds = state.epoch + 1, 0, 0.0, 0.0


def predict_logits(
    classifier: nn.Module, source: Source, rows: Rows, batch_size: int = 1024, views: Sequence[int] = (0,)
) -> Tensor:
    """Logits (n, K) float32 on the CPU of these rows, in their order, without dropout: the mean over these views."""
    classifier.eval()
    device = next(classifier.parameters()).device
    with torch.inference_mode():
        found = []
        for view in views:
            numbers = np.full(len(rows), view) if view else None
            batches = source.batches(rows, batch_size, numbers)
            found.append(torch.cat([classifier(x.to(device)).float().cpu() for x in batches]))
    return torch.stack(found).mean(0)


def shared_logits(
    classifier: nn.Module, source: Source, rows: Rows, batch_size: int = 1024, views: Sequence[int] = (0,)
) -> Tensor:
    """As `predict_logits`, each process answering its share of the rows and none twice; all get all of them."""
    own = ranks.share_of(len(rows))
    count = own.stop - own.start
    some = rows[own] if count else rows[:1]  # who has too few rows answers one, so as to know of how many classes
    return ranks.gathered(predict_logits(classifier, source, some, batch_size, views)[:count], len(rows))


# Guards against the classic blunders.


def check_first_loss(loss: float, classes: int) -> None:
    """An untrained classifier guesses, so its loss is near ln(classes); far from it, inputs or labels are wrong."""
    if not 0.5 * math.log(classes) < loss < 2 * math.log(classes):
        warnings.warn(
            f"the first loss is {loss:.2f}, expected about ln({classes}) = {math.log(classes):.2f}: "
            "are the features normalised, and do the labels belong to the images?",
            AttireWarning,
            stacklevel=3,
        )


def digests(classifier: nn.Module) -> dict[str, str]:
    """A digest of each parameter: to see that it changed takes no second copy of 100 MB."""
    return {
        name: files.sha256(parameter.detach().cpu().numpy().tobytes())
        for name, parameter in classifier.named_parameters()
        if parameter.requires_grad
    }


def check_agreement(
    source: Source,
    labels: NDArray[np.int64],
    train: Rows,
    val: Rows,
    recipe: Recipe,
    state: State,
    soft: NDArray[np.float32] | None,
) -> None:
    """Several processes must have been given the same: looked at before the first step, features by a sample."""
    some = next(iter(source.batches(train[:64], 64, None)))
    told = files.canonical_json([recipe.to_json(), state.epoch, state.step])
    arrays = [some.cpu().numpy(), labels, train, val, *([] if soft is None else [soft])]
    what, do = (
        "features, rows, recipe or checkpoint",
        "give them one cache and one run folder, on a disk that they share",
    )
    ranks.agree(b"".join([told, *(array.tobytes() for array in arrays)]), what, do)


def weights_digest(classifier: nn.Module) -> bytes:
    """SHA-256 of each weight and buffer, one after the other."""
    tensors = classifier.state_dict().values()
    return "".join(files.sha256(tensor.cpu().numpy().tobytes()) for tensor in tensors).encode()


def check_all_changed(before: dict[str, str], classifier: nn.Module) -> None:
    after = digests(classifier)
    for name, parameter in classifier.named_parameters():
        if name in before and before[name] == after[name]:
            raise AttireError("training", f"classifier.{name} did not change in an epoch; it is not being trained")
        if not torch.isfinite(parameter).all():
            raise AttireError("training", f"classifier.{name} is no longer finite", do="lower --lr")


def check_loss_fell(history: list[Epoch]) -> None:
    if len(history) > 1 and not history[-1].train_loss < history[0].train_loss:
        first, last = history[0].train_loss, history[-1].train_loss
        warnings.warn(f"the loss did not fall ({first:.3f} to {last:.3f}): lower --lr", AttireWarning, stacklevel=3)


# Stopping, checkpoints, history.


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C, SIGTERM or the end of the terminal comes, so that a step is never cut in two; what
    is ignored, as under nohup, stays so. Outside the main thread signals cannot be caught, and it stays empty."""
    asked: list[int] = []
    previous: dict[signal.Signals, Any] = {}
    try:
        for number in STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, lambda number, frame: asked.append(number))
    except ValueError:  # not the main thread
        pass
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def save_checkpoint(
    classifier: nn.Module,
    optimiser: torch.optim.Adam,
    state: State,
    folder: Path,
    average: AveragedModel | None = None,
) -> None:
    """One .npz: weights, Adam's moments, the random state of each process, the rest as JSON; then the SHA-256 of all.

    Array by array, so that 315 MB of `classic` are never copied whole.
    """
    arrays = {f"classifier.{name}": value for name, value in classifier.state_dict().items()}
    if average is not None:
        arrays |= {f"average.{name}": value for name, value in average.state_dict().items()}
    for i, moments in optimiser.state_dict()["state"].items():
        arrays |= {f"adam.{i}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    arrays["random.cpu"] = ranks.stacked(torch.get_rng_state())
    if next(classifier.parameters()).is_cuda:
        arrays["random.cuda"] = ranks.stacked(torch.cuda.get_rng_state())
    if not ranks.leads():
        return
    told = {name: value for name, value in asdict(state).items() if name != "resumed"}
    about = files.canonical_json({**told, "schema": SCHEMA})
    path = folder / f"epoch-{state.epoch:03d}-step-{state.step:06d}.ckpt"
    with files.sealed(path) as file, zipfile.ZipFile(cast(IO[bytes], file), "w") as archive:
        archive.writestr(zipfile.ZipInfo("about.json"), about)  # which has no time stamp: equal states, equal bytes
        for name, value in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, value.detach().cpu().numpy(), allow_pickle=False)
    forget_old(folder)


def forget_old(folder: Path) -> None:
    """Remove all checkpoints but those that are kept."""
    for old in checkpoints(folder)[KEPT_CHECKPOINTS:]:
        old.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """Newest first, by the epoch and step in the name."""
    return sorted((p for p in folder.glob("*.ckpt") if re.fullmatch(r"epoch-\d+-step-\d+\.ckpt", p.name)), reverse=True)


def resume(
    classifier: nn.Module, optimiser: torch.optim.Adam, folder: Path, average: AveragedModel | None = None
) -> State:
    """Restore the newest sound checkpoint; a damaged one is passed over with a warning. A fresh state without any."""
    for path in checkpoints(folder):
        try:
            state, tensors = read_checkpoint(path)
        except AttireError as error:
            warnings.warn(f"{error}; going on from the one before", AttireWarning, stacklevel=3)
            continue
        if state.ranks != ranks.count():
            do = f"resume with as many: torchrun --nproc-per-node {state.ranks} -m attire train --resume RUN"
            do = do if state.ranks > 1 else "resume without torchrun: attire train --resume RUN"
            raise AttireError(path, f"a checkpoint of {state.ranks} processes, found {ranks.count()}", do=do)
        restore(classifier, optimiser, tensors, path, average)
        return state
    return State(ranks=ranks.count())


def read_checkpoint(path: Path) -> tuple[State, dict[str, Tensor]]:
    """The parts of a checkpoint. Raises AttireError where a byte is not what was written."""
    try:
        if not files.is_sound(path):
            raise AttireError(path, "not a whole Attire checkpoint: its digest does not match")
        with zipfile.ZipFile(path) as archive:
            values = json.loads(archive.read("about.json"))
            if values.pop("schema") != SCHEMA:
                raise AttireError(path, f"a checkpoint of another schema version than {SCHEMA}")
            tensors = {}
            for name in archive.namelist()[1:]:
                with archive.open(name) as member:
                    array = np.lib.format.read_array(member, allow_pickle=False)
                tensors[name.removesuffix(".npy")] = torch.from_numpy(array)
        values["history"] = [Epoch(**line) for line in values["history"]]
        return State(**{**values, "resumed": True}), tensors
    except OSError as error:
        raise files.cannot("read", path, error) from error
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, TokenError, *WRONG_VALUES) as error:
        raise AttireError(path, "not an Attire checkpoint", str(error)[:80]) from error


def restore(
    classifier: nn.Module,
    optimiser: torch.optim.Adam,
    tensors: dict[str, Tensor],
    path: Path,
    average: AveragedModel | None,
) -> None:
    """Put weights, moments and the random state back. Raises AttireError where one does not fit the classifier."""
    wanted = {f"classifier.{name}": value for name, value in classifier.state_dict().items()}
    if average is not None:
        wanted |= {f"average.{name}": value for name, value in average.state_dict().items()}
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind in ("classifier", "average") and (name not in wanted or wanted[name].shape != value.shape):
            raise AttireError(
                path, f"{name} does not fit the recipe's classifier", do="resume with the run's own recipe"
            )
        if kind == "adam":
            index, _, moment = rest.partition(".")
            moments.setdefault(int(index), {})[moment] = laid_out(value, parameters[int(index)])
    if missing := sorted(set(wanted) - set(tensors)):
        raise AttireError(path, f"{missing[0]} is missing", do="resume with the run's own recipe")
    for kind, module in (("classifier.", classifier), ("average.", average)):
        if module is not None:
            own = {name.removeprefix(kind): tensors[name] for name in wanted if name.startswith(kind)}
            module.load_state_dict(own)
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
    random = {name: own_state(value) for name, value in tensors.items() if name.startswith("random.")}
    torch.set_rng_state(random["random.cpu"])
    if "random.cuda" in random:
        torch.cuda.set_rng_state(random["random.cuda"])


def own_state(value: Tensor) -> Tensor:
    """Of random states, one a process, this process's."""
    return value[ranks.rank()].clone() if value.ndim > 1 else value


def laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """A moment with its channels where the parameter has them: fused Adam goes through both as they lie in memory."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value


def write_history(path: Path, history: list[Epoch]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Epoch.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(epoch) for epoch in history)
    files.write_text(path, text.getvalue())
