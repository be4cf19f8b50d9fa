"""Checks that a training is sane, and signals that ask it to stop."""

import math
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from attire.data.dataset import RowIndices
from attire.errors import AttireError, AttireWarning
from attire.features.sources import FeatureSource
from attire.model import distributed
from attire.progress import Epoch
from attire.recipes import Recipe
from attire.storage import files
from attire.training.checkpoints import State, digests

_STOPS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def check_first_loss(loss: float, classes: int) -> None:
    """An untrained classifier guesses, so its loss is near ln(classes); far from it, inputs or labels are wrong."""
    if not 0.5 * math.log(classes) < loss < 2 * math.log(classes):
        warnings.warn(
            f"the first loss is {loss:.2f}, expected about ln({classes}) = {math.log(classes):.2f}: "
            "are the features normalised, and do the labels belong to the images?",
            AttireWarning,
            stacklevel=3,
        )


def check_agreement(
    source: FeatureSource,
    labels: NDArray[np.int64],
    train: RowIndices,
    val: RowIndices,
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
    distributed.agree(b"".join([told, *(array.tobytes() for array in arrays)]), what, do)


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


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C, SIGTERM or the end of the terminal comes, so that a step is never cut in two; what
    is ignored, as under nohup, stays so. Outside the main thread signals cannot be caught, and it stays empty."""
    asked: list[int] = []
    previous: dict[signal.Signals, Any] = {}
    try:
        for number in _STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, lambda number, frame: asked.append(number))
    except ValueError:  # not the main thread
        pass
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
