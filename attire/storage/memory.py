"""How much memory this process may plan to hold: one limit for all of its work, `--memory-limit`."""

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from attire.errors import AttireError, UsageError
from attire.storage.files import human_size

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_UNLIMITED = 2**62
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h, see mallopt(3)
_AT_ONCE = 128 * 2**10  # bytes; glibc's own first threshold, which it raises as it goes unless it is set


@dataclass
class _Budget:
    """limit: bytes that the whole process may hold; spare: those left beside what it held when work began, measured
    once, so that plans do not depend on what the allocator keeps; reserved: those of it that training will need."""

    limit: int = _UNLIMITED
    spare: int | None = None
    reserved: int = 0


_budget = _Budget()


@contextmanager
def limited(limit: str | int | None) -> Iterator[None]:
    """Plan within this limit inside the block: bytes, or text such as "2GB"; None: no limit.

    What is held is chosen to fit: batches of extraction, and whether features are read into memory. Raises UsageError
    for text that is no size; what needs more raises AttireError before it begins.
    """
    global _budget
    before, _budget = _budget, _Budget(_UNLIMITED if limit is None else _size_of(limit))
    if _is_limited():
        _return_at_once()
    try:
        yield
    finally:
        _budget = before


def _size_of(text: str | int) -> int:
    """Bytes of "2GB", "1500 MB", "1.5GiB" or a plain number."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?) ?([kmg]i?b)", str(text).strip().lower(), re.A)
    if found:
        return int(float(found[1]) * _UNITS[found[2]])
    if re.fullmatch(r"[0-9]{1,18}", str(text)) and int(text):
        return int(text)
    raise UsageError("--memory-limit", f"expected a size such as 2GB or 1500MB, found {str(text)!r}")


def _is_limited() -> bool:
    return _budget.limit < _UNLIMITED


def _spare() -> int:
    """Bytes that work may hold beside what the process holds already, libraries and images."""
    if not _is_limited():
        return _UNLIMITED
    if _budget.spare is None:
        _budget.spare = max(0, _budget.limit - _resident())
    return _budget.spare


def for_batches() -> int:
    """Bytes for pictures on their way through the backbone: half, since features may be in memory meanwhile."""
    return _spare() // 2


def for_rows() -> int:
    """Bytes for features that are read into memory: what neither batches nor training need."""
    return max(0, min(_spare() // 2, _spare() - _budget.reserved))


def reserve(count: int, what: str) -> None:
    """Keep so many bytes for later. Raises AttireError, before anything is begun, where the limit leaves too little."""
    if count > _spare():
        least = human_size(_budget.limit - _spare() + count)
        told = f"{what} needs about {least} in all, {human_size(count)} of them beside what is held already"
        raise AttireError("--memory-limit", f"{human_size(_budget.limit)} is too little", told, "give a higher one")
    _budget.reserved = count


def _resident() -> int:
    """Bytes of this process in memory: VmRSS of proc(5), elsewhere the most that it ever was."""
    _give_back()
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmRSS:\s+(\d+) kB$", status.read_text(), re.M)):
        return 1024 * int(found[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def keep_freed() -> None:
    """Ask glibc to reuse large blocks instead of returning them to the system after every step; not under a limit.

    A gradient of 25,088 x 1,024 weights is 103 MB: by default it is mapped, zeroed by the kernel and unmapped in each
    step. Keeping it took a step of `classic` from 83 to 48 ms. Elsewhere than on glibc nothing is done.
    """
    if not _is_limited():
        _mallopt((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1))


def _return_at_once() -> None:
    """Ask glibc to give larger blocks back as they are freed; by default it soon keeps those of up to 32 MB.

    In a run of `fast` it kept 500 MB of them (n = 3).
    """
    _mallopt((_M_TRIM_THRESHOLD, _AT_ONCE))


def _mallopt(*options: tuple[int, int]) -> None:
    with suppress(AttributeError, OSError, TypeError):
        for option in options:
            ctypes.CDLL(None).mallopt(*option)


def _give_back() -> None:
    """Let the C library return to the system what was freed; only glibc can."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def memory() -> int:
    """Bytes of this machine; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return 0
