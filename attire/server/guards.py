"""What every request passes first: host, origin, token, framing; and what every response carries."""

import hmac
import json
import logging
import re
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from html.parser import HTMLParser

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from attire.server.problems import Problem

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_OPEN = ("/", "/healthz", "/readyz", "/openapi.json")  # need no token: nothing in them belongs to anyone
_SAFE = ("GET", "HEAD")
HEAD_BYTES = 16 * 1024  # request line and headers: twice what common proxies allow
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?", re.A)

# Helmet's and OWASP's lists, less what only matters over TLS or to browsers that are gone.
_COMMON = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}
_NOTHING = "default-src 'none'; frame-ancestors 'none'"  # for answers that are no pages

_log = logging.getLogger("attire.server")


@dataclass
class Guard:
    """ASGI middleware: refuses what no endpoint should see, adds headers, counts, catches what nobody caught.

    hosts: allowed names in a Host header, lower case; token: wanted as a bearer token, None for none; told: called
    with (route, method, status, seconds) after each response; draining: whether the server is about to stop: then
    every response ends its connection, so that clients open the next one elsewhere.
    """

    app: ASGIApp
    hosts: frozenset[str]
    token: bytes | None
    told: Callable[[str, str, int, float], None]
    draining: Callable[[], bool]
    access_log: bool = False
    headers: list[tuple[bytes, bytes]] = field(default_factory=lambda: _encoded(_COMMON))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self.guarded(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, status = time.perf_counter(), 0

        async def sender(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                broken_off = status >= 400 and any(name == b"expect" for name, _ in scope["headers"])
                more = self.extra(message["headers"], broken_off or self.draining())
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        try:
            self.check(scope)
            await self.app(scope, receive, sender)
        except Problem as problem:
            await problem.response()(scope, receive, sender)
        except Exception:
            _log.exception("an answer failed")
            if not status:
                failed = Problem(500, "failed", "something went wrong here; it has been noted")
                await failed.response()(scope, receive, sender)
        seconds = time.perf_counter() - start
        self.told(*_labels(scope), status, seconds)
        if self.access_log:
            print(_access_line(scope, status, seconds), file=sys.stderr, flush=True)

    def extra(self, given: Iterable[tuple[bytes, bytes]], last: bool) -> list[tuple[bytes, bytes]]:
        """Headers that every response has. last: the connection ends with it; so it must where a client waited for
        100 Continue and now will not send the body that the next request would be taken for."""
        names = {name for name, _ in given}
        more = [pair for pair in self.headers if pair[0] not in names]
        if b"content-security-policy" not in names:
            more.append((b"content-security-policy", _NOTHING.encode()))
        if last and b"connection" not in names:
            more.append((b"connection", b"close"))
        return more

    def check(self, scope: Scope) -> None:
        """Raises Problem for what must not reach an endpoint."""
        headers = Headers(scope=scope)
        _check_head(scope)
        _check_framing(headers)
        _check_host(headers, self.hosts)
        if scope["method"] not in _SAFE:
            _check_origin(headers, scope["scheme"])
        if self.token is not None and scope["path"] not in _OPEN:
            _check_token(headers, self.token)


def _labels(scope: Scope) -> tuple[str, str]:
    """Route and method as this program knows them: a client may write anything in their place."""
    route = scope.get("route")
    method = scope["method"] if scope["method"] in (getattr(route, "methods", None) or ()) else "other"
    return getattr(route, "path", "other"), method


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


def _check_head(scope: Scope) -> None:
    """HTTP servers limit a head that is still incomplete; one that arrived in one piece may be of any size."""
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
    found = _HOST.fullmatch(given[0].lower()) if len(given) == 1 else None
    if found is None:
        raise Problem(400, "host", "exactly one Host header with a host name is needed", {"Connection": "close"})
    if found[1] not in hosts:
        raise Problem(421, "host", "this server does not answer to that host name", {"Connection": "close"})


def _check_origin(headers: Headers, scheme: str) -> None:
    """What changes or costs something may be asked for by this server's own page and by programs, by no other page."""
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
    told = {"time": round(time.time(), 3), "method": scope["method"][:16], "path": scope["path"][:200]}
    return json.dumps({**told, "status": status, "milliseconds": round(1000 * seconds, 1)})


class _Inline(HTMLParser):
    """What a page has inside it that its policy must allow: scripts, styles, style attributes."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.attributes: list[str] = []
        self._into: list[str] | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [value for name, value in attrs if name == "style" and value]
        self._into = {"script": self.scripts, "style": self.styles}.get(tag)
        if self._into is not None:
            self._into.append("")

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._into = None


def policy(html: str, ancestors: str = "'none'") -> str:
    """The Content-Security-Policy of a page: what is inside it now, by digest, and this server; nothing else."""
    inline = _Inline(html)
    attributes = ["'unsafe-hashes'", *_digests(inline.attributes)] if inline.attributes else []
    parts = {
        "default-src": ["'none'"],
        "script-src": _digests(inline.scripts) or ["'none'"],
        "style-src": [*_digests(inline.styles), *attributes] or ["'none'"],
        "img-src": ["'self'", "data:", "blob:"],
        "media-src": ["blob:"],
        "connect-src": ["'self'"],
        "frame-src": ["'self'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": [ancestors],
    }
    return "; ".join(f"{name} {' '.join(values)}" for name, values in parts.items())


def _digests(texts: list[str]) -> list[str]:
    """Of each text once. Browsers turn CR LF into LF before they take a digest."""
    lines = dict.fromkeys(text.replace("\r\n", "\n").replace("\r", "\n") for text in texts)
    return [f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in lines]
