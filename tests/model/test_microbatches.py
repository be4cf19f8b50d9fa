"""Microbatches give what one large batch does, on whatever threads, and threads are left as they were."""

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attire.model import microbatches
from attire.model.microbatches import Microbatching

SEQUENTIAL, PARALLEL = Microbatching("sequential"), Microbatching("parallel")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def double(x: Tensor) -> Tensor:
    return 2 * x.flatten(1)


@pytest.mark.parametrize("n", [0, 1, 3, 4, 9, 150])
def test_all_rows_come_back_in_their_order(n: int) -> None:
    x = torch.randn(n, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(PARALLEL.run(double, x), double(x))
    assert torch.equal(SEQUENTIAL.run(double, x), double(x))


def test_batches_are_small_and_as_many_as_keep_every_thread_busy() -> None:
    sizes: list[int] = []

    def note(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x

    for size in (32, 64, 224):
        SEQUENTIAL.run(note, torch.empty(64, 1, size, size))
    assert sizes == [64] + 4 * [16] + 16 * [4]
    sizes.clear()
    PARALLEL.run(note, torch.empty(33, 1, 224, 224))
    assert sorted(sizes) == [3] * 7 + [4] * 3  # not eight of 4 and one of 1, with a core idle in the last round
    sizes.clear()
    SEQUENTIAL.run(note, torch.empty(33, 1, 224, 224))
    assert sizes == [4] * 8 + [1]


def test_each_worker_uses_one_core_and_nobody_else_is_changed() -> None:
    calls = set()

    def note(x: Tensor) -> Tensor:
        calls.add((threading.current_thread().name[:11], torch.get_num_threads(), torch.is_grad_enabled()))
        return x

    PARALLEL.run(note, torch.empty(200, 1, 32, 32))
    assert calls == {("attire-core", 1, False)}
    assert torch.get_num_threads() == 2
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]


def test_what_fails_in_a_worker_fails_here() -> None:
    def fail(x: Tensor) -> Tensor:
        raise ValueError("as it happened")

    with pytest.raises(ValueError, match="as it happened"):
        PARALLEL.run(fail, torch.empty(200, 1, 32, 32))


def test_workers_are_started_once_in_each_process() -> None:
    assert microbatches._workers(2, os.getpid()) is microbatches._workers(2, os.getpid())
    assert microbatches._workers(2, -1) is not microbatches._workers(2, os.getpid())


@pytest.mark.parametrize("mode", ["whole", "sequential", "parallel"])
def test_a_mode_changes_nothing_but_the_batches(mode: Any) -> None:
    x, sizes = torch.randn(21, 1, 8, 8, generator=torch.Generator().manual_seed(0)), []

    def note(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return double(part)

    assert torch.equal(Microbatching(mode, 4).run(note, x), double(x))
    assert max(sizes) == (21 if mode == "whole" else 4)
