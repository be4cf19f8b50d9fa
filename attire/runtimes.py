"""Exported files, each run in its own runtime: from raw uint8 images to probabilities, nothing rewritten by hand."""

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attire import devices, files
from attire.classifier import Architecture, Classifier, Prediction, as_images, assemble, ranked
from attire.errors import AttireError

SCHEMA = 1
NO_SEAL = "0" * 64  # stands in the metadata while the digest over the file is computed
SUFFIXES = {"onnx": ".onnx", "openvino": ".openvino", "torch-export": ".pt2", "safetensors": ".safetensors"}
EXTRAS = {"onnx": "onnx", "openvino": "openvino"}  # what `pip install 'attire[...]'` is called
METADATA = "attire.json"
BATCH = 256

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]  # (n, 28, 28) to (n, K), n from 1 to BATCH


@dataclass(frozen=True)
class Exported:
    """A file that `attire export` wrote, opened: it answers as the bundle it was made from does."""

    path: Path
    format: str
    facts: dict[str, Any]  # schema, format, precision, classes, bundle, runtime, gate
    run: Run

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.facts["classes"])

    def predict_proba(self, images: ArrayLike) -> NDArray[np.float32]:
        """Calibrated probabilities (n, K) float32 of (n, 28, 28) or (n, 784) uint8 images."""
        found = as_images(images)
        parts = [self.run(found[i : i + BATCH]) for i in range(0, len(found), BATCH)]
        return np.concatenate(parts) if parts else np.empty((0, len(self.classes)), np.float32)

    def predict(self, images: ArrayLike) -> list[Prediction]:
        """As `Classifier.predict` for (n, 28, 28) images; an exported file cannot reject."""
        return [ranked(self.classes, row) for row in self.predict_proba(images)]


def format_of(path: Path) -> str | None:
    """The export format that a path's name stands for; None for anything else, a bundle's folder for one."""
    return next((name for name, suffix in SUFFIXES.items() if path.suffix == suffix), None)


def load_export(path: str | Path) -> Exported:
    """Open an exported file. Raises AttireError for what is not ours, damaged, or lacks its runtime here."""
    path = Path(path)
    kind = format_of(path)
    if kind is None:
        raise AttireError(path, "not an exported file by its name", do=f"expected {', '.join(SUFFIXES.values())}")
    if not path.exists():
        raise AttireError(path, "no such file")
    read, run = READERS[kind]
    facts = read(path)
    if not isinstance(facts, dict) or facts.get("format") != kind or not facts.get("classes"):
        raise AttireError(path, "not a file that `attire export` wrote")
    if facts.get("schema", 0) > SCHEMA:
        raise AttireError(path, f"made by a newer Attire (schema {facts['schema']})", do="update attire")
    return Exported(path, kind, facts, run(path, facts))


def damaged(path: Path) -> AttireError:
    return AttireError(path, "damaged, or changed after it was written: its digest does not match", do="export again")


def missing(kind: str, error: ImportError) -> AttireError:
    return AttireError(kind, "its runtime is not installed", str(error), f"pip install 'attire[{EXTRAS[kind]}]'")


# ONNX: the seal is the SHA-256 of the file with NO_SEAL in the seal's place.


def seal_bytes(data: bytes) -> bytes:
    """The file with its digest where NO_SEAL stands. Raises ValueError where that is not exactly once."""
    if data.count(NO_SEAL.encode()) != 1:
        raise ValueError("expected the place of the seal once")
    return data.replace(NO_SEAL.encode(), files.sha256(data).encode())


def read_onnx(path: Path) -> dict[str, Any]:
    try:
        import onnx
    except ImportError as error:
        raise missing("onnx", error) from error
    data = read(path)
    try:
        model = onnx.load_from_string(data)
        facts: dict[str, Any] = json.loads({line.key: line.value for line in model.metadata_props}["attire"])
        seal = str(facts["seal"])
    except Exception as error:  # protobuf's DecodeError, KeyError, ValueError ...
        raise AttireError(path, "not an ONNX file that `attire export` wrote, or damaged") from error
    if files.sha256(data.replace(seal.encode(), NO_SEAL.encode())) != seal:
        raise damaged(path)
    return facts


def run_onnx(path: Path, facts: dict[str, Any]) -> Run:
    try:
        import onnxruntime
    except ImportError as error:
        raise missing("onnx", error) from error
    session = onnxruntime.InferenceSession(read(path), providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(["probabilities"], {"images": images})[0], np.float32)


# OpenVINO: a folder, since its runtime reads a pair of files; `attire.json` is written last and holds their digests.


def read_openvino(path: Path) -> dict[str, Any]:
    if not (path / METADATA).is_file():
        raise AttireError(path, "not a folder that `attire export` wrote")
    facts = files.read_json(path / METADATA)
    seal = facts.pop("seal", "")
    if seal != files.sha256(files.canonical_json(facts)):
        raise damaged(path / METADATA)
    for name, digest in facts["sha256"].items():
        part = path / Path(name).name
        if not part.is_file() or files.sha256_file(part) != digest:
            raise damaged(part)
    return facts


@devices.signal_stack_kept()
def run_openvino(path: Path, facts: dict[str, Any]) -> Run:
    try:
        import openvino
    except ImportError as error:
        raise missing("openvino", error) from error
    hint = {"fp32": "f32", "int8": "f32", "bf16": "bf16"}[facts["precision"]]
    network = openvino.Core().compile_model(path / "network.xml", "CPU", {"INFERENCE_PRECISION_HINT": hint})
    return lambda images: np.array(network(images)[0], np.float32)


# torch.export: a zip; the seal covers every record but the metadata itself.


def records_digest(path: Path) -> str:
    sha = hashlib.sha256()
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith(f"extra/{METADATA}"):
                sha.update(name.partition("/")[2].encode() + b"\0" + hashlib.sha256(archive.read(name)).digest())
    return sha.hexdigest()


def read_torch_export(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith(f"extra/{METADATA}"))
            facts: dict[str, Any] = json.loads(archive.read(name))
        seal = facts.pop("seal")
        digest = records_digest(path)
    except (OSError, zipfile.BadZipFile, StopIteration, ValueError, KeyError) as error:
        raise AttireError(path, "not a torch.export file that `attire export` wrote, or damaged") from error
    if seal != files.sha256(files.canonical_json(facts)) or facts["records"] != digest:
        raise damaged(path)
    return facts


def run_torch_export(path: Path, facts: dict[str, Any]) -> Run:
    import torch

    module = torch.export.load(path).module()

    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(module(torch.from_numpy(np.ascontiguousarray(images))).float().numpy())

    return run


# safetensors: tensors named as torchvision names them, everything else in the header; sealed as ONNX is.


def read_safetensors(path: Path) -> dict[str, Any]:
    data = read(path)
    try:
        length = int.from_bytes(data[:8], "little")
        facts: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["attire"])
        seal = str(facts["seal"])
    except (ValueError, KeyError, TypeError) as error:
        raise AttireError(path, "not a safetensors file that `attire export` wrote, or damaged") from error
    if files.sha256(data.replace(seal.encode(), NO_SEAL.encode())) != seal:
        raise damaged(path)
    return facts


def run_safetensors(path: Path, facts: dict[str, Any]) -> Run:
    """In PyTorch, in fp32 whatever the weights are kept in."""
    from safetensors.torch import load

    about = {**facts["architecture"], "hidden": tuple(facts["architecture"]["hidden"])}
    tensors = {name: value.float() for name, value in load(read(path)).items()}
    classes = tuple(facts["classes"])
    model = assemble(Architecture(**about), len(classes), tensors, path)
    return Classifier(model, Architecture(**about), classes, facts["temperature"], {}).predict_proba


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise files.cannot("read", path, error) from error


READERS: dict[str, tuple[Callable[[Path], dict[str, Any]], Callable[[Path, dict[str, Any]], Run]]] = {
    "onnx": (read_onnx, run_onnx),
    "openvino": (read_openvino, run_openvino),
    "torch-export": (read_torch_export, run_torch_export),
    "safetensors": (read_safetensors, run_safetensors),
}
