"""Folders and object stores behind one face: files by name, read in part, written whole or not at all.

Stores are pyarrow's file systems, with the credentials that each store's own tools use. The server uses none of it:
what a request says never becomes a URL.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from attire.errors import AttireError, UsageError, one_line
from attire.storage import files

_SCHEMES = ("s3", "gs", "az", "http", "https", "file")
_PATIENCE = 15  # seconds that Google's client tries again; its own default is 15 minutes


class StoreError(AttireError):
    """The store did not answer, or refused to: what is there is not known."""


@dataclass(frozen=True)
class StorageLocation:
    """A folder of this machine or a prefix in an object store: files in it by name, written whole or not at all."""

    url: str  # what people are told; no slash at its end
    filesystem: Any  # pyarrow.fs.FileSystem
    path: str

    @property
    def folder(self) -> Path | None:
        """Where it is on this machine; None for an object store."""
        return Path(self.path) if self.filesystem.type_name == "local" else None

    def name(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def sizes(self) -> dict[str, int]:
        """Bytes of each file that lies directly in it."""
        from pyarrow import fs

        with faults(self.url):
            found = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return {info.base_name: info.size for info in found if info.is_file}

    def size(self, name: str) -> int | None:
        """None where there is no such file."""
        info = self.info(name)
        return int(info.size) if info.is_file else None

    def info(self, name: str = "") -> Any:
        """The pyarrow.fs.FileInfo: kind, size, time of the last change."""
        with faults(self.name(name)):
            return self.filesystem.get_file_info(self._at(name))

    def open(self, name: str = "") -> Any:
        """A pyarrow.NativeFile that can seek; each read of an object is a request for that range."""
        with faults(self.name(name)):
            return self.filesystem.open_input_file(self._at(name))

    def read(self, name: str) -> bytes:
        with faults(self.name(name)), self.open(name) as file:
            data: bytes = file.read()
        return data

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """A file to write into, which is there once all of it is; after a failure there is none."""
        if self.folder:
            with files.atomic(self.folder / name) as file:
                yield file
            return
        at = self._at(name)
        with faults(self.name(name)):
            stream = self.filesystem.open_output_stream(at)
            try:
                yield stream
            except BaseException:
                with suppress(OSError):
                    stream.close()  # which pyarrow would do anyway: what was cut off becomes an object
                with suppress(OSError):
                    self.filesystem.delete_file(at)
                raise
            stream.close()

    def write(self, name: str, data: bytes) -> None:
        with self.writing(name) as file:
            file.write(data)

    def remove(self, name: str) -> None:
        with faults(self.name(name)):
            self.filesystem.delete_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path


def is_url(text: object) -> bool:
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", str(text)) is not None


def scheme_of(url: str) -> str:
    """Raises UsageError for one that is not known."""
    scheme = url.partition("://")[0].lower()
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise UsageError(url, f"{scheme}:// is not known", do=f"expected {known} or a path")
    return scheme


def file_path(url: str) -> Path:
    """The path in a file:// URL."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise UsageError(url, "names another machine", do=f"expected file:///{parts.netloc}{parts.path} or a path")
    return Path(url2pathname(parts.path))


def place(where: str | Path) -> StorageLocation:
    """The folder, prefix, file or object that a path or URL names; nothing is asked of a store yet."""
    from pyarrow import fs

    text = str(where)
    if not is_url(text) or scheme_of(text) == "file":
        path = Path(text) if not is_url(text) else file_path(text)
        return StorageLocation(str(path), fs.LocalFileSystem(), str(path.expanduser().absolute()))
    if scheme_of(text) in ("http", "https"):
        raise UsageError(text, "HTTP has no folders and takes no files", do="expected s3://, gs://, az:// or a path")
    scheme, path_in = text.partition("://")[0].lower(), text.partition("://")[2].strip("/")
    bucket = path_in.partition("/")[0]
    if not bucket:
        raise UsageError(text, "names no bucket", do=f"expected {scheme}://bucket/key")
    with faults(text), _built(text):
        if scheme == "gs":
            anonymous, path_in = path_in.startswith("anonymous@"), path_in.removeprefix("anonymous@")
            system = fs.GcsFileSystem(anonymous=anonymous, retry_time_limit=timedelta(seconds=_PATIENCE))
        else:
            system = _s3(bucket) if scheme == "s3" else _azure(text)
    return StorageLocation(text.rstrip("/"), system, path_in)


@contextmanager
def _built(url: str) -> Iterator[None]:
    """Not every build of pyarrow knows every store."""
    try:
        yield
    except ImportError as error:
        raise AttireError(url, "this pyarrow was built without that store", do="install another build of it") from error


def _s3(bucket: str) -> Any:
    """Amazon's, or what AWS_ENDPOINT_URL names; pyarrow reads credentials as Amazon's tools do, but not that."""
    from pyarrow import fs

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region:
        region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket)
    # Delayed: what is small is sent in one request, where opening, a part and closing were three.
    return fs.S3FileSystem(region=region, endpoint_override=endpoint, allow_delayed_open=True)


def _azure(url: str) -> Any:
    from pyarrow import fs

    account = os.environ.get("AZURE_STORAGE_ACCOUNT")
    if not account:
        raise UsageError(url, "whose account is not known", do="set AZURE_STORAGE_ACCOUNT")
    names = {"account_key": "AZURE_STORAGE_KEY", "sas_token": "AZURE_STORAGE_SAS_TOKEN"}
    given = {name: os.environ[variable] for name, variable in names.items() if os.environ.get(variable)}
    return fs.AzureFileSystem(account_name=account, **given)


@contextmanager
def faults(url: str) -> Iterator[None]:
    """Whatever pyarrow raises becomes one AttireError about `url`."""
    try:
        yield
    except FileNotFoundError as error:
        raise AttireError(url, "no such object" if is_url(url) else "no such file") from error
    except (OSError, ValueError) as error:
        if not is_url(url):
            raise files.cannot(
                "use it", Path(url), error if isinstance(error, OSError) else OSError(str(error))
            ) from error
        raise StoreError(url, "the store did not serve it", _told(error)) from error


def _told(error: Exception) -> str:
    """The few words that matter of a store's answer."""
    found = re.search(r"AWS Error (\w+)[^:]*: (?:curlCode: \d+, )?([^;(]*)", str(error))
    return one_line(f"{found[1]}: {found[2]}" if found else str(error)).strip()[:120]
