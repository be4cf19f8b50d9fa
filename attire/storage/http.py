"""One file over HTTP with little patience: dead hosts are left in seconds, broken transfers continued."""

import http.client
import socket
import ssl
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from attire.errors import AttireError, AttireWarning, one_line
from attire.storage.files import cache_dir, cannot, human_size, make_dir, sha256

# (name, bytes so far, bytes in all - an upper bound where the server does not say)
ProgressCallback = Callable[[str, int, int], None]
_T = TypeVar("_T")

# Three dead hosts in a row cost less than 10 s, whether they swallow the look-up, the connection or the request.
_CONNECT_SECONDS = 3.0  # name look-up and TCP together
_STALL_SECONDS = 3.0  # without a byte; a transfer that stalls is continued, so that this may be short
_FRUITLESS = 3  # attempts that bring less than GAIN before a host is given up
_GAIN = 1_000_000
_BLOCK = 1 << 18
_sound: set[tuple[Path, int, int]] = set()  # (path, bytes, mtime_ns) that this process has verified


class MirrorError(Exception):
    """Why one place did not serve, in a few words; the caller goes on to the next."""


def download(url: str, limit: int, take: Callable[[Path], _T], progress: ProgressCallback | None = None) -> _T:
    """Fetch `url`, at most `limit` bytes, and return what `take` makes of the file, which is then deleted.

    What has arrived is kept in `<cache>/downloads/` when the connection breaks or the user stops, and is continued
    next time. `take` verifies, and raises MirrorError for wrong bytes; if those began in an earlier call, they are
    fetched once more from the start. Raises MirrorError, and AttireError where the cache cannot be written.
    """
    probe(url)
    part = make_dir(cache_dir() / "downloads") / f"{sha256(url.encode())[:8]}-{url.rsplit('/', 1)[-1]}.part"
    continued = part.exists()
    fruitless, have = 0, _size(part)
    while not _pull(url, part, limit, progress):
        fruitless += _size(part) < have + _GAIN
        have = _size(part)
        if fruitless == _FRUITLESS:
            raise MirrorError(f"the connection keeps breaking, {human_size(have)} arrived")
    try:
        result = take(part)
    except MirrorError:
        part.unlink()
        if continued:
            return download(url, limit, take, progress)
        raise
    part.unlink()
    return result


def _pull(url: str, part: Path, limit: int, progress: ProgressCallback | None) -> bool:
    """Continue `part` until the server has no more; False where the connection broke before that."""
    if _size(part) > limit:
        part.unlink()
    response = _answer(url, _size(part))
    if response is None:
        return True
    with response:
        done = _size(part) if response.status == 206 else 0
        total = None if response.length is None else done + response.length
        if total is not None and total > limit:
            raise MirrorError(f"offers {human_size(total)}, at most {human_size(limit)} expected")
        try:
            with part.open("ab" if done else "wb") as file:
                for block in _blocks(response):
                    done += len(block)
                    if done > limit:
                        break
                    file.write(block)
                    if progress:
                        progress(url.rsplit("/", 1)[-1], done, total or limit)
        except OSError as error:
            raise cannot("write", part, error) from error
    if done > limit:
        part.unlink()
        raise MirrorError(f"sends more than the {human_size(limit)} expected")
    return total is None or done >= total


def _answer(url: str, have: int) -> Any:
    """The open response, which begins at byte `have` (status 206) or at 0; None where nothing is left to fetch."""
    request = urllib.request.Request(url, headers={"User-Agent": "attire"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=_STALL_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != 416 or not have:
            raise MirrorError(f"HTTP {error.code}") from error
        return None if error.headers.get("Content-Range") == f"bytes */{have}" else _answer(url, 0)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise MirrorError(reason(error)) from error
    if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        response.close()
        return _answer(url, 0)
    return response


def _blocks(response: Any) -> Iterator[bytes]:
    """Until the end or a break: the declared length, or `take`, tells them apart."""
    try:
        while block := response.read1(_BLOCK):
            yield block
    except (OSError, http.client.HTTPException, ValueError):
        return


def probe(url: str) -> None:
    """Raise MirrorError unless the host accepts a connection within CONNECT_SECONDS.

    In a thread, because no time-out of the standard library covers the name look-up or several addresses in a row.
    """
    parts = urlsplit(url)
    address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(address[0]):
        return  # only the proxy can say
    outcome: list[OSError | None] = []

    def connect() -> None:
        try:
            socket.create_connection(address, _CONNECT_SECONDS).close()
            outcome.append(None)
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_CONNECT_SECONDS)
    if not outcome:
        raise MirrorError(f"no answer in {_CONNECT_SECONDS:g} s")
    if outcome[0] is not None:
        raise MirrorError(reason(outcome[0])) from outcome[0]


def reason(error: object) -> str:
    """A few words for what the network did."""
    if isinstance(error, urllib.error.URLError):
        return reason(error.reason)
    known = {
        socket.gaierror: "its name cannot be resolved",
        TimeoutError: "no answer",
        ConnectionRefusedError: "connection refused",
        ssl.SSLCertVerificationError: "its certificate is not trusted",
    }
    for kind, words in known.items():
        if isinstance(error, kind):
            return words
    return one_line(getattr(error, "strerror", None) or str(error) or type(error).__name__)[:80]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def is_sound(path: Path, digest: str, digest_of: Callable[[Path], str]) -> bool:
    """Whether a cached file is there and is what it was; its bytes are read once per process."""
    if not path.exists():
        return False
    try:
        stat = path.stat()
        state = (path, stat.st_size, stat.st_mtime_ns)
        if state not in _sound and digest_of(path) == digest:
            _sound.add(state)
    except AttireError:
        return False
    except OSError as error:
        raise cannot("read", path, error) from error
    return state in _sound


def set_aside(path: Path) -> None:
    """Keep a damaged cached file under another name, so that a good one can take its place."""
    if not path.exists():
        return
    aside = path.with_name(f"{path.name}.damaged")
    try:
        path.replace(aside)
    except OSError as error:
        raise cannot("set aside", path, error) from error
    warnings.warn(f"{path}: damaged; set aside as {aside.name} and fetched again", AttireWarning, stacklevel=3)


def host(url: str) -> str:
    return urlsplit(url).netloc
