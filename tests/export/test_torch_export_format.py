"""Exports by torch.export: nothing in the archive is ever unpickled or run but a network of tensors."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attire.data.dataset import ImageDataset
from attire.errors import AttireError
from attire.export.export import export
from attire.inference.runtimes import METADATA_FILE, load_export, records_digest
from attire.storage import files

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own deprecations


class Payload:
    """What a pickle can do to who loads it: this one writes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.canary, "fired")


def pickled(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Payload(canary), buffer)
    return buffer.getvalue()


def with_records(path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Records changed, and the seal made anew: it tells damage, it cannot tell malice."""
    with zipfile.ZipFile(path) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(records)
    metadata = json.loads(records.pop(f"extra/{METADATA_FILE}"))
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(f"x/{name}", data)
    metadata = {**metadata, "records_digest": records_digest(path)}
    del metadata["seal"]
    sealed = {**metadata, "seal": files.sha256(files.canonical_json(metadata))}
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"x/extra/{METADATA_FILE}", json.dumps(sealed))


def test_no_pickle_in_an_exported_program_is_ever_run(bundle: Path, synthetic: ImageDataset, tmp_path: Path) -> None:
    made = export(bundle, "torch-export", out=tmp_path / "m.pt2", data=synthetic).path
    whole, canary = made.read_bytes(), tmp_path / "canary"
    with_records(made, lambda records: None)
    load_export(made)  # what is resealed as it was can be opened
    payload = pickled(canary)

    def weight(records: dict[str, bytes]) -> None:
        name = "data/weights/model_weights_config.json"
        config = json.loads(records[name])
        first = next(iter(config["config"].values()))
        first["use_pickle"] = True
        records |= {name: json.dumps(config).encode(), f"data/weights/{first['path_name']}": payload}

    changes: list[tuple[Callable[[dict[str, bytes]], None], str]] = [
        (lambda records: records.update({"data/sample_inputs/model.pt": payload}), "cannot be opened by its runtime"),
        (weight, "cannot be opened by its runtime"),
        (lambda records: records.update({"data/weights/model.pt": payload}), "holds more than a network"),
        (lambda records: records.update({"data/constants/opaque_obj_0": payload}), "holds more than a network"),
        (lambda records: records.update({"data/aotinductor/model/x.so": b"\x7fELF"}), "holds more than a network"),
    ]
    for change, said in changes:
        made.write_bytes(whole)
        with_records(made, change)
        with pytest.raises(AttireError, match=said):
            load_export(made)
        assert not canary.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
