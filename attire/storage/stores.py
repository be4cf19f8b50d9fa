"""One interface to local folders and object stores: files by name, partial reads, atomic writes.

Stores are pyarrow's file systems, with the credentials that each store's own tools use. The server does not use this
module: no part of a request ever becomes a URL.
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
_RETRY_SECONDS = 15  # of Google's client; its own default is 15 minutes


class StoreError(AttireError):
    """The store did not answer, or refused to: its content is unknown."""


@dataclass(frozen=True)
class StorageLocation:
    """A local folder or a prefix in an object store. Files in it have names and are written atomically."""

    url: str  # as shown to people; no slash at its end
    filesystem: Any  # pyarrow.fs.FileSystem
    path: str

    @property
    def folder(self) -> Path | None:
        """The local path; None for an object store."""
        return Path(self.path) if self.filesystem.type_name == "local" else None

    def url_of(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file that lies directly in it, by name."""
        from pyarrow import fs

        with store_errors(self.url):
            infos = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return {info.base_name: info.size for info in infos if info.is_file}

    def size(self, name: str) -> int | None:
        """Return a file's bytes; None where there is no such file."""
        info = self.info(name)
        return int(info.size) if info.is_file else None

    def info(self, name: str = "") -> Any:
        """Return the pyarrow.fs.FileInfo: kind, size, time of the last change."""
        with store_errors(self.url_of(name)):
            return self.filesystem.get_file_info(self._path_of(name))

    def open(self, name: str = "") -> Any:
        """Open a seekable pyarrow.NativeFile. Each read of an object is a request for that range."""
        with store_errors(self.url_of(name)):
            return self.filesystem.open_input_file(self._path_of(name))

    def read(self, name: str) -> bytes:
        with store_errors(self.url_of(name)), self.open(name) as file:
            data: bytes = file.read()
        return data

    @contextmanager
    def open_output(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file for writing. It appears when the block ends; after a failure there is none."""
        if self.folder:
            with files.atomic_file(self.folder / name) as file:
                yield file
            return
        path = self._path_of(name)
        with store_errors(self.url_of(name)):
            stream = self.filesystem.open_output_stream(path)
            try:
                yield stream
            except BaseException:
                with suppress(OSError):
                    stream.close()  # pyarrow would do so anyway, and the partial file would become an object
                with suppress(OSError):
                    self.filesystem.delete_file(path)
                raise
            stream.close()

    def write(self, name: str, data: bytes) -> None:
        with self.open_output(name) as file:
            file.write(data)

    def remove(self, name: str) -> None:
        with store_errors(self.url_of(name)):
            self.filesystem.delete_file(self._path_of(name))

    def _path_of(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path


def is_url(text: object) -> bool:
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", str(text)) is not None


def scheme_of(url: str) -> str:
    """Return a URL's scheme. Raises UsageError for an unknown one."""
    scheme = url.partition("://")[0].lower()
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise UsageError(url, f"{scheme}:// is not known", do=f"expected {known} or a path")
    return scheme


def _file_path(url: str) -> Path:
    """Return the path in a file:// URL. Raises UsageError where it names another machine."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise UsageError(url, "names another machine", do=f"expected file:///{parts.netloc}{parts.path} or a path")
    return Path(url2pathname(parts.path))


def open_location(path_or_url: str | Path) -> StorageLocation:
    """Return the folder, prefix, file or object that a path or URL names, without a request to a store."""
    from pyarrow import fs

    text = str(path_or_url)
    if not is_url(text) or scheme_of(text) == "file":
        path = Path(text) if not is_url(text) else _file_path(text)
        return StorageLocation(str(path), fs.LocalFileSystem(), str(path.expanduser().absolute()))
    if scheme_of(text) in ("http", "https"):
        raise UsageError(text, "HTTP has no folders and takes no files", do="expected s3://, gs://, az:// or a path")
    scheme, path_in_store = text.partition("://")[0].lower(), text.partition("://")[2].strip("/")
    bucket = path_in_store.partition("/")[0]
    if not bucket:
        raise UsageError(text, "names no bucket", do=f"expected {scheme}://bucket/key")
    with store_errors(text), _missing_store(text):
        if scheme == "gs":
            anonymous = path_in_store.startswith("anonymous@")
            path_in_store = path_in_store.removeprefix("anonymous@")
            system = fs.GcsFileSystem(anonymous=anonymous, retry_time_limit=timedelta(seconds=_RETRY_SECONDS))
        else:
            system = _s3(bucket) if scheme == "s3" else _azure(text)
    return StorageLocation(text.rstrip("/"), system, path_in_store)


@contextmanager
def _missing_store(url: str) -> Iterator[None]:
    """Raise AttireError where this build of pyarrow lacks the store."""
    try:
        yield
    except ImportError as error:
        raise AttireError(url, "this pyarrow was built without that store", do="install another build of it") from error


def _s3(bucket: str) -> Any:
    """Open Amazon's store or that of AWS_ENDPOINT_URL. pyarrow reads Amazon's credentials itself, but no endpoint."""
    from pyarrow import fs

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region:
        region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket)
    # allow_delayed_open: a small file takes one request instead of three.
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
def store_errors(url: str) -> Iterator[None]:
    """Turn whatever pyarrow raises into an AttireError about `url`."""
    try:
        yield
    except FileNotFoundError as error:
        raise AttireError(url, "no such object" if is_url(url) else "no such file") from error
    except (OSError, ValueError) as error:
        if not is_url(url):
            system_error = error if isinstance(error, OSError) else OSError(str(error))
            raise files.io_error("use it", Path(url), system_error) from error
        raise StoreError(url, "the store did not serve it", _summary(error)) from error


def _summary(error: Exception) -> str:
    """Return the few words that matter of a store's error."""
    match = re.search(r"AWS Error (\w+)[^:]*: (?:curlCode: \d+, )?([^;(]*)", str(error))
    return one_line(f"{match[1]}: {match[2]}" if match else str(error)).strip()[:120]
