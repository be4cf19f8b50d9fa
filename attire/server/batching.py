"""Micro-batches: a bounded queue between requests and the threads that run the model on all that waits."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

_Source = TypeVar("_Source")
_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")

_PREPARERS = 2  # threads that decode: Pillow frees the interpreter lock for part of it; more fight over the same cores


class QueueFull(Exception):  # noqa: N818  (a state, not a fault)
    """As many sources wait as may: try again later."""


class DeadlineExceeded(Exception):  # noqa: N818
    """The deadline passed before there was an answer."""


@dataclass(eq=False)
class _Job(Generic[_Source, _Item, _Answer]):
    """One source that waits, the item that `prepare` made of it, and the future for its answer.

    The caller of `ask` gives up by cancelling the future; from then on no time is spent on the job.
    """

    source: _Source | None
    future: "asyncio.Future[_Answer | Exception]"
    item: _Item | None = None

    @property
    def given_up(self) -> bool:
        return self.future.done()


class MicroBatches(Generic[_Source, _Item, _Answer]):
    """Calls `prepare` on each source in a few threads, then `answer`, in `workers` threads, on all items that wait.

    No thread waits for a batch to fill: it takes the items that are there, at least one and at most `max_batch`, and
    the next batch gathers while it works. `max_waiting` bounds the sources that are accepted and not yet answered;
    `seconds` is the time that each `ask` has. on_batch: called with (items, seconds) after each batch, in its thread.
    on_thread_start: called first in each thread that answers.

    An object belongs to the event loop that calls `start`; every other public method is called there.
    """

    def __init__(
        self,
        prepare: Callable[[_Source], _Item],
        answer: Callable[[list[_Item]], Sequence[_Answer]],
        *,
        max_waiting: int,
        max_batch: int,
        seconds: float,
        workers: int = 1,
        on_batch: Callable[[int, float], None] = lambda items, seconds: None,
        on_thread_start: Callable[[], None] = lambda: None,
    ) -> None:
        self.waiting = 0  # sources accepted and not yet answered
        self._max_waiting, self._max_batch, self._seconds = max_waiting, max_batch, seconds
        self._threads = [threading.Thread(target=self._work, name="attire-model", daemon=True) for _ in range(workers)]
        self._prepare_one, self._answer = prepare, answer
        self._on_batch, self._on_thread_start = on_batch, on_thread_start
        self._ready: queue.SimpleQueue[_Job[_Source, _Item, _Answer] | None] = queue.SimpleQueue()

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()
        self._pool = ThreadPoolExecutor(_PREPARERS, "attire-decode")
        for thread in self._threads:
            thread.start()

    async def close(self) -> None:
        """Wait until every source is answered, then end the threads."""
        await self._idle.wait()
        for _ in self._threads:
            self._ready.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        self._pool.shutdown()

    def has_room(self, count: int = 1) -> bool:
        return self.waiting + count <= self._max_waiting

    async def ask(self, sources: Sequence[_Source]) -> list[_Answer | Exception]:
        """An answer for each source, or the exception that `prepare` or `answer` raised.

        Raises QueueFull where there is no room for all of them, DeadlineExceeded after `seconds`. When the calling task
        is cancelled, its sources that still wait are dropped.
        """
        if not sources:
            return []
        if not self.has_room(len(sources)):
            raise QueueFull
        jobs = [_Job[_Source, _Item, _Answer](source, self._loop.create_future()) for source in sources]
        self.waiting += len(jobs)
        self._idle.clear()
        for job in jobs:
            self._pool.submit(self._prepare, job)
        try:
            async with asyncio.timeout(self._seconds):
                return [await job.future for job in jobs]
        except TimeoutError:
            raise DeadlineExceeded from None
        finally:
            for job in jobs:
                job.future.cancel()  # of those that are done already nothing changes

    def _prepare(self, job: _Job[_Source, _Item, _Answer]) -> None:
        source, job.source = job.source, None  # an upload is not kept while its picture waits
        if job.given_up or source is None:
            return self._hand_out([job], [DeadlineExceeded()])
        try:
            job.item = self._prepare_one(source)
        except Exception as error:
            return self._hand_out([job], [error])
        return self._ready.put(job)

    def _work(self) -> None:
        self._on_thread_start()
        while (first := self._ready.get()) is not None:
            jobs, last = [first], False
            while len(jobs) < self._max_batch:
                try:
                    job = self._ready.get_nowait()
                except queue.Empty:
                    break
                if job is None:
                    last = True
                    break
                jobs.append(job)
            self._run(jobs)
            if last:
                return

    def _run(self, jobs: list[_Job[_Source, _Item, _Answer]]) -> None:
        wanted, dropped = list[_Job[_Source, _Item, _Answer]](), list[_Job[_Source, _Item, _Answer]]()
        for job in jobs:  # asked once: it may be given up at any moment
            (dropped if job.given_up else wanted).append(job)
        items = [job.item for job in wanted if job.item is not None]
        start = time.perf_counter()
        answers: Sequence[_Answer | Exception] = []
        if items:
            try:
                answers = self._answer(items)
            except Exception as error:
                answers = [error] * len(wanted)
            self._on_batch(len(items), time.perf_counter() - start)
        self._hand_out(wanted + dropped, [*answers, *(DeadlineExceeded() for _ in dropped)])

    def _hand_out(self, jobs: list[_Job[_Source, _Item, _Answer]], answers: Sequence[_Answer | Exception]) -> None:
        """To the event loop, once a batch: waking it costs more than setting a result."""
        self._loop.call_soon_threadsafe(self._settle, jobs, answers)

    def _settle(self, jobs: list[_Job[_Source, _Item, _Answer]], answers: Sequence[_Answer | Exception]) -> None:
        for job, answer in zip(jobs, answers, strict=True):
            if not job.given_up:
                job.future.set_result(answer)
        self.waiting -= len(jobs)
        if not self.waiting:
            self._idle.set()
