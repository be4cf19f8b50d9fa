"""Several processes that train as one: shares of rows, sums of gradients, what all agree on, by `torch.distributed`.

Started by `torchrun`, or in processes that somebody else has joined into a group. Alone, each function here does what
one process did without it. Bytes, numbers and JSON are all that is sent: no object is pickled for another process.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from attire import errors, files
from attire.errors import AttireError

# Until a process that neither answers nor ends is given up. One that ended is noticed at once: its connection closes.
STEP = timedelta(minutes=5)
PATIENCE = timedelta(days=2)  # for what the first process does while the others wait: extraction takes hours
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets

T = TypeVar("T")


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
    if not launched() or not dist.is_available() or dist.is_initialized():
        yield
        return
    devices = torch.cuda.device_count()
    if devices:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % devices)
    own = devices >= int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    with connected():
        dist.init_process_group("cpu:gloo,cuda:nccl" if own else "gloo", timeout=STEP)
    try:
        yield
    finally:
        patient.cache_clear()
        dist.destroy_process_group()


def launched() -> bool:
    return all(os.environ.get(name) for name in LAUNCHED) and os.environ["WORLD_SIZE"] != "1"


def command() -> str:
    """What stands before `attire` in a line that starts as many processes again; nothing for one."""
    if count() == 1 or not launched():
        return ""
    return f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', count())} -m "


@contextmanager
def connected() -> Iterator[None]:
    """What is sent in here comes through, or AttireError is raised: another process ended, or does not answer."""
    try:
        yield
    except RuntimeError as error:
        who = f"process {os.environ.get('RANK', '?')} of {os.environ.get('WORLD_SIZE', '?')}"
        do = "what ended first says why; then go on with --resume and as many processes"
        why = str(error).partition("\n")[0][-100:]
        raise AttireError(who, "another process of this training ended, or does not answer", why, do) from error


@cache
def patient(group: Any) -> Any:
    """As many processes as in the default group, which is given, on the CPU and with more patience."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def waiting() -> Any:
    return patient(dist.group.WORLD)


# What the first process does for all.


def shared(function: Callable[[], T]) -> T:
    """What the first process finds, in all of them: they wait for it. It must be JSON, in which a tuple is a list.

    An AttireError of the first is raised in all.
    """
    if count() == 1:
        return function()
    if not leads():
        told = json.loads(send(b""))
        if "error" in told:
            raise getattr(errors, told["error"])(*told["about"])
        return cast(T, told["found"])
    try:
        found = function()
    except AttireError as error:
        about = [error.subject, error.what, error.where, error.do]
        send(json.dumps({"error": type(error).__name__, "about": about}).encode())
        raise
    send(json.dumps({"found": found}).encode())
    return found


def after_first(function: Callable[[], T]) -> T:
    """The first process calls it while the others wait, then they do, and find in the cache what it left there."""
    found: list[T] = []
    shared(lambda: found.append(function()))
    return found[0] if found else function()


@contextmanager
def held(what: Callable[[], AbstractContextManager[Path]]) -> Iterator[Path]:
    """A folder that the first process holds for all."""
    with ExitStack() as stack:
        yield Path(shared(lambda: str(stack.enter_context(what()))))


def send(data: bytes) -> bytes:
    """The first process's bytes, in all of them."""
    with connected():
        size = torch.tensor([len(data)])
        dist.broadcast(size, 0, group=waiting())
        told = (
            torch.frombuffer(bytearray(data), dtype=torch.uint8)
            if leads()
            else torch.empty(int(size), dtype=torch.uint8)
        )
        dist.broadcast(told, 0, group=waiting())
    return told.numpy().tobytes()


def spread(tensors: Iterable[Tensor]) -> None:
    """The first process's values into the same tensors of all the others."""
    if count() == 1:
        return
    with connected(), torch.no_grad():
        for tensor in tensors:
            told = tensor.detach().cpu().contiguous()
            dist.broadcast(told, 0, group=waiting())
            tensor.copy_(told)


# What each does a share of.


def share_of(rows: int) -> slice:
    """The neighbouring rows, of so many, that are this process's own: no row twice, none left out, at most one more
    than another's, and none where there are too few."""
    each, more = divmod(rows, count())
    start = rank() * each + min(rank(), more)
    return slice(start, start + each + (rank() < more))


def gathered(own: Tensor, rows: int) -> Tensor:
    """All rows (rows, ...) in their order, on the CPU, of what each process has of `share_of(rows)`."""
    if count() == 1:
        return own
    most = -(-rows // count())
    padded = torch.zeros(most, *own.shape[1:], dtype=own.dtype)
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(count())]
    with connected():
        dist.all_gather(parts, padded, group=waiting())
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
    flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), loss.detach().reshape(1)])
    with connected():
        dist.all_reduce(flat)
    parts = flat[:-1].split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view(gradient.shape))
    return flat[-1]


def own_seed(seed: int) -> int:
    """A seed for each process, drawn from the one of all."""
    return int(np.random.SeedSequence([seed, rank()]).generate_state(1, np.uint64)[0] >> 1)


# What all agree on.


def any_of(*flags: bool) -> list[bool]:
    """Of each flag, whether a process has it set."""
    if count() == 1:
        return list(flags)
    told = torch.tensor(flags, dtype=torch.uint8)
    with connected():
        dist.all_reduce(told, dist.ReduceOp.MAX, group=waiting())
    return [bool(flag) for flag in told]


def agree(value: bytes, what: str, do: str) -> None:
    """Raises AttireError in all processes where one has another value than the first."""
    if count() == 1:
        return
    digest = torch.frombuffer(bytearray.fromhex(files.sha256(value)), dtype=torch.uint8)
    found = stacked(digest)
    if other := [i for i, line in enumerate(found) if not torch.equal(line, found[0])]:
        raise AttireError("training", f"{what} differ between processes", f"0 and {other[0]} of {count()}", do)


# Batch normalisation by all the rows of a batch.


class BatchNorm(nn.BatchNorm2d):
    """Normalises by the moments of the whole batch, whichever processes its rows are in; torch's own for one process.

    (torch.nn.SyncBatchNorm does the same on CUDA alone, and not for a process without rows.)
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or count() == 1:
            return super().forward(x)
        found, mean, variance = cast(tuple[Tensor, ...], Normalised.apply(x, self.weight, self.bias, self.eps))
        moments = ((self.running_mean, mean), (self.running_var, variance))
        for running, value in moments:
            cast(Tensor, running).lerp_(value, cast(float, self.momentum))
        cast(Tensor, self.num_batches_tracked).add_(1)
        return found


class Normalised(torch.autograd.Function):
    """Maps (b, C, H, W), of which b may be 0, normalised; mean and unbiased variance (C,) over all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        given = x.float()
        size = given.numel() // given.shape[1]
        mean = given.sum((0, 2, 3)) / max(1, size)
        squares = (given - along(mean)).square().sum((0, 2, 3))
        sizes, means, parts = everyone(torch.stack([torch.full_like(mean, size), mean, squares]))  # (ranks, C) each
        total = sizes.sum(0)
        mean = (sizes * means).sum(0) / total
        squares = (parts + sizes * (means - mean).square()).sum(0)  # Chan et al. 1983: nothing is cancelled out
        scale = (squares / total + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale, total)
        found = (given - along(mean)) * along(scale * weight) + along(bias)
        variance = squares / (total - 1).clamp_min(1)
        ctx.mark_non_differentiable(mean, variance)
        return found.to(x.dtype), mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, scale, total = ctx.saved_tensors
        got, normal = gradients[0].float(), (x.float() - along(mean)) * along(scale)
        own = torch.stack([(got * normal).sum((0, 2, 3)), got.sum((0, 2, 3))])  # of this process's rows: add_up's
        with connected():
            dist.all_reduce(all_rows := own.clone())
        straight, level = all_rows / total
        found = (got - normal * along(straight) - along(level)) * along(scale * weight)
        return found.to(x.dtype), own[0], own[1], None


def along(values: Tensor) -> Tensor:
    """(C,) beside maps (b, C, H, W)."""
    return values[:, None, None]


def everyone(own: Tensor) -> Tensor:
    """(k, C) of each process as (k, ranks, C)."""
    parts = [torch.empty_like(own) for _ in range(count())]
    with connected():
        dist.all_gather(parts, own)
    return torch.stack(parts, 1)
