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
from attire.evaluation.report import report_page
from attire.evaluation.run_result import RunResult, load_result
from attire.export.bundle_graph import write_graph
from attire.inference.bundle_files import GRAPH, MODEL_JSON, WEIGHTS
from attire.inference.classifier import Classifier, load_bundle
from attire.inference.runtimes import load_export
from attire.progress import NoProgress, Progress, in_batches
from attire.storage import files

_CARD, _REPORT, _SAMPLES = "MODEL_CARD.md", "report.html", "samples.png"
_PRESERVED = (_SAMPLES,)  # lie beside the bundle and are not made of a run
_DTYPE = "float16"  # kept 9,999 of 10,000 classes and every verdict; bfloat16 kept all classes and changed 8 verdicts
_SUBSET = 2000  # the first official test images: what a test can afford to score
_MIN_AGREEMENT = 0.999  # fraction of the test images that must keep their class
_MAX_DIFFERENCE = 0.01  # of a probability, that 16 bits may make
_MAX_BYTES = 16_000_000  # all files together


def release(run: Path, out: Path, progress: Progress | None = None, data: ImageDataset | None = None) -> dict[str, Any]:
    """Write the bundle of a finished run into `out`, with 16-bit weights, and return what it measured.

    data: labelled images, default the official test set. All of them decide: the class must stay the same on 99.9 %,
    every probability within 0.01; on the first 2,000 the graph must answer as the bundle. Raises AttireError, and
    leaves `out` as it was, where that fails or the files exceed 16 MB.
    """
    files.check_writable(out.parent)
    progress, data = progress or NoProgress(), data or load_dataset(part="test")
    result, bundle = _anonymous(load_result(run)), load_bundle(run, "cpu")
    if data.classes != bundle.classes:
        raise AttireError(data.source, "its classes are not the bundle's")
    expected = _probabilities(bundle, data, "Bundle", progress)
    with _replacing(out) as part:
        bundle.save(part, _DTYPE)
        released = load_bundle(part, "cpu")
        measured = _compare(_probabilities(released, data, "16 bits", progress), expected, data)
        _check(measured, out)
        texts = {_REPORT: report_page(result), _CARD: _release_card(model_card(result), measured, data)}
        digests = {name: files.sha256(text.encode()) for name, text in texts.items()}
        released.metadata |= {"release": {**measured, "dtype": _DTYPE, "file_digests": digests}}
        released.save(part, _DTYPE)
        for name, text in texts.items():
            files.write_text(part / name, text)
        parity = write_graph(part, data.subset(range(min(_SUBSET, len(data)))))
        progress.note("Parity", str(parity))
        size = sum(path.stat().st_size for path in part.iterdir())
        if size > _MAX_BYTES:
            raise AttireError(out, f"{size:,} bytes altogether, allowed {_MAX_BYTES:,}", do="release a smaller recipe")
        progress.note("Size", files.human_size(size))
    return {**measured, "parity": parity.to_json(), "bytes": size}


def _anonymous(result: RunResult) -> RunResult:
    """A run's result without the folders of the machine that it ran on."""
    config, data = _without_teacher_folders(result.config), _without_teacher_folders(result.data)
    return replace(result, command=_without_folders(result.command), config=config, data=data)


def _without_folders(command: str) -> str:
    """A command line whose paths are names alone: where things lay on one machine is nobody else's business."""
    return shlex.join(Path(word).name if "/" in word else word for word in shlex.split(command))


def _without_teacher_folders(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config or data, the teachers of its distillation named by their runs alone."""
    teacher = values.get("teacher")
    if not teacher:
        return dict(values)
    names = [path.parent.name if path.name == "model" else path.name for path in map(Path, teacher["bundles"])]
    return {**values, "teacher": {**teacher, "bundles": names}}


def _probabilities(model: Classifier, data: ImageDataset, what: str, progress: Progress) -> NDArray[np.float32]:
    return np.concatenate([model.predict_proba(part) for part in in_batches(data.images, 1000, what, progress)])


def _compare(probabilities: NDArray[np.float32], expected: NDArray[np.float32], data: ImageDataset) -> dict[str, Any]:
    """What the card says: how often the 16-bit bundle (n, K) is right, and how near it is to the run's (n, K)."""
    right = probabilities.argmax(1) == data.labels
    same = probabilities.argmax(1) == expected.argmax(1)
    return {
        "n": len(data),
        "correct": int(right.sum()),
        "subset": {"n": len(right[:_SUBSET]), "correct": int(right[:_SUBSET].sum())},
        "correct_float32": int((expected.argmax(1) == data.labels).sum()),
        "same_class": int(same.sum()),
        "max_difference": float(np.abs(probabilities - expected).max()),
        "data_digest": data.image_digest,
    }


def _check(measured: dict[str, Any], out: Path) -> None:
    if measured["same_class"] < _MIN_AGREEMENT * measured["n"] or measured["max_difference"] > _MAX_DIFFERENCE:
        what = f"not written: {_DTYPE} keeps the class of {measured['same_class']:,} of {measured['n']:,} images"
        raise AttireError(out, f"{what}, probabilities within {measured['max_difference']:.1e}")


def _release_card(card: str, measured: dict[str, Any], data: ImageDataset) -> str:
    """The run's card, and what was measured with the weights that ship."""
    accuracy: Interval = wilson(measured["correct"], measured["n"])
    subset = measured["subset"]
    return (
        f"{card}\n## What ships\n\n"
        f"The weights are kept in 16 bits ({_DTYPE}) and computed with in float32. With them, on {data.source}:\n\n"
        "| Images | Right | Of |\n|---|---:|---:|\n"
        f"| all | {measured['correct']:,} | {measured['n']:,} |\n"
        f"| the first {subset['n']:,} | {subset['correct']:,} | {subset['n']:,} |\n\n"
        f"That is {100 * accuracy.value:.2f} % ({accuracy.span()}); with 32 bits {measured['correct_float32']:,} were"
        f" right. {measured['same_class']:,} images keep their class, and no probability moves by more than"
        f" {measured['max_difference']:.4f}. The figures above are of the run, with 32 bits.\n"
    )


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder that takes this one's place when all is written; on failure the old one stays as it was."""
    holds_bundle = (folder / MODEL_JSON).exists()
    if folder.exists() and not (folder.is_dir() and (holds_bundle or _holds_only(folder, _PRESERVED))):
        raise AttireError(folder, "holds something else than a bundle", do="give --out another name")
    with files.atomic_folder(folder, replace=True) as part:
        for name in _PRESERVED:
            if (folder / name).exists():
                files.write_bytes(part / name, (folder / name).read_bytes())
        yield part


def _holds_only(folder: Path, names: tuple[str, ...]) -> bool:
    return all(path.name in names for path in folder.iterdir())


def _check_release(folder: Path, data: ImageDataset) -> list[str]:
    """What is not as the bundle says of itself: digests, and how many of the first images are right, by both ways."""
    classifier = load_bundle(folder, "cpu")
    release = classifier.metadata["release"]
    claimed = release["subset"]
    wrong = [name for name, digest in release["file_digests"].items() if files.sha256_file(folder / name) != digest]
    subset = data.subset(range(claimed["n"]))
    for name, model in ((WEIGHTS, classifier), (GRAPH, load_export(folder / GRAPH))):
        correct = int((model.predict_proba(subset.images).argmax(1) == subset.labels).sum())
        if correct != claimed["correct"]:
            wrong.append(f"{name}: {correct} of {len(subset)}, {claimed['correct']} was claimed")
    return wrong
