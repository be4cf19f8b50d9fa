"""The memory limit (`--memory-limit`): how much memory this process may plan to hold, and how much it holds."""

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from attire.errors import AttireError, UsageError
from attire.storage.files import human_size

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_UNLIMITED = 2**62
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h, see mallopt(3)
_TRIM_BYTES = 128 * 2**10  # glibc's own first threshold, which it raises as it goes unless it is set


@dataclass
class _Budget:
    """Bytes of one limit.

    limit: what the whole process may hold. spare: what is left beside the memory held when work began; measured once,
    so that plans do not depend on the allocator. reserved: the part of `spare` that training will need.
    """

    limit: int = _UNLIMITED
    spare: int | None = None
    reserved: int = 0


_budget = _Budget()


@contextmanager
def limit_memory(limit: str | int | None) -> Iterator[None]:
    """Plan within a limit inside the block: bytes, or text such as "2GB"; None: no limit.

    Extraction batches are made to fit, and features are read into memory only where they fit. Raises UsageError for
    text that is no size. Work that needs more raises AttireError before it begins.
    """
    global _budget
    before, _budget = _budget, _Budget(_UNLIMITED if limit is None else _parse_size(limit))
    if _is_limited():
        _mallopt((_M_TRIM_THRESHOLD, _TRIM_BYTES))  # else glibc keeps freed blocks: 500 MB in a run of `fast` (n = 3)
    try:
        yield
    finally:
        _budget = before


def _parse_size(text: str | int) -> int:
    """Return the bytes of "2GB", "1500 MB", "1.5GiB" or a plain number."""
    number = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?) ?([kmg]i?b)", str(text).strip().lower(), re.A)
    if number:
        return int(float(number[1]) * _UNITS[number[2]])
    if re.fullmatch(r"[0-9]{1,18}", str(text)) and int(text):
        return int(text)
    raise UsageError("--memory-limit", f"expected a size such as 2GB or 1500MB, found {str(text)!r}")


def _is_limited() -> bool:
    return _budget.limit < _UNLIMITED


def _spare() -> int:
    """Return the bytes that work may hold beside what the process holds already, libraries and images."""
    if not _is_limited():
        return _UNLIMITED
    if _budget.spare is None:
        _budget.spare = max(0, _budget.limit - _resident_memory())
    return _budget.spare


def batch_budget() -> int:
    """Return the bytes for a batch in the backbone: half of the spare, as features may be in memory meanwhile."""
    return _spare() // 2


def row_budget() -> int:
    """Return the bytes for features that are read into memory: what neither batches nor training need."""
    return max(0, min(_spare() // 2, _spare() - _budget.reserved))


def reserve(count: int, what: str) -> None:
    """Reserve bytes for training. Raises AttireError, before work begins, where the limit leaves too little."""
    if count > _spare():
        least = human_size(_budget.limit - _spare() + count)
        where = f"{what} needs about {least} in all, {human_size(count)} of them beside what is held already"
        raise AttireError("--memory-limit", f"{human_size(_budget.limit)} is too little", where, "give a higher one")
    _budget.reserved = count


def _resident_memory() -> int:
    """Return the resident bytes of this process; elsewhere than on Linux their peak."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc gives freed memory back
    return _process_status("VmRSS") or peak_memory()


def peak_memory() -> int:
    """Return the peak of this process's resident bytes; 0 where the system does not say.

    Linux hands the `ru_maxrss` of a process on to its children, but not `VmHWM`.
    """
    if peak := _process_status("VmHWM"):
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _process_status(field: str) -> int:
    """Return bytes from Linux's /proc/self/status, see proc(5); 0 elsewhere."""
    status = Path("/proc/self/status")
    line = re.search(rf"^{field}:\s+(\d+) kB$", status.read_text(), re.M) if status.exists() else None
    return 1024 * int(line[1]) if line else 0


def keep_freed_memory() -> None:
    """Ask glibc to reuse large blocks instead of returning them to the system after every step; not under a limit.

    A gradient of 25,088 x 1,024 weights is 103 MB: by default it is mapped, zeroed by the kernel and unmapped in each
    step. Keeping it took a step of `classic` from 83 to 48 ms. Elsewhere than on glibc nothing is done.
    """
    if not _is_limited():
        _mallopt((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1))


def _mallopt(*options: tuple[int, int]) -> None:
    with suppress(AttributeError, OSError, TypeError):
        for option, value in options:
            ctypes.CDLL(None).mallopt(option, value)


def total_memory() -> int:
    """Return the bytes of this machine's memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return 0
