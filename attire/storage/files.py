"""Digests, atomic writes, locks and the cache folder: the only code that writes artefacts."""

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

_ANOTHER = "name a folder for the cache in ATTIRE_CACHE"
_reading_umask = threading.Lock()
PART = ".attire."  # how the names of temporary files begin; they end in .part


def cache_dir() -> Path:
    """`$ATTIRE_CACHE`, else the platform's user cache folder; made on first use."""
    try:
        path = Path(os.environ.get("ATTIRE_CACHE") or platformdirs.user_cache_dir("attire", appauthor=False))
        return make_dir(path.expanduser().absolute(), _ANOTHER)
    except RuntimeError as error:
        raise AttireError("cache folder", "nothing says where your home is", do=_ANOTHER) from error


def make_dir(path: Path, do: str = "") -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot("make the folder", path, error, do) from error
    return path


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """One byte string for equal values: sorted keys, no spaces, no NaN. What cache keys are digests of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """Write to a temporary file beside `path`; on success fsync and rename, on any failure leave no trace.

    What a process that was killed left behind, here or for other files of the folder, is removed first.
    """
    make_dir(path.parent)
    sweep(path.parent)
    try:
        handle, part = _temporary(path)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                part.chmod(0o666 & ~umask())
                if fcntl:  # while it is locked: between its closing and its renaming another writer would sweep it
                    part.replace(path)
            if not fcntl:
                part.replace(path)
            _sync_dir(path.parent)
        finally:
            part.unlink(missing_ok=True)  # before a full disk is told with what is free without it
    except OSError as error:
        raise cannot("write", path, error) from error


def _temporary(path: Path) -> tuple[int, Path]:
    """A new file beside `path`, open for writing, on which this process holds a lock: `sweep` leaves it alone."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f"{PART}{path.name[:80]}.", suffix=".part", dir=path.parent)
        if fcntl is None:
            return handle, Path(name)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # not swept between the two
            return handle, Path(name)
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders of processes that were killed: the kernel has freed the locks on them."""
    if fcntl is None:
        return
    for part in folder.glob(f"{PART}*.part"):
        with suppress(OSError), _handle_of(part) as handle:  # somebody's who is still writing, or swept by another
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if part.is_dir():
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink()


@contextmanager
def _handle_of(path: Path) -> Iterator[int]:
    """The number of an open file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """As `atomic`, for a folder: it is called `path`, where at most an empty folder lies, once all of it is there."""
    with scratch(path) as part:
        yield part
        part.chmod(0o777 & ~umask())
        part.replace(path)
        _sync_dir(part.parent)


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` for what is made on the way to it; it goes, as `atomic`'s file does."""
    parent = make_dir(path.absolute().parent)
    sweep(parent)
    try:
        part = Path(tempfile.mkdtemp(prefix=f"{PART}{path.name[:80]}.", suffix=".part", dir=parent))
        try:
            with _locked(part):
                yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise cannot("write", path, error) from error


@contextmanager
def _locked(part: Path) -> Iterator[None]:
    """A temporary folder that `sweep` leaves alone."""
    if fcntl is None:
        yield
        return
    with _handle_of(part) as handle:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    with atomic(path) as file:
        file.write(data)


class _DigestWriter:
    """A file to write into that cannot seek, so that every byte passes through the digest once and in order."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._sum = file, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self._sum.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> bytes:
        return self._sum.digest()


@contextmanager
def sealed(path: Path) -> Iterator[_DigestWriter]:
    """As `atomic`, for a file that ends with the SHA-256 of all that was written into it."""
    with atomic(path) as file:
        writer = _DigestWriter(file)
        yield writer
        file.write(writer.digest())


def is_sound(path: Path) -> bool:
    """Whether a file that `sealed` wrote is whole."""
    with path.open("rb") as file:
        left = max(0, path.stat().st_size - hashlib.sha256().digest_size)
        found = hashlib.sha256()
        while left and (block := file.read(min(left, 2**20))):
            found.update(block)
            left -= len(block)
        return file.read() == found.digest()


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises AttireError where the file is missing, unreadable or holds anything else.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise cannot("read", path, error) from error
    except (ValueError, RecursionError) as error:
        raise AttireError(path, "not valid JSON", str(error)[:80], "the file may be damaged") from error
    if not isinstance(value, dict):
        raise AttireError(path, f"expected a JSON object, found {type(value).__name__}")
    return value


@contextmanager
def lock(path: Path, wait: float = -1) -> Iterator[None]:
    """Hold `path` as a lock file between processes; the kernel frees it when the holder dies.

    `wait` in seconds, -1 for ever. Raises TimeoutError when another process still holds it then, AttireError where its
    folder cannot be written into.
    """
    make_dir(path.parent)
    held = filelock.FileLock(path, timeout=wait, poll_interval=0.1)
    try:
        held.acquire()
    except filelock.Timeout as error:
        raise TimeoutError(f"{path} is held by another process") from error
    except OSError as error:
        raise cannot("write into it", path.parent, error) from error
    try:
        yield
    finally:
        held.release()


def release(array: Any) -> None:
    """Give the pages of a memory-mapped array back: they stay in the system's page cache but leave this process's
    resident memory. Nothing is done to an array of another kind."""
    while array is not None and not isinstance(array, mmap.mmap):
        array = getattr(array, "base", None)
    if array is not None and hasattr(mmap, "MADV_DONTNEED"):
        array.madvise(mmap.MADV_DONTNEED)


def _sync_dir(path: Path) -> None:
    """A rename is durable only once its folder is."""
    if os.name != "posix":
        return
    with _handle_of(path) as handle:
        os.fsync(handle)


def umask() -> int:
    """It can only be read by setting it, which threads must not do at the same time."""
    with _reading_umask:
        mask = os.umask(0o022)
        os.umask(mask)
    return mask


def cannot(verb: str, path: Path, error: OSError, do: str = "") -> AttireError:
    """The error of the system in one line. do: what helps where it is not for want of room."""
    return AttireError(path, f"cannot {verb}", error.strerror or str(error), room_left(path, error) or do)


def room_left(path: Path, error: OSError) -> str:
    """Where the disk is full, what is left of it; else nothing."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    return f"make room: {human_size(_free_bytes(path.parent))} are free there"


def _nearest(folder: Path) -> Path:
    """The folder, or the lowest one above it that is there already."""
    return next((place for place in (folder, *folder.parents) if place.exists()), Path("/"))


def _free_bytes(folder: Path) -> int:
    """What may still be written in the file system of a folder, which need not be there yet."""
    return shutil.disk_usage(_nearest(folder)).free


def check_writable(folder: Path) -> None:
    """Raise AttireError, before long work is begun, where nothing can be written into a folder, which need not be
    there yet. It is tried, with a file that where the system can has no name: rights alone do not tell."""
    there = _nearest(folder)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise cannot("write into it", there, error) from error


def check_room(folder: Path, needed: int, what: str, do: str = "make room") -> None:
    """Raise AttireError, before long work is begun, where its result would not fit on the disk."""
    if (free := _free_bytes(folder)) < needed:
        size = f"{human_size(needed)} needed, {human_size(free)} free"
        raise AttireError(folder, f"not enough room for {what}", size, do)


def human_size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
