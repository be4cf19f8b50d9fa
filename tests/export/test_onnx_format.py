"""ONNX files: their metadata, what of the exporter they do not tell, and their seal."""

import json
from pathlib import Path

import pytest

from attire.data.dataset import ImageDataset
from attire.export.export import export
from attire.inference.runtimes import NO_SEAL, seal_bytes

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own deprecations


def test_metadata_travels_in_the_onnx_file(bundle: Path, synthetic: ImageDataset, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")

    path = export(bundle, "onnx", out=tmp_path / "m.onnx", data=synthetic).path
    properties = {line.key: line.value for line in onnx.load(path).metadata_props}
    metadata = json.loads(properties["attire"])
    assert metadata["classes"][0] == "T-shirt/top"
    assert metadata["runtime_versions"]["opset"] == 20
    assert properties["card"].startswith("---")
    assert str(Path(export.__code__.co_filename).parent).encode() not in path.read_bytes()  # nor any other trace
    assert metadata["seal"] != NO_SEAL


def test_a_seal_has_exactly_one_place() -> None:
    sealed = seal_bytes(b"before" + NO_SEAL.encode() + b"after")
    assert sealed != b"before" + NO_SEAL.encode() + b"after"
    assert len(sealed) == 11 + 64
    for data in (b"none", 2 * NO_SEAL.encode() + b"x" + NO_SEAL.encode()):
        with pytest.raises(ValueError, match="the place of the seal once"):
            seal_bytes(data)
