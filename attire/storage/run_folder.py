"""A run's folder: find a free one, create it, and lock it for one process.

This module imports little, so that a taken folder is refused before PyTorch is loaded.
"""

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from attire.errors import AttireError, Stopped
from attire.storage import files

_LOCK, _PID = ".lock", ".pid"  # in a run's folder while a process works on it


@contextmanager
def new_run_folder(run_dir: str | Path | None) -> Iterator[Path]:
    """Create and lock a run folder. A run that fails before its first checkpoint leaves no new folder behind."""
    folder = find_free_folder(run_dir)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        files.make_dir(folder)
        with claim_folder(folder):
            try:
                yield folder
            except Stopped:
                raise
            except Exception:
                if not any(folder.rglob("*.ckpt")):
                    _clear(folder)
                raise
    finally:
        for path in missing:
            with suppress(OSError):  # not empty: it holds the run
                path.rmdir()


def find_free_folder(run_dir: str | Path | None) -> Path:
    """Return a writable run folder that is empty or does not exist yet; for None the next of `runs/1`, `runs/2` ...

    Raises AttireError where `run_dir` is taken.
    """
    taken = [int(path.name) for path in Path("runs").glob("*") if path.name.isdigit()]
    folder = Path("runs") / str(max(taken, default=0) + 1) if run_dir is None else Path(run_dir)
    if folder.exists() and not folder.is_dir():
        raise AttireError(folder, "expected a folder, found a file", do="give --out another name")
    if folder.is_dir() and not all(map(_is_leftover, folder.iterdir())):
        if (folder / _LOCK).exists():
            with _locked(folder):  # a process at work there is reported before what lies there
                pass
        do = "give --out another name"
        if any((folder / name).exists() for name in ("checkpoints", "series.json")):
            do += f", or go on with: attire train --resume {shlex.quote(str(folder))}"
        raise AttireError(folder, "the folder is not empty", do=do)
    files.check_writable(folder)
    return folder


def _is_leftover(path: Path) -> bool:
    """Check for what a process leaves that is killed before it has written the config of a new run."""
    return path.name in (_LOCK, _PID) or files.is_temporary(path)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def claim_folder(folder: Path) -> Iterator[Path]:
    """Lock a run folder for one training; a second one raises AttireError that names the first one's process.

    Ctrl-C becomes `Stopped` about this folder. Where one run of a series is stopped, that is the series' folder.
    """
    pid = folder / _PID
    with _locked(folder):
        files.write_text(pid, f"{os.getpid()}\n")
        try:
            yield folder
        except Stopped as stop:
            raise Stopped(folder, stop.what) from None
        except KeyboardInterrupt:
            raise Stopped(folder, "stopped, what was finished is kept") from None
        finally:
            pid.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock. Raises AttireError that names its holder, after a short wait for one that is ending."""
    with ExitStack() as stack:
        try:
            stack.enter_context(files.lock(folder / _LOCK, wait=0.2))
        except TimeoutError as error:
            pid = folder / _PID
            holder = pid.read_text().strip() if pid.exists() else "unknown"
            raise AttireError(folder, f"another attire (process {holder}) is training into it") from error
        yield
