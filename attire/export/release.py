"""A run's bundle made fit to ship: 16-bit weights, ONNX Runtime's graph, card, report, and its own measured figures."""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attire.data.dataset import ImageDataset
from attire.data.loading import load_dataset
from attire.errors import AttireError
from attire.evaluation.intervals import Interval, wilson
from attire.evaluation.model_card import model_card
from attire.evaluation.report import page
from attire.evaluation.run_result import load_result
from attire.export.bundle_graph import write_graph
from attire.inference.bundle_files import GRAPH, MODEL_JSON, WEIGHTS
from attire.inference.classifier import Classifier, load_bundle
from attire.inference.runtimes import load_graph
from attire.progress import NoProgress, Progress, in_parts
from attire.storage import files

_CARD, _REPORT, _SAMPLES = "MODEL_CARD.md", "report.html", "samples.png"
_KEPT = (_SAMPLES,)  # what lies beside the bundle and is not made of a run
_DTYPE = "float16"  # kept 9,999 of 10,000 classes and every verdict; bfloat16 kept all classes and changed 8 verdicts
_SOME = 2000  # the first official test images: what a test can afford to score
_LEAST = 0.999  # share of the test images that must keep their class
_LARGEST = 0.01  # difference of a probability that 16 bits may make
_LIMIT = 16_000_000  # bytes, all files together


def release(run: Path, out: Path, progress: Progress | None = None, data: ImageDataset | None = None) -> dict[str, Any]:
    """Write the bundle of a finished run into `out`, with 16-bit weights, and return what it measured.

    data: labelled images, default the official test set. All of them decide: the class must stay the same on 99.9 %,
    every probability within 0.01; on the first 2,000 the graph must answer as the bundle. Raises AttireError, and
    leaves `out` as it was, where that fails or the files exceed 16 MB.
    """
    files.check_writable(out.parent)
    progress, data = progress or NoProgress(), data or load_dataset(part="test")
    result, whole = load_result(run), load_bundle(run, "cpu")
    config, told_of = _without_places(result.config), _without_places(result.data)
    result = replace(result, command=_without_folders(result.command), config=config, data=told_of)
    if data.classes != whole.classes:
        raise AttireError(data.source, "its classes are not the bundle's")
    expected = _probabilities(whole, data, "Bundle", progress)
    with _replaced(out) as part:
        whole.save(part, _DTYPE)
        half = load_bundle(part, "cpu")
        found = _probabilities(half, data, "16 bits", progress)
        told = _compare(found, expected, data)
        _judge(told, out)
        texts = {_REPORT: page(result), _CARD: _shipped_card(model_card(result), told, data)}
        digests = {name: files.sha256(text.encode()) for name, text in texts.items()}
        half.metadata |= {"release": {**told, "dtype": _DTYPE, "digests": digests}}
        half.save(part, _DTYPE)
        for name, text in texts.items():
            files.write_text(part / name, text)
        gate = write_graph(part, data.subset(range(min(_SOME, len(data)))))
        progress.note("Gate", str(gate))
        size = sum(path.stat().st_size for path in part.iterdir())
        if size > _LIMIT:
            raise AttireError(out, f"{size:,} bytes altogether, allowed {_LIMIT:,}", do="release a smaller recipe")
        progress.note("Size", files.human_size(size))
    return {**told, "gate": gate.to_json(), "bytes": size}


def _without_folders(command: str) -> str:
    """A command line whose paths are names alone: where things lay on one machine is nobody else's business."""
    return shlex.join(Path(word).name if "/" in word else word for word in shlex.split(command))


def _without_places(told: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config or data, its teachers named by their runs alone."""
    teacher = told.get("teacher")
    if not teacher:
        return dict(told)
    names = [path.parent.name if path.name == "model" else path.name for path in map(Path, teacher["bundles"])]
    return {**told, "teacher": {**teacher, "bundles": names}}


def _probabilities(model: Classifier, data: ImageDataset, what: str, progress: Progress) -> NDArray[np.float32]:
    return np.concatenate([model.predict_proba(part) for part in in_parts(data.images, 1000, what, progress)])


def _compare(found: NDArray[np.float32], expected: NDArray[np.float32], data: ImageDataset) -> dict[str, Any]:
    """What the card says: how often the 16-bit bundle (n, K) is right, and how near it is to the run's (n, K)."""
    right = found.argmax(1) == data.labels
    same = found.argmax(1) == expected.argmax(1)
    return {
        "n": len(data),
        "correct": int(right.sum()),
        "first": {"n": len(right[:_SOME]), "correct": int(right[:_SOME].sum())},
        "before": int((expected.argmax(1) == data.labels).sum()),
        "same": int(same.sum()),
        "largest": float(np.abs(found - expected).max()),
        "digest": data.image_digest,
    }


def _judge(told: dict[str, Any], out: Path) -> None:
    if told["same"] < _LEAST * told["n"] or told["largest"] > _LARGEST:
        what = f"not written: {_DTYPE} keeps the class of {told['same']:,} of {told['n']:,} images"
        raise AttireError(out, f"{what}, probabilities within {told['largest']:.1e}")


def _shipped_card(card: str, told: dict[str, Any], data: ImageDataset) -> str:
    """The run's card, and what was measured with the weights that ship."""
    share: Interval = wilson(told["correct"], told["n"])
    first = told["first"]
    return (
        f"{card}\n## What ships\n\n"
        f"The weights are kept in 16 bits ({_DTYPE}) and computed with in float32. With them, on {data.source}:\n\n"
        "| Images | Right | Of |\n|---|---:|---:|\n"
        f"| all | {told['correct']:,} | {told['n']:,} |\n"
        f"| the first {first['n']:,} | {first['correct']:,} | {first['n']:,} |\n\n"
        f"That is {100 * share.value:.2f} % ({share.span()}); with 32 bits {told['before']:,} were right."
        f" {told['same']:,} images keep their class, and no probability moves by more than {told['largest']:.4f}."
        " The figures above are of the run, with 32 bits.\n"
    )


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A new folder that takes this one's place when all is written; on failure the old one stays as it was."""
    if folder.exists() and not (folder.is_dir() and ((folder / MODEL_JSON).exists() or _holds_only(folder, _KEPT))):
        raise AttireError(folder, "holds something else than a bundle", do="give --out another name")
    with files.atomic_folder(folder, replace=True) as part:
        for name in _KEPT:
            if (folder / name).exists():
                files.write_bytes(part / name, (folder / name).read_bytes())
        yield part


def _holds_only(folder: Path, names: tuple[str, ...]) -> bool:
    return all(path.name in names for path in folder.iterdir())


def _check_release(folder: Path, data: ImageDataset) -> list[str]:
    """What is not as the bundle says of itself: digests, and how many of the first images are right, by both ways."""
    classifier = load_bundle(folder, "cpu")
    told = classifier.metadata["release"]
    wrong = [name for name, digest in told["digests"].items() if files.sha256_file(folder / name) != digest]
    some = data.subset(range(told["first"]["n"]))
    for what, model in ((WEIGHTS, classifier), (GRAPH, load_graph(folder))):
        correct = int((model.predict_proba(some.images).argmax(1) == some.labels).sum())
        if correct != told["first"]["correct"]:
            wrong.append(f"{what}: {correct} of {len(some)}, {told['first']['correct']} was said")
    return wrong
