"""`attire export`: a bundle in another runtime's form, proved equal before it gets its name."""

import contextlib
import io
import json
import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from attire.data.dataset import ImageDataset
from attire.data.loading import load_dataset
from attire.errors import AttireError, UsageError
from attire.evaluation.intervals import Interval, paired_difference, wilson
from attire.features import views
from attire.inference import runtimes
from attire.inference.bundle_files import find_bundle
from attire.inference.classifier import Classifier, load_bundle
from attire.inference.out_of_distribution import OODDetector, TENSORS, add_confidence_term, mahalanobis_distance, pool_features
from attire.inference.runtimes import ExportedModel, METADATA_FILE, NO_SEAL, READERS, SCHEMA, SUFFIXES, load_export, seal_bytes
from attire.model import devices, vgg
from attire.progress import NoProgress, Progress, in_parts
from attire.storage import files

_FORMATS = tuple(SUFFIXES)
_PRECISIONS = {
    "onnx": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
    "torch-export": ("fp32", "bf16"),
    "safetensors": ("fp32", "bf16"),
}
_OPSET = 20  # of ONNX: the newest whose operators the web runtime has too
_REJECTS = ("onnx", "fp32")  # gives distances too: the others have one output, and int8 moves distances
_TOLERANCE = 1e-4  # largest difference of a probability that fp32 may show
_DISTANCE_TOLERANCE = 1e-3  # relative: roots of a difference of squares; 5e-6 for `fast`, 1e-4 where 60 images trained
_CALIBRATION_IMAGES = 300  # of the training set: what NNCF takes by default
_LEAST = 2000  # images the gate runs
_PART = 250  # images answered between two signs of progress


@dataclass(frozen=True)
class ParityCheck:
    """The export against its bundle on the same labelled images: what decides whether it is written."""

    n: int
    agreement: Interval  # share of images given the same class
    largest: float  # difference of a probability
    accuracy: Interval  # of the export
    change: Interval  # accuracy of the export minus that of the bundle, paired
    distance: float | None = None  # largest relative difference of a distance; None where the export cannot reject
    verdicts: int = 0  # images that one rejects and the other does not

    def to_json(self) -> dict[str, Any]:
        intervals = {name: getattr(self, name).to_json() for name in ("agreement", "accuracy", "change")}
        told = {"n": self.n, "largest": self.largest, **intervals}
        return told if self.distance is None else {**told, "distance": self.distance, "verdicts": self.verdicts}

    def __str__(self) -> str:
        same = f"same class on {100 * self.agreement.value:.2f} % ({self.agreement.span()}, n = {self.n:,})"
        accuracy = f"accuracy {self.accuracy.percent()}, change {self.change.points()}"
        far = "" if self.distance is None else f", distances within {self.distance:.1e}, {self.verdicts} other verdicts"
        return f"{same}, probabilities within {self.largest:.1e}{far}, {accuracy}"


class WholeNetwork(nn.Module):
    """Raw images (n, 28, 28) uint8 to calibrated probabilities (n, K) float32: preprocessing and temperature inside.

    So are the views, of which a bundle may average several; its batches are then so many times as large inside.
    ood_detector: its distances (n,) are then a second output.
    """

    def __init__(
        self, classifier: Classifier, dtype: torch.dtype = torch.float32, ood_detector: OODDetector | None = None
    ) -> None:
        super().__init__()
        self.ood: nn.Module | None = None
        self.doubt = ood_detector.doubt if ood_detector else 0.0
        if ood_detector is not None:
            self.ood = nn.Module()
            for name in TENSORS:
                self.ood.register_buffer(name, getattr(ood_detector, name))
        self.model, self.size, self.dtype = classifier.model.to(dtype), classifier.architecture.image_size, dtype
        self.temperature, self.views = classifier.temperature, classifier.architecture.views
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(vgg.IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(vgg.IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        count, grey = images.shape[0], images[:, None].float() / 255
        if len(self.views) > 1:
            grey = torch.cat([_seen(grey, view) for view in self.views])  # (V * n, 1, 28, 28), view after view
        if self.size != 28:
            grey = F.interpolate(grey, size=(self.size, self.size), mode="bilinear", antialias=self.size < 28)
        x = (grey.expand(-1, 3, -1, -1) - self.mean) / self.std
        x = self.model.avgpool(self.model.features(x.to(self.dtype))).flatten(1)
        logits = self.model.classifier(x).float()
        if len(self.views) > 1:
            x, logits = x[:count], logits.unflatten(0, (len(self.views), count)).mean(0)
        probabilities = torch.softmax(logits / self.temperature, 1)
        if self.ood is None:
            return probabilities
        centre, means, whiten = (getattr(self.ood, name) for name in TENSORS)
        far = mahalanobis_distance(pool_features(x, len(centre)), centre, whiten, means)
        return probabilities, add_confidence_term(far, probabilities, self.doubt)


def _seen(grey: Tensor, view: str) -> Tensor:
    """What `features.seen` does, to (n, 1, 28, 28) of 0..1 and in operations that every runtime has."""
    if down_right := views.view_shift(view):
        down, right = down_right
        grey = F.pad(grey, (right, -right, down, -down))
    return grey.flip(3) if view.endswith("flip") else grey


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

    kind: onnx, openvino (a folder), torch-export or safetensors; precision: fp32, bf16 or int8, not every format has
    each. data: labelled images for the gate, default 2,000 of the official test set; max_drop: accuracy, as a share,
    that bf16 and int8 may lose. Raises AttireError, and writes nothing, where the export does not pass.
    """
    _check(kind, precision, max_drop)
    path = Path(out) if out else Path(f"{Path(bundle).resolve().name}{SUFFIXES[kind]}")
    if path.suffix != SUFFIXES[kind]:
        raise UsageError("--out", f"expected a name that ends in {SUFFIXES[kind]}, found {path.name!r}")
    if path.exists():
        files.remove_leftovers(path.parent)  # of one that was killed when all but its scratch folder was in order
        raise AttireError(path, "it exists already", do="give --out another name, or remove it first")
    files.check_writable(path.parent)
    progress, classifier = progress or NoProgress(), load_bundle(bundle, "cpu")
    data = data or load_dataset(part="test").subset(range(_LEAST))
    if data.classes != classifier.classes:
        raise AttireError(data.source, "its classes are not the bundle's")
    folder_of_bundle = find_bundle(bundle)
    facts = describe(folder_of_bundle, classifier, kind, precision)
    card = folder_of_bundle / "README.md"
    ood_detector = classifier.ood_detector if (kind, precision) == _REJECTS else None
    facts |= {"ood": ood_detector.about()} if ood_detector else {}
    probabilities = [classifier.predict_proba(part) for part in in_parts(data.images, _PART, "Bundle", progress)]
    seen = data.images if ood_detector else data.images[:0]
    far = [classifier.distances(part) for part in in_parts(seen, _PART, "Distances", progress)]
    expected = Expected(np.concatenate(probabilities), np.concatenate(far) if ood_detector else None)
    with files.temporary_folder(path) as folder:
        progress.note("Export", f"{kind}, {precision}")
        with quiet():
            built, versions = _BUILDERS[kind](WholeNetwork(classifier, ood_detector=ood_detector), precision, folder)
        facts["runtime"] = versions
        found = measure_parity(ExportedModel(built, kind, facts, READERS[kind][1](built, facts)), expected, data, progress)
        progress.note("Gate", str(found))
        judge(found, precision, max_drop, path)
        told = card.read_text(encoding="utf-8") if card.exists() else ""
        _STAMPS[kind](built, {**facts, "gate": found.to_json()}, told, path)
    return load_export(path)


def _check(kind: str, precision: str, max_drop: float) -> None:
    if kind not in _FORMATS:
        raise UsageError("--format", f"expected one of {', '.join(_FORMATS)}, found {kind!r}")
    if precision not in _PRECISIONS[kind]:
        raise UsageError("--precision", f"{kind} has {' and '.join(_PRECISIONS[kind])}, found {precision!r}")
    if not 0 <= max_drop <= 1:
        raise UsageError("--max-drop", f"expected 0 to 100 points, found {100 * max_drop:g}")


def describe(bundle: Path, classifier: Classifier, kind: str, precision: str) -> dict[str, Any]:
    """What the file says of itself; `gate` and `runtime` join it."""
    return {
        "schema": SCHEMA,
        "format": kind,
        "precision": precision,
        "classes": list(classifier.classes),
        "input": "images: uint8 (n, 28, 28), garments light on a black background, n free",
        "output": "probabilities: float32 (n, K), calibrated, in the order of classes; onnx in fp32 also gives"
        " distances: float32 (n,), rejected where above reject.threshold",
        "temperature": classifier.temperature,
        "architecture": {**classifier.architecture.__dict__, "hidden": list(classifier.architecture.hidden)},
        "bundle": files.sha256_file(bundle / "model.json"),
        "facts": classifier.metadata,
    }


@dataclass(frozen=True)
class Expected:
    """The bundle's answers: probabilities (n, K), and distances (n,) where the export is to give them too."""

    probabilities: NDArray[np.float32]
    distances: NDArray[np.float32] | None = None


def measure_parity(
    exported: ExportedModel, bundle: Expected, data: ImageDataset, progress: Progress | None = None
) -> ParityCheck:
    """Run the export in its own runtime over all images of `data`, against the bundle's answers."""
    answers = [exported.answers(part) for part in in_parts(data.images, _PART, "Export", progress or NoProgress())]
    found = np.concatenate([probabilities for probabilities, _ in answers])
    distances = [distance for _, distance in answers if distance is not None]
    far, expected = np.concatenate(distances) if distances else None, bundle.probabilities
    if found.shape != expected.shape or not np.isfinite(found).all():
        raise AttireError(exported.path, f"its answers are {found.shape}, expected {expected.shape} finite values")
    same = found.argmax(1) == expected.argmax(1)
    right, before = found.argmax(1) == data.labels, expected.argmax(1) == data.labels
    return ParityCheck(
        len(data),
        wilson(int(same.sum()), len(data)),
        float(np.abs(found - expected).max()),
        wilson(int(right.sum()), len(data)),
        paired_difference(before, right),
        *_distance_gap(exported, far, bundle.distances),
    )


def _distance_gap(
    exported: ExportedModel, found: NDArray[np.float32] | None, expected: NDArray[np.float32] | None
) -> tuple[float | None, int]:
    """The largest relative difference of a distance, and how many verdicts differ; None and 0 where there are none."""
    if found is None or expected is None or exported.threshold is None:
        return None, 0
    verdicts = (found > exported.threshold) != (expected > exported.threshold)
    return float((np.abs(found - expected) / np.maximum(expected, 1)).max()), int(verdicts.sum())


def judge(found: ParityCheck, precision: str, max_drop: float, path: Path) -> None:
    """Raises AttireError where the export is not as good as its bundle."""
    far = found.distance or 0
    unlike = found.agreement.value < 1 or found.largest > _TOLERANCE or found.verdicts or far > _DISTANCE_TOLERANCE
    if precision == "fp32" and unlike:
        raise AttireError(path, f"not written, since it is not equal to the bundle: {found}")
    if -found.change.value > max_drop:
        what = f"not written: {precision} loses {-100 * found.change.value:.2f} points, allowed {100 * max_drop:g}"
        raise AttireError(path, what, str(found), "give --max-drop, or another --precision")


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters talk: their progress, deprecations and advice are not the user's."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)


def _example() -> Tensor:
    return torch.zeros(2, 28, 28, dtype=torch.uint8)


def _calibration() -> NDArray[np.uint8]:
    return load_dataset(part="train").images[:_CALIBRATION_IMAGES]


_Built = tuple[Path, dict[str, Any]]  # the network without our metadata, and the versions it was made with


def build_onnx(network: WholeNetwork, precision: str, folder: Path) -> _Built:
    try:
        import onnx
        import onnxscript

        onnxruntime = runtimes.onnx_runtime()
    except ImportError as error:
        raise runtimes.missing_runtime("onnx", error) from error
    shapes = {"images": {0: torch.export.Dim("n", min=1, max=2**16)}}
    program = torch.onnx.export(
        network,
        (_example(),),
        dynamo=True,
        opset_version=_OPSET,
        input_names=["images"],
        output_names=["probabilities", "distances"] if network.ood is not None else ["probabilities"],
        dynamic_shapes=shapes,
        verbose=False,
    )
    path = folder / "network.onnx"
    path.write_bytes(_without_traces(cast(Any, program).model_proto).SerializeToString())
    if precision == "int8":
        path = _quantise_onnx(path, folder / "int8.onnx")
    made = {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "onnxscript": onnxscript.__version__}
    return path, {**made, "opset": _OPSET, "torch": torch.__version__}


def _without_traces(model: Any) -> Any:
    """The exporter notes for every node where in whose source files it came from: larger, and nobody's business."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return model


def _quantise_onnx(path: Path, target: Path) -> Path:
    """Static post-training quantisation: weights int8 per channel, activations uint8, in QDQ form."""
    from onnxruntime import quantization

    class Images(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter(_calibration())

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            image = next(self.rows, None)
            return None if image is None else {"images": image[None]}

    quantization.quant_pre_process(str(path), str(path), skip_symbolic_shape=True)
    # Weights in 7 bits: processors without VNNI add two products of 8 bits in 16, which overflow. With 8 a bundle of
    # `fast` lost 3.9 points on such a one (AMD EPYC, family 25 model 1), and none where there is VNNI.
    layers = ["Conv", "Gemm", "MatMul", "MaxPool"]
    quantization.quantize_static(
        str(path), str(target), Images(), per_channel=True, reduce_range=True, op_types_to_quantize=layers
    )
    return target


def _stamp_onnx(built: Path, facts: dict[str, Any], card: str, path: Path) -> None:
    import onnx

    model = onnx.load(built)
    onnx.helper.set_model_props(model, {"attire": json.dumps({**facts, "seal": NO_SEAL}), "card": card})
    files.write_bytes(path, seal_bytes(model.SerializeToString(deterministic=True)))


@devices.preserve_signal_stack()
def _build_openvino(network: WholeNetwork, precision: str, folder: Path) -> _Built:
    try:
        import nncf
        import openvino
    except ImportError as error:
        raise runtimes.missing_runtime("openvino", error) from error
    converted = openvino.convert_model(network, example_input=_example(), input=[-1, 28, 28])
    if precision == "int8":
        images = [image[None] for image in _calibration()]
        converted = nncf.quantize(converted, nncf.Dataset(images), subset_size=len(images))
    openvino.save_model(converted, folder / "network.xml", compress_to_fp16=precision == "bf16")
    return folder, {"openvino": openvino.__version__, "nncf": nncf.__version__, "torch": torch.__version__}


def _stamp_openvino(built: Path, facts: dict[str, Any], card: str, path: Path) -> None:
    """The pair of files, the card, and `attire.json` last; the folder gets its name when all of it is there."""
    with files.atomic_folder(path) as part:
        for name in ("network.xml", "network.bin"):
            files.write_bytes(part / name, (built / name).read_bytes())
        files.write_text(part / "README.md", card)
        digests = {name: files.sha256_file(part / name) for name in ("network.xml", "network.bin", "README.md")}
        sealed = {**facts, "sha256": digests}
        sealed = json.loads(json.dumps(sealed))  # tuples as lists, so that the digest is that of what is read
        files.write_json(part / METADATA_FILE, {**sealed, "seal": files.sha256(files.canonical_json(sealed))})


def _build_torch_export(network: WholeNetwork, precision: str, folder: Path) -> _Built:
    if precision == "bf16":
        network.model, network.dtype = network.model.bfloat16(), torch.bfloat16
    shapes = {"images": {0: torch.export.Dim("n", min=1, max=2**16)}}
    program = torch.export.export(network, (_example(),), dynamic_shapes=shapes)
    path = folder / "network.pt2"
    torch.export.save(program, path)
    return path, {"torch": torch.__version__}


def _stamp_torch_export(built: Path, facts: dict[str, Any], card: str, path: Path) -> None:
    """One more record in the zip that passed the gate."""
    told = json.loads(json.dumps({**facts, "card": card, "records": runtimes.records_digest(built)}))
    sealed = json.dumps({**told, "seal": files.sha256(files.canonical_json(told))})
    with zipfile.ZipFile(built, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/extra/{METADATA_FILE}", sealed)
    files.write_bytes(path, built.read_bytes())


def _build_safetensors(network: WholeNetwork, precision: str, folder: Path) -> _Built:
    """The weights alone, in 16 bits for bf16; who reads them computes in fp32."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    path = folder / "network.safetensors"
    tensors = {name: value.to(dtype).contiguous() for name, value in network.model.state_dict().items()}
    path.write_bytes(safetensors.torch.save(tensors))
    return path, {"safetensors": safetensors.__version__, "torch": torch.__version__}


def _stamp_safetensors(built: Path, facts: dict[str, Any], card: str, path: Path) -> None:
    told = {"format": "pt", "attire": json.dumps({**facts, "seal": NO_SEAL}), "card": card}
    tensors = safetensors.torch.load(built.read_bytes())
    files.write_bytes(path, seal_bytes(safetensors.torch.save(tensors, metadata=told)))


_BUILDERS: dict[str, Callable[[WholeNetwork, str, Path], _Built]] = {
    "onnx": build_onnx,
    "openvino": _build_openvino,
    "torch-export": _build_torch_export,
    "safetensors": _build_safetensors,
}
_STAMPS: dict[str, Callable[[Path, dict[str, Any], str, Path], None]] = {
    "onnx": _stamp_onnx,
    "openvino": _stamp_openvino,
    "torch-export": _stamp_torch_export,
    "safetensors": _stamp_safetensors,
}
