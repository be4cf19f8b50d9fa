"""Finished feature entries shared between machines through a folder or an object store: pulled instead of computed.

`ATTIRE_REMOTE_CACHE` names it: s3://bucket/prefix, gs://, az://, or a folder that several machines see. It only saves
time: an entry that is missing, damaged or out of reach is computed here, after one line of warning.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from attire.errors import AttireError, AttireWarning, UsageError
from attire.storage import files
from attire.storage.stores import StorageLocation, StoreError, open_location

_VARIABLE = "ATTIRE_REMOTE_CACHE"
_MANIFEST = "MANIFEST.json"
_THREADS = 4  # shards under way at a time, 16 MB each: one alone waits for the store most of the time

# Stores that refused to be read or written in this process. Each is asked once, and warned of once.
_unreadable: set[str] = set()
_unwritable: set[str] = set()


class _Shard(NamedTuple):
    """A shard's local file and its record: rows and SHA-256."""

    path: Path
    record: dict[str, Any]

    @property
    def remote_name(self) -> str:
        """With the beginning of its digest: two machines that make one entry differently do not mix their shards."""
        return f"{self.path.stem}-{self.record['sha256'][:16]}.npy"


def pull(
    folder: Path, expected: dict[str, Any], shards: Sequence[tuple[Path, int]], progress: Callable[[int, int], None]
) -> None:
    """Bring the shards of a finished shared entry, with their records, as an extraction here would leave them.

    expected: what the shared manifest must say of its entry; shards: path and rows of each, in order; progress: gets
    rows that are here, and rows in all. A shard gets its name here once its bytes have the manifest's SHA-256; shards
    whose bytes have another are left to be computed.
    """
    if (folder / _MANIFEST).exists():
        return
    with _failure_as_warning("features are computed here", _unreadable, _unwritable):
        location = _open_shared(folder.name, _unreadable)
        if location is None or location.size(_MANIFEST) is None:
            return
        records = _read_manifest(location, expected, [rows for _, rows in shards])
        wanted = [_Shard(path, rec) for (path, _), rec in zip(shards, records, strict=True) if not path.exists()]
        done = sum(rows for _, rows in shards) - sum(shard.record["rows"] for shard in wanted)
        damaged = []
        with ThreadPoolExecutor(_THREADS, "pull") as pool:
            for shard, sound in zip(wanted, pool.map(lambda shard: _fetch(location, shard), wanted), strict=True):
                done += shard.record["rows"]
                damaged += [] if sound else [shard.remote_name]
                progress(done, expected["rows"])
        if damaged:
            others = f", and {len(damaged) - 1} others" if damaged[1:] else ""
            raise AttireError(location.url_of(damaged[0]), f"damaged or missing{others}")


def push(folder: Path) -> None:
    """Share a finished entry: shards first, the manifest last. One that is there already stays as it is."""
    with _failure_as_warning("new features are not shared", _unwritable):  # a store that is only readable is read on
        location = _open_shared(folder.name, _unwritable)
        if location is None or location.size(_MANIFEST) is not None:
            return
        records, sizes = files.read_json(folder / _MANIFEST)["shards"], location.sizes()
        shards = [_Shard(folder / f"shard-{i:05d}.npy", record) for i, record in enumerate(records)]
        missing = [shard for shard in shards if sizes.get(shard.remote_name) != shard.path.stat().st_size]
        with ThreadPoolExecutor(_THREADS, "push") as pool:
            list(pool.map(lambda shard: location.write(shard.remote_name, shard.path.read_bytes()), missing))
        location.write(_MANIFEST, (folder / _MANIFEST).read_bytes())


def _open_shared(key: str, refused: Set[str]) -> StorageLocation | None:
    """Where the entry with this key is shared; None where no store is named, or it refused before."""
    store = _store_name()
    return open_location(f"{store}/{key}") if store and store not in refused else None


def _store_name() -> str:
    return os.environ.get(_VARIABLE, "").strip().rstrip("/")


@contextmanager
def _failure_as_warning(consequence: str, *refusals: set[str]) -> Iterator[None]:
    """Turn an AttireError into a warning, and add a store that failed to `refusals`; a wrong name stays an error."""
    try:
        yield
    except UsageError:
        raise
    except AttireError as error:
        if isinstance(error, StoreError):
            for refused in refusals:
                refused.add(_store_name())
        warnings.warn(f"{_VARIABLE}: {error}; {consequence}", AttireWarning, stacklevel=5)


def _read_manifest(location: StorageLocation, expected: dict[str, Any], rows: list[int]) -> list[dict[str, Any]]:
    """Rows and SHA-256 of each shard. Raises AttireError where the manifest is damaged or of another entry."""
    try:
        manifest = json.loads(location.read(_MANIFEST))
        shards = manifest["shards"]
        same = {name: manifest.get(name) for name in expected} == expected
        sound = same and [shard["rows"] for shard in shards] == rows and all(len(s["sha256"]) == 64 for s in shards)
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise AttireError(location.url_of(_MANIFEST), "damaged, or not of these features", do="delete it there")
    return [{"rows": shard["rows"], "sha256": shard["sha256"]} for shard in shards]


def _fetch(location: StorageLocation, shard: _Shard) -> bool:
    """Bring one shard; False where it is missing or damaged."""
    try:
        data = location.read(shard.remote_name)
    except StoreError:
        raise
    except AttireError:
        return False
    if files.sha256(data) != shard.record["sha256"]:
        return False
    files.write_bytes(shard.path, data)
    files.write_json(shard.path.with_suffix(".json"), shard.record)
    return True
