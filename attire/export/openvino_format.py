"""OpenVINO: a folder, since its runtime reads a pair of files, with the metadata beside them."""

import json
from pathlib import Path
from typing import Any

import torch

from attire.export.export_format import ExportFormat
from attire.export.network import EndToEndNetwork
from attire.inference import runtimes
from attire.inference.runtimes import METADATA_FILE
from attire.model import devices
from attire.storage import files


class OpenVinoFormat(ExportFormat):
    """Runs in OpenVINO; int8 is quantised by NNCF."""

    precisions = ("fp32", "bf16", "int8")

    @devices.preserve_signal_stack()
    def _build(self, network: EndToEndNetwork, precision: str, folder: Path) -> tuple[Path, dict[str, Any]]:
        try:
            import nncf
            import openvino
        except ImportError as error:
            raise runtimes.missing_runtime("openvino", error) from error
        converted = openvino.convert_model(network, example_input=self._example_images(), input=[-1, 28, 28])
        if precision == "int8":
            images = [image[None] for image in self._calibration_images()]
            converted = nncf.quantize(converted, nncf.Dataset(images), subset_size=len(images))
        openvino.save_model(converted, folder / "network.xml", compress_to_fp16=precision == "bf16")
        return folder, {"openvino": openvino.__version__, "nncf": nncf.__version__, "torch": torch.__version__}

    def write(self, built: Path, metadata: dict[str, Any], card: str, path: Path) -> None:
        """The pair of files, the card, and `attire.json` last; the folder gets its name when all of it is there."""
        with files.atomic_folder(path) as part:
            for name in ("network.xml", "network.bin"):
                files.write_bytes(part / name, (built / name).read_bytes())
            files.write_text(part / "README.md", card)
            digests = {name: files.sha256_file(part / name) for name in ("network.xml", "network.bin", "README.md")}
            sealed = json.loads(json.dumps({**metadata, "sha256": digests}))  # lists for tuples, as they will be read
            files.write_json(part / METADATA_FILE, {**sealed, "seal": files.sha256(files.canonical_json(sealed))})
