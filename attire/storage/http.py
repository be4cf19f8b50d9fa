"""Download files over HTTP: dead hosts are given up in seconds, broken transfers continue where they broke."""

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
from attire.storage.files import cache_dir, human_size, io_error, make_dir, sha256

# (name, bytes so far, bytes in total: an upper bound where the server does not say)
ProgressCallback = Callable[[str, int, int], None]
_T = TypeVar("_T")

# Three dead hosts in a row cost less than 10 s, whether look-up, connection or request hangs.
_CONNECT_SECONDS = 3.0  # name look-up and TCP together
_STALL_SECONDS = 3.0  # without a byte; short, as a stalled transfer is continued
_MAX_FRUITLESS = 3  # attempts that transfer less than _MIN_GAIN bytes each, before a host is given up
_MIN_GAIN = 1_000_000
_BLOCK = 1 << 18
_verified: set[tuple[Path, int, int]] = set()  # (path, bytes, mtime_ns) of files that this process has verified


class MirrorError(Exception):
    """Why a mirror failed, in a few words. The caller tries the next one."""


def download(url: str, limit: int, read: Callable[[Path], _T], progress: ProgressCallback | None = None) -> _T:
    """Download `url`, at most `limit` bytes, and return `read(file)`. The file is then deleted.

    Where the connection breaks or the user stops, the part that arrived stays in `<cache>/downloads/`, and the next
    call continues it. `read` verifies the file and raises MirrorError for wrong bytes; a file that an earlier call
    began is then downloaded once more. Raises MirrorError, and AttireError where the cache is not writable.
    """
    check_reachable(url)
    part = make_dir(cache_dir() / "downloads") / f"{sha256(url.encode())[:8]}-{url.rsplit('/', 1)[-1]}.part"
    continued = part.exists()
    fruitless, size = 0, _size(part)
    while not _continue(url, part, limit, progress):
        fruitless += _size(part) < size + _MIN_GAIN
        size = _size(part)
        if fruitless == _MAX_FRUITLESS:
            raise MirrorError(f"the connection keeps breaking, {human_size(size)} arrived")
    try:
        result = read(part)
    except MirrorError:
        part.unlink()
        if continued:
            return download(url, limit, read, progress)
        raise
    part.unlink()
    return result


def _continue(url: str, part: Path, limit: int, progress: ProgressCallback | None) -> bool:
    """Append to `part` until the server has no more; return False where the connection broke before."""
    if _size(part) > limit:
        part.unlink()
    response = _request(url, _size(part))
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
            raise io_error("write", part, error) from error
    if done > limit:
        part.unlink()
        raise MirrorError(f"sends more than the {human_size(limit)} expected")
    return total is None or done >= total


def _request(url: str, start: int) -> Any:
    """Return the open response, from byte `start` (status 206) or 0 on; None where no byte is left."""
    request = urllib.request.Request(url, headers={"User-Agent": "attire"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = urllib.request.urlopen(request, timeout=_STALL_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != 416 or not start:
            raise MirrorError(f"HTTP {error.code}") from error
        return None if error.headers.get("Content-Range") == f"bytes */{start}" else _request(url, 0)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise MirrorError(describe_error(error)) from error
    if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        response.close()
        return _request(url, 0)
    return response


def _blocks(response: Any) -> Iterator[bytes]:
    """Yield the content until its end or a break. The declared length, or `read`, tells them apart."""
    try:
        while block := response.read1(_BLOCK):
            yield block
    except (OSError, http.client.HTTPException, ValueError):
        return


def check_reachable(url: str) -> None:
    """Raise MirrorError unless the host accepts a connection within 3 s.

    A thread connects, because the standard library's time-outs cover neither the look-up nor a list of addresses.
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
        raise MirrorError(describe_error(outcome[0])) from outcome[0]


def describe_error(error: object) -> str:
    """Describe a network error in a few words."""
    if isinstance(error, urllib.error.URLError):
        return describe_error(error.reason)
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


def matches_digest(path: Path, digest: str, digest_of: Callable[[Path], str]) -> bool:
    """Check that a cached file exists and has this digest. A process reads its bytes only once."""
    if not path.exists():
        return False
    try:
        stat = path.stat()
        state = (path, stat.st_size, stat.st_mtime_ns)
        if state not in _verified and digest_of(path) == digest:
            _verified.add(state)
    except AttireError:
        return False
    except OSError as error:
        raise io_error("read", path, error) from error
    return state in _verified


def set_aside(path: Path) -> None:
    """Rename a damaged cached file, if there is one, so that a good one can take its place. Warns (AttireWarning)."""
    if not path.exists():
        return
    aside = path.with_name(f"{path.name}.damaged")
    try:
        path.replace(aside)
    except OSError as error:
        raise io_error("set aside", path, error) from error
    warnings.warn(f"{path}: damaged; set aside as {aside.name} and fetched again", AttireWarning, stacklevel=3)


def host_of(url: str) -> str:
    return urlsplit(url).netloc
