"""Digests, atomic writes, locks and the cache folder. Only this module writes artefacts."""

import errno
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import filelock
import platformdirs

from attire.errors import AttireError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_CACHE_ADVICE = "name a folder for the cache in ATTIRE_CACHE"
_PREFIX, _SUFFIX = ".attire.", ".part"  # of the names of temporary files and folders
_umask_lock = threading.Lock()


def cache_dir() -> Path:
    """Return `$ATTIRE_CACHE`, else the platform's user cache folder. It is created on first use."""
    try:
        path = Path(os.environ.get("ATTIRE_CACHE") or platformdirs.user_cache_dir("attire", appauthor=False))
        return make_dir(path.expanduser().absolute(), _CACHE_ADVICE)
    except RuntimeError as error:
        raise AttireError("cache folder", "nothing says where your home is", do=_CACHE_ADVICE) from error


def make_dir(path: Path, do: str = "") -> Path:
    """Create a folder and its parents. Raises AttireError; `do` is its advice."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise io_error("make the folder", path, error, do) from error
    return path


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """Encode equal values as equal bytes: sorted keys, no spaces, no NaN. Cache keys are digests of it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Write to a temporary file beside `path`. On success, fsync and rename it; on failure, leave no trace.

    Leftovers of killed processes are removed from the folder first. Raises AttireError where writing fails.
    """
    make_dir(path.parent)
    remove_leftovers(path.parent)
    try:
        handle, temporary = _open_temporary(path)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                temporary.chmod(0o666 & ~_umask())
                if fcntl:  # rename under the lock: after closing, another writer would remove the file
                    temporary.replace(path)
            if not fcntl:
                temporary.replace(path)
            _sync_dir(path.parent)
        finally:
            temporary.unlink(missing_ok=True)  # before the error says how much room is free
    except OSError as error:
        raise io_error("write", path, error) from error


def _open_temporary(path: Path) -> tuple[int, Path]:
    """Open a new file beside `path` and lock it, so that `remove_leftovers` skips it."""
    while True:
        handle, name = tempfile.mkstemp(**_beside(path))
        if fcntl is None:
            return handle, Path(name)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # nobody removed it before it was locked
            return handle, Path(name)
        os.close(handle)


def _beside(path: Path) -> dict[str, Any]:
    """Return what `tempfile` needs for a temporary name beside `path`."""
    return {"prefix": f"{_PREFIX}{path.name[:80]}.", "suffix": _SUFFIX, "dir": path.absolute().parent}


def is_temporary(path: Path) -> bool:
    return path.name.startswith(_PREFIX) and path.name.endswith(_SUFFIX)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders of killed processes, whose locks the kernel has freed."""
    if fcntl is None:
        return
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError), _open_handle(path) as handle:  # a live process holds it, or another removed it
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


@contextmanager
def _open_handle(path: Path) -> Iterator[int]:
    """Open a file or folder as a file descriptor."""
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Fill a temporary folder beside `path` and rename it on success; on failure, `path` stays as it was.

    Without `replace`, at most an empty folder may lie at `path`.
    """
    with temporary_folder(path) as folder:
        yield folder
        folder.chmod(0o777 & ~_umask())
        _move_into_place(folder, path, replace)
        _sync_dir(folder.parent)


def _move_into_place(folder: Path, path: Path, replace: bool) -> None:
    old = folder.with_suffix(".old")  # no temporary name: a process killed between the renames loses nothing
    if replace and path.exists():
        path.rename(old)
    try:
        folder.replace(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Create a temporary folder beside `path` and delete it at the end. Raises AttireError as `atomic_file` does."""
    parent = make_dir(path.absolute().parent)
    remove_leftovers(parent)
    try:
        folder = Path(tempfile.mkdtemp(**_beside(path)))
        try:
            with _locked(folder):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise io_error("write", path, error) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a temporary folder, so that `remove_leftovers` skips it."""
    if fcntl is None:
        yield
        return
    with _open_handle(folder) as handle:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    with atomic_file(path) as file:
        file.write(data)


class _DigestWriter:
    """A file that hashes what is written. It cannot seek, so each byte is hashed once and in order."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> bytes:
        return self._hash.digest()


@contextmanager
def sealed_file(path: Path) -> Iterator[_DigestWriter]:
    """Write a file as `atomic_file` does and append the SHA-256 of its content (the seal)."""
    with atomic_file(path) as file:
        writer = _DigestWriter(file)
        yield writer
        file.write(writer.digest())


def has_valid_seal(path: Path) -> bool:
    """Check whether a file that `sealed_file` wrote is undamaged."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        left = max(0, path.stat().st_size - sha.digest_size)
        while left and (block := file.read(min(left, 2**20))):
            sha.update(block)
            left -= len(block)
        return file.read() == sha.digest()


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises AttireError where the file is missing, unreadable or holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise io_error("read", path, error) from error
    except (ValueError, RecursionError) as error:
        raise AttireError(path, "not valid JSON", str(error)[:80], "the file may be damaged") from error
    if not isinstance(value, dict):
        raise AttireError(path, f"expected a JSON object, found {type(value).__name__}")
    return value


@contextmanager
def lock(path: Path, wait: float = -1) -> Iterator[None]:
    """Hold `path` as a lock file between processes. The kernel frees the lock when its holder dies.

    wait: seconds, -1 for ever. Raises TimeoutError when another process still holds the lock then, AttireError where
    the folder is not writable.
    """
    make_dir(path.parent)
    file_lock = filelock.FileLock(path, timeout=wait, poll_interval=0.1)
    try:
        file_lock.acquire()
    except filelock.Timeout as error:
        raise TimeoutError(f"{path} is held by another process") from error
    except OSError as error:
        raise io_error("write into it", path.parent, error) from error
    try:
        yield
    finally:
        file_lock.release()


def release_pages(array: Any) -> None:
    """Drop the pages of a memory-mapped array from this process's resident memory; other arrays stay as they are.

    The pages stay in the system's page cache.
    """
    while array is not None and not isinstance(array, mmap.mmap):
        array = getattr(array, "base", None)
    if array is not None and hasattr(mmap, "MADV_DONTNEED"):
        array.madvise(mmap.MADV_DONTNEED)


def _sync_dir(path: Path) -> None:
    """Fsync a folder: only then is a rename in it durable."""
    if os.name != "posix":
        return
    with _open_handle(path) as handle:
        os.fsync(handle)


def _umask() -> int:
    """Read the umask, which needs setting it: threads must not do so at the same time."""
    with _umask_lock:
        mask = os.umask(0o022)
        os.umask(mask)
    return mask


def io_error(verb: str, path: Path, error: OSError, do: str = "") -> AttireError:
    """Turn a system error into one line. do: the advice, unless the disk is full."""
    return AttireError(path, f"cannot {verb}", error.strerror or str(error), disk_full_advice(path, error) or do)


def disk_full_advice(path: Path, error: OSError) -> str:
    """Say how much room is left where `error` is a full disk, else return ""."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    return f"make room: {human_size(_free_bytes(path.parent))} are free there"


def _nearest_existing(folder: Path) -> Path:
    return next((parent for parent in (folder, *folder.parents) if parent.exists()), Path("/"))


def _free_bytes(folder: Path) -> int:
    """Return the free bytes of a folder's file system. The folder need not exist."""
    return shutil.disk_usage(_nearest_existing(folder)).free


def check_writable(folder: Path) -> None:
    """Raise AttireError, before long work begins, where a folder is not writable. The folder need not exist.

    A temporary file is created to find out, since permissions alone do not tell.
    """
    nearest = _nearest_existing(folder)
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise io_error("write into it", nearest, error) from error


def check_room(folder: Path, needed: int, what: str, do: str = "make room") -> None:
    """Raise AttireError, before long work begins, where `needed` bytes would not fit on the disk."""
    if (free := _free_bytes(folder)) < needed:
        size = f"{human_size(needed)} needed, {human_size(free)} free"
        raise AttireError(folder, f"not enough room for {what}", size, do)


def human_size(count: float) -> str:
    """Format bytes with one decimal in kB, MB or GB (powers of 1,000)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
