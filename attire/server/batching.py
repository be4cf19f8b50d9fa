"""Micro-batches: a bounded queue between requests and the threads that run the model on whatever waits."""

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
    """No room for what was asked: try again later."""


class DeadlineExceeded(Exception):  # noqa: N818
    """The deadline passed before there was an answer."""


@dataclass(eq=False)
class _Job(Generic[_Source, _Item, _Answer]):
    """What waits: its source, what became of it, and where the answer goes.

    Whoever asked gives up by cancelling the future; from then on no time is spent on the job.
    """

    source: _Source | None
    future: "asyncio.Future[_Answer | Exception]"
    item: _Item | None = None

    @property
    def given_up(self) -> bool:
        return self.future.done()


class MicroBatches(Generic[_Source, _Item, _Answer]):
    """Asks `prepare` about each source in a few threads, then `answer`, in `workers` threads, about whatever waits.

    The batch is never waited for: a thread takes what is there, at least one item, at most `most`, and while it
    works the next batch gathers. `limit` bounds all sources between being asked about and being answered; `seconds` is
    the time each `ask` has. on_batch: told (items, seconds) after each batch, in its thread. begin: called in
    each of those threads first.

    Belongs to the event loop that calls `start`; every other method but the private ones is called there.
    """

    def __init__(
        self,
        prepare: Callable[[_Source], _Item],
        answer: Callable[[list[_Item]], Sequence[_Answer]],
        *,
        limit: int,
        most: int,
        seconds: float,
        workers: int = 1,
        on_batch: Callable[[int, float], None] = lambda items, seconds: None,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self.limit, self.most, self.seconds, self.waiting = limit, most, seconds, 0
        self._threads = [threading.Thread(target=self._work, name="attire-model", daemon=True) for _ in range(workers)]
        self._prepare_one, self._answer, self._on_batch, self._begin = prepare, answer, on_batch, begin
        self._ready: queue.SimpleQueue[_Job[_Source, _Item, _Answer] | None] = queue.SimpleQueue()

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()
        self._pool = ThreadPoolExecutor(_PREPARERS, "attire-decode")
        for thread in self._threads:
            thread.start()

    async def close(self) -> None:
        """Answer all that waits, then end the threads."""
        await self._idle.wait()
        for _ in self._threads:
            self._ready.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        self._pool.shutdown()

    def has_room(self, count: int = 1) -> bool:
        return self.waiting + count <= self.limit

    async def ask(self, sources: Sequence[_Source]) -> list[_Answer | Exception]:
        """An answer for each source, or the exception that `prepare` or `answer` raised.

        Raises Full where there is no room for all of them, Late after `seconds`. When the calling task is cancelled,
        what still waits is dropped.
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
            async with asyncio.timeout(self.seconds):
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
        self._begin()
        while (first := self._ready.get()) is not None:
            jobs, last = [first], False
            while len(jobs) < self.most:
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
        dropped = [job for job in jobs if job.given_up]
        wanted = [job for job in jobs if not job.given_up]
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
