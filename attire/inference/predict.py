"""`attire predict`: which model answers, in batches, and how the answers are told; what is asked is `intake`'s."""

import csv
import io
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from attire.errors import AttireError, UsageError, one_line
from attire.inference.bundle_files import GRAPH, find_bundle, is_bundle
from attire.inference.inputs import PictureInput, expand_paths, read_inputs
from attire.inference.prediction import Prediction
from attire.inference.runtimes import ExportedModel, format_of, load_export
from attire.storage import files

_FORMS = ("table", "jsonl", "csv")
_NARROW = 72  # columns; below it a name and three classes do not fit in a line
BATCH = 128  # images a forward pass: 256 was no faster, and the first of many answers comes sooner


Answer = tuple[PictureInput, Prediction] | AttireError


class Model(Protocol):
    """A Classifier or an exported file."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def predict(self, images: NDArray[np.uint8]) -> list[Prediction]: ...


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
    from attire.inference.classifier import load_bundle

    return load_bundle(folder, device)


def lacks_verdict(model: Model) -> bool:
    """Whether this is a bundle that cannot tell what is none of its classes."""
    return not isinstance(model, ExportedModel) and getattr(model, "ood_detector", None) is None


# Answers.


def _answer(model: Model, asked: Iterable[PictureInput | AttireError]) -> Iterator[list[Answer]]:
    """Batches of answers in the order of what is asked, errors in their places."""
    for batch in batches(asked):
        images = images_of(batch)
        yield in_places(batch, model.predict(np.stack(images)) if images else [])


def batches(asked: Iterable[PictureInput | AttireError]) -> Iterator[list[PictureInput | AttireError]]:
    batch: list[PictureInput | AttireError] = []
    for item in asked:
        batch.append(item)
        if len(batch) >= BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def images_of(batch: list[PictureInput | AttireError]) -> list[NDArray[np.uint8]]:
    return [item.image for item in batch if isinstance(item, PictureInput)]


def in_places(batch: list[PictureInput | AttireError], found: Iterable[Prediction]) -> list[Answer]:
    """What was found for the images of a batch, each with what was asked, and the errors among them."""
    following = iter(found)
    return [item if isinstance(item, AttireError) else (item, next(following)) for item in batch]


def _table_line(name: str, found: Prediction, top: int) -> str:
    if found.out_of_distribution:
        return f"{one_line(name):24} {found}"
    rest = "   ".join(f"{label} {p:.3f}" for label, p in found.ranking[1:top])
    return f"{one_line(name):24} {found.label:12} {found.probability:.3f}   {rest}".rstrip()


def _narrow_lines(name: str, found: Prediction, top: int) -> str:
    """The same on a terminal that is too narrow for it: the name, and a line for each class."""
    told = [f"{found}"] if found.out_of_distribution else [f"{label:12} {p:.3f}" for label, p in found.ranking[:top]]
    return "\n  ".join([one_line(name), *told])


def _json_line(name: str, found: Prediction, top: int) -> str:
    told = {"file": name, "label": found.label, "probabilities": dict(found.ranking[:top])}
    return json.dumps({**told, "out_of_distribution": found.out_of_distribution, "distance": found.distance})


def _csv_line(name: str, found: Prediction, top: int) -> str:
    verdict = ["" if found.out_of_distribution is None else str(found.out_of_distribution).lower()]
    verdict.append("" if found.distance is None else f"{found.distance:.4f}")
    rest = [value for label, p in found.ranking[1:top] for value in (label, f"{p:.6f}")]
    shown = name.encode("utf-8", "backslashreplace").decode()  # a name on disk need not be UTF-8
    return _csv_text([shown, found.label, f"{found.probability:.6f}", *verdict, *rest])


def _csv_header(top: int) -> str:
    rest = [f"{part}_{i}" for i in range(2, top + 1) for part in ("label", "probability")]
    return _csv_text(["file", "label", "probability", "out_of_distribution", "distance", *rest])


def _csv_text(cells: list[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\r\n").writerow(cells)  # either of these in a name makes it quoted
    return buffer.getvalue().removesuffix("\r\n")


_LINES = {"table": _table_line, "jsonl": _json_line, "csv": _csv_line}


# What `attire predict` does.


def print_answers(
    arguments: Sequence[str],
    model: Model,
    *,
    form: str = "table",
    top: int = 3,
    show: Path | None = None,
    out: IO[str] | None = None,
    ask: Callable[[Iterable[PictureInput | AttireError]], Iterator[list[Answer]]] | None = None,
) -> int:
    """Answer all that the arguments name: answers to `out`, one line for each bad file to stderr. Returns how many.

    ask: who is asked in place of the model in this process.
    """
    out, top, began = out or sys.stdout, min(top, len(model.classes)), time.perf_counter()
    if form == "csv":
        print(_csv_header(top), file=out)
    narrow = form == "table" and out.isatty() and shutil.get_terminal_size().columns < _NARROW
    line = _narrow_lines if narrow else _LINES[form]
    strips, done, failed = _Strips(show), 0, 0
    with _progress(arguments, out) as step, closing(read_inputs(expand_paths(arguments), model.classes)) as asked:
        for batch in ask(asked) if ask else _answer(model, asked):
            for item in batch:
                if isinstance(item, AttireError):
                    print(f"error: {item}", file=sys.stderr)
                    failed += 1
                    continue
                print(line(item[0].name, item[1], top), file=out)
                strips.write(item[0])
                done += 1
            out.flush()
            step(done + failed)
    if sys.stderr.isatty():
        print(_speed(done, time.perf_counter() - began), file=sys.stderr)
    return failed


def _speed(done: int, seconds: float) -> str:
    """`1,204 pictures in 3.1 s, 388/s`."""
    return f"{done:,} picture{'' if done == 1 else 's'} in {seconds:.1f} s, {done / max(seconds, 1e-9):,.0f}/s"


class _progress:  # noqa: N801  (used as a function)
    """Calls its step with how many are done; a bar on a terminal, where the answers themselves do not show it."""

    def __init__(self, arguments: Sequence[str], out: IO[str]) -> None:
        self.watch: Any = None
        if sys.stderr.isatty() and not out.isatty():
            self.total = sum(1 for _ in expand_paths(arguments))
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


class _Strips:
    """`--show`: for each picture what was made of it, in a folder, or for a single one in a PNG file."""

    def __init__(self, where: Path | None) -> None:
        self.where, self.taken = where, set[str]()

    def write(self, asked: PictureInput) -> None:
        if self.where is None or asked.picture is None:
            return
        from attire.data import photos

        files.write_bytes(self.path(asked), photos.comparison_strip(photos.prepare(asked.picture, asked.name)))

    def path(self, asked: PictureInput) -> Path:
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
