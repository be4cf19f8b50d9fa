"""Clients in a process of their own: closed loops, or arrivals at a fixed rate whatever comes back. Prints JSON.

    python benchmarks/load.py PORT --clients 32 --seconds 5
    python benchmarks/load.py PORT --rate 1000 --seconds 5

Keep-alive connections, raw asyncio protocols: a client costs the machine it shares with the server as little as
Python can. Pictures are official test images as PNG, another one for each request.
"""

import argparse
import asyncio
import io
import json
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from PIL import Image

from attire.data.loading import load_dataset

CONNECTIONS = 600  # of an open loop: more than the server lets wait, fewer than it lets connect
PROBE_SECONDS = 0.02  # between two requests to /healthz


def pngs(count: int) -> list[bytes]:
    """Official test images as PNG files."""
    found = []
    for image in load_dataset(None, part="test").images[:count]:
        out = io.BytesIO()
        Image.fromarray(np.asarray(image)).save(out, "PNG")
        found.append(out.getvalue())
    return found


def request(data: bytes) -> bytes:
    head = (
        f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


class Client(asyncio.Protocol):
    """One connection: one request at a time, its status when the whole response is here; 0 where it broke off."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.future: asyncio.Future[int] | None = None
        self.data, self.last = b"", False

    def ask(self, data: bytes) -> "asyncio.Future[int]":
        self.future = asyncio.get_running_loop().create_future()
        self.data = b""
        self.transport.write(data)
        return self.future

    def data_received(self, data: bytes) -> None:
        self.data += data
        end = self.data.find(b"\r\n\r\n")
        if end < 0 or self.future is None:
            return
        head = self.data[:end].lower()
        start = head.index(b"content-length:") + 15
        stop = head.find(b"\r\n", start)
        if len(self.data) >= end + 4 + int(head[start : stop if stop > 0 else None]):
            self.last = b"connection: close" in head
            self.finish(int(self.data[9:12]))

    def connection_lost(self, exc: Exception | None) -> None:
        self.last = True
        self.finish(0)

    def finish(self, status: int) -> None:
        if self.future is not None and not self.future.done():
            self.future.set_result(status)


async def connect(port: int) -> Client:
    _, client = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", port)
    return client


class Run:
    """What came back: (status, seconds) of each request, and of each probe of /healthz."""

    def __init__(self, port: int, seconds: float) -> None:
        self.port, self.end = port, time.perf_counter() + seconds
        self.requests = [request(data) for data in pngs(500)]
        self.answers: list[tuple[int, float]] = []
        self.probes: list[tuple[int, float]] = []
        self.refused_connections = 0

    def over(self) -> bool:
        return time.perf_counter() >= self.end

    async def loop(self, number: int) -> None:
        """A client that asks again as soon as it has its answer; it ends where it can no longer connect."""
        client, i = await connect(self.port), number
        while not self.over():
            start = time.perf_counter()
            status = await client.ask(self.requests[i % len(self.requests)])
            self.answers.append((status, time.perf_counter() - start))
            i += 31
            if client.last:
                try:
                    client = await connect(self.port)
                except OSError:
                    self.refused_connections += 1
                    return

    async def arrivals(self, rate: float) -> None:
        """Requests at fixed times, whatever the answers; seconds count from the time it should have been sent."""
        free: deque[Client] = deque([await connect(self.port) for _ in range(32)])
        tasks: set[asyncio.Task[None]] = set()
        start, count = time.perf_counter(), 0

        async def one(i: int, due: float) -> None:
            client = free.pop() if free else await connect(self.port)
            status = await client.ask(self.requests[i % len(self.requests)])
            self.answers.append((status, time.perf_counter() - due))
            if not client.last:
                free.append(client)

        while not self.over():
            due = start + count / rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            if len(tasks) < CONNECTIONS:
                task = asyncio.ensure_future(one(count, due))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            else:
                self.answers.append((-1, 0.0))  # not sent: this process could not keep up
            count += 1
        await asyncio.gather(*tasks)

    async def probe(self) -> None:
        client = await connect(self.port)
        while not self.over():
            start = time.perf_counter()
            status = await client.ask(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.probes.append((status, time.perf_counter() - start))
            if client.last:
                return
            await asyncio.sleep(PROBE_SECONDS)

    def to_json(self, seconds: float) -> dict[str, Any]:
        good = [s for status, s in self.answers if status == 200]
        refused = [s for status, s in self.answers if status == 503]
        return {
            "seconds": seconds,
            "statuses": dict(Counter(str(status) for status, _ in self.answers)),
            "rate": len(good) / seconds,
            "good": quantiles(good),
            "refused": quantiles(refused),
            "healthz": quantiles([s for status, s in self.probes if status == 200]),
            "refused_connections": self.refused_connections,
        }


def quantiles(seconds: list[float]) -> dict[str, float] | None:
    """Milliseconds."""
    if not seconds:
        return None
    p50, p99 = (float(value) for value in np.quantile(seconds, (0.5, 0.99)))
    return {"n": len(seconds), "p50": 1000 * p50, "p99": 1000 * p99, "max": 1000 * max(seconds)}


async def main(port: int, clients: int, rate: float, seconds: float) -> dict[str, Any]:
    run = Run(port, seconds)
    run.end = (start := time.perf_counter()) + seconds
    work: list[Callable[[], Awaitable[None]]] = [run.probe]
    if rate:
        work.append(lambda: run.arrivals(rate))
    else:
        work += [lambda number=number: run.loop(number) for number in range(clients)]  # type: ignore[misc]
    await asyncio.gather(*(one() for one in work))
    return run.to_json(time.perf_counter() - start)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=5.0)
    chosen = parser.parse_args()
    print(json.dumps(asyncio.run(main(chosen.port, chosen.clients, chosen.rate, chosen.seconds))))
