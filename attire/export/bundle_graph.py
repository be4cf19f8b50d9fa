"""`network.onnx` beside a bundle: how ONNX Runtime computes with the bundle's own weights, which it does not repeat."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from attire.data.dataset import ImageDataset
from attire.errors import AttireError
from attire.export import export
from attire.export.export import Expected, ParityCheck, WholeNetwork
from attire.inference import runtimes
from attire.inference.bundle_files import GRAPH, MODEL_JSON, WEIGHTS
from attire.inference.classifier import load_bundle
from attire.inference.runtimes import NO_SEAL, seal_bytes
from attire.model import batch_norm
from attire.storage import files

_LEAST = 1 << 14  # values; a smaller tensor may stay inside the graph: means that the exporter transposed, constants
_LIMIT = 1 << 20  # bytes of a graph without its weights


def write_graph(folder: Path, data: ImageDataset) -> ParityCheck:
    """Write the bundle's graph, proved on these labelled images to answer as the bundle does, verdicts included.

    The weights stay in `model.safetensors`, in 32 or 16 bits, where ONNX names them as external data; those of 16
    bits are cast to float32, once, when a session begins. Raises AttireError, and writes nothing, where an answer
    differs.
    """
    classifier = load_bundle(folder, "cpu")
    ood_detector, path = classifier.ood_detector, folder / GRAPH
    distances = classifier.distances(data.images) if ood_detector else None
    expected = Expected(classifier.predict_proba(data.images), distances)
    batch_norm.freeze_batch_norm(classifier.model)
    facts = {
        **export.describe(folder, classifier, "onnx", "fp32"),
        "ood": ood_detector.about() if ood_detector else None,
    }
    with tempfile.TemporaryDirectory(prefix="attire-graph-") as made, export.quiet():
        built, facts["runtime"] = export.build_onnx(
            WholeNetwork(classifier, ood_detector=ood_detector), "fp32", Path(made)
        )
        body = _sealed(*_outside(built, folder / WEIGHTS), facts)
        trial = _trial_folder(Path(made), folder, body)
        found = export.measure_parity(runtimes.load_export(trial / GRAPH), expected, data)
    export.judge(found, "fp32", 0, path)
    files.write_bytes(path, body)
    return found


def _trial_folder(parent: Path, bundle: Path, graph: bytes) -> Path:
    """The bundle with this graph, to be tried before it gets its name."""
    for name in (MODEL_JSON, WEIGHTS):
        files.write_bytes(parent / "trial" / name, (bundle / name).read_bytes())
    files.write_bytes(parent / "trial" / GRAPH, graph)
    return parent / "trial"


def _sealed(model: Any, weights: dict[str, Any], facts: dict[str, Any]) -> bytes:
    import onnx

    told = json.dumps({**facts, "weights": weights, "seal": NO_SEAL})
    onnx.helper.set_model_props(model, {"attire": told})
    body = seal_bytes(model.SerializeToString(deterministic=True))
    if len(body) > _LIMIT:
        raise AttireError(GRAPH, f"{len(body):,} bytes without its weights, expected at most {_LIMIT:,}")
    return body


def _outside(built: Path, weights: Path) -> tuple[Any, dict[str, Any]]:
    """The ONNX model whose large initializers refer to the safetensors file, and which tensor of it each one is."""
    import onnx

    model, data = onnx.load(built), weights.read_bytes()
    tensors, places, start = load(data), json.loads(data[8 : 8 + _header(data)]), 8 + _header(data)
    names: dict[str, str] = {}
    casts = []
    for value in list(model.graph.initializer):
        name = value.name.removeprefix("model.")
        if np.prod(value.dims) < _LEAST and name not in tensors:
            continue
        if name not in tensors or not np.array_equal(onnx.numpy_helper.to_array(value), tensors[name].astype("f4")):
            raise AttireError(GRAPH, f"the exporter changed {value.name}, which is not the bundle's any more")
        begin, end = places[name]["data_offsets"]
        stored = onnx.helper.np_dtype_to_tensor_dtype(tensors[name].dtype)
        label = value.name
        if stored != onnx.TensorProto.FLOAT:
            label = f"{value.name}.16"
            casts.append(onnx.helper.make_node("Cast", [label], [value.name], to=onnx.TensorProto.FLOAT))
        model.graph.initializer.remove(value)
        model.graph.initializer.append(_external(label, stored, value.dims, start + begin, end - begin))
        names[label] = name
    for cast in reversed(casts):
        model.graph.node.insert(0, cast)
    return model, {"sha256": files.sha256(data), "tensors": names}


def _header(data: bytes) -> int:
    """Bytes of a safetensors header, which begin after the eight that say so."""
    return int.from_bytes(data[:8], "little")


def _external(name: str, dtype: int, shape: Any, offset: int, length: int) -> Any:
    """An ONNX tensor whose data are these bytes of the bundle's weights."""
    import onnx

    tensor = onnx.TensorProto(name=name, data_type=dtype, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": WEIGHTS, "offset": str(offset), "length": str(length)}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor
