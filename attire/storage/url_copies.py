"""Copies of what URLs name, in the cache: made once, verified at every use, made again when the store has another."""

import fnmatch
import glob
import os
import re
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from attire.errors import AttireError, AttireWarning, UsageError
from attire.storage import files
from attire.storage.http import MirrorError, download, reason
from attire.storage.stores import StorageLocation, StoreError, faults, file_path, is_url, place, scheme_of

_BLOCK = 4 * 2**20  # bytes a read: a store answers each with a request of its own
_LARGEST = 1 << 40  # bytes of one file over HTTP
_HTTP_SECONDS = 10.0  # for the head of an answer
_RECORD = "OBJECTS.json"
_OFTEN = 256  # objects between two writings of the record

_ProgressCallback = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)
_Lines = dict[str, dict[str, Any]]  # of the record: by the path below the URL, "" for a single object


def local(source: str | Path, progress: _ProgressCallback | None = None) -> Path:
    """Where `source` is read from: itself, or for a URL its copy, the same tree under the same name.

    A copy is made once, goes on where it was stopped, and is made again when the store names another version of the
    object. The SHA-256 that each object had when it came is checked at every call. Where the store cannot be reached, a
    sound copy is used, with a warning. Raises AttireError.
    """
    if not is_url(source):
        return Path(source)
    url = str(source)
    if scheme_of(url) == "file":
        return file_path(url)
    folder = _copies_folder() / files.sha256(url.encode())[:16]
    with files.lock(folder.with_suffix(".lock")):
        return _mirrored(url, folder, progress or (lambda what, done, total: None))


def bring(*sources: str | Path | None, progress: _ProgressCallback) -> None:
    """Copy what is named by URLs while somebody is told how far it is; whoever reads it later finds it there."""
    for source in sources:
        if source is not None and is_url(source):
            local(source, progress)


def _copies_folder() -> Path:
    return files.cache_dir() / "objects"


def _mirrored(url: str, folder: Path, progress: _ProgressCallback) -> Path:
    """The copy, made to agree with the store; whoever calls holds the lock."""
    target, known = folder / _base_name(url), _recorded(folder, url)
    try:
        found = listed(url)
    except StoreError as error:
        if not known or not all(_is_sound(target, name, line) for name, line in known.items()):
            raise
        warnings.warn(f"{error}; the copy that was made before is used", AttireWarning, stacklevel=4)
        return target
    kept = {name: known[name] for name, one in found.items() if _keeps(known.get(name), one, target, name)}
    missing = [name for name in found if name not in kept]
    need = sum(found[name].size for name in missing)
    files.check_room(folder, need, "a copy of it", "make room, or name another disk's folder in ATTIRE_CACHE")
    for name in set(known) - set(found):
        (target / name).unlink(missing_ok=True)
    try:
        for count, name in enumerate(missing, 1):
            path, part = (
                _below(target, name),
                folder / f"{files.sha256(f'{name} {found[name].version}'.encode())[:16]}.part",
            )
            kept[name] = found[name].copy(path, part, progress)
            if count % _OFTEN == 0:
                _record(folder, url, kept)
    finally:
        if kept != known:
            _record(folder, url, kept)
    for part in folder.glob("*.part"):  # of versions that are no more
        part.unlink()
    return target


@dataclass(frozen=True)
class StoredObject:
    """One object of a store; version: its size with its ETag, or where many are listed the time of its change."""

    place: StorageLocation
    size: int
    version: str

    @property
    def url(self) -> str:
        return self.place.url

    def copy(self, target: Path, part: Path, progress: _ProgressCallback) -> dict[str, Any]:
        """Stream it into `part`, going on where that ends, then into its place; its line for the record."""
        files.make_dir(target.parent)
        with self.place.open() as source:
            etag = _marks(source).get("ETag", "")
            done = part.stat().st_size if part.exists() else 0
            done = done if done <= self.size else 0
            try:
                with part.open("r+b" if done else "wb") as out:
                    out.seek(done)
                    with faults(self.url):
                        source.seek(done)
                    while block := _read(source, self.url):
                        out.write(block)
                        done += len(block)
                        progress(target.name, done, self.size)
                    out.flush()
                    os.fsync(out.fileno())
            except OSError as error:
                raise files.cannot("write", part, error) from error
        if done != self.size:
            part.unlink()
            raise StoreError(self.url, f"{done:,} bytes came, {self.size:,} expected", do="try again")
        line = {"size": done, "version": self.version, "etag": etag, "sha256": files.sha256_file(part)}
        part.replace(target)
        return line


def _read(source: Any, url: str) -> bytes:
    with faults(url):
        block: bytes = source.read(_BLOCK)
    return block


@dataclass(frozen=True)
class HttpFile:
    """A file over HTTP; version: size with ETag or date, "" where the server says none: then the copy is for good."""

    url: str
    size: int
    version: str

    def copy(self, target: Path, part: Path, progress: _ProgressCallback) -> dict[str, Any]:
        """By `download`, which keeps unfinished files itself."""

        def take(arrived: Path) -> dict[str, Any]:
            with arrived.open("rb") as source, files.atomic(target) as out:
                while block := source.read(_BLOCK):
                    out.write(block)
            size = target.stat().st_size
            return {"size": size, "version": self.version, "etag": "", "sha256": files.sha256_file(target)}

        try:
            return download(self.url, self.size or _LARGEST, take, progress)
        except MirrorError as error:
            raise StoreError(self.url, f"{error}") from error


def listed(url: str) -> dict[str, StoredObject] | dict[str, HttpFile]:
    """What a URL names: one object, those below a prefix, or those that a pattern matches.

    Raises AttireError where there is nothing, StoreError where that is not known.
    """
    from pyarrow import fs

    if scheme_of(url) in ("http", "https"):
        return {"": _head(url)}
    bare, pattern = _without_pattern(url)
    at = place(bare)
    with faults(bare):
        info = at.filesystem.get_file_info(at.path)
        if info.is_file and not pattern:
            with at.filesystem.open_input_file(at.path) as file:
                return {"": StoredObject(at, info.size, f"{info.size} {_marks(file).get('ETag') or info.mtime_ns}")}
        inside = at.filesystem.get_file_info(fs.FileSelector(at.path, recursive=not pattern, allow_not_found=True))
    found = {}
    for each in sorted((each for each in inside if each.is_file), key=lambda each: str(each.path)):
        name = each.path[len(at.path) + 1 :]
        if not pattern or fnmatch.fnmatchcase(name, pattern):
            one = StorageLocation(f"{bare}/{name}", at.filesystem, each.path)
            found[name] = StoredObject(one, each.size, f"{each.size} {each.mtime_ns}")
    if not found:
        raise AttireError(url, "no such object")
    return found


def _without_pattern(url: str) -> tuple[str, str]:
    """The URL and "", or the folder and the pattern that is its last part."""
    bare, pattern = url.rstrip("/"), ""
    if glob.has_magic(url.partition("://")[2]):
        bare, _, pattern = bare.rpartition("/")
        if glob.has_magic(bare.partition("://")[2]):
            raise UsageError(url, "a pattern in the name of a folder", do="only the last part may hold * ? [")
    return bare, pattern


def _marks(file: Any) -> dict[str, str]:
    """What the store says of an open object: ETag and others."""
    return {_plain(key): _plain(value) for key, value in (file.metadata() or {}).items()}


def _plain(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _head(url: str) -> HttpFile:
    """What a server says of a file before it sends it."""
    request = urllib.request.Request(url, headers={"User-Agent": "attire"}, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_HTTP_SECONDS) as answer:
            size, said = int(answer.headers.get("Content-Length") or 0), answer.headers
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (404, 410):
            raise AttireError(url, f"HTTP {error.code}: no such file") from error
        if error.code not in (405, 501):  # a server that knows no HEAD
            raise StoreError(url, f"HTTP {error.code}") from error
        return HttpFile(url, 0, "")
    except (OSError, ValueError) as error:
        raise StoreError(url, "cannot be reached", reason(error)) from error
    mark = said.get("ETag") or said.get("Last-Modified") or ""
    return HttpFile(url, size, f"{size} {mark}" if mark or size else "")


def _keeps(line: dict[str, Any] | None, one: StoredObject | HttpFile, target: Path, name: str) -> bool:
    """Whether the copy is of this version and sound."""
    if line is None or line.get("version") != one.version:
        return False
    if _is_sound(target, name, line):
        return True
    warnings.warn(f"{one.url}: its copy in the cache is damaged and made again", AttireWarning, stacklevel=6)
    return False


def _is_sound(target: Path, name: str, line: dict[str, Any]) -> bool:
    path = _below(target, name)
    return path.is_file() and files.sha256_file(path) == line.get("sha256")


def _below(target: Path, name: str) -> Path:
    """The file of an object in the copy; refuses a key that would lie elsewhere."""
    if name and (any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or "\0" in name):
        raise AttireError(target.name, "an object's name cannot be a file's", name[:80])
    return target / name if name else target


def _recorded(folder: Path, url: str) -> _Lines:
    """Lines of the record; none where there is none that is sound."""
    try:
        value = files.read_json(folder / _RECORD) if (folder / _RECORD).exists() else {}
    except AttireError:
        return {}
    lines = value.get("objects")
    if value.get("url") != url or not isinstance(lines, dict):
        return {}
    return {name: line for name, line in lines.items() if isinstance(line, dict)}


def _record(folder: Path, url: str, lines: _Lines) -> None:
    files.write_json(folder / _RECORD, {"schema": 1, "url": url, "objects": lines})


def _base_name(url: str) -> str:
    """The last part of a URL's path as a file's name; of a pattern its folder's."""
    bare = url if scheme_of(url).startswith("http") else _without_pattern(url)[0]
    parts = [part for part in urlsplit(bare).path.split("/") if part] or [urlsplit(bare).netloc]
    return re.sub(r"[^\w.+ -]", "_", parts[-1]).lstrip(".")[:120] or "object"


def copies() -> Iterator[tuple[str, str, int]]:
    """(key, URL, bytes) of each copy."""
    for path in sorted(_copies_folder().glob(f"*/{_RECORD}")):
        try:
            value = files.read_json(path)
            yield path.parent.name, str(value["url"]), sum(int(line["size"]) for line in value["objects"].values())
        except (AttireError, KeyError, TypeError, AttributeError):
            continue


def delete_copies() -> int:
    """Remove them all, unfinished ones too; returns the bytes freed."""
    freed = 0
    for folder in sorted(path for path in _copies_folder().glob("*") if path.is_dir()):
        with files.lock(folder.with_suffix(".lock")):
            for path in sorted(folder.rglob("*"), reverse=True):  # what a folder holds comes before it
                freed += path.stat().st_size if path.is_file() else 0
                path.rmdir() if path.is_dir() else path.unlink()
            folder.rmdir()
        folder.with_suffix(".lock").unlink(missing_ok=True)
    return freed
