"""A pickle in the place of each file that Attire opens: whatever is said to it, what is in the pickle never runs."""

import io
import json
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from attire.features.cache import _shard_path
from attire.model import pretrained
from attire.model.weights import read_weights
from attire.storage import files
from tests.command import TINY, Done, attire


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.canary, "fired")


def plain(canary: Path) -> bytes:
    return pickle.dumps(Payload(canary))


def old(canary: Path) -> bytes:
    return pickle.dumps(Payload(canary), 0)


def as_array(canary: Path) -> bytes:
    """A .npy file of Python objects."""
    out, values = io.BytesIO(), np.empty(1, object)
    values[0] = Payload(canary)
    np.save(out, values, allow_pickle=True)
    return out.getvalue()


def as_archive(canary: Path) -> bytes:
    """A .npz file as our checkpoints are, and as numpy's."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("about.json", '{"schema": 1, "history": []}')
        archive.writestr("head.0.weight.npy", as_array(canary))
        archive.writestr("data.pkl", plain(canary))
    return out.getvalue()


def as_torch(canary: Path) -> bytes:
    out = io.BytesIO()
    torch.save({"features.0.weight": Payload(canary)}, out)
    return out.getvalue()


FORMS = (plain, old, as_array, as_archive, as_torch)


def sealed(data: bytes) -> bytes:
    return data + bytes.fromhex(files.sha256(data))


def with_digest(name: str, key: Callable[[dict[str, object]], dict[str, object]]) -> Callable[[Path, bytes], None]:
    """Also correct the digest of `name` in the bundle's description: only then is the file itself parsed."""

    def put(folder: Path, data: bytes) -> None:
        (folder / name).write_bytes(data)
        about = json.loads((folder / "model.json").read_text())
        del about["seal"]
        key(about)["sha256"] = files.sha256(data)
        about["seal"] = files.sha256(files.canonical_json(about))
        (folder / "model.json").write_text(json.dumps(about))

    return put


def into(name: str, seal: bool = False) -> Callable[[Path, bytes], None]:
    def put(folder: Path, data: bytes) -> None:
        (folder / name).write_bytes(sealed(data) if seal else data)

    return put


def into_checkpoints(folder: Path, data: bytes) -> None:
    for path in (folder / "checkpoints").glob("*.ckpt"):
        path.write_bytes(sealed(data))


def into_evaluation(name: str) -> Callable[[Path, bytes], None]:
    def put(folder: Path, data: bytes) -> None:
        (folder / name).write_bytes(data)
        values = json.loads((folder / "evaluation/digests.json").read_text())
        values["sha256"][name] = files.sha256(data)
        (folder / "evaluation/digests.json").write_text(json.dumps(values))

    return put


# The command, in a folder that holds a run and small.csv; what is exchanged, below the folder that stands before it.
CASES = {
    "bundle, description": ("run/model", "evaluate run/model --data small.csv", into("model.json")),
    "bundle, weights": ("run/model", "evaluate run/model --data small.csv", into("model.safetensors")),
    "bundle, weights with their digest": (
        "run/model", "evaluate run/model --data small.csv", with_digest("model.safetensors", lambda about: about)
    ),
    "bundle, neighbours with their digest": (
        "run/model",
        "evaluate run/model --data small.csv",
        with_digest("neighbours.safetensors", lambda about: about["neighbours"]),  # type: ignore[arg-type,return-value]
    ),
    "checkpoints, sealed": ("run", "train --resume run", into_checkpoints),
    "config": ("run", "train --resume run", into("config.json")),
    "config given": (".", "train --config c.json --data small.csv", into("c.json")),
    "teacher's answers, sealed": ("taught", "train --resume taught", into("teacher.npy", seal=True)),
    "teacher": ("run/model", "train --data small.csv --teacher run", into("model.json")),
    "metrics": ("run", "report run", into_evaluation("evaluation/metrics.json")),
    "predictions": ("run", "report run", into_evaluation("evaluation/predictions.csv")),
    "gallery": ("run", "compare run run", into_evaluation("evaluation/gallery.png")),
    "history": ("run", "report run", into_evaluation("history.csv")),
    "digests": ("run", "report run", into("evaluation/digests.json")),
    "ensemble": (".", "ensemble e.json --data small.csv", into("e.json")),
    "weights .pth": (".", "train --data small.csv --weights-from w.pth", into("w.pth")),
    "weights .safetensors": (".", "train --data small.csv --weights-from w.safetensors", into("w.safetensors")),
    "weights .ckpt": (".", "train --data small.csv --weights-from vgg16.ckpt", into("vgg16.ckpt")),
    "export, ONNX": (".", "evaluate x.onnx --data small.csv", into("x.onnx")),
    "export, torch": (".", "evaluate x.pt2 --data small.csv", into("x.pt2")),
    "data, CSV": (".", "train --data x.csv", into("x.csv")),
    "data, IDX": (".", "train --data train-images-idx3-ubyte", into("train-images-idx3-ubyte")),
    "data, anything": (".", "evaluate run/model --data x.pkl", into("x.pkl")),
    "picture": (".", "predict --model run/model x.png", into("x.png")),
    "measurements": ("cache", "train --data small.csv", into("convolutions.json")),
}  # fmt: skip

# What a run can do without, or makes again.
HARMLESS = ("checkpoints, sealed", "teacher's answers, sealed", "measurements")


@pytest.fixture
def workplace(
    here: Path, finished: tuple[Path, Done], weights: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    shutil.copytree(finished[0], here / "run")
    shutil.copytree(finished[0], here / "taught")
    config = json.loads((here / "taught/config.json").read_text())
    digest = files.sha256_file(here / "run/model/model.json")
    config["teacher"] = {"bundles": [str(here / "run/model")], "digests": [digest]}
    (here / "taught/config.json").write_text(json.dumps(config))
    shutil.copy(finished[0].parent / "small.csv", here)
    (here / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x01\0")
    (here / "cache").symlink_to(cache)
    monkeypatch.setattr(pretrained, "vgg16_weights", lambda source=None, progress=None: read_or(source, weights))
    return here


def read_or(source: Path | None, weights: Path) -> Path:
    """What `fetch.vgg16_weights` does with a file that is named, and else these weights."""
    if source is not None:
        read_weights(source)
    return weights


@pytest.mark.parametrize("name", CASES)
def test_a_pickle_in_place_of_a_file_never_runs(name: str, workplace: Path, tmp_path: Path) -> None:
    place, command, put = CASES[name]
    canary, more = tmp_path / "canary", TINY if command.startswith("train --data") else []
    pickle.loads(plain(canary))  # noqa: S301  (this very one: it does run where it is unpickled)
    canary.unlink()
    for form in FORMS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            put(workplace / place, form(canary))
            assert attire(*command.split(), *more).status == (0 if name in HARMLESS else 1), form.__name__
        assert not canary.exists(), form.__name__


def test_a_pickle_in_the_cache_of_features_never_runs(workplace: Path, cache: Path, tmp_path: Path) -> None:
    """Not even where the manifest vouches for it: who can write there can write that too."""
    canary = tmp_path / "canary"
    assert attire("train", "--data", "small.csv", *TINY, "--out", "first").status == 0
    for manifest in (cache / "features").glob("*/MANIFEST.json"):
        data, values = as_array(canary), json.loads(manifest.read_text())
        _shard_path(manifest.parent, 0).write_bytes(data)
        values["shards"][0]["sha256"] = files.sha256(data)
        manifest.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="Python objects"):
        attire("train", "--data", "small.csv", *TINY, "--out", "second")
    assert not canary.exists()
