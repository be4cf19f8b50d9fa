"""Exported files, each run in its own runtime: from raw uint8 images to probabilities, nothing rewritten by hand.

No torch is imported here but where a format needs it: a picture is then answered in less than half the time.
"""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attire.errors import AttireError
from attire.inference.bundle_files import MODEL_JSON, WEIGHTS
from attire.inference.prediction import Prediction, as_images
from attire.storage import files

SCHEMA = 1
NO_SEAL = "0" * 64  # stands in the metadata while the digest over the file is computed
SUFFIXES = {"onnx": ".onnx", "openvino": ".openvino", "torch-export": ".pt2"}
METADATA_FILE = "attire.json"
_BATCH = 256

# (n, 28, 28) uint8, n from 1 to _BATCH, to probabilities (n, K) and, where there is `ood`, distances (n,)
_Run = Callable[[NDArray[np.uint8]], tuple[NDArray[np.float32], NDArray[np.float32] | None]]


@dataclass(frozen=True)
class ExportedModel:
    """A file that `attire export` wrote, opened: it answers as the bundle it was made from does.

    metadata: schema, format, precision, classes, the bundle's digest and metadata, versions, the parity check; `ood`
    where it detects what is out-of-distribution.
    """

    path: Path
    format: str
    metadata: dict[str, Any]
    run: _Run

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.metadata["classes"])

    @property
    def threshold(self) -> float | None:
        """The distance above which an image is out-of-distribution; None where this file gives no distances."""
        ood = self.metadata.get("ood")
        return float(ood["threshold"]) if ood else None

    def predict_proba(self, images: ArrayLike) -> NDArray[np.float32]:
        """Calibrated probabilities (n, K) float32 of (n, 28, 28) or (n, 784) uint8 images."""
        return self.probabilities_and_distances(as_images(images))[0]

    def probabilities_and_distances(
        self, images: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Probabilities (n, K) and distances (n,), None where this file gives none, of (n, 28, 28) images."""
        parts = [self.run(images[i : i + _BATCH]) for i in range(0, len(images), _BATCH)]
        probabilities = np.concatenate([np.empty((0, len(self.classes)), np.float32), *(p for p, _ in parts)])
        if self.threshold is None:
            return probabilities, None
        return probabilities, np.concatenate([np.empty(0, np.float32), *(d for _, d in parts if d is not None)])

    def predict(self, images: ArrayLike) -> list[Prediction]:
        """As `Classifier.predict` for (n, 28, 28) images; without a verdict where this file gives no distances."""
        probabilities, distances = self.probabilities_and_distances(as_images(images))
        pairs = zip(
            probabilities, [None] * len(probabilities) if distances is None else distances.tolist(), strict=True
        )
        return [Prediction.from_probabilities(self.classes, row, distance, self.threshold) for row, distance in pairs]


def format_of(path: Path) -> str | None:
    """The export format that a path's name stands for; None for anything else, a bundle's folder for one."""
    return next((name for name, suffix in SUFFIXES.items() if path.suffix == suffix), None)


def load_export(path: str | Path) -> ExportedModel:
    """Open an exported file, or a bundle's `network.onnx`, in its runtime.

    Raises AttireError for a file that is not an export or is damaged, and where its runtime is not installed.
    """
    path = Path(path)
    kind = format_of(path)
    if kind is None:
        raise AttireError(path, "not an exported file by its name", do=f"expected {', '.join(SUFFIXES.values())}")
    if not path.exists():
        raise AttireError(path, "no such file")
    try:
        metadata = _RUNTIMES[kind].read(path)
    except (AttireError, MemoryError):
        raise
    except Exception as error:  # a seal tells damage: whoever writes metadata can seal it too
        reason = f"{type(error).__name__} {error}"[:80]
        raise AttireError(path, "not a file that `attire export` wrote", reason) from error
    if not isinstance(metadata, dict) or metadata.get("format") != kind or not metadata.get("classes"):
        raise AttireError(path, "not a file that `attire export` wrote")
    schema = metadata.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise AttireError(path, f"made by a newer Attire (schema {schema})", do="update attire")
    if schema != SCHEMA:
        raise AttireError(path, "not a file that `attire export` wrote", f"schema {schema!r}"[:80])
    try:
        return open_network(path, kind, metadata)
    except Exception as error:  # the seal fits, and still it is no network: each runtime raises errors of its own
        if isinstance(error, MemoryError) or getattr(error, "status", 0) == 1:
            raise
        reason = f"{type(error).__name__} {error}"[:80]
        raise AttireError(path, "cannot be opened by its runtime", reason, "export again") from error


def open_network(path: Path, kind: str, metadata: dict[str, Any]) -> ExportedModel:
    """A network in its runtime, whether or not the file holds its metadata already. Raises what the runtime raises."""
    return ExportedModel(path, kind, metadata, _RUNTIMES[kind].open(path, metadata))


def _damaged(path: Path) -> AttireError:
    return AttireError(path, "damaged, or changed after it was written: its digest does not match", do="export again")


def missing_runtime(kind: str, error: ImportError) -> AttireError:
    """The error for a format whose packages, an extra of the same name, are not installed."""
    return AttireError(kind, "its runtime is not installed", str(error), f"pip install 'attire[{kind}]'")


# ONNX: the seal is the SHA-256 of the file with NO_SEAL in the seal's place. It is checked before anything parses the
# file; the metadata is found by the bytes that precede it in every ONNX file (onnx.proto: StringStringEntryProto).

_METADATA_PREFIX = b"\n\x06attire\x12"


def seal_bytes(data: bytes) -> bytes:
    """The file with its digest where NO_SEAL stands. Raises ValueError where that is not exactly once."""
    if data.count(NO_SEAL.encode()) != 1:
        raise ValueError("expected the place of the seal once")
    return data.replace(NO_SEAL.encode(), files.sha256(data).encode())


def _read_onnx(path: Path) -> dict[str, Any]:
    data = _read(path)
    try:
        metadata: dict[str, Any] = json.loads(_field(data, data.rindex(_METADATA_PREFIX) + len(_METADATA_PREFIX)))
        seal = str(metadata["seal"])
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise AttireError(path, "not an ONNX file that `attire export` wrote, or damaged") from error
    if files.sha256(data.replace(seal.encode(), NO_SEAL.encode())) != seal:
        raise _damaged(path)
    return metadata


def _field(data: bytes, at: int) -> bytes:
    """A protobuf field of bytes: its length as a varint at `at`, then so many bytes."""
    length = shift = 0
    while True:
        byte = data[at]
        length, shift, at = length | (byte & 0x7F) << shift, shift + 7, at + 1
        if not byte & 0x80:
            return data[at : at + length]


def onnx_runtime() -> Any:
    """The module. Left to itself, 1.32 sends usage data to its maker from the moment it is imported: it is asked not
    to, unless the environment says otherwise. Raises ImportError."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def _open_onnx(path: Path, metadata: dict[str, Any]) -> _Run:
    try:
        onnxruntime = onnx_runtime()
    except ImportError as error:
        raise AttireError(path, "ONNX Runtime is not installed", str(error), "pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _threads_wanted()
    options.log_severity_level = 3  # errors; its warnings are about what it optimises
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others want the cores: a server's loop
    if tensors := _bundle_tensors(path, metadata):
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in tensors.values()]
        options.add_external_initializers(list(tensors), values)
    session = onnxruntime.InferenceSession(_read(path), options, providers=["CPUExecutionProvider"])
    names = ["probabilities", "distances"] if metadata.get("ood") else ["probabilities"]

    def run(images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        outputs = session.run(names, {"images": images})
        return outputs[0], outputs[1] if metadata.get("ood") else None

    return run


def _threads_wanted() -> int:
    """By OMP_NUM_THREADS, as torch's are, which ONNX Runtime by itself does not heed; 0: one a core."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isascii() and text.isdigit() else 0


def _bundle_tensors(path: Path, metadata: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """The weights of a graph that lies in a bundle, from the bundle; none for a file that holds its own.

    Raises AttireError where the bundle is not the one that the graph was made of.
    """
    if not (weights := metadata.get("weights")):
        return {}
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = _read(path.parent / WEIGHTS)
    digests = (files.sha256(data), files.sha256(_read(path.parent / MODEL_JSON)))
    if digests != (weights["sha256"], metadata["bundle_digest"]):
        raise AttireError(path, f"{WEIGHTS} or {MODEL_JSON} beside it is damaged or another's", do="use a fresh copy")
    try:
        tensors = load(data)
        return {name: tensors[key] for name, key in weights["tensors"].items()}
    except (SafetensorError, KeyError) as error:
        raise _damaged(path) from error


# OpenVINO: a folder, since its runtime reads a pair of files; `attire.json` is written last and holds their digests.


def _read_openvino(path: Path) -> dict[str, Any]:
    if not (path / METADATA_FILE).is_file():
        raise AttireError(path, "not a folder that `attire export` wrote")
    metadata = files.read_json(path / METADATA_FILE)
    seal = metadata.pop("seal", "")
    if seal != files.sha256(files.canonical_json(metadata)):
        raise _damaged(path / METADATA_FILE)
    for name, digest in metadata["sha256"].items():
        part = path / Path(name).name
        if not part.is_file() or files.sha256_file(part) != digest:
            raise _damaged(part)
    return metadata


def _open_openvino(path: Path, metadata: dict[str, Any]) -> _Run:
    try:
        import openvino
    except ImportError as error:
        raise missing_runtime("openvino", error) from error
    from attire.model.devices import preserve_signal_stack

    hint = {"fp32": "f32", "int8": "f32", "bf16": "bf16"}[metadata["precision"]]
    with preserve_signal_stack():
        network = openvino.Core().compile_model(path / "network.xml", "CPU", {"INFERENCE_PRECISION_HINT": hint})
    return lambda images: (np.array(network(images)[0], np.float32), None)


# torch.export: a zip; the seal covers every record but the metadata itself. A seal tells damage, not malice, and
# torch.export.load goes on to unpickle anything where a record is not of tensors alone, or to run native code that lies
# in the file (torch 2.14): so that no other records than these are let in, and pickles may hold tensors only.

_TENSORS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_RECORDS = re.compile(
    r"archive_format|archive_version|version|byteorder|\.format_version|\.data/\w+|models/\w+\.json"
    r"|data/(weights/(weight_\d+|\w+_weights_config\.json)|constants/(tensor_\d+|\w+_constants_config\.json))"
    r"|data/sample_inputs/\w+\.pt|extra/[\w.]+"
)


def records_digest(path: Path) -> str:
    """SHA-256 over all records of a torch.export file but the metadata."""
    sha = hashlib.sha256()
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith(f"extra/{METADATA_FILE}"):
                sha.update(name.partition("/")[2].encode() + b"\0" + hashlib.sha256(archive.read(name)).digest())
    return sha.hexdigest()


def _read_torch_export(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            name = next(name for name in names if name.endswith(f"extra/{METADATA_FILE}"))
            metadata: dict[str, Any] = json.loads(archive.read(name))
        seal = metadata.pop("seal")
        digest = records_digest(path)
    except (OSError, zipfile.BadZipFile, StopIteration, ValueError, KeyError) as error:
        raise AttireError(path, "not a torch.export file that `attire export` wrote, or damaged") from error
    if seal != files.sha256(files.canonical_json(metadata)) or metadata["records_digest"] != digest:
        raise _damaged(path)
    if foreign := [name for name in names if not _RECORDS.fullmatch(name.partition("/")[2])]:
        raise AttireError(path, "holds more than a network", foreign[0], do="nothing in it was executed")
    return metadata


@contextmanager
def _tensors_only() -> Iterator[None]:
    """torch.load refuses pickles of anything else, whatever its caller asks for."""
    before = {name: os.environ.pop(name, None) for name in (_TENSORS_ONLY, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")}
    os.environ[_TENSORS_ONLY] = "1"
    try:
        yield
    finally:
        del os.environ[_TENSORS_ONLY]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _open_torch_export(path: Path, metadata: dict[str, Any]) -> _Run:
    import torch

    with _tensors_only():
        module = torch.export.load(path).module()

    def run(images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], None]:
        with torch.inference_mode():
            return np.asarray(module(torch.from_numpy(np.ascontiguousarray(images))).float().numpy()), None

    return run


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise files.io_error("read", path, error) from error


@dataclass(frozen=True)
class _Runtime:
    """How a format's files are read, sealed metadata first, and then run."""

    read: Callable[[Path], dict[str, Any]]
    open: Callable[[Path, dict[str, Any]], _Run]


_RUNTIMES = {
    "onnx": _Runtime(_read_onnx, _open_onnx),
    "openvino": _Runtime(_read_openvino, _open_openvino),
    "torch-export": _Runtime(_read_torch_export, _open_torch_export),
}
