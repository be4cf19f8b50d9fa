"""Several processes that train as one by `torch.distributed`: division of rows, sums of gradients, common decisions.

`torchrun` starts the processes, or the caller has already joined them into a group. In a single process each function
leaves everything as it is. Bytes, numbers and JSON are all that is sent: no object is pickled for another process.
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
_STEP_TIMEOUT = timedelta(minutes=5)
_WAIT_TIMEOUT = timedelta(days=1)  # while the main process works and the others wait: extraction takes hours
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_T = TypeVar("_T")


def world_size() -> int:
    """How many processes train together; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main_process() -> bool:
    """Whether this process writes files and shows progress: rank 0."""
    return rank() == 0


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started for as long as this lasts.

    Does nothing where torchrun started none, or a process group exists already. NCCL adds up on CUDA where each process
    of the machine has a device of its own, otherwise gloo. Raises AttireError where the others do not come.
    """
    if not _started_by_torchrun() or not dist.is_available() or dist.is_initialized():
        yield
        return
    devices = torch.cuda.device_count()
    if devices:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % devices)
    own_device = devices >= int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    with _lost_process_error():
        dist.init_process_group("cpu:gloo,cuda:nccl" if own_device else "gloo", timeout=_STEP_TIMEOUT)
    try:
        with warnings.catch_warnings(), _sigterm_as_interrupt():
            if not is_main_process():  # it would repeat the main process's warnings
                warnings.simplefilter("ignore", AttireWarning)
            yield
    finally:
        _gloo_group.cache_clear()
        dist.destroy_process_group()


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM, by which torchrun ends all processes when one has ended, as Ctrl-C, so that work done is reported.

    Not while an exception propagates: torchrun sends the signal at the moment that a process notices the loss of
    another, and the line that says so would never be printed.
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


def _started_by_torchrun() -> bool:
    return all(os.environ.get(name) for name in _TORCHRUN_VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def torchrun_prefix() -> str:
    """The part of a command before `attire` that starts as many processes again; empty for a single one."""
    if world_size() == 1 or not _started_by_torchrun():
        return ""
    return f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', world_size())} -m "


@contextmanager
def _lost_process_error() -> Iterator[None]:
    """Turn what torch.distributed raises into an AttireError: another process ended, or does not answer."""
    try:
        yield
    except RuntimeError as error:
        process = f"process {os.environ.get('RANK', '?')} of {os.environ.get('WORLD_SIZE', '?')}"
        do = "what ended first says why; then go on with --resume and as many processes"
        why = re.sub(r"^\[[^]]*\] ", "", str(error).partition("\n")[0]).partition(". ")[0][:120]
        raise AttireError(process, "another process of this training ended, or does not answer", why, do) from error


@cache
def _gloo_group(default: Any, timeout: timedelta) -> Any:
    """The processes of the default group, joined on the CPU with another timeout."""
    return dist.new_group(backend="gloo", timeout=timeout)


def _on_cpu(timeout: timedelta = _WAIT_TIMEOUT) -> Any:
    return _gloo_group(dist.group.WORLD, timeout)


# What the main process does for all.


def from_main_process(function: Callable[[], _T]) -> _T:
    """The result of `function`, called in the main process alone; the others wait for it.

    The result must be JSON, where a tuple becomes a list. An AttireError of the main process is raised in all.
    """
    if world_size() == 1:
        return function()
    if not is_main_process():
        message = json.loads(_broadcast_bytes(b""))
        if "error" in message:
            raise getattr(errors, message["error"], AttireError)(**message["about"])
        return cast(_T, message["result"])
    try:
        result = function()
    except AttireError as error:
        about = {"subject": error.subject, "what": error.what, "where": error.where, "do": error.do}
        _broadcast_bytes(json.dumps({"error": type(error).__name__, "about": about}).encode())
        raise
    _broadcast_bytes(json.dumps({"result": result}).encode())
    return result


def main_process_first(function: Callable[[], _T]) -> _T:
    """Call `function` in the main process, then in the others, which find in the cache what it left there."""
    results: list[_T] = []
    from_main_process(lambda: results.append(function()))
    return results[0] if results else function()


@contextmanager
def enter_on_main_process(context: Callable[[], AbstractContextManager[Path]]) -> Iterator[Path]:
    """Enter a context in the main process alone; all get the path that it gives."""
    with ExitStack() as stack:
        yield Path(from_main_process(lambda: str(stack.enter_context(context()))))


def _broadcast_bytes(data: bytes) -> bytes:
    """The main process's bytes, in all processes."""
    size = torch.tensor([len(data)])
    with _lost_process_error():
        dist.broadcast(size, 0, group=_on_cpu())
        received = torch.frombuffer(bytearray(data or bytes(int(size))), dtype=torch.uint8)
        dist.broadcast(received, 0, group=_on_cpu())
    return received.numpy().tobytes()


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Copy the main process's values into the same tensors of all the others."""
    if world_size() == 1:
        return
    with _lost_process_error(), torch.no_grad():
        for tensor in tensors:
            values = tensor.detach().cpu().contiguous()
            dist.broadcast(values, 0, group=_on_cpu())
            tensor.copy_(values)


# How rows are divided among the processes.


def own_rows(rows: int) -> slice:
    """This process's neighbouring rows out of so many: each row belongs to one process, and no process has over one row
    more than another. It may have none."""
    each, more = divmod(rows, world_size())
    start = rank() * each + min(rank(), more)
    return slice(start, start + each + (rank() < more))


class _StepShare(NamedTuple):
    """This process's part of one step: it reads `read` of the epoch's order, and trains on `own` of the rows read."""

    rows: int  # of the whole batch
    read: slice
    own: slice


def plan_steps(rows: int, start: int, batch_size: int, whole: bool = False) -> list[_StepShare]:
    """This process's part of each step from the row `start` to the end of an epoch of so many rows.

    A process without a row of a small batch reads one and trains on none, so that it takes part in the sums. whole:
    each process reads the whole batch, because CutMix takes from any row and random numbers are drawn for all of it.
    """
    plan = []
    for first in range(start, rows, batch_size):
        size = min(batch_size, rows - first)
        own = own_rows(size)
        if whole:
            plan.append(_StepShare(size, slice(first, first + size), own))
            continue
        count, begin = own.stop - own.start, first + min(own.start, size - 1)
        plan.append(_StepShare(size, slice(begin, begin + max(1, count)), slice(0, count)))
    return plan


def read_batch_size(plan: Sequence[_StepShare]) -> int:
    """How many rows this process reads for each step but the last, which may have fewer."""
    return plan[0].read.stop - plan[0].read.start if plan else 1


def gather_rows(own: Tensor, rows: int) -> Tensor:
    """All rows (rows, ...) in their order, on the CPU; own: this process's, those of `own_rows(rows)`."""
    if world_size() == 1:
        return own
    most = -(-rows // world_size())
    padded = torch.zeros(most, *own.shape[1:], dtype=own.dtype)
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    with _lost_process_error():
        dist.all_gather(parts, padded, group=_on_cpu())
    each, more = divmod(rows, world_size())
    return torch.cat([part[: each + (i < more)] for i, part in enumerate(parts)])


def stack_processes(own: Tensor) -> Tensor:
    """The tensors of all processes, stacked on the CPU in a new first dimension; a single process's as it is."""
    return own if world_size() == 1 else gather_rows(own.cpu()[None], world_size())


# What all processes compute together.


def sum_gradients(parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
    """Replace each gradient by its sum over all processes, the same bits in each; returns the sum of the losses.

    A process without rows has no gradients, or zeros. All go in one message: 8 MB a step for `fast`.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [cast(Tensor, parameter.grad) for parameter in trained]
    flat = all_reduce(torch.cat([*(gradient.reshape(-1) for gradient in gradients), loss.detach().reshape(1)]))
    parts = torch.split(flat[:-1], [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view(gradient.shape))
    return flat[-1]


def all_reduce(own: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on its device."""
    total = own.clone()
    with _lost_process_error():
        dist.all_reduce(total)
    return total


def gather_columns(own: Tensor) -> Tensor:
    """(k, C) of each process as (k, processes, C), on its device. A sum with zeros: gloo gathers nothing from CUDA."""
    columns = own.new_zeros(own.shape[0], world_size(), *own.shape[1:])
    columns[:, rank()] = own
    return all_reduce(columns)


def process_seed(seed: int) -> int:
    """A seed for this process alone, derived from the common one."""
    return int(np.random.SeedSequence([seed, rank()]).generate_state(1, np.uint64)[0] >> 1)


def any_process(*flags: bool) -> list[bool]:
    """For each flag, whether it is set in any process."""
    if world_size() == 1:
        return list(flags)
    values = torch.tensor(flags, dtype=torch.uint8)
    with _lost_process_error():
        dist.all_reduce(values, dist.ReduceOp.MAX, group=_on_cpu(_STEP_TIMEOUT))
    return [bool(flag) for flag in values]


def check_equal(value: bytes, what: str, do: str) -> None:
    """Raises AttireError in all processes where one has another value than the main process."""
    if world_size() == 1:
        return
    digest = torch.frombuffer(bytearray.fromhex(files.sha256(value)), dtype=torch.uint8)
    digests = stack_processes(digest)
    if other := [i for i, row in enumerate(digests) if not torch.equal(row, digests[0])]:
        raise AttireError("training", f"{what} differ between processes", f"0 and {other[0]} of {world_size()}", do)
