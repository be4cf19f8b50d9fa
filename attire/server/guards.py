"""ASGI middleware: checks host, origin, token and framing of every request, adds headers to every response."""

import hmac
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from attire.server.problems import Problem

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_WITHOUT_TOKEN = ("/", "/healthz", "/readyz", "/openapi.json")  # nothing in them belongs to anyone
HEAD_BYTES = 16 * 1024  # request line and headers: twice what common proxies allow
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?", re.A)

# Helmet's and OWASP's lists, less what only matters over TLS or to browsers that are gone.
_COMMON_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"permissions-policy": b"camera=(self), microphone=(), geolocation=()",
    b"cache-control": b"no-store",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",  # of answers that are no pages
}

_log = logging.getLogger("attire.server")


@dataclass
class Guard:
    """ASGI middleware: refuses requests that no endpoint should see, adds headers, answers 500 to what nobody caught.

    hosts: names allowed in a Host header, lower case; token: what a client must send as a bearer token, None for none;
    on_response: called with (route, method, status, seconds) after each response; draining: whether the server is
    about to stop: then every response ends its connection, so that clients open the next one elsewhere.
    """

    app: ASGIApp
    hosts: frozenset[str]
    token: bytes | None
    on_response: Callable[[str, str, int, float], None]
    draining: Callable[[], bool]
    access_log: bool = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._guard(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, status = time.perf_counter(), 0

        async def sender(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                broken_off = status >= 400 and any(name == b"expect" for name, _ in scope["headers"])
                added = _added_headers(message["headers"], last=broken_off or self.draining())
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, receive, sender)
        except Problem as problem:
            await problem.response()(scope, receive, sender)
        except Exception:
            _log.exception("an answer failed")
            if not status:
                failed = Problem(500, "failed", "something went wrong here; it has been noted")
                await failed.response()(scope, receive, sender)
        seconds = time.perf_counter() - start
        route, method = _labels(scope)
        self.on_response(route, method, status, seconds)
        if self.access_log:
            print(_access_line(scope, status, seconds), file=sys.stderr, flush=True)

    def _check(self, scope: Scope) -> None:
        """Raises Problem for what must not reach an endpoint."""
        headers = Headers(scope=scope)
        _check_head(scope)
        _check_framing(headers)
        _check_host(headers, self.hosts)
        if scope["method"] not in ("GET", "HEAD"):
            _check_origin(headers, scope["scheme"])
        if self.token is not None and scope["path"] not in _WITHOUT_TOKEN:
            _check_token(headers, self.token)


def _labels(scope: Scope) -> tuple[str, str]:
    """Route and method as this program knows them, since a client may send any text in their place."""
    route = scope.get("route")
    method = scope["method"] if scope["method"] in (getattr(route, "methods", None) or ()) else "other"
    return getattr(route, "path", "other"), method


def _added_headers(given: Iterable[tuple[bytes, bytes]], last: bool) -> list[tuple[bytes, bytes]]:
    """The headers of every response that this one does not set itself.

    last: the connection ends with this response. So it must where a client waited for 100 Continue: it will not send
    the body, and the server would take its next request for that body.
    """
    headers = {**_COMMON_HEADERS, b"connection": b"close"} if last else _COMMON_HEADERS
    names = {name for name, _ in given}
    return [(name, value) for name, value in headers.items() if name not in names]


def _check_head(scope: Scope) -> None:
    """HTTP servers limit a head that is still incomplete; a head that arrives in one piece may have any size."""
    if not scope["http_version"].startswith("1.") and scope["http_version"] not in ("2", "3"):
        raise Problem(400, "http", "not a version of HTTP that is spoken here", {"Connection": "close"})
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    if size + sum(len(name) + len(value) for name, value in scope["headers"]) > HEAD_BYTES:
        detail = f"request line and headers may have {HEAD_BYTES:,} bytes at most"
        raise Problem(431, "http", detail, {"Connection": "close"})


def _check_framing(headers: Headers) -> None:
    """RFC 9112, 6.1: a message with both framings ought to be handled as an error, for it may be smuggling."""
    if "transfer-encoding" in headers and "content-length" in headers:
        detail = "Content-Length and Transfer-Encoding in one request"
        raise Problem(400, "framing", detail, {"Connection": "close"})


def _check_host(headers: Headers, hosts: frozenset[str]) -> None:
    """Another name in Host is how a page of another site reaches a server on this machine (DNS rebinding)."""
    given = headers.getlist("host")
    host = _HOST.fullmatch(given[0].lower()) if len(given) == 1 else None
    if host is None:
        raise Problem(400, "host", "exactly one Host header with a host name is needed", {"Connection": "close"})
    if host[1] not in hosts:
        raise Problem(421, "host", "this server does not answer to that host name", {"Connection": "close"})


def _check_origin(headers: Headers, scheme: str) -> None:
    """Only this server's own page and programs may send requests that cost something; pages of other sites may not."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    own = f"{scheme}://{headers['host']}".lower()
    if (origin is not None and origin.lower() != own) or site not in (None, "same-origin", "none"):
        raise Problem(403, "origin", "requests from pages of other sites are refused")


def _check_token(headers: Headers, token: bytes) -> None:
    kind, _, given = headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), token):
        raise Problem(401, "token", "a bearer token is needed", {"WWW-Authenticate": "Bearer"})


def _access_line(scope: Scope, status: int, seconds: float) -> str:
    """JSON, in which no request can break the line or forge another."""
    request = {"time": round(time.time(), 3), "method": scope["method"][:16], "path": scope["path"][:200]}
    return json.dumps({**request, "status": status, "milliseconds": round(1000 * seconds, 1)})
