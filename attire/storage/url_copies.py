"""Local copies of what URLs name: downloaded once, verified at each use, downloaded again when the store changes."""

import fnmatch
import glob
import os
import re
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from attire.errors import AttireError, AttireWarning, UsageError
from attire.storage import files
from attire.storage.http import MirrorError, ProgressCallback, describe_error, download
from attire.storage.stores import StorageLocation, StoreError, is_url, open_location, scheme_of, store_errors

_BLOCK = 4 * 2**20  # bytes a read: a store answers each with a request of its own
_MAX_HTTP_BYTES = 1 << 40  # of one file
_HTTP_SECONDS = 10.0  # for the answer to HEAD
_RECORD = "OBJECTS.json"
_RECORD_EVERY = 256  # objects between two writings of the record

_Entries = dict[str, dict[str, Any]]  # of the record: by the path below the URL, "" for a single object


def local_copy(source: str | Path, progress: ProgressCallback | None = None) -> Path:
    """Return the path to read `source` from: itself, or for a URL its copy, the same tree under the same name.

    An interrupted copy continues where it stopped. Another version in the store replaces the copy. Each call checks
    every file's SHA-256. Where the store cannot be reached, an undamaged copy is used with a warning. Raises
    AttireError.
    """
    if not is_url(source):
        return Path(source)
    url = str(source)
    if scheme_of(url) == "file":
        return Path(open_location(url).path)
    folder = _copies_folder() / files.sha256(url.encode())[:16]
    with files.lock(folder.with_suffix(".lock")):
        return _update_copy(url, folder, progress or (lambda name, done, total: None))


def prefetch(*sources: str | Path | None, progress: ProgressCallback) -> None:
    """Copy those sources that are URLs, and report progress; later reads use the copies."""
    for source in sources:
        if source is not None and is_url(source):
            local_copy(source, progress)


def _copies_folder() -> Path:
    return files.cache_dir() / "objects"


def _update_copy(url: str, folder: Path, progress: ProgressCallback) -> Path:
    """Make the copy agree with the store. The caller holds the lock."""
    target, recorded = folder / _base_name(url), _read_record(folder, url)
    try:
        objects = _list_objects(url)
    except StoreError as error:
        if not recorded or not all(_is_undamaged(target, name, entry) for name, entry in recorded.items()):
            raise
        warnings.warn(f"{error}; the copy that was made before is used", AttireWarning, stacklevel=4)
        return target
    current = {name for name, one in objects.items() if _is_current(recorded.get(name), one, target, name)}
    entries = {name: recorded[name] for name in objects if name in current}
    missing = {name: one for name, one in objects.items() if name not in current}
    needed = sum(one.size for one in missing.values())
    files.check_room(folder, needed, "a copy of it", "make room, or name another disk's folder in ATTIRE_CACHE")
    for name in set(recorded) - set(objects):
        (target / name).unlink(missing_ok=True)
    try:
        for count, (name, one) in enumerate(missing.items(), 1):
            part = folder / f"{files.sha256(f'{name} {one.version}'.encode())[:16]}.part"
            entries[name] = one.copy(_path_below(target, name), part, progress)
            if count % _RECORD_EVERY == 0:
                _write_record(folder, url, entries)
    finally:
        if entries != recorded:
            _write_record(folder, url, entries)
    for part in folder.glob("*.part"):  # of versions that the store no longer has
        part.unlink()
    return target


@dataclass(frozen=True)
class _StoredObject:
    """One object of a store. version: its size with its ETag, or where many are listed the time of its change."""

    location: StorageLocation
    size: int
    version: str

    @property
    def url(self) -> str:
        return self.location.url

    def copy(self, target: Path, part: Path, progress: ProgressCallback) -> dict[str, Any]:
        """Download into `part`, from its end on, then rename it to `target`. Returns the record's entry."""
        files.make_dir(target.parent)
        with self.location.open() as source:
            etag = _metadata(source).get("ETag", "")
            done = part.stat().st_size if part.exists() else 0
            done = done if done <= self.size else 0
            try:
                with part.open("r+b" if done else "wb") as out:
                    out.seek(done)
                    with store_errors(self.url):
                        source.seek(done)
                    while block := self._read_block(source):
                        out.write(block)
                        done += len(block)
                        progress(target.name, done, self.size)
                    out.flush()
                    os.fsync(out.fileno())
            except OSError as error:
                raise files.io_error("write", part, error) from error
        if done != self.size:
            part.unlink()
            raise StoreError(self.url, f"{done:,} bytes came, {self.size:,} expected", do="try again")
        entry = {"size": done, "version": self.version, "etag": etag, "sha256": files.sha256_file(part)}
        part.replace(target)
        return entry

    def _read_block(self, source: Any) -> bytes:
        with store_errors(self.url):
            block: bytes = source.read(_BLOCK)
        return block


@dataclass(frozen=True)
class _HttpFile:
    """A file over HTTP. version: size with ETag or date; "" where the server names none: its copy is never renewed."""

    url: str
    size: int
    version: str

    def copy(self, target: Path, part: Path, progress: ProgressCallback) -> dict[str, Any]:
        """As `_StoredObject.copy`, but `download` keeps unfinished files itself."""

        def read(arrived: Path) -> dict[str, Any]:
            with arrived.open("rb") as source, files.atomic_file(target) as out:
                while block := source.read(_BLOCK):
                    out.write(block)
            size = target.stat().st_size
            return {"size": size, "version": self.version, "etag": "", "sha256": files.sha256_file(target)}

        try:
            return download(self.url, self.size or _MAX_HTTP_BYTES, read, progress)
        except MirrorError as error:
            raise StoreError(self.url, f"{error}") from error


def locations(url: str) -> list[StorageLocation]:
    """Return where to read the objects that a URL names, by name; a file over HTTP is copied first.

    Raises AttireError where there is none, StoreError where that is unknown.
    """
    objects = _list_objects(url).values()
    return [one.location if isinstance(one, _StoredObject) else open_location(local_copy(url)) for one in objects]


def _list_objects(url: str) -> dict[str, _StoredObject] | dict[str, _HttpFile]:
    """List what a URL names: one object, those below a prefix, or those that match a pattern. Raises as `locations`."""
    from pyarrow import fs

    if scheme_of(url) in ("http", "https"):
        return {"": _request_head(url)}
    bare, pattern = _split_pattern(url)
    location = open_location(bare)
    path, filesystem = location.path, location.filesystem
    with store_errors(bare):
        info = filesystem.get_file_info(path)
        if info.is_file and not pattern:
            with filesystem.open_input_file(path) as file:
                version = f"{info.size} {_metadata(file).get('ETag') or info.mtime_ns}"
            return {"": _StoredObject(location, info.size, version)}
        infos = filesystem.get_file_info(fs.FileSelector(path, recursive=not pattern, allow_not_found=True))
    objects = {}
    for info in sorted((info for info in infos if info.is_file), key=lambda info: str(info.path)):
        name = info.path[len(path) + 1 :]
        if not pattern or fnmatch.fnmatchcase(name, pattern):
            below = StorageLocation(f"{bare}/{name}", filesystem, info.path)
            objects[name] = _StoredObject(below, info.size, f"{info.size} {info.mtime_ns}")
    if not objects:
        raise AttireError(url, "no such object")
    return objects


def _split_pattern(url: str) -> tuple[str, str]:
    """Split a URL into its folder and the pattern in its last part; without a pattern, into itself and ""."""
    bare, pattern = url.rstrip("/"), ""
    if glob.has_magic(url.partition("://")[2]):
        bare, _, pattern = bare.rpartition("/")
        if glob.has_magic(bare.partition("://")[2]):
            raise UsageError(url, "a pattern in the name of a folder", do="only the last part may hold * ? [")
    return bare, pattern


def _metadata(file: Any) -> dict[str, str]:
    """Return the store's metadata of an open object, such as its ETag."""
    return {_text(key): _text(value) for key, value in (file.metadata() or {}).items()}


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _request_head(url: str) -> _HttpFile:
    """Ask a server for a file's size and version."""
    request = urllib.request.Request(url, headers={"User-Agent": "attire"}, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_HTTP_SECONDS) as response:
            size, headers = int(response.headers.get("Content-Length") or 0), response.headers
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (404, 410):
            raise AttireError(url, f"HTTP {error.code}: no such file") from error
        if error.code not in (405, 501):  # a server without HEAD
            raise StoreError(url, f"HTTP {error.code}") from error
        return _HttpFile(url, 0, "")
    except (OSError, ValueError) as error:
        raise StoreError(url, "cannot be reached", describe_error(error)) from error
    tag = headers.get("ETag") or headers.get("Last-Modified") or ""
    return _HttpFile(url, size, f"{size} {tag}" if tag or size else "")


def _is_current(entry: dict[str, Any] | None, one: _StoredObject | _HttpFile, target: Path, name: str) -> bool:
    """Check that the copy has this version and is undamaged. Warns (AttireWarning) where it is damaged."""
    if entry is None or entry.get("version") != one.version:
        return False
    if _is_undamaged(target, name, entry):
        return True
    warnings.warn(f"{one.url}: its copy in the cache is damaged and made again", AttireWarning, stacklevel=6)
    return False


def _is_undamaged(target: Path, name: str, entry: dict[str, Any]) -> bool:
    path = _path_below(target, name)
    return path.is_file() and files.sha256_file(path) == entry.get("sha256")


def _path_below(target: Path, name: str) -> Path:
    """Return the path of an object in the copy. Raises AttireError for a name that leads elsewhere."""
    if name and (any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or "\0" in name):
        raise AttireError(target.name, "an object's name cannot be a file's", name[:80])
    return target / name if name else target


def _read_record(folder: Path, url: str) -> _Entries:
    """Read the record's entries; none where it is missing or damaged."""
    try:
        value = files.read_json(folder / _RECORD) if (folder / _RECORD).exists() else {}
    except AttireError:
        return {}
    entries = value.get("objects")
    if value.get("url") != url or not isinstance(entries, dict):
        return {}
    return {name: entry for name, entry in entries.items() if isinstance(entry, dict)}


def _write_record(folder: Path, url: str, entries: _Entries) -> None:
    files.write_json(folder / _RECORD, {"schema": 1, "url": url, "objects": entries})


def _base_name(url: str) -> str:
    """Return a file name from the last part of a URL's path, for a pattern from its folder's."""
    bare = url if scheme_of(url).startswith("http") else _split_pattern(url)[0]
    parts = [part for part in urlsplit(bare).path.split("/") if part] or [urlsplit(bare).netloc]
    return re.sub(r"[^\w.+ -]", "_", parts[-1]).lstrip(".")[:120] or "object"


def copies() -> Iterator[tuple[str, str, int]]:
    """Yield key, URL and bytes of each copy."""
    for path in sorted(_copies_folder().glob(f"*/{_RECORD}")):
        try:
            value = files.read_json(path)
            size = sum(int(entry["size"]) for entry in value["objects"].values())
            yield path.parent.name, str(value["url"]), size
        except (AttireError, KeyError, TypeError, AttributeError):
            continue


def delete_copies() -> int:
    """Delete all copies, unfinished ones too; returns the bytes freed."""
    freed = 0
    for folder in sorted(path for path in _copies_folder().glob("*") if path.is_dir()):
        with files.lock(folder.with_suffix(".lock")):
            for path in sorted(folder.rglob("*"), reverse=True):  # what a folder holds comes before it
                freed += path.stat().st_size if path.is_file() else 0
                path.rmdir() if path.is_dir() else path.unlink()
            folder.rmdir()
        folder.with_suffix(".lock").unlink(missing_ok=True)
    return freed
