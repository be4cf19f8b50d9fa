"""torch.export: PyTorch's own archive of a program, with the metadata as one more record."""

import json
import zipfile
from pathlib import Path
from typing import Any

import torch

from attire.export.export_format import ExportFormat
from attire.export.network import EndToEndNetwork
from attire.inference.runtimes import METADATA_FILE, records_digest
from attire.storage import files


class TorchExportFormat(ExportFormat):
    """Runs in PyTorch without the code of this package."""

    precisions = ("fp32", "bf16")

    def _build(self, network: EndToEndNetwork, precision: str, folder: Path) -> tuple[Path, dict[str, Any]]:
        if precision == "bf16":
            network.model, network.dtype = network.model.bfloat16(), torch.bfloat16
        shapes = {"images": {0: torch.export.Dim("n", min=1, max=2**16)}}
        program = torch.export.export(network, (self._example_images(),), dynamic_shapes=shapes)
        path = folder / "network.pt2"
        torch.export.save(program, path)
        return path, {"torch": torch.__version__}

    def write(self, built: Path, metadata: dict[str, Any], card: str, path: Path) -> None:
        sealed = json.loads(json.dumps({**metadata, "card": card, "records_digest": records_digest(built)}))
        record = json.dumps({**sealed, "seal": files.sha256(files.canonical_json(sealed))})
        with zipfile.ZipFile(built, "a") as archive:
            root = archive.namelist()[0].partition("/")[0]
            archive.writestr(f"{root}/extra/{METADATA_FILE}", record)
        files.write_bytes(path, built.read_bytes())
