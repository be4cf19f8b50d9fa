"""`attire predict`: which model answers, in batches, and how the answers are printed; `inputs` reads the pictures."""

import csv
import io
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray

from attire.errors import AttireError, UsageError, one_line
from attire.inference.bundle_files import GRAPH, find_bundle, is_bundle
from attire.inference.inputs import PictureInput, expand_paths, read_inputs
from attire.inference.prediction import NO_OOD_DETECTOR, Prediction
from attire.inference.runtimes import ExportedModel, format_of, load_export
from attire.storage import files

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


def ood_warning(model: Model) -> str | None:
    """What to warn of where a bundle cannot tell what is none of its classes."""
    if isinstance(model, ExportedModel) or getattr(model, "ood_detector", None) is not None:
        return None
    return NO_OOD_DETECTOR


# Answers.


@dataclass(frozen=True, eq=False)
class InputBatch:
    """Pictures in the order they were named in, and errors in the places of those that cannot be read."""

    items: list[PictureInput | AttireError]

    def images(self) -> NDArray[np.uint8]:
        """(n, 28, 28) uint8, n at most the number of items."""
        images = [item.image for item in self.items if isinstance(item, PictureInput)]
        return np.stack(images) if images else np.empty((0, 28, 28), np.uint8)

    def answers(self, predictions: Iterable[Prediction]) -> list[Answer]:
        """Each picture with its prediction, of which there is one an image, and the errors among them."""
        following = iter(predictions)
        return [item if isinstance(item, AttireError) else (item, next(following)) for item in self.items]


def batch_inputs(inputs: Iterable[PictureInput | AttireError]) -> Iterator[InputBatch]:
    """Batches of at most 128 inputs, errors counted."""
    items: list[PictureInput | AttireError] = []
    for item in inputs:
        items.append(item)
        if len(items) >= BATCH:
            yield InputBatch(items)
            items = []
    if items:
        yield InputBatch(items)


def _answer(model: Model, inputs: Iterable[PictureInput | AttireError]) -> Iterator[list[Answer]]:
    for batch in batch_inputs(inputs):
        images = batch.images()
        yield batch.answers(model.predict(images) if len(images) else [])


def _table_line(name: str, prediction: Prediction, top_k: int) -> str:
    if prediction.out_of_distribution:
        return f"{one_line(name):24} {prediction}"
    rest = "   ".join(f"{label} {p:.3f}" for label, p in prediction.ranking[1:top_k])
    return f"{one_line(name):24} {prediction.label:12} {prediction.probability:.3f}   {rest}".rstrip()


def _narrow_lines(name: str, prediction: Prediction, top_k: int) -> str:
    """As `_table_line`, on a terminal that is too narrow for it: the name, and a line for each class."""
    lines = [f"{label:12} {p:.3f}" for label, p in prediction.ranking[:top_k]]
    return "\n  ".join([one_line(name), *([f"{prediction}"] if prediction.out_of_distribution else lines)])


def _json_line(name: str, prediction: Prediction, top_k: int) -> str:
    return json.dumps(
        {
            "file": name,
            "label": prediction.label,
            "probabilities": dict(prediction.ranking[:top_k]),
            "out_of_distribution": prediction.out_of_distribution,
            "distance": prediction.distance,
        }
    )


def _csv_line(name: str, prediction: Prediction, top_k: int) -> str:
    outlier, distance = prediction.out_of_distribution, prediction.distance
    verdict = ["" if outlier is None else str(outlier).lower(), "" if distance is None else f"{distance:.4f}"]
    rest = [value for label, p in prediction.ranking[1:top_k] for value in (label, f"{p:.6f}")]
    printable = name.encode("utf-8", "backslashreplace").decode()  # a name on disk need not be UTF-8
    return _csv_text([printable, prediction.label, f"{prediction.probability:.6f}", *verdict, *rest])


def _csv_header(top_k: int) -> str:
    rest = [f"{part}_{i}" for i in range(2, top_k + 1) for part in ("label", "probability")]
    return _csv_text(["file", "label", "probability", "out_of_distribution", "distance", *rest])


def _csv_text(cells: list[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\r\n").writerow(cells)  # either of these in a name makes it quoted
    return buffer.getvalue().removesuffix("\r\n")


_FORMS = {"table": _table_line, "jsonl": _json_line, "csv": _csv_line}


# What `attire predict` does.


def print_answers(
    arguments: Sequence[str],
    model: Model,
    *,
    form: str = "table",
    top_k: int = 3,
    save_inputs: Path | None = None,
    out: IO[str] | None = None,
    answer: Callable[[Iterable[PictureInput | AttireError]], Iterator[list[Answer]]] | None = None,
) -> int:
    """Answer all that the arguments name: answers to `out`, one line for each bad file to stderr. Returns the errors.

    form: table, jsonl or csv; top_k: classes shown an answer; save_inputs: see `_SavedInputs`; answer: used instead of
    the model of this process.
    """
    out, top_k, start = out or sys.stdout, min(top_k, len(model.classes)), time.perf_counter()
    if form == "csv":
        print(_csv_header(top_k), file=out)
    narrow = form == "table" and out.isatty() and shutil.get_terminal_size().columns < _NARROW
    line = _narrow_lines if narrow else _FORMS[form]
    saved, answered, errors = _SavedInputs(save_inputs), 0, 0
    with (
        _progress_bar(arguments, out) as advance,
        closing(read_inputs(expand_paths(arguments), model.classes)) as inputs,
    ):
        for batch in answer(inputs) if answer else _answer(model, inputs):
            for item in batch:
                if isinstance(item, AttireError):
                    print(f"error: {item}", file=sys.stderr)
                    errors += 1
                    continue
                picture, prediction = item
                print(line(picture.name, prediction, top_k), file=out)
                saved.write(picture)
                answered += 1
            out.flush()
            advance(answered + errors)
    if sys.stderr.isatty():
        print(_speed(answered, time.perf_counter() - start), file=sys.stderr)
    return errors


def _speed(count: int, seconds: float) -> str:
    """`1,204 pictures in 3.1 s, 388/s`."""
    return f"{count:,} picture{'' if count == 1 else 's'} in {seconds:.1f} s, {count / max(seconds, 1e-9):,.0f}/s"


@contextmanager
def _progress_bar(arguments: Sequence[str], out: IO[str]) -> Iterator[Callable[[int], None]]:
    """Gives what shows how many are done: a bar on a terminal, where the answers themselves do not show it."""
    total = sum(1 for _ in expand_paths(arguments)) if sys.stderr.isatty() and not out.isatty() else 0
    if total <= BATCH:
        yield lambda done: None
        return
    from attire.terminal import Terminal

    terminal = Terminal()
    try:
        yield lambda done: terminal.advance("Pictures", done, max(total, done))
    finally:
        terminal.close()


class _SavedInputs:
    """`--save-inputs`: a strip for each picture, from the original to what the model sees.

    path: a folder, or a PNG file for a single picture; None to save nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.names = path, set[str]()

    def write(self, item: PictureInput) -> None:
        if self.path is None or item.picture is None:
            return
        from attire.data import photos

        strip = photos.comparison_strip(photos.prepare(item.picture, item.name))
        files.write_bytes(self._free_path(self.path, item), strip)

    def _free_path(self, path: Path, item: PictureInput) -> Path:
        if path.suffix.lower() == ".png":
            if self.names:
                raise UsageError("--save-inputs", "one file for several pictures", do="name a folder")
            self.names.add(path.name)
            return path
        stem = Path(item.name).stem if isinstance(item.picture, Path) else "stdin"
        names = (f"{stem}.png" if i == 1 else f"{stem}-{i}.png" for i in range(1, len(self.names) + 2))
        name = next(name for name in names if name not in self.names)
        self.names.add(name)
        return path / name
