"""`attire predict`: pictures and CSV rows, as many as there are, read ahead, answered in batches, told in order."""

import csv
import glob
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from attire import files
from attire.bundles import GRAPH, find_bundle, is_bundle
from attire.errors import AttireError, UsageError, one_line
from attire.formats import is_folder, is_text, name_format
from attire.pictures import SHOULD, SUFFIXES
from attire.prediction import Prediction, read_picture
from attire.runtimes import Exported, format_of, load_export

FORMS = ("table", "jsonl", "csv")
STDIN = "-"
BATCH = 128  # images a forward pass: 512 was no faster, and the first answer of many comes sooner
THREADS = 2  # one reads a file while another decodes: Pillow's warnings are guarded, so decoding takes turns
AHEAD = 2 * BATCH  # pictures waiting, 784 bytes each


class Model(Protocol):
    """A Classifier or an exported file."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def predict(self, images: NDArray[np.uint8]) -> list[Prediction]: ...


@dataclass(frozen=True, eq=False)
class Asked:
    """One image (28, 28) and what it is called; picture: its file, or its bytes, where it is not a row of a table."""

    name: str
    image: NDArray[np.uint8]
    picture: Path | bytes | None = None


# What answers.


def split_model(arguments: Sequence[str], model: Path | None) -> tuple[Path | None, list[str]]:
    """The model, None for the shipped one, and the pictures: without --model the first argument may be the model."""
    rest = list(arguments)
    if model is None and rest and (is_bundle(Path(rest[0])) or format_of(Path(rest[0]))):
        model = Path(rest.pop(0))
    if not rest:
        raise UsageError("attire predict", "no picture was named", do="give files, folders, or - for standard input")
    return model, rest


def open_model(path: Path | None, device: str) -> Model:
    """A bundle or an exported file, None is the shipped bundle.

    A bundle with a graph is answered by ONNX Runtime, without torch, unless a device other than the processor is
    asked for: the answers are the same, the start is several times as fast.
    """
    if path is not None and format_of(path):
        return load_export(path)
    folder = find_bundle(path)
    if device in ("auto", "cpu") and (folder / GRAPH).exists() and find_spec("onnxruntime"):
        return load_export(folder / GRAPH)
    from attire.classifier import load_bundle

    return load_bundle(folder, device)


def lacks_verdict(model: Model) -> bool:
    """Whether this is a bundle that cannot tell what is none of its classes."""
    return not isinstance(model, Exported) and getattr(model, "rejecter", None) is None


# What is asked.


def expand(arguments: Iterable[str], globs: bool = True) -> Iterator[str | AttireError]:
    """Every file that the arguments name: themselves, pictures below folders, what matches a pattern."""
    for argument in arguments:
        path = Path(argument)
        if argument == STDIN and globs:
            yield argument
        elif is_folder(path):
            yield from below(path)
        elif globs and glob.has_magic(argument) and not os.path.lexists(path):
            matches = sorted(glob.iglob(argument, recursive=True))  # noqa: PTH207  (absolute patterns too)
            yield from expand(matches, globs=False) if matches else [AttireError(path, "no file matches the pattern")]
        else:
            yield argument


def below(folder: Path) -> Iterator[str | AttireError]:
    """The pictures of a folder and of those in it, by name, hidden ones left out."""
    refused: list[OSError] = []
    empty = True
    for here, folders, names in os.walk(folder, onerror=refused.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                empty = False
                yield str(Path(here) / name)
    yield from (files.cannot("read the folder", Path(error.filename), error) for error in refused)
    if empty and not refused:
        yield AttireError(folder, "no pictures in this folder", do=SHOULD)


def read_ahead(found: Iterator[str | AttireError], classes: Sequence[str]) -> Iterator[Asked | AttireError]:
    """The images of these files in their order, pictures read by threads some way ahead; an error takes its place."""
    waiting: deque[Future[Asked | AttireError] | Callable[[], Iterator[Asked | AttireError]]] = deque()
    pool = ThreadPoolExecutor(THREADS, "read")
    try:
        for source in found:
            if isinstance(source, AttireError):
                waiting.append(partial(iter, (source,)))
            elif source == STDIN:
                waiting.append(partial(read_stdin, classes))
            elif source.lower().endswith(".csv"):
                waiting.append(partial(read_rows, source, source, classes))  # when its turn comes: it may be large
            else:
                waiting.append(pool.submit(read_file, source))
            if len(waiting) >= AHEAD:
                yield from next_of(waiting)
        while waiting:
            yield from next_of(waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def next_of(waiting: deque[Any]) -> Iterator[Asked | AttireError]:
    first = waiting.popleft()
    if isinstance(first, Future):
        yield first.result()
    else:
        yield from first()


def read_file(source: str) -> Asked | AttireError:
    try:
        return Asked(source, read_picture(Path(source)), Path(source))
    except AttireError as error:
        return error


def read_rows(path: str, name: str, classes: Sequence[str]) -> Iterator[Asked | AttireError]:
    """Each row of a CSV file, called by its line in the file."""
    from attire.data import read_csv_images

    try:
        images = read_csv_images(path, classes)
    except AttireError as error:
        yield error if name == path else renamed(error)
        return
    yield from (Asked(f"{name}:{line}", image) for line, image in enumerate(images, 2))  # after the header


def read_stdin(classes: Sequence[str]) -> Iterator[Asked | AttireError]:
    """A picture or a table, whichever its first bytes are; kept on disk meanwhile."""
    with tempfile.TemporaryDirectory(prefix="attire-") as folder:
        path = Path(folder) / "stdin"
        with path.open("wb") as file:
            shutil.copyfileobj(getattr(sys.stdin, "buffer", io.BytesIO()), file)
        with path.open("rb") as file:
            head = file.read(4096)
        if head and is_text(head) and name_format(head) in ("", "UTF-16 text"):
            yield from read_rows(str(path), STDIN, classes)
            return
        try:
            yield Asked(STDIN, read_picture(path), path.read_bytes())
        except AttireError as error:
            yield renamed(error)


def renamed(error: AttireError) -> AttireError:
    return AttireError("standard input", error.what, error.where, error.do)


# Answers.


def answer(
    model: Model, asked: Iterable[Asked | AttireError]
) -> Iterator[list[tuple[Asked, Prediction] | AttireError]]:
    """Batches of answers in the order of what is asked, errors in their places."""
    batch: list[Asked | AttireError] = []
    for item in asked:
        batch.append(item)
        if len(batch) >= BATCH:
            yield answered(model, batch)
            batch = []
    if batch:
        yield answered(model, batch)


def answered(model: Model, batch: list[Asked | AttireError]) -> list[tuple[Asked, Prediction] | AttireError]:
    images = [item.image for item in batch if isinstance(item, Asked)]
    found = iter(model.predict(np.stack(images)) if images else [])
    return [item if isinstance(item, AttireError) else (item, next(found)) for item in batch]


def table_line(name: str, found: Prediction, top: int) -> str:
    if found.rejected:
        return f"{one_line(name):24} {found}"
    rest = "   ".join(f"{label} {p:.3f}" for label, p in found.ranking[1:top])
    return f"{one_line(name):24} {found.label:12} {found.probability:.3f}   {rest}".rstrip()


def json_line(name: str, found: Prediction, top: int) -> str:
    told = {"file": name, "label": found.label, "probabilities": dict(found.ranking[:top])}
    return json.dumps({**told, "rejected": found.rejected, "distance": found.distance})


def csv_line(name: str, found: Prediction, top: int) -> str:
    verdict = ["" if found.rejected is None else str(found.rejected).lower()]
    verdict.append("" if found.distance is None else f"{found.distance:.4f}")
    rest = [value for label, p in found.ranking[1:top] for value in (label, f"{p:.6f}")]
    shown = name.encode("utf-8", "backslashreplace").decode()  # a name on disk need not be UTF-8
    return csv_text([shown, found.label, f"{found.probability:.6f}", *verdict, *rest])


def csv_header(top: int) -> str:
    rest = [f"{part}_{i}" for i in range(2, top + 1) for part in ("label", "probability")]
    return csv_text(["file", "label", "probability", "rejected", "distance", *rest])


def csv_text(cells: list[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(cells)
    return buffer.getvalue()


LINES = {"table": table_line, "jsonl": json_line, "csv": csv_line}


# What `attire predict` does.


def tell(
    arguments: Sequence[str],
    model: Model,
    *,
    form: str = "table",
    top: int = 3,
    show: Path | None = None,
    out: IO[str] | None = None,
) -> int:
    """Answer all that the arguments name: answers to `out`, one line for each bad file to stderr. Returns how many."""
    out, top, began = out or sys.stdout, min(top, len(model.classes)), time.perf_counter()
    if form == "csv":
        print(csv_header(top), file=out)
    strips, done, failed = Strips(show), 0, 0
    with progress(arguments, out) as step, closing(read_ahead(expand(arguments), model.classes)) as asked:
        for batch in answer(model, asked):
            for item in batch:
                if isinstance(item, AttireError):
                    print(f"error: {item}", file=sys.stderr)
                    failed += 1
                    continue
                print(LINES[form](item[0].name, item[1], top), file=out)
                strips.write(item[0])
                done += 1
            out.flush()
            step(done + failed)
    if sys.stderr.isatty():
        print(speed(done, time.perf_counter() - began), file=sys.stderr)
    return failed


def speed(done: int, seconds: float) -> str:
    """`1,204 pictures in 3.1 s, 388/s`."""
    return f"{done:,} picture{'' if done == 1 else 's'} in {seconds:.1f} s, {done / max(seconds, 1e-9):,.0f}/s"


class progress:  # noqa: N801  (used as a function)
    """Calls its step with how many are done; a bar on a terminal, where the answers themselves do not show it."""

    def __init__(self, arguments: Sequence[str], out: IO[str]) -> None:
        self.watch: Any = None
        if sys.stderr.isatty() and not out.isatty():
            self.total = sum(1 for _ in expand(arguments))
            if self.total > BATCH:
                from attire.terminal import Terminal

                self.watch = Terminal()

    def __enter__(self) -> Callable[[int], None]:
        return self.step

    def step(self, done: int) -> None:
        if self.watch:
            self.watch.advance("Pictures", done, max(self.total, done))

    def __exit__(self, *error: object) -> None:
        if self.watch:
            self.watch.close()


class Strips:
    """`--show`: for each picture what was made of it, in a folder, or for a single one in a PNG file."""

    def __init__(self, where: Path | None) -> None:
        self.where, self.taken = where, set[str]()

    def write(self, asked: Asked) -> None:
        if self.where is None or asked.picture is None:
            return
        from attire import photos  # type: ignore[attr-defined]

        files.write_bytes(self.path(asked), photos.strip(photos.prepare(asked.picture, asked.name)))

    def path(self, asked: Asked) -> Path:
        assert self.where is not None
        if self.where.suffix.lower() == ".png":
            if self.taken:
                raise UsageError("--show", "one file for several pictures", do="name a folder")
            self.taken.add(self.where.name)
            return self.where
        stem = Path(asked.name).stem if isinstance(asked.picture, Path) else "stdin"
        names = (f"{stem}.png" if i == 1 else f"{stem}-{i}.png" for i in range(1, len(self.taken) + 2))
        name = next(name for name in names if name not in self.taken)
        self.taken.add(name)
        return self.where / name
