"""A run's folder: a free one found, made and held by one process, told from one that is taken.

It imports little: that a folder is taken is said before PyTorch is loaded.
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
def made_folder(run_dir: str | Path | None) -> Iterator[Path]:
    """A new folder, held. What fails before there is a checkpoint leaves no folder that was not there before."""
    folder = free_folder(run_dir)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        files.make_dir(folder)
        with claim(folder):
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
            with suppress(OSError):  # it is not empty: the run is there
                path.rmdir()


def free_folder(run_dir: str | Path | None) -> Path:
    """A folder that may be written into, not made yet; the next of `runs/1`, `runs/2` ... for None."""
    taken = [int(path.name) for path in Path("runs").glob("*") if path.name.isdigit()]
    folder = Path("runs") / str(max(taken, default=0) + 1) if run_dir is None else Path(run_dir)
    if folder.exists() and not folder.is_dir():
        raise AttireError(folder, "expected a folder, found a file", do="give --out another name")
    if folder.is_dir() and not all(map(_is_leftover, folder.iterdir())):
        if (folder / _LOCK).exists():
            with _hold(folder):  # who is at work there comes before what lies there
                pass
        do = "give --out another name"
        if any((folder / name).exists() for name in ("checkpoints", "series.json")):
            do += f", or go on with: attire train --resume {shlex.quote(str(folder))}"
        raise AttireError(folder, "the folder is not empty", do=do)
    files.check_writable(folder)
    return folder


def _is_leftover(path: Path) -> bool:
    """What a process leaves that was killed before it had written the config of a new run."""
    return path.name in (_LOCK, _PID) or path.match(f"{files.PART}*.part")


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def claim(folder: Path) -> Iterator[Path]:
    """One training a folder: a second one is refused at once, and told who holds it.

    Ctrl-C becomes `Stopped`, and its subject this folder: of a series stopped in one of its runs, the series.
    """
    pid = folder / _PID
    with _hold(folder):
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
def _hold(folder: Path) -> Iterator[None]:
    """Hold a folder's lock. Raises AttireError that names who has it; who is just leaving is waited for."""
    with ExitStack() as held:
        try:
            held.enter_context(files.lock(folder / _LOCK, wait=0.2))
        except TimeoutError as error:
            pid = folder / _PID
            holder = pid.read_text().strip() if pid.exists() else "unknown"
            raise AttireError(folder, f"another attire (process {holder}) is training into it") from error
        yield
