"""`attire export`: a bundle in another runtime's form, proved equal before it gets its name."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from attire.data.dataset import ImageDataset
from attire.data.loading import load_dataset
from attire.errors import AttireError, UsageError
from attire.export.export_format import ExportFormat
from attire.export.network import EndToEndNetwork
from attire.export.onnx_format import OnnxFormat
from attire.export.openvino_format import OpenVinoFormat
from attire.export.parity import BundleAnswers, ParityCheck
from attire.export.torch_export_format import TorchExportFormat
from attire.inference.bundle_files import MODEL_JSON, find_bundle
from attire.inference.classifier import Classifier, load_bundle
from attire.inference.runtimes import SCHEMA, SUFFIXES, ExportedModel, load_export, open_network
from attire.progress import NoProgress, Progress
from attire.storage import files

_FORMATS: dict[str, ExportFormat] = {
    "onnx": OnnxFormat(),
    "openvino": OpenVinoFormat(),
    "torch-export": TorchExportFormat(),
}
_WITH_DISTANCES = ("onnx", "fp32")  # the others have one output, and int8 moves distances
_PARITY_IMAGES = 2000


def export(
    bundle: str | Path,
    kind: str = "onnx",
    *,
    out: str | Path | None = None,
    precision: str = "fp32",
    max_drop: float = 0.003,
    data: ImageDataset | None = None,
    progress: Progress | None = None,
) -> ExportedModel:
    """Write the bundle as `out` (default: the bundle's folder name with the format's suffix) and return it, opened.

    kind: onnx, openvino (a folder) or torch-export; precision: fp32, bf16 or int8, not every format has each. data:
    labelled images for the parity check, default 2,000 of the official test set; max_drop: accuracy, as a fraction,
    that bf16 and int8 may lose. Raises AttireError, and writes nothing, where the export does not pass.
    """
    path = _check_options(bundle, kind, out, precision, max_drop)
    progress, classifier = progress or NoProgress(), load_bundle(bundle, "cpu")
    data = data or load_dataset(part="test").subset(range(_PARITY_IMAGES))
    if data.classes != classifier.classes:
        raise AttireError(data.source, "its classes are not the bundle's")
    if (kind, precision) != _WITH_DISTANCES:
        classifier.ood_detector = None
    metadata = describe_export(find_bundle(bundle), classifier, kind, precision)
    answers = BundleAnswers.of(classifier, data.images, progress)
    with files.temporary_folder(path) as folder:
        progress.note("Export", f"{kind}, {precision}")
        network = EndToEndNetwork(classifier)
        built, metadata["runtime_versions"] = _FORMATS[kind].build(network, precision, folder)
        parity = ParityCheck.measure(open_network(built, kind, metadata), answers, data, progress)
        progress.note("Parity", str(parity))
        parity.require(precision, max_drop, path)
        card = find_bundle(bundle) / "README.md"
        text = card.read_text(encoding="utf-8") if card.exists() else ""
        _FORMATS[kind].write(built, {**metadata, "parity": parity.to_json()}, text, path)
    return load_export(path)


def _check_options(bundle: str | Path, kind: str, out: str | Path | None, precision: str, max_drop: float) -> Path:
    """The path of the export. Raises UsageError for an option that does not fit, AttireError where it cannot be."""
    if kind not in _FORMATS:
        raise UsageError("--format", f"expected one of {', '.join(_FORMATS)}, found {kind!r}")
    if precision not in _FORMATS[kind].precisions:
        raise UsageError("--precision", f"{kind} has {' and '.join(_FORMATS[kind].precisions)}, found {precision!r}")
    if not 0 <= max_drop <= 1:
        raise UsageError("--max-drop", f"expected 0 to 100 points, found {100 * max_drop:g}")
    path = Path(out) if out else Path(f"{Path(bundle).resolve().name}{SUFFIXES[kind]}")
    if path.suffix != SUFFIXES[kind]:
        raise UsageError("--out", f"expected a name that ends in {SUFFIXES[kind]}, found {path.name!r}")
    if path.exists():
        files.remove_leftovers(path.parent)  # of one that was killed when all but its scratch folder was in order
        raise AttireError(path, "it exists already", do="give --out another name, or remove it first")
    files.check_writable(path.parent)
    return path


def describe_export(bundle: Path, classifier: Classifier, kind: str, precision: str) -> dict[str, Any]:
    """What an exported file says of itself; `runtime_versions` and `parity` join it."""
    ood = {"ood": classifier.ood_detector.to_json()} if classifier.ood_detector else {}
    return {
        "schema": SCHEMA,
        "format": kind,
        "precision": precision,
        "classes": list(classifier.classes),
        "input": "images: uint8 (n, 28, 28), garments light on a black background, n free",
        "output": "probabilities: float32 (n, K), calibrated, in the order of classes; onnx in fp32 also gives"
        " distances: float32 (n,), out-of-distribution where above ood.threshold",
        "temperature": classifier.temperature,
        "architecture": asdict(classifier.architecture),
        "bundle_digest": files.sha256_file(bundle / MODEL_JSON),
        "bundle_metadata": classifier.metadata,
        **ood,
    }
