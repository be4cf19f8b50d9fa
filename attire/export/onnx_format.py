"""ONNX: one file that holds everything, its metadata among the properties of the model."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from attire.export.export_format import ExportFormat
from attire.export.network import EndToEndNetwork
from attire.inference import runtimes
from attire.inference.runtimes import NO_SEAL, seal_bytes
from attire.storage import files

_OPSET = 20  # the newest whose operators the web runtime has too


class OnnxFormat(ExportFormat):
    """Runs in ONNX Runtime; in fp32 it gives distances too, which int8 would move."""

    precisions = ("fp32", "int8")

    def _build(self, network: EndToEndNetwork, precision: str, folder: Path) -> tuple[Path, dict[str, Any]]:
        try:
            import onnx
            import onnxscript

            onnxruntime = runtimes.onnx_runtime()
        except ImportError as error:
            raise runtimes.missing_runtime("onnx", error) from error
        program = torch.onnx.export(
            network,
            (self._example_images(),),
            dynamo=True,
            opset_version=_OPSET,
            input_names=["images"],
            output_names=["probabilities", "distances"] if network.ood is not None else ["probabilities"],
            dynamic_shapes={"images": {0: torch.export.Dim("n", min=1, max=2**16)}},
            verbose=False,
        )
        path = folder / "network.onnx"
        path.write_bytes(_without_traces(cast(Any, program).model_proto).SerializeToString())
        if precision == "int8":
            path = _quantise(path, folder / "int8.onnx", self._calibration_images())
        versions = {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
        versions |= {"onnxscript": onnxscript.__version__, "opset": _OPSET, "torch": torch.__version__}
        return path, versions

    def write(self, built: Path, metadata: dict[str, Any], card: str, path: Path) -> None:
        import onnx

        files.write_bytes(path, self.seal(onnx.load(built), metadata, card=card))

    def seal(self, model: Any, metadata: dict[str, Any], **properties: str) -> bytes:
        """The bytes of an ONNX model with its metadata and these further properties, sealed."""
        import onnx

        sealed = json.dumps({**metadata, "seal": NO_SEAL})
        onnx.helper.set_model_props(model, {"attire": sealed, **properties})
        return seal_bytes(model.SerializeToString(deterministic=True))


def _without_traces(model: Any) -> Any:
    """The exporter notes for every node where in whose source files it came from: larger, and nobody's business."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return model


def _quantise(path: Path, target: Path, images: NDArray[np.uint8]) -> Path:
    """Static post-training quantisation: weights int8 per channel, activations uint8, in QDQ form."""
    from onnxruntime import quantization

    class Images(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter(images)

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
