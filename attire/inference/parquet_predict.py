"""`attire predict IN.parquet --out OUT.parquet`: a row out for each row in, in order, in bounded memory, resumable.

The work is cut into parts of PART_ROWS rows. A part is read, answered and written whole, so that what a killed process
left is parts that are finished and one that is not there; the rest is computed as if nothing had happened.
"""

import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import parquet as pq

from attire.data.parquet import DECODE_THREADS, IMAGE_COLUMN, ParquetSource, SUFFIX, find_sources, image_bytes, prepare_image
from attire.errors import AttireError, Stopped, UsageError, one_line
from attire.inference.bundle_files import find_bundle
from attire.inference.predict import BATCH, Model
from attire.inference.prediction import Prediction
from attire.inference.runtimes import format_of
from attire.storage import files
from attire.storage.stores import StorageLocation, is_url, open_location
from attire.version import __version__

_PART_ROWS = 8192  # rows of a part, which a killed process loses at most: 15 s of work at 550 pictures a second
_SHOWN = 20  # bad rows told one by one; of more, their number
_MARK = b"attire"  # in the metadata of each part and of the result: whose answers these are, and how many are missing
_MANIFEST = "MANIFEST.json"
_TOP = pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float32())]))
_ANSWERS = pa.schema(
    [
        ("predicted", pa.string()),
        ("probability", pa.float32()),
        ("out_of_distribution", pa.bool_()),
        ("distance", pa.float32()),
        ("top", _TOP),
        ("error", pa.string()),
    ]
)

_ProgressCallback = Callable[[int, int], None]  # (rows answered, rows in all)
_Complain = Callable[[str], None]


@dataclass(frozen=True)
class _Done:
    """What became of all rows: how many, and how many of them have an error instead of an answer."""

    out: str
    rows: int
    errors: int
    seconds: float

    def __str__(self) -> str:
        lost = f", {self.errors:,} of them without an answer" if self.errors else ""
        rate = f"{self.rows / max(self.seconds, 1e-9):,.0f}/s"
        return f"{one_line(self.out)}   {self.rows:,} rows{lost}   {self.seconds:.1f} s, {rate}"

    def to_json(self) -> dict[str, Any]:
        return {"out": self.out, "rows": self.rows, "errors": self.errors, "seconds": self.seconds}


@dataclass(frozen=True)
class _Work:
    """What is to be answered, and by whom: the rows of `sources` one after another, in parts."""

    sources: Sequence[ParquetSource]
    model: Model
    digest: str  # of the model
    top: int

    @cached_property
    def starts(self) -> list[int]:
        """The first row of each source, counted over all; and behind the last one the number of rows."""
        return [0, *np.cumsum([source.rows for source in self.sources]).tolist()]

    @property
    def rows(self) -> int:
        return self.starts[-1]

    @property
    def parts(self) -> int:
        return max(1, -(-self.rows // _PART_ROWS))  # one of no rows where there are none

    def part_rows(self, index: int) -> int:
        return min(_PART_ROWS, self.rows - index * _PART_ROWS)

    @cached_property
    def kept(self) -> Any:
        """The columns of the input that go into the output; AttireError where the files do not agree on them."""
        found = [_kept_schema(source) for source in self.sources]
        for source, schema in zip(self.sources, found, strict=True):
            if schema != found[0]:
                raise AttireError(source, f"its columns are not those of {self.sources[0]}")
            for name in schema.names:
                if name in _ANSWERS.names:
                    raise AttireError(source, f"has a column {name}, which is one of the answers'", do="rename it")
        return found[0]

    @cached_property
    def mark(self) -> str:
        """Digest of all that decides the answers: parts of other work are not taken for its own."""
        inputs = [[str(source), source.rows, source.version] for source in self.sources]
        by = {"model": self.digest, "kind": type(self.model).__name__, "attire": __version__}
        about = {**by, "inputs": inputs, "top": self.top, "part_rows": _PART_ROWS}
        return files.sha256(files.canonical_json(about))[:32]

    def schema(self, errors: int) -> Any:
        note = json.dumps({"mark": self.mark, "errors": errors})
        return pa.schema([*self.kept, *_ANSWERS], metadata={_MARK: note})


def predict_parquet(
    where: str | Path,
    out: str | Path,
    model: Model,
    digest: str,
    *,
    top: int = 3,
    progress: _ProgressCallback = lambda done, total: None,
    complain: _Complain = lambda line: None,
) -> _Done:
    """Answer every row of the Parquet files that `where` names; `out` is a Parquet file, else a folder of parts.

    Both may be URLs. digest: of the model, see `model_digest`. complain: is given a line for each of the first bad
    rows. Columns other than the picture are kept, those of ANSWERS follow. Raises AttireError for what is no such
    input or is in the way at `out`, Stopped after Ctrl-C: then the same call goes on.
    """
    began = time.perf_counter()
    work = _Work(find_sources(where), model, digest, min(top, len(model.classes)))
    work.schema(0)  # which looks at every file, before anything is written
    whole = str(out).lower().endswith(SUFFIX)
    at = open_location(f"{out}.parts" if whole else out)
    with ExitStack() as held:
        if whole and (errors := _finished(out, work)) is not None:
            return _Done(str(out), work.rows, errors, time.perf_counter() - began)
        if at.folder:
            held.enter_context(_claimed(at.folder))
        try:
            errors = _answer_parts(work, at, progress, complain, began_empty=not whole)
        except KeyboardInterrupt:
            raise Stopped(str(out), "stopped; finished parts are kept", do="the same command goes on") from None
        if whole:
            _join(work, at, out, errors)
        else:
            at.write(_MANIFEST, json.dumps({"rows": work.rows, "errors": errors, "parts": work.parts}).encode())
    if whole:
        _remove(at)
    return _Done(str(out), work.rows, errors, time.perf_counter() - began)


def model_digest(path: Path | None) -> str:
    """SHA-256 over the files of a bundle or an exported file, None is the shipped bundle."""
    found = path if path is not None and format_of(path) else find_bundle(path)
    parts = [found] if found.is_file() else sorted(part for part in found.rglob("*") if part.is_file())
    return files.sha256(files.canonical_json([[part.name, files.sha256_file(part)] for part in parts]))


class _claimed:  # noqa: N801  (used as a function)
    """One process at a time in a folder of parts."""

    def __init__(self, folder: Path) -> None:
        self.path, self.folder = folder / ".lock", folder
        self.held = files.lock(self.path, wait=0)

    def __enter__(self) -> None:
        try:
            self.held.__enter__()
        except TimeoutError as error:
            raise AttireError(self.folder, "another process is writing there", do="wait for it") from error

    def __exit__(self, *raised: Any) -> None:
        self.held.__exit__(*raised)
        with suppress(OSError):
            self.path.unlink()
            self.folder.rmdir()  # where not one part was finished


# Parts.


def _part_name(index: int) -> str:
    return f"part-{index:06d}{SUFFIX}"


def _answer_parts(
    work: _Work, at: StorageLocation, progress: _ProgressCallback, complain: _Complain, began_empty: bool
) -> int:
    """Write every part that is not there; how many rows have an error, those of an earlier call included."""
    there = at.sizes()
    if began_empty:
        _refuse_others(work, at, there)
    errors = done = 0
    stream: Iterator[tuple[ParquetSource, int, Any]] | None = None
    progress(0, work.rows)
    with ThreadPoolExecutor(DECODE_THREADS, "decode") as pool:
        for index in range(work.parts):
            count = work.part_rows(index)
            found = _errors_of(at, _part_name(index), work, count) if _part_name(index) in there else None
            if found is None:
                stream = stream or _aligned(work.sources, work.starts, index * _PART_ROWS)
                table, found = _answered(work, _pieces(stream, count), pool, complain if errors < _SHOWN else None)
                buffer = io.BytesIO()
                _write_table(buffer, table.cast(work.schema(found)))
                at.write(_part_name(index), buffer.getvalue())
            else:
                stream = None
            errors, done = errors + found, done + count
            progress(done, work.rows)
    return errors


def _aligned(
    sources: Sequence[ParquetSource], starts: Sequence[int], first: int
) -> Iterator[tuple[ParquetSource, int, Any]]:
    """(source, number of its row from 1, record batch) from row `first` of all on, never over the end of a part."""
    position = first
    for source, start, end in zip(sources, starts, starts[1:], strict=False):
        if end <= first:
            continue
        for batch in source.batches(first=max(0, first - start)):
            while len(batch):
                head = batch[: _PART_ROWS - position % _PART_ROWS]
                yield source, position - start + 1, head
                batch, position = batch[len(head) :], position + len(head)


def _pieces(stream: Iterator[tuple[ParquetSource, int, Any]], count: int) -> Iterator[tuple[ParquetSource, int, Any]]:
    """So many rows of the stream."""
    while count:
        source, row, batch = next(stream)
        yield source, row, batch
        count -= len(batch)


def _answered(
    work: _Work, rows: Iterator[tuple[ParquetSource, int, Any]], pool: ThreadPoolExecutor, complain: _Complain | None
) -> tuple[Any, int]:
    """The table of a part and how many of its rows have an error."""
    seen: list[NDArray[np.uint8] | AttireError] = []
    kept = []
    for source, row, batch in rows:
        numbers = range(row, row + len(batch))
        seen += pool.map(_looked_at, image_bytes(batch), [source] * len(batch), numbers)
        kept.append(_keep(batch))
    images = [image for image in seen if not isinstance(image, AttireError)]
    found = [each for start in range(0, len(images), BATCH) for each in _ask(work.model, images[start : start + BATCH])]
    answers, lines, errors = iter(found), [], 0
    for image in seen:
        if isinstance(image, AttireError):
            errors += 1
            if complain and errors <= _SHOWN:
                complain(str(image))
            what = AttireError("", image.what, image.where, image.do)
            lines.append({"error": str(what).removeprefix(": ")})
        else:
            lines.append(_line(next(answers), work.top))
    table = pa.Table.from_batches(kept, work.kept) if kept else work.kept.empty_table()
    for name, column in zip(_ANSWERS.names, pa.Table.from_pylist(lines, _ANSWERS).columns, strict=True):
        table = table.append_column(_ANSWERS.field(name), column)
    return table, errors


def _ask(model: Model, images: list[NDArray[np.uint8]]) -> list[Prediction]:
    return model.predict(np.stack(images))


def _looked_at(data: bytes | None, source: ParquetSource, row: int) -> NDArray[np.uint8] | AttireError:
    try:
        return prepare_image(data, source, row)
    except AttireError as error:
        return error


def _line(found: Prediction, top: int) -> dict[str, Any]:
    ranking = [{"label": label, "probability": p} for label, p in found.ranking[:top]]
    told = {"predicted": found.label, "probability": found.probability, "top": ranking}
    return {**told, "out_of_distribution": found.out_of_distribution, "distance": found.distance}


def _kept_schema(source: ParquetSource) -> Any:
    """The input's columns without the picture; with the path beside its bytes, where no other column is called so."""
    fields = [field for field in source.schema if field.name != IMAGE_COLUMN]
    if _has_path(source.schema):
        fields.insert(0, pa.field("path", pa.string()))
    return pa.schema([pa.field(field.name, field.type) for field in fields])


def _has_path(schema: Any) -> bool:
    kind = schema.field(IMAGE_COLUMN).type
    return pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 and "path" not in schema.names


def _keep(batch: Any) -> Any:
    """A record batch in the form of `kept_schema`."""
    names = [name for name in batch.schema.names if name != IMAGE_COLUMN]
    columns = [batch.column(batch.schema.get_field_index(name)) for name in names]
    if _has_path(batch.schema):
        image = batch.column(batch.schema.get_field_index(IMAGE_COLUMN))
        names.insert(0, "path")
        columns.insert(0, pc.struct_field(image, "path").cast(pa.string()))
    fields = [pa.field(name, column.type) for name, column in zip(names, columns, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))


def _write_table(file: Any, table: Any) -> None:
    pq.write_table(table, file, compression="zstd", write_page_checksum=True)


def _errors_of(at: StorageLocation, name: str, work: _Work, rows: int) -> int | None:
    """How many rows of a finished part have an error; None where it is damaged or of other work."""
    try:
        table = _read_part(at, name)
        note = json.loads((table.schema.metadata or {})[_MARK])
        return int(note["errors"]) if (note["mark"], len(table)) == (work.mark, rows) else None
    except (AttireError, pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return None


def _read_part(at: StorageLocation, name: str) -> Any:
    with at.open(name) as file:
        return pq.ParquetFile(file, page_checksum_verification=True).read()


def _refuse_others(work: _Work, at: StorageLocation, there: dict[str, int]) -> None:
    """A folder of answers may hold what an earlier call for the same work left, and nothing else."""
    own = {_part_name(index) for index in range(work.parts)} | {_MANIFEST, ".lock"}
    for name in sorted(there):
        if name.endswith(".part"):  # of a process that was killed
            continue
        if name not in own or (name.endswith(SUFFIX) and not _is_own(at, name, work)):
            raise UsageError("--out", f"{at.url_of(name)} is no part of these answers", do="name a new folder")


def _is_own(at: StorageLocation, name: str, work: _Work) -> bool:
    """False for a part of other work; a damaged one may be ours, and is made again."""
    try:
        with at.open(name) as file:
            note = json.loads((pq.ParquetFile(file).schema_arrow.metadata or {})[_MARK])
        return bool(note["mark"] == work.mark)
    except (AttireError, pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return True


# The result.


def _split(out: str | Path) -> tuple[StorageLocation, str]:
    """The folder of a file and its name."""
    if is_url(out):
        folder, _, name = str(out).rpartition("/")
        return open_location(folder), name
    path = Path(out)
    return open_location(path.parent), path.name


def _finished(out: str | Path, work: _Work) -> int | None:
    """How many errors the result has where it is there already; None where it is not; UsageError for another file."""
    folder, name = _split(out)
    if folder.size(name) is None:
        return None
    try:
        with folder.open(name) as file:
            note = json.loads((pq.ParquetFile(file).schema_arrow.metadata or {})[_MARK])
        if note["mark"] == work.mark:
            return int(note["errors"])
    except (AttireError, pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        pass
    raise UsageError("--out", f"{out} is there already, and holds other answers", do="name another, or delete it")


def _join(work: _Work, at: StorageLocation, out: str | Path, errors: int) -> None:
    """All parts as one file, a row group each."""
    folder, name = _split(out)
    schema, options = work.schema(errors), {"compression": "zstd", "write_page_checksum": True}
    with folder.open_output(name) as file, pq.ParquetWriter(file, schema, **options) as writer:
        for index in range(work.parts):
            table = _read_part(at, _part_name(index))
            writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=_PART_ROWS)


def _remove(at: StorageLocation) -> None:
    """The parts, once the result is there."""
    for name in at.sizes():
        at.remove(name)
    if at.folder:
        with suppress(OSError):
            at.folder.rmdir()
