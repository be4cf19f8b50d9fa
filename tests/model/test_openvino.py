"""Compiled backbones: close to the exact one; the int8 one is built once, and refused where it was damaged."""

import ctypes
import faulthandler
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from attire.data.dataset import ImageDataset
from attire.errors import AttireError, UsageError
from attire.model import devices, vgg
from attire.model.openvino import INT8, CompiledBackbone, Int8Backbone, _import_backend, choose_precision

pytest.importorskip("openvino")
pytest.importorskip("nncf")


@pytest.fixture
def backbone(random_weights: Path) -> vgg.Backbone:
    return vgg.Backbone(vgg.vgg16(random_weights, "block2", 0, nn.Sequential()), torch.device("cpu"), "fp32")


def test_its_features_are_close_to_the_exact_ones_and_it_is_built_once(
    backbone: vgg.Backbone, synthetic: ImageDataset, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = Int8Backbone(backbone, "test", 16, synthetic.images)
    pictures = vgg.preprocess(synthetic.images, 16)
    with torch.inference_mode():
        exact = backbone(pictures)
    features = quick(pictures)
    error = ((features - exact).norm() / exact.norm()).item()
    assert features.shape == exact.shape
    assert 0 < error < 0.1
    monkeypatch.setattr("attire.model.openvino._quantise", lambda *given: pytest.fail("quantised again"))
    assert torch.equal(Int8Backbone(backbone, "test", 16, synthetic.images)(pictures), features)
    folder = cache / "backends" / f"{INT8}-test"
    assert sorted(path.name for path in folder.iterdir()) == ["MANIFEST.json", "network.bin", "network.xml"]
    weights = folder / "network.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(AttireError, match=r"network\.bin: damaged: its digest does not match; delete"):
        Int8Backbone(backbone, "test", 16, synthetic.images)


@pytest.mark.skipif(sys.platform != "linux", reason="the fault is Linux's")
def test_a_signal_after_it_does_not_end_the_process(
    backbone: vgg.Backbone, synthetic: ImageDataset, tmp_path: Path
) -> None:
    """OpenVINO left a signal stack behind that it had freed: Ctrl-C in the training that follows was fatal."""
    Int8Backbone(backbone, "test", 16, synthetic.images)
    stack = devices._SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    before = faulthandler.is_enabled()
    assert bool(stack.pointer) == before or stack.flags == 2  # Python's own, or SS_DISABLE
    caught: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))
    signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, previous)
    assert caught == [signal.SIGUSR1]


def test_where_it_is_not_installed_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nncf", None)
    with pytest.raises(AttireError, match=r"openvino: not installed; pip install 'attire\[openvino\]'"):
        _import_backend()


def test_without_quantisation_its_features_are_the_exact_ones(backbone: vgg.Backbone, synthetic: ImageDataset) -> None:
    pictures = vgg.preprocess(synthetic.images, 16)
    with torch.inference_mode():
        exact = backbone(pictures)
    features = CompiledBackbone(backbone, 16, "fp32")(pictures)
    assert torch.allclose(features, exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())


def test_bf16_is_refused_where_openvino_would_not_compute_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _, openvino = _import_backend()
    able = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert choose_precision("auto") == ("bf16" if able else "fp32")
    assert choose_precision("fp32") == "fp32"
    if able:
        assert choose_precision("bf16") == "bf16"
    else:
        with pytest.raises(UsageError, match="--precision: bf16 was asked for, but OpenVINO has none"):
            choose_precision("bf16")
