"""Checks that a training is sane, and signals that ask it to stop."""

import math
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from attire.errors import AttireError, AttireWarning
from attire.progress import Epoch
from attire.storage import files

_STOP_SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def check_first_loss(loss: float, classes: int) -> None:
    """Warn where the first loss is far from ln(classes), that of an untrained head: inputs or labels are then wrong."""
    if not 0.5 * math.log(classes) < loss < 2 * math.log(classes):
        warnings.warn(
            f"the first loss is {loss:.2f}, expected about ln({classes}) = {math.log(classes):.2f}: "
            "are the features normalised, and do the labels belong to the images?",
            AttireWarning,
            stacklevel=3,
        )


def parameter_digests(head: nn.Module) -> dict[str, str]:
    """SHA-256 of each trained parameter: to see that it changed takes no second copy of 100 MB."""
    parameters = {name: value for name, value in head.named_parameters() if value.requires_grad}
    return {name: files.sha256(value.detach().cpu().numpy().tobytes()) for name, value in parameters.items()}


def weights_digest(head: nn.Module) -> bytes:
    """SHA-256 of each weight and buffer, one after the other."""
    tensors = head.state_dict().values()
    return "".join(files.sha256(tensor.cpu().numpy().tobytes()) for tensor in tensors).encode()


def check_all_changed(before: dict[str, str], head: nn.Module) -> None:
    """Raises AttireError where a parameter has the digest it had before the epoch, or is not finite."""
    after = parameter_digests(head)
    for name, parameter in head.named_parameters():
        if name in before and before[name] == after[name]:
            raise AttireError("training", f"head.{name} did not change in an epoch; it is not being trained")
        if not torch.isfinite(parameter).all():
            raise AttireError("training", f"head.{name} is no longer finite", do="lower --lr")


def check_loss_fell(history: list[Epoch]) -> None:
    if len(history) > 1 and not history[-1].train_loss < history[0].train_loss:
        first, last = history[0].train_loss, history[-1].train_loss
        warnings.warn(f"the loss did not fall ({first:.3f} to {last:.3f}): lower --lr", AttireWarning, stacklevel=3)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that collects Ctrl-C, SIGTERM and SIGHUP, so that no signal cuts a step in two.

    A signal that is ignored, as under nohup, stays ignored. Outside the main thread the list stays empty.
    """
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}
    try:
        for number in _STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, lambda number, frame: received.append(number))
    except ValueError:  # not the main thread
        pass
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
