"""`attire predict IN.parquet --out OUT.parquet`: a row out for each row in, in order, in bounded memory, resumable.

The job is cut into parts. Each is read, answered and written whole, so that a killed process leaves only finished
parts; the next call computes the others as if nothing had happened.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from attire.data.parquet import (
    DECODE_THREADS,
    IMAGE_COLUMN,
    SUFFIX,
    ParquetSource,
    find_sources,
    image_bytes,
    prepare_image,
)
from attire.errors import AttireError, Stopped, one_line
from attire.inference.bundle_files import find_bundle
from attire.inference.parquet_parts import AnswerParts
from attire.inference.predict import BATCH, Model
from attire.inference.prediction import Prediction
from attire.inference.runtimes import format_of
from attire.storage import files
from attire.storage.stores import open_location
from attire.version import __version__

_PART_ROWS = 8192  # rows of a part, which a killed process loses at most: 15 s of work at 550 pictures a second
_WARNINGS = 20  # bad rows that are reported one by one
_ANSWERS = pa.schema(
    [
        ("predicted", pa.string()),
        ("probability", pa.float32()),
        ("out_of_distribution", pa.bool_()),
        ("distance", pa.float32()),
        ("top_k", pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float32())]))),
        ("error", pa.string()),
    ]
)

_Warn = Callable[[str], None]
_Batches = Iterator[tuple[ParquetSource, int, Any]]  # a source, the number of its row from 1, a record batch from there


@dataclass(frozen=True)
class _Summary:
    """How many rows there are, and how many of them have an error instead of an answer."""

    out: str
    rows: int
    errors: int
    seconds: float

    def __str__(self) -> str:
        lost = f", {self.errors:,} of them without an answer" if self.errors else ""
        rate = f"{self.rows / max(self.seconds, 1e-9):,.0f}/s"
        return f"{one_line(self.out)}   {self.rows:,} rows{lost}   {self.seconds:.1f} s, {rate}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Job:
    """What is to be answered, and by which model: the rows of `sources` one after another, in parts."""

    sources: Sequence[ParquetSource]
    model: Model
    model_digest: str
    top_k: int

    @cached_property
    def starts(self) -> list[int]:
        """The first row of each source, counted over all; after the last one, the number of rows."""
        return [0, *np.cumsum([source.rows for source in self.sources]).tolist()]

    @property
    def rows(self) -> int:
        return self.starts[-1]

    @property
    def parts(self) -> int:
        return max(1, -(-self.rows // _PART_ROWS))  # one of no rows where there are none

    @cached_property
    def input_columns(self) -> Any:
        """The schema of what goes from the input into the output. Raises AttireError where the files do not agree."""
        schemas = [_output_schema(source) for source in self.sources]
        for source, schema in zip(self.sources, schemas, strict=True):
            if schema != schemas[0]:
                raise AttireError(source, f"its columns are not those of {self.sources[0]}")
            for name in schema.names:
                if name in _ANSWERS.names:
                    raise AttireError(source, f"has a column {name}, which is one of the answers'", do="rename it")
        return schemas[0]

    @property
    def digest(self) -> str:
        """Of all that decides the answers."""
        inputs = [[str(source), source.rows, source.version] for source in self.sources]
        by = {"model": self.model_digest, "kind": type(self.model).__name__, "attire": __version__}
        about = {**by, "inputs": inputs, "top_k": self.top_k, "part_rows": _PART_ROWS}
        return files.sha256(files.canonical_json(about))[:32]

    def batches(self, first: int) -> _Batches:
        """The rows from number `first` of all on, in record batches that never reach over the end of a part."""
        position = first
        for source, (start, end) in zip(self.sources, pairwise(self.starts), strict=True):
            if end <= first:
                continue
            for batch in source.batches(first=max(0, first - start)):
                while len(batch):
                    head = batch[: _PART_ROWS - position % _PART_ROWS]
                    yield source, position - start + 1, head
                    batch, position = batch[len(head) :], position + len(head)


def predict_parquet(
    where: str | Path,
    out: str | Path,
    model: Model,
    digest: str,
    *,
    top_k: int = 3,
    progress: Callable[[int, int], None] = lambda done, total: None,
    warn: _Warn = lambda line: None,
) -> _Summary:
    """Answer every row of the Parquet files that `where` names; `out` is a Parquet file, else a folder of parts.

    Both may be URLs. digest: of the model, see `model_digest`; progress: is given the rows answered and all rows; warn:
    is given a line for each of the first bad rows. Columns other than the picture are kept, those of the answers
    follow. Raises AttireError for an unsuitable input or output, Stopped after Ctrl-C: the same call then resumes.
    """
    start = time.perf_counter()
    job = _Job(find_sources(where), model, digest, min(top_k, len(model.classes)))
    columns = [*job.input_columns, *_ANSWERS]  # which looks at every file, before anything is written
    whole = str(out).lower().endswith(SUFFIX)
    location = open_location(f"{out}.parts" if whole else out)
    parts = AnswerParts(location, job.digest, columns, job.parts, _PART_ROWS)
    errors = parts.count_joined_errors(out) if whole else None
    if errors is None:
        with parts.claim():
            if not whole:
                parts.refuse_others()
            try:
                errors = _answer_parts(job, parts, progress, warn)
            except KeyboardInterrupt:
                raise Stopped(str(out), "stopped; finished parts are kept", do="the same command goes on") from None
            if whole:
                parts.join(out, errors)
            else:
                parts.write_manifest(job.rows, errors)
        if whole:
            parts.remove()
    return _Summary(str(out), job.rows, errors, time.perf_counter() - start)


def model_digest(path: Path | None) -> str:
    """SHA-256 over the files of a bundle or an exported file, None is the shipped bundle."""
    model = path if path is not None and format_of(path) else find_bundle(path)
    parts = [model] if model.is_file() else sorted(part for part in model.rglob("*") if part.is_file())
    return files.sha256(files.canonical_json([[part.name, files.sha256_file(part)] for part in parts]))


def _answer_parts(job: _Job, parts: AnswerParts, progress: Callable[[int, int], None], warn: _Warn) -> int:
    """Write every part that is missing; returns how many rows have an error, those of an earlier call included."""
    all_errors = done = 0
    batches: _Batches | None = None
    progress(0, job.rows)
    with ThreadPoolExecutor(DECODE_THREADS, "decode") as pool:
        for index in range(job.parts):
            rows = min(_PART_ROWS, job.rows - index * _PART_ROWS)
            errors = parts.count_errors(index, rows)
            if errors is None:
                batches = batches or job.batches(index * _PART_ROWS)
                quiet = all_errors >= _WARNINGS
                table, errors = _answer_part(job, _take_rows(batches, rows), pool, None if quiet else warn)
                parts.write(index, table, errors)
            else:
                batches = None
            all_errors, done = all_errors + errors, done + rows
            progress(done, job.rows)
    return all_errors


def _take_rows(batches: _Batches, rows: int) -> _Batches:
    while rows:
        source, row, batch = next(batches)
        yield source, row, batch
        rows -= len(batch)


def _answer_part(job: _Job, batches: _Batches, pool: ThreadPoolExecutor, warn: _Warn | None) -> tuple[Any, int]:
    """The table of a part and how many of its rows have an error."""
    images: list[NDArray[np.uint8] | AttireError] = []
    inputs = []
    for source, row, batch in batches:
        numbers = range(row, row + len(batch))
        images += pool.map(_prepare_or_error, image_bytes(batch), [source] * len(batch), numbers)
        inputs.append(_output_columns(batch))
    predictions, answers, errors = _predict(job.model, images), [], 0
    for image in images:
        if isinstance(image, AttireError):
            errors += 1
            if warn and errors <= _WARNINGS:
                warn(str(image))
            line = str(AttireError("", image.what, image.where, image.do))
            answers.append({"error": line.removeprefix(": ")})
        else:
            answers.append(_answer_row(next(predictions), job.top_k))
    columns = job.input_columns
    table = pa.Table.from_batches(inputs, columns) if inputs else columns.empty_table()
    for field, column in zip(_ANSWERS, pa.Table.from_pylist(answers, _ANSWERS).columns, strict=True):
        table = table.append_column(field, column)
    return table, errors


def _prepare_or_error(data: bytes | None, source: ParquetSource, row: int) -> NDArray[np.uint8] | AttireError:
    try:
        return prepare_image(data, source, row)
    except AttireError as error:
        return error


def _predict(model: Model, images: Sequence[NDArray[np.uint8] | AttireError]) -> Iterator[Prediction]:
    """A prediction for each that is an image."""
    sound = [image for image in images if not isinstance(image, AttireError)]
    for start in range(0, len(sound), BATCH):
        yield from model.predict(np.stack(sound[start : start + BATCH]))


def _answer_row(prediction: Prediction, top_k: int) -> dict[str, Any]:
    """One row of the columns of the answers."""
    return {
        "predicted": prediction.label,
        "probability": prediction.probability,
        "out_of_distribution": prediction.out_of_distribution,
        "distance": prediction.distance,
        "top_k": [{"label": label, "probability": p} for label, p in prediction.ranking[:top_k]],
    }


# The input's columns.


def _output_schema(source: ParquetSource) -> Any:
    """The input's columns without the picture; with the path beside its bytes, unless another column has that name."""
    fields = [field for field in source.schema if field.name != IMAGE_COLUMN]
    if _has_path(source.schema):
        fields.insert(0, pa.field("path", pa.string()))
    return pa.schema([pa.field(field.name, field.type) for field in fields])


def _has_path(schema: Any) -> bool:
    kind = schema.field(IMAGE_COLUMN).type
    return pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 and "path" not in schema.names


def _output_columns(batch: Any) -> Any:
    """A record batch in the form of `_output_schema`."""
    names = [name for name in batch.schema.names if name != IMAGE_COLUMN]
    columns = [batch.column(batch.schema.get_field_index(name)) for name in names]
    if _has_path(batch.schema):
        image = batch.column(batch.schema.get_field_index(IMAGE_COLUMN))
        names.insert(0, "path")
        columns.insert(0, pc.struct_field(image, "path").cast(pa.string()))
    fields = [pa.field(name, column.type) for name, column in zip(names, columns, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))
