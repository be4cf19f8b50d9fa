"""The parts of a Parquet file of answers: written whole, checked before they are used again, joined at the end."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet as pq

from attire.data.parquet import SUFFIX
from attire.errors import AttireError, UsageError
from attire.storage import files
from attire.storage.stores import StorageLocation, is_url, open_location

_KEY = b"attire"  # in the metadata of each part and of the result: the job, and how many rows have an error
_MANIFEST = "MANIFEST.json"
_FORMAT = {"compression": "zstd", "write_page_checksum": True}
_UNREADABLE = (AttireError, pa.ArrowException, OSError, ValueError, KeyError, TypeError)


@dataclass(frozen=True)
class AnswerParts:
    """The parts of one job's answers in a folder or a store.

    job: digest of all that decides the answers, so that parts of another job are not taken for this one's; columns: the
    pyarrow fields of the answers; count: the number of parts; part_rows: of each but the last.
    """

    location: StorageLocation
    job: str
    columns: list[Any]
    count: int
    part_rows: int

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Keep other processes out of a folder of parts. Raises AttireError where one is in it; a store has no lock."""
        folder = self.location.folder
        if not folder:
            yield
            return
        path = folder / ".lock"
        lock = files.lock(path, wait=0)
        try:
            lock.__enter__()
        except TimeoutError as error:
            raise AttireError(folder, "another process is writing there", do="wait for it") from error
        try:
            yield
        finally:
            lock.__exit__(None, None, None)
            with suppress(OSError):
                path.unlink()
                folder.rmdir()  # where not one part was finished

    def write(self, index: int, table: Any, errors: int) -> None:
        """Write a part whole. errors: how many of its rows have one."""
        buffer = io.BytesIO()
        pq.write_table(table.cast(self._schema(errors)), buffer, **_FORMAT)
        self.location.write(_part_name(index), buffer.getvalue())

    def count_errors(self, index: int, rows: int) -> int | None:
        """How many rows of a finished part have an error; None where it is missing, damaged or of another job."""
        try:
            table = _read(self.location, _part_name(index))
            job, errors = _read_note(table.schema)
        except _UNREADABLE:
            return None
        return errors if (job, len(table)) == (self.job, rows) else None

    def refuse_others(self) -> None:
        """Raises UsageError where the folder holds anything but parts of the same job."""
        own = {_part_name(index) for index in range(self.count)} | {_MANIFEST, ".lock"}
        for name in sorted(self.location.sizes()):
            if name.endswith(".part"):  # of a process that was killed
                continue
            if name not in own or (name.endswith(SUFFIX) and not self._is_own(name)):
                what = f"{self.location.url_of(name)} is no part of these answers"
                raise UsageError("--out", what, do="name a new folder")

    def _is_own(self, name: str) -> bool:
        """False for a part of another job; a damaged one may be of this job, and is made again."""
        try:
            return _read_note(_read_schema(self.location, name))[0] == self.job
        except _UNREADABLE:
            return True

    def count_joined_errors(self, out: str | Path) -> int | None:
        """How many rows of the result have an error; None where it is not there. Raises UsageError for another file."""
        folder, name = _split(out)
        if folder.size(name) is None:
            return None
        with suppress(*_UNREADABLE):
            job, errors = _read_note(_read_schema(folder, name))
            if job == self.job:
                return errors
        raise UsageError("--out", f"{out} is there already, and holds other answers", do="name another, or delete it")

    def join(self, out: str | Path, errors: int) -> None:
        """Write all parts as one file, a row group each."""
        (folder, name), schema = _split(out), self._schema(errors)
        with folder.open_output(name) as file, pq.ParquetWriter(file, schema, **_FORMAT) as writer:
            for index in range(self.count):
                table = _read(self.location, _part_name(index)).replace_schema_metadata(schema.metadata)
                writer.write_table(table, row_group_size=self.part_rows)

    def write_manifest(self, rows: int, errors: int) -> None:
        """Mark a folder of parts as complete."""
        manifest = {"rows": rows, "errors": errors, "parts": self.count}
        self.location.write(_MANIFEST, json.dumps(manifest).encode())

    def remove(self) -> None:
        """Remove the parts, once they are joined."""
        for name in self.location.sizes():
            self.location.remove(name)
        if self.location.folder:
            with suppress(OSError):
                self.location.folder.rmdir()

    def _schema(self, errors: int) -> Any:
        return pa.schema(self.columns, metadata={_KEY: json.dumps({"job": self.job, "errors": errors})})


def _part_name(index: int) -> str:
    return f"part-{index:06d}{SUFFIX}"


def _read(location: StorageLocation, name: str) -> Any:
    """The table; an error of pyarrow where a page's checksum does not match."""
    with location.open(name) as file:
        return pq.ParquetFile(file, page_checksum_verification=True).read()


def _read_schema(location: StorageLocation, name: str) -> Any:
    with location.open(name) as file:
        return pq.ParquetFile(file).schema_arrow


def _read_note(schema: Any) -> tuple[str, int]:
    """The job that a file is of, and how many of its rows have an error."""
    note = json.loads((schema.metadata or {})[_KEY])
    return str(note["job"]), int(note["errors"])


def _split(out: str | Path) -> tuple[StorageLocation, str]:
    """The folder of a file and its name."""
    if is_url(out):
        folder, _, name = str(out).rpartition("/")
        return open_location(folder), name
    path = Path(out)
    return open_location(path.parent), path.name
