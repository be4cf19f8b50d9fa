"""A forward pass in microbatches that stay in the processor's caches, one after another or one a core."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import Literal, NamedTuple

import torch
from torch import Tensor

_PIXELS = 2**16  # of a microbatch: 64 images of 32 px, 16 of 64; what lies between two layers then takes 17 MB
_LEAST = 4  # images of a microbatch, however large they are: deep layers are mostly weights


class Microbatching(NamedTuple):
    """How a batch goes through the network: whole, in microbatches one after another, or in microbatches one a core.

    images: of a microbatch; 0: as many as the caches hold.
    """

    mode: Literal["whole", "sequential", "parallel"] = "whole"
    images: int = 0

    def run(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`function` of all images (n, C, H, W), without gradients where microbatches run in parallel."""
        if self.mode == "whole":
            return function(x)
        images = self.images or max(_LEAST, _PIXELS // (x.shape[2] * x.shape[3]))
        return (_run_parallel if self.mode == "parallel" else _run_sequentially)(function, x, images)


def _run_sequentially(function: Callable[[Tensor], Tensor], x: Tensor, images: int) -> Tensor:
    """One microbatch after another, each on all cores."""
    return torch.cat([function(part) for part in torch.split(x, images)])


def _run_parallel(function: Callable[[Tensor], Tensor], x: Tensor, images: int) -> Tensor:
    """As many microbatches at a time as torch has threads, each on one of them.

    For functions of many short operations: the threads then wait for each other once, not after each operation.
    """
    threads = torch.get_num_threads()
    parts = -(-len(x) // (images * threads)) * threads  # equal ones, so that no core is left over at the end
    if threads == 1 or len(x) < max(parts, 1):
        return _run_sequentially(function, x, images)

    def run(part: Tensor) -> Tensor:
        with torch.no_grad():  # the mode of the calling thread is not that of this one
            return function(part)

    return torch.cat(list(_workers(threads, os.getpid()).map(run, x.tensor_split(parts))))


@cache
def _workers(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads whose operations use one core each. A forked process has none of its parent's: it gets its own."""
    pool = ThreadPoolExecutor(threads, "attire-core")
    met = Barrier(threads)

    def start(_: int) -> None:
        torch.set_num_threads(1)  # this thread's, and what other threads begin with
        torch.get_num_threads()  # marks this thread as begun; otherwise its first operation would reset the number
        met.wait()

    list(pool.map(start, range(threads)))
    torch.set_num_threads(threads)  # so that other threads begin with what this one has
    return pool
