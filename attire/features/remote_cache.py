"""Finished feature entries shared between machines through a folder or an object store: pulled instead of computed.

`ATTIRE_REMOTE_CACHE` names it: s3://bucket/prefix, gs://, az://, or a folder that several machines see. It saves time
and nothing else: what is not there, is damaged or cannot be reached is computed here, after one line of warning.
"""

import json
import os
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attire.errors import AttireError, AttireWarning, UsageError
from attire.storage import files
from attire.storage.stores import StorageLocation, StoreError, open_location

_VARIABLE = "ATTIRE_REMOTE_CACHE"
_MANIFEST = "MANIFEST.json"
_THREADS = 4  # shards under way at a time, 16 MB each: one alone waits for the store most of the time

_ProgressCallback = Callable[[int, int], None]  # (rows there, rows in all)
_unread, _unwritten = (
    set[str](),
    set[str](),
)  # stores that refused in this process: each is asked once, and told of once


def pull(
    folder: Path, made_by: dict[str, Any], shards: Sequence[tuple[Path, int]], progress: _ProgressCallback | None = None
) -> None:
    """Bring the shards of a finished shared entry, with their ledger lines, as an extraction here would leave them.

    made_by: what the shared manifest must say of itself; shards: path and rows of each, in order. A shard gets its name
    here once its bytes agree with the manifest's SHA-256; those that do not are left to be computed.
    """
    if (folder / _MANIFEST).exists():
        return
    with _tolerated("features are computed here", _unread, _unwritten):
        at = _shared_place(folder.name, _unread)
        if at is None or at.size(_MANIFEST) is None:
            return
        lines = _sound_lines(at, made_by, [rows for _, rows in shards])
        wanted = [(path, line) for (path, _), line in zip(shards, lines, strict=True) if not path.exists()]
        done, total = sum(rows for _, rows in shards) - sum(line["rows"] for _, line in wanted), made_by["rows"]
        damaged = []
        with ThreadPoolExecutor(_THREADS, "pull") as pool:
            for (path, line), sound in zip(wanted, pool.map(lambda one: _fetch(at, *one), wanted), strict=True):
                done += line["rows"]
                damaged += [] if sound else [_shared_name(path, line)]
                if progress:
                    progress(done, total)
        if damaged:
            others = f", and {len(damaged) - 1} others" if damaged[1:] else ""
            raise AttireError(at.url_of(damaged[0]), f"damaged or missing{others}")


def push(folder: Path) -> None:
    """Share a finished entry: shards first, the manifest last. One that is there already stays as it is."""
    with _tolerated("new features are not shared", _unwritten):  # who may only read goes on pulling
        at = _shared_place(folder.name, _unwritten)
        if at is None or at.size(_MANIFEST) is not None:
            return
        lines, there = files.read_json(folder / _MANIFEST)["shards"], at.sizes()
        shards = [(folder / f"shard-{i:05d}.npy", line) for i, line in enumerate(lines)]
        missing = [one for one in shards if there.get(_shared_name(*one)) != one[0].stat().st_size]
        with ThreadPoolExecutor(_THREADS, "push") as pool:
            list(pool.map(lambda one: at.write(_shared_name(*one), one[0].read_bytes()), missing))
        at.write(_MANIFEST, (folder / _MANIFEST).read_bytes())


def _shared_place(key: str, refused: Container[str]) -> StorageLocation | None:
    """Where the entry with this key is shared; None where nothing is, or it refused before."""
    where = _named()
    return open_location(f"{where}/{key}") if where and where not in refused else None


def _named() -> str:
    return os.environ.get(_VARIABLE, "").strip().rstrip("/")


@contextmanager
def _tolerated(rest: str, *refused: set[str]) -> Iterator[None]:
    """What fails is one warning, a store that refused is left alone from then on; a wrong name is an error."""
    try:
        yield
    except UsageError:
        raise
    except AttireError as error:
        if isinstance(error, StoreError):
            for places in refused:
                places.add(_named())
        warnings.warn(f"{_VARIABLE}: {error}; {rest}", AttireWarning, stacklevel=5)


def _sound_lines(at: StorageLocation, made_by: dict[str, Any], rows: list[int]) -> list[dict[str, Any]]:
    """The manifest's lines, rows and SHA-256 of each shard; AttireError where it speaks of anything else."""
    try:
        manifest = json.loads(at.read(_MANIFEST))
        lines = manifest["shards"]
        same = {name: manifest.get(name) for name in made_by} == made_by
        sound = same and [line["rows"] for line in lines] == rows and all(len(line["sha256"]) == 64 for line in lines)
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise AttireError(at.url_of(_MANIFEST), "damaged, or not of these features", do="delete it there")
    return [{"rows": line["rows"], "sha256": line["sha256"]} for line in lines]


def _shared_name(path: Path, line: dict[str, Any]) -> str:
    """With the beginning of its digest: two machines that make one entry differently do not mix their shards."""
    return f"{path.stem}-{line['sha256'][:16]}.npy"


def _fetch(at: StorageLocation, path: Path, line: dict[str, Any]) -> bool:
    """Bring one shard; False where it is missing or damaged."""
    try:
        data = at.read(_shared_name(path, line))
    except StoreError:
        raise
    except AttireError:
        return False
    if files.sha256(data) != line["sha256"]:
        return False
    files.write_bytes(path, data)
    files.write_json(path.with_suffix(".json"), line)
    return True
