"""`network.onnx` beside a bundle: how ONNX Runtime computes with the bundle's own weights, which it does not repeat."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from attire.data.dataset import ImageDataset
from attire.errors import AttireError
from attire.export.export import describe_export
from attire.export.network import EndToEndNetwork
from attire.export.onnx_format import OnnxFormat
from attire.export.parity import BundleAnswers, ParityCheck
from attire.inference.bundle_files import GRAPH, MODEL_JSON, WEIGHTS
from attire.inference.classifier import load_bundle
from attire.inference.runtimes import load_export
from attire.model import batch_norm
from attire.storage import files

_MIN_EXTERNAL = (
    1 << 14
)  # values; a smaller tensor may stay inside the graph: means that the exporter transposed, constants
_MAX_BYTES = 1 << 20  # of a graph without its weights


def write_graph(folder: Path, data: ImageDataset) -> ParityCheck:
    """Write the bundle's graph, proved on these labelled images to answer as the bundle does, distances included.

    The weights stay in `model.safetensors`, in 32 or 16 bits, where ONNX names them as external data; those of 16
    bits are cast to float32, once, when a session begins. Raises AttireError, and writes nothing, where an answer
    differs.
    """
    classifier, path = load_bundle(folder, "cpu"), folder / GRAPH
    answers = BundleAnswers.of(classifier, data.images)
    batch_norm.freeze_batch_norm(classifier.model)
    metadata = describe_export(folder, classifier, "onnx", "fp32")
    with tempfile.TemporaryDirectory(prefix="attire-graph-") as temporary:
        built, metadata["runtime_versions"] = OnnxFormat().build(EndToEndNetwork(classifier), "fp32", Path(temporary))
        model, metadata["weights"] = _with_external_weights(built, folder / WEIGHTS)
        body = OnnxFormat().seal(model, metadata)
        if len(body) > _MAX_BYTES:
            raise AttireError(GRAPH, f"{len(body):,} bytes without its weights, expected at most {_MAX_BYTES:,}")
        trial = _trial_folder(Path(temporary), folder, body)
        parity = ParityCheck.measure(load_export(trial / GRAPH), answers, data)
    parity.require("fp32", 0, path)
    files.write_bytes(path, body)
    return parity


def _trial_folder(parent: Path, bundle: Path, graph: bytes) -> Path:
    """The bundle with this graph, to be tried before it gets its name."""
    for name in (MODEL_JSON, WEIGHTS):
        files.write_bytes(parent / "trial" / name, (bundle / name).read_bytes())
    files.write_bytes(parent / "trial" / GRAPH, graph)
    return parent / "trial"


def _with_external_weights(built: Path, weights: Path) -> tuple[Any, dict[str, Any]]:
    """The ONNX model whose large initializers refer to the safetensors file, and which tensor of it each one is."""
    import onnx

    model, data = onnx.load(built), weights.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")  # behind the header, whose length stands in the first 8 bytes
    tensors, header = load(data), json.loads(data[8:start])
    names: dict[str, str] = {}
    casts = []
    for value in list(model.graph.initializer):
        name = value.name.removeprefix("model.")
        if np.prod(value.dims) < _MIN_EXTERNAL and name not in tensors:
            continue
        if name not in tensors or not np.array_equal(onnx.numpy_helper.to_array(value), tensors[name].astype("f4")):
            raise AttireError(GRAPH, f"the exporter changed {value.name}, which is not the bundle's any more")
        begin, end = header[name]["data_offsets"]
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


def _external(name: str, dtype: int, shape: Any, offset: int, length: int) -> Any:
    """An ONNX tensor whose data are these bytes of the bundle's weights."""
    import onnx

    tensor = onnx.TensorProto(name=name, data_type=dtype, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": WEIGHTS, "offset": str(offset), "length": str(length)}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor
