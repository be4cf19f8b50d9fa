"""The frozen backbone compiled by OpenVINO, an optional extra: in fp32 or bf16, or in int8, quantised by NNCF."""

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attire.errors import AttireError, UsageError
from attire.model import devices, vgg
from attire.storage import files

INT8 = "openvino-int8"  # the backend of a cache entry
_CALIBRATION_IMAGES = 128


class _NetworkBackbone:
    """Callable like a torch backbone: (n, 3, S, S) float32 normalised pictures to (n, D) float32 features."""

    network: Any

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.array(self.network(x.numpy())[0]))


class CompiledBackbone(_NetworkBackbone):
    """A backbone in fp32 or bf16, the precision of its arithmetic. Each process compiles it anew, in a second."""

    @devices.preserve_signal_stack()
    def __init__(self, backbone: nn.Module, image_size: int, precision: str) -> None:
        core, hint = _import_backend()[1].Core(), {"fp32": "f32", "bf16": "bf16"}[precision]
        options = {"NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": hint}
        self.network = core.compile_model(_convert(backbone, image_size), "CPU", options)


class Int8Backbone(_NetworkBackbone):
    """A backbone in int8, quantised on the first of the `calibration` images (n, 28, 28), never those of a test set.

    Built once per boundary, size and weights, then kept in the cache folder with its digest, so that every row of
    training and test data passes through the very same quantised network.
    """

    def __init__(self, backbone: nn.Module, name: str, image_size: int, calibration: NDArray[np.uint8]) -> None:
        folder = files.cache_dir() / "backends" / f"{INT8}-{name}"
        with files.lock(folder.with_suffix(".lock")):
            if not (folder / "MANIFEST.json").exists():
                _quantise(backbone, image_size, calibration, folder)
            self.network = _compile_network(folder)


def choose_precision(name: str) -> str:
    """The precision of this name; for `auto` bf16 where OpenVINO has it on this processor, else fp32.

    Raises UsageError where bf16 is asked for and is not there: OpenVINO would silently compute in fp32.
    """
    able = "BF16" in _import_backend()[1].Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if name == "bf16" and not able:
        raise UsageError("--precision", "bf16 was asked for, but OpenVINO has none on this processor", do="use fp32")
    return ("bf16" if able else "fp32") if name == "auto" else name


@devices.preserve_signal_stack()
def _quantise(backbone: nn.Module, image_size: int, calibration: NDArray[np.uint8], folder: Path) -> None:
    """NNCF post-training quantisation: int8 weights per channel, int8 activations per tensor."""
    nncf, openvino = _import_backend()
    logging.getLogger("nncf").setLevel(logging.ERROR)
    network = _convert(backbone, image_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pictures = [vgg.preprocess(image[None], image_size).numpy() for image in calibration[:_CALIBRATION_IMAGES]]
        network = nncf.quantize(network, nncf.Dataset(pictures), subset_size=len(pictures))
    files.make_dir(folder)
    part = folder / "network.part.xml"  # OpenVINO writes two files; they get their names when both are whole
    openvino.save_model(network, part, compress_to_fp16=False)
    digests = {}
    for suffix in (".xml", ".bin"):
        data = part.with_suffix(suffix).read_bytes()
        files.write_bytes(folder / f"network{suffix}", data)
        digests[f"network{suffix}"] = files.sha256(data)
        part.with_suffix(suffix).unlink()
    files.write_json(folder / "MANIFEST.json", {"schema": 1, "sha256": digests, "nncf": nncf.__version__})


def _convert(backbone: nn.Module, image_size: int) -> Any:
    """A torch backbone as an OpenVINO model, for any number of pictures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's own deprecation notices
        return _import_backend()[1].convert_model(
            backbone, example_input=torch.zeros(1, 3, image_size, image_size), input=[-1, 3, image_size, image_size]
        )


@devices.preserve_signal_stack()
def _compile_network(folder: Path) -> Any:
    _, openvino = _import_backend()
    for name, digest in files.read_json(folder / "MANIFEST.json")["sha256"].items():
        if files.sha256_file(folder / Path(name).name) != digest:
            raise AttireError(folder / name, "damaged: its digest does not match", do=f"delete {folder} and try again")
    return openvino.Core().compile_model(folder / "network.xml", "CPU", {"NUM_STREAMS": 1})


def _import_backend() -> tuple[Any, Any]:
    try:
        import nncf
        import openvino
    except ImportError as error:
        raise AttireError("openvino", "not installed", do="pip install 'attire[openvino]'") from error
    return nncf, openvino
