"""Sockets: the HTTP server under the app, its limits, and how it stops. The only code that knows uvicorn."""

import asyncio
import ctypes
import errno
import logging
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from attire.errors import AttireError
from attire.server.guards import HEAD_BYTES
from attire.server.problems import MEDIA_TYPE, Problem

_HEAD_SECONDS = 10.0  # from the first byte of a request to the end of its headers
_LINGER_SECONDS = 5.0  # for the rest of a body that was refused, so that the client gets to read why
_KEEP_ALIVE_SECONDS = 15
_CONNECTIONS = 800  # below the 1,024 open files that most systems allow a process
_DRAIN_SECONDS = 1.0  # after SIGTERM: answering, but not ready, so that balancers and clients look elsewhere
_LAST_SECONDS = 0.5  # after that without new connections: requests on the open ones are answered
_GRACE_SECONDS = 60  # for what is being answered; longer than any deadline of the app


_SO_ATTACH_FILTER = 26  # of asm-generic/socket.h
# A program for the kernel's packet filter, of four struct sock_filter: code, jump if true, jump if false, operand.
_DROP_SYN = b"".join(
    struct.pack("=HBBI", code, if_true, if_false, operand)
    for code, if_true, if_false, operand in (
        (0x30, 0, 0, 13),  # load byte 13 of the segment: TCP's flags
        (0x45, 0, 1, 0x02),  # is SYN set?
        (0x06, 0, 0, 0),  # yes: drop the segment
        (0x06, 0, 0, 0xFFFFFFFF),  # no: let all of it through
    )
)


class _Protocol(H11Protocol):
    """uvicorn's, with a time limit on headers and on refused bodies, a limit on connections, and problem+json."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _CONNECTIONS:
            transport.abort()
            return
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def _watch_head(self) -> None:
        """Time the head of a request from its first byte, however many follow."""
        incomplete_head = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if not incomplete_head:
            self._stop_head_timer()
        elif self._head_timer is None:
            self._start_head_timer()

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(_HEAD_SECONDS, self._on_late_head)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_late_head(self) -> None:
        self._head_timer = None
        if self.conn.trailing_data[0]:
            self._refuse(408, "slow-head", "the headers did not arrive in time")
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Called while h11's exception is being handled, which says whether 431 or 501 fits better."""
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        self._refuse(status if status in (400, 431, 501) else 400, "http", "not a valid HTTP request")

    def _refuse(self, status: int, code: str, detail: str) -> None:
        body = Problem(status, code, detail).body()
        headers = [
            (b"content-type", MEDIA_TYPE.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        response = h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode())
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:  # the app was about to answer this very request
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_head()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self.loop.call_later(_LINGER_SECONDS, self._close_if_lingering, self.cycle)

    def _close_if_lingering(self, cycle: object) -> None:
        if self.cycle is cycle and self.conn.their_state is h11.SEND_BODY:
            self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn's, which after SIGTERM goes on for a moment as not ready, and does not raise the signal once more.

    on_stop: called at the first signal; on_listening: called once connections are accepted.
    """

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None], on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_stop, self.on_listening = on_stop, on_listening
        self.signal = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.on_stop()
        if self.signal == signal.SIGTERM:
            await asyncio.sleep(_DRAIN_SECONDS)
            for sock in sockets or []:
                _refuse_new_connections(sock)
            await asyncio.sleep(_LAST_SECONDS / 2)  # in which connections that wait in its queue are accepted
            for server in self.servers:
                server.close()
            await asyncio.sleep(_LAST_SECONDS / 2)  # in which the requests on them arrive
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.on_stop()
        self.force_exit = self.should_exit and sig == signal.SIGINT  # the second Ctrl-C does not wait
        self.should_exit = True
        self.signal = self.signal or sig

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # only there can they be listened to
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


def _refuse_new_connections(sock: socket.socket) -> None:
    """Let the kernel begin no further connection; those that it has begun stay and can be accepted.

    Closing alone resets a connection that was made between the last accept and the close, and `listen(0)` still lets
    one be made: in 12 drains of `benchmarks/serving.py` 1 of 3,062 requests was lost so, and none with a filter. So on
    Linux a socket filter (bpf(4), socket(7)) drops segments with SYN; the client's next attempt, a second later, is
    refused.
    """
    sock.listen(0)
    if sys.platform != "linux":
        return
    code = ctypes.create_string_buffer(_DROP_SYN, len(_DROP_SYN))
    with suppress(OSError):  # a kernel without it: the connection in the queue may be reset
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", 4, ctypes.addressof(code)))


def bind(host: str, port: int) -> socket.socket:
    """A socket bound there, not yet listening. Raises AttireError where that cannot be."""
    name = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise AttireError(name, "no such address", do="give an address of this machine to --host") from error
    try:
        if sys.platform != "win32":  # there it would let two servers share a port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise AttireError(name, "the port is in use", do="give another to --port, or 0 for a free one") from error
        raise AttireError(name, "cannot listen there", error.strerror or "") from error
    return sock


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _make_server(app: Any, on_stop: Callable[[], None], on_listening: Callable[[], None]) -> _Server:
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # not a line for each request that is no HTTP
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="on",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=HEAD_BYTES,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    return _Server(config, on_stop, on_listening)


def serve(app: Any, sock: socket.socket, on_stop: Callable[[], None], on_listening: Callable[[], None]) -> int:
    """Answer on this socket until a signal comes; returns that signal.

    on_stop: called when it comes; on_listening: called once connections are accepted.
    """
    server = _make_server(app, on_stop, on_listening)
    server.run([sock])
    return server.signal
