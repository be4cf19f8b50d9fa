"""A forward pass on every core: small batches that stay in the caches, each worked on by one thread."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import Literal, NamedTuple

import torch
from torch import Tensor

_PIXELS = 2**16  # of a small batch: 64 pictures of 32 px, 16 of 64; what lies between two layers then takes 17 MB
LEAST = 4  # pictures of a small batch, however large they are: deep layers are mostly weights


class Layout(NamedTuple):
    """How a forward pass is spread over the cores, and of how many pictures a small batch is."""

    how: Literal["whole", "in turn", "side by side"] = "whole"
    pictures: int = 0


def spread(function: Callable[[Tensor], Tensor], x: Tensor, layout: Layout) -> Tensor:
    """`function` of all pictures (n, C, H, W) without gradients: all of them at once, or as the layout says."""
    if layout.how == "side by side":
        return side_by_side(function, x, layout.pictures)
    return _in_turn(function, x, layout.pictures) if layout.how == "in turn" else function(x)


def _small_batch(x: Tensor) -> int:
    """How many of the pictures (n, C, H, W) make a small batch where nobody says how many."""
    return max(LEAST, _PIXELS // (x.shape[2] * x.shape[3]))


def _in_turn(function: Callable[[Tensor], Tensor], x: Tensor, pictures: int = 0) -> Tensor:
    """`function` of all pictures (n, C, H, W), one small batch after the other, each on all cores."""
    return torch.cat([function(part) for part in torch.split(x, pictures or _small_batch(x))])


def side_by_side(function: Callable[[Tensor], Tensor], x: Tensor, pictures: int = 0) -> Tensor:
    """`function` of all pictures (n, C, H, W) without gradients, as many small batches at a time as torch has threads.

    For functions of many short operations: the threads then wait for each other once, not after each operation.
    """
    threads, pictures = torch.get_num_threads(), pictures or _small_batch(x)
    parts = -(-len(x) // (pictures * threads)) * threads  # equal ones, so that no core is left over at the end
    if threads == 1 or len(x) < max(parts, 1):
        return _in_turn(function, x, pictures)

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
        torch.get_num_threads()  # this thread has begun: without it, its first operation would begin it once more
        met.wait()

    list(pool.map(start, range(threads)))
    torch.set_num_threads(threads)  # so that other threads begin with what this one has
    return pool
