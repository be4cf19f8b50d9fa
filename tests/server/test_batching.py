import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from attire.server.batching import DeadlineExceeded, MicroBatches, QueueFull

Batches = MicroBatches[int, int, int]


def double(items: list[int]) -> list[int]:
    return [2 * item for item in items]


def refuse_negative(source: int) -> int:
    if source < 0:
        raise ValueError(source)
    return source


def use(work: Callable[[Batches], Coroutine[Any, Any, Any]], **changes: Any) -> Any:
    """What `work` returns, of batches that are closed afterwards."""
    chosen = {
        "prepare": refuse_negative,
        "answer": double,
        "max_waiting": 8,
        "max_batch": 4,
        "seconds": 20.0,
        **changes,
    }

    async def run() -> Any:
        batches: Batches = MicroBatches(chosen.pop("prepare"), chosen.pop("answer"), **chosen)
        batches.start()
        try:
            return await work(batches)
        finally:
            await batches.close()
            assert batches.waiting == 0

    return asyncio.run(run())


def test_answers_come_in_the_order_of_the_sources() -> None:
    assert use(lambda batches: batches.ask([3, 1, 2])) == [6, 2, 4]
    assert use(lambda batches: batches.ask([])) == []


def test_what_prepare_raises_stays_with_its_source() -> None:
    first, bad, last = use(lambda batches: batches.ask([1, -1, 2]))
    assert (first, last) == (2, 4)
    assert isinstance(bad, ValueError)


def test_what_answer_raises_is_told_to_all_of_the_batch_and_the_next_is_answered() -> None:
    failing = [True]

    def answer(items: list[int]) -> list[int]:
        if failing:
            failing.clear()
            raise RuntimeError
        return double(items)

    async def work(batches: Batches) -> tuple[list[Any], list[Any]]:
        return await batches.ask([1]), await batches.ask([1])

    (bad,), good = use(work, answer=answer)
    assert isinstance(bad, RuntimeError)
    assert good == [2]


def test_more_than_the_limit_is_refused_at_once() -> None:
    async def work(batches: Batches) -> None:
        with pytest.raises(QueueFull):
            await batches.ask([0] * 9)
        assert batches.has_room(8)
        assert await batches.ask([1] * 8) == [2] * 8

    use(work)


def test_batches_gather_while_the_thread_works_and_none_is_waited_for() -> None:
    gate, entered, sizes = threading.Event(), threading.Event(), []

    def answer(items: list[int]) -> list[int]:
        entered.set()
        assert gate.wait(20)
        sizes.append(len(items))
        return double(items)

    async def work(batches: Batches) -> list[list[Any]]:
        first = asyncio.create_task(batches.ask([0]))
        await asyncio.to_thread(entered.wait)
        rest = [asyncio.create_task(batches.ask([i])) for i in range(7)]
        while batches._ready.qsize() < 7:
            await asyncio.sleep(0.001)
        gate.set()
        return [await task for task in (first, *rest)]

    assert use(work, answer=answer) == [[0], *([2 * i] for i in range(7))]
    assert sizes == [1, 4, 3]


@pytest.mark.parametrize("how", ["deadline", "cancelled"])
def test_what_is_given_up_never_reaches_the_model(how: str) -> None:
    gate, entered, seen = threading.Event(), threading.Event(), []

    def answer(items: list[int]) -> list[int]:
        entered.set()
        assert gate.wait(20)
        seen.extend(items)
        return double(items)

    async def work(batches: Batches) -> None:
        first = asyncio.create_task(batches.ask([1]))
        await asyncio.to_thread(entered.wait)
        second = asyncio.create_task(batches.ask([2]))
        while not batches._ready.qsize():
            await asyncio.sleep(0.001)
        if how == "cancelled":
            second.cancel()
        with pytest.raises(DeadlineExceeded if how == "deadline" else asyncio.CancelledError):
            await second
        assert batches.waiting == 2  # room is given back when the thread has come past it
        gate.set()
        await asyncio.wait([first])
        assert first.exception() is None or isinstance(first.exception(), DeadlineExceeded)

    use(work, answer=answer, seconds=0.2 if how == "deadline" else 20.0)
    assert seen == [1]


def test_closing_answers_what_waits() -> None:
    async def run() -> list[Any]:
        batches: Batches = MicroBatches(refuse_negative, double, max_waiting=8, max_batch=2, seconds=20)
        batches.start()
        task = asyncio.create_task(batches.ask(list(range(8))))
        await asyncio.sleep(0)
        await batches.close()
        assert not any(thread.is_alive() for thread in batches._threads)
        return await task

    assert asyncio.run(run()) == [2 * i for i in range(8)]


def test_the_model_s_thread_begins_as_it_is_told_and_tells_of_its_batches() -> None:
    told: list[Any] = []
    names = lambda: told.append(threading.current_thread().name)  # noqa: E731
    use(
        lambda batches: batches.ask([1]),
        on_thread_start=names,
        on_batch=lambda items, seconds: told.append((items, seconds >= 0)),
    )
    assert told == ["attire-model", (1, True)]
