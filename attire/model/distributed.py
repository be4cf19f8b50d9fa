"""Several processes that train as one: shares of rows, sums of gradients, what all agree on, by `torch.distributed`.

Started by `torchrun`, or in processes that somebody else has joined into a group. Alone, each function here does what
one process did without it. Bytes, numbers and JSON are all that is sent: no object is pickled for another process.
"""

import json
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from attire import errors
from attire.errors import AttireError, AttireWarning
from attire.storage import files

# Until a process that neither answers nor ends is given up. One that ended is noticed at once: its connection closes.
_STEP = timedelta(minutes=5)
_PATIENCE = timedelta(days=1)  # for what the first process does while the others wait: extraction takes hours
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets

_T = TypeVar("_T")


def count() -> int:
    """How many processes train together; 1 where nobody has joined any."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def leads() -> bool:
    """Whether this process is the one that writes files and shows how work goes."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started, while this lasts; nothing where it did not, or somebody has already.

    NCCL adds up on CUDA where each process of the machine has a device of its own, else gloo does.
    Raises AttireError where the others do not come.
    """
    if not _launched() or not dist.is_available() or dist.is_initialized():
        yield
        return
    devices = torch.cuda.device_count()
    if devices:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % devices)
    own = devices >= int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    with _connected():
        dist.init_process_group("cpu:gloo,cuda:nccl" if own else "gloo", timeout=_STEP)
    try:
        with warnings.catch_warnings(), _torchrun_s_signal():
            if not leads():  # it would say what the first one says
                warnings.simplefilter("ignore", AttireWarning)
            yield
    finally:
        _beside.cache_clear()
        dist.destroy_process_group()


@contextmanager
def _torchrun_s_signal() -> Iterator[None]:
    """SIGTERM, by which torchrun ends all when one has ended, is Ctrl-C in here, so that what was done is told.

    But not while an error is on its way up: who has lost a process is told to end at that very moment, and the line
    that says so would never be printed.
    """

    def end(number: int, frame: object) -> None:
        if sys.exception() is None:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the process ends by itself; torchrun kills it after 30 s
        raise
    signal.signal(signal.SIGTERM, before)


def _launched() -> bool:
    return all(os.environ.get(name) for name in _LAUNCHED) and os.environ["WORLD_SIZE"] != "1"


def command() -> str:
    """What stands before `attire` in a line that starts as many processes again; nothing for one."""
    if count() == 1 or not _launched():
        return ""
    return f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', count())} -m "


@contextmanager
def _connected() -> Iterator[None]:
    """What is sent in here comes through, or AttireError is raised: another process ended, or does not answer."""
    try:
        yield
    except RuntimeError as error:
        who = f"process {os.environ.get('RANK', '?')} of {os.environ.get('WORLD_SIZE', '?')}"
        do = "what ended first says why; then go on with --resume and as many processes"
        why = re.sub(r"^\[[^]]*\] ", "", str(error).partition("\n")[0]).partition(". ")[0][:120]
        raise AttireError(who, "another process of this training ended, or does not answer", why, do) from error


@cache
def _beside(group: Any, patience: timedelta) -> Any:
    """The same processes as in the default group, which is given, on the CPU, with a patience of its own."""
    return dist.new_group(backend="gloo", timeout=patience)


def _on_cpu(patience: timedelta = _PATIENCE) -> Any:
    return _beside(dist.group.WORLD, patience)


# What the first process does for all.


def shared(function: Callable[[], _T]) -> _T:
    """What the first process finds, in all of them: they wait for it. It must be JSON, in which a tuple is a list.

    An AttireError of the first is raised in all.
    """
    if count() == 1:
        return function()
    if not leads():
        told = json.loads(_send(b""))
        if "error" in told:
            raise getattr(errors, told["error"], AttireError)(*told["about"])
        return cast(_T, told["found"])
    try:
        found = function()
    except AttireError as error:
        about = [error.subject, error.what, error.where, error.do]
        _send(json.dumps({"error": type(error).__name__, "about": about}).encode())
        raise
    _send(json.dumps({"found": found}).encode())
    return found


def after_first(function: Callable[[], _T]) -> _T:
    """The first process calls it while the others wait, then they do, and find in the cache what it left there."""
    found: list[_T] = []
    shared(lambda: found.append(function()))
    return found[0] if found else function()


@contextmanager
def held(what: Callable[[], AbstractContextManager[Path]]) -> Iterator[Path]:
    """A folder that the first process holds for all."""
    with ExitStack() as stack:
        yield Path(shared(lambda: str(stack.enter_context(what()))))


def _send(data: bytes) -> bytes:
    """The first process's bytes, in all of them."""
    size = torch.tensor([len(data)])
    with _connected():
        dist.broadcast(size, 0, group=_on_cpu())
        told = torch.frombuffer(bytearray(data or bytes(int(size))), dtype=torch.uint8)
        dist.broadcast(told, 0, group=_on_cpu())
    return told.numpy().tobytes()


def spread(tensors: Iterable[Tensor]) -> None:
    """The first process's values into the same tensors of all the others."""
    if count() == 1:
        return
    with _connected(), torch.no_grad():
        for tensor in tensors:
            told = tensor.detach().cpu().contiguous()
            dist.broadcast(told, 0, group=_on_cpu())
            tensor.copy_(told)


# What each does a share of.


def share_of(rows: int) -> slice:
    """The neighbouring rows, of so many, that are this process's own: no row twice, none left out, at most one more
    than another's, and none where there are too few."""
    each, more = divmod(rows, count())
    start = rank() * each + min(rank(), more)
    return slice(start, start + each + (rank() < more))


class _Share(NamedTuple):
    """What this process does of one step: `read` in the epoch's order, of those rows the `own` ones are learnt from."""

    rows: int  # of the whole batch
    read: slice
    own: slice


def shares(rows: int, start: int, batch_size: int, whole: bool = False) -> list[_Share]:
    """This process's part of each step from the row `start` to the end of an epoch of so many rows.

    Who has no row of a small batch reads one and learns from none, so that it takes part in what all do. whole: the
    whole batch is read, as CutMix takes from any row of it, and what is drawn is drawn for all of it.
    """
    found = []
    for first in range(start, rows, batch_size):
        size = min(batch_size, rows - first)
        own = share_of(size)
        if whole:
            found.append(_Share(size, slice(first, first + size), own))
            continue
        number, begin = own.stop - own.start, first + min(own.start, size - 1)
        found.append(_Share(size, slice(begin, begin + max(1, number)), slice(0, number)))
    return found


def most_read(plan: Sequence[_Share]) -> int:
    """How many rows are read for each step but the last, which may have fewer."""
    return plan[0].read.stop - plan[0].read.start if plan else 1


def gathered(own: Tensor, rows: int) -> Tensor:
    """All rows (rows, ...) in their order, on the CPU, of what each process has of `share_of(rows)`."""
    if count() == 1:
        return own
    most = -(-rows // count())
    padded = torch.zeros(most, *own.shape[1:], dtype=own.dtype)
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(count())]
    with _connected():
        dist.all_gather(parts, padded, group=_on_cpu())
    each, more = divmod(rows, count())
    return torch.cat([part[: each + (i < more)] for i, part in enumerate(parts)])


def stacked(own: Tensor) -> Tensor:
    """One more dimension in front: what each process has, on the CPU; as it is for one process."""
    return own if count() == 1 else gathered(own.cpu()[None], count())


def add_up(parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
    """Each gradient becomes the sum of all processes', the very same bits in each; returns the sum of the losses.

    A process without rows has no gradients, or zeros. All go in one piece: 8 MB a step for `fast`.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [cast(Tensor, parameter.grad) for parameter in trained]
    flat = summed(torch.cat([*(gradient.reshape(-1) for gradient in gradients), loss.detach().reshape(1)]))
    parts = torch.split(flat[:-1], [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view(gradient.shape))
    return flat[-1]


def summed(own: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on its device."""
    found = own.clone()
    with _connected():
        dist.all_reduce(found)
    return found


def side_by_side(own: Tensor) -> Tensor:
    """(k, C) of each process as (k, processes, C), on its device. A sum with zeros: gloo gathers nothing from CUDA."""
    places = own.new_zeros(own.shape[0], count(), *own.shape[1:])
    places[:, rank()] = own
    return summed(places)


def own_seed(seed: int) -> int:
    """A seed for each process, drawn from the one of all."""
    return int(np.random.SeedSequence([seed, rank()]).generate_state(1, np.uint64)[0] >> 1)


# What all agree on.


def any_of(*flags: bool) -> list[bool]:
    """Of each flag, whether a process has it set."""
    if count() == 1:
        return list(flags)
    told = torch.tensor(flags, dtype=torch.uint8)
    with _connected():
        dist.all_reduce(told, dist.ReduceOp.MAX, group=_on_cpu(_STEP))
    return [bool(flag) for flag in told]


def agree(value: bytes, what: str, do: str) -> None:
    """Raises AttireError in all processes where one has another value than the first."""
    if count() == 1:
        return
    digest = torch.frombuffer(bytearray.fromhex(files.sha256(value)), dtype=torch.uint8)
    found = stacked(digest)
    if other := [i for i, line in enumerate(found) if not torch.equal(line, found[0])]:
        raise AttireError("training", f"{what} differ between processes", f"0 and {other[0]} of {count()}", do)
