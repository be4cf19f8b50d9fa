"""Winograd's convolutions are the direct ones: values, gradients, odd sizes, chunks of any size."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attire.blocks import BLOCKS
from attire.model import vgg, winograd
from attire.model.winograd import _F2, _F4, _Form

SIZES = [(1, 1), (2, 2), (3, 5), (4, 4), (7, 8), (9, 14), (16, 13)]


def problem(channels: int, outputs: int, height: int, width: int, n: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(n, channels, height, width, generator=made)
    weight = torch.randn(outputs, channels, 3, 3, generator=made) / (9 * channels) ** 0.5
    return x, weight, torch.randn(outputs, generator=made)


def error(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def layer(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
    convolution.load_state_dict({"weight": weight, "bias": bias})
    return convolution.requires_grad_(False)


@pytest.mark.parametrize("form", [_F2, _F4], ids=["2x2", "4x4"])
def test_the_matrices_satisfy_winograd_s_identity_exactly(form: _Form) -> None:
    """One tile, one channel, small integers, in float64: y = A' [(G g G') * (B' d B)] A."""
    rng = np.random.default_rng(0)
    tile = torch.from_numpy(rng.integers(-9, 9, (form.reach, form.reach)).astype(np.float64))
    kernel = torch.from_numpy(rng.integers(-9, 9, (3, 3)).astype(np.float64))
    products = (form.g @ kernel.flatten()) * (form.b.double() @ tile.flatten())
    found = (form.a.double() @ products).view(form.side, form.side)
    assert torch.allclose(found, F.conv2d(tile[None, None], kernel[None, None])[0, 0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", [_F2, _F4], ids=["2x2", "4x4"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_it_is_conv2d(height: int, width: int, form: _Form) -> None:
    x, weight, bias = problem(5, 7, height, width)
    found = winograd._conv2d_winograd(x, winograd._transform_weight(weight, form), bias, form)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    assert error(found, exact) < 3e-6


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 4), (7, 6)])
def test_its_gradients_are_conv2d_s(height: int, width: int) -> None:
    tensors = [value.requires_grad_() for value in problem(5, 7, height, width)]
    x, weight, bias = tensors
    copies = [value.detach().double().requires_grad_() for value in tensors]
    found = winograd._conv2d_winograd(x, winograd._transform_weight(weight, dtype=torch.float32), bias)
    exact = F.conv2d(copies[0], copies[1], copies[2], padding=1)
    weighting = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    (found * weighting).sum().backward()  # type: ignore[no-untyped-call]
    (exact * weighting.double()).sum().backward()  # type: ignore[no-untyped-call]
    for mine, theirs in zip(tensors, copies, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert error(mine.grad, theirs.grad) < 3e-5


def test_frozen_weights_and_a_frozen_input_cost_no_gradient() -> None:
    x, weight, bias = problem(5, 7, 8, 8)
    factors = winograd._transform_weight(weight)
    free = bias.requires_grad_()
    winograd._conv2d_winograd(x, factors, free).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is None
    assert factors.grad is None
    assert torch.allclose(bias.grad if bias.grad is not None else torch.empty(0), torch.full((7,), 3 * 64.0))


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(("height", "width"), [size for size in SIZES if min(size) > 1])
def test_a_layer_is_convolution_relu_and_pooling(height: int, width: int, pool: bool) -> None:
    x, weight, bias = problem(16, 20, height, width)
    with torch.inference_mode():
        found = winograd.WinogradConv2d(layer(weight, bias), pool)(x)
        exact = F.relu(F.conv2d(x.double(), weight.double(), bias.double(), padding=1))
        assert error(found, F.max_pool2d(exact, 2) if pool else exact) < 3e-6


@pytest.mark.parametrize("tiles", [1, 3, 4, 7, 16, 1000])
def test_a_layer_does_not_depend_on_how_it_is_cut(tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd.WinogradConv2d, "tiles", tiles)
    x, weight, bias = problem(16, 16, 14, 11, n=5)
    with torch.inference_mode():
        found = winograd.WinogradConv2d(layer(weight, bias), pool=True)(x)
        exact = F.max_pool2d(F.relu(F.conv2d(x, weight, bias, padding=1)), 2)
    assert error(found, exact) < 3e-6


def test_scratch_made_in_inference_mode_serves_outside_of_it_too() -> None:
    def run() -> None:  # in a thread, whose scratch is new
        x, weight, bias = problem(16, 16, 8, 8)
        convolution = winograd.WinogradConv2d(layer(weight, bias), pool=False)
        with torch.inference_mode():
            inside = convolution(x)
        found.append(torch.equal(convolution(x), inside))

    found: list[bool] = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.parametrize("size", [16, 20, 33])
@pytest.mark.parametrize("block", ["block3", "block4"])
def test_an_accelerated_network_computes_what_the_original_does(block: str, size: int, random_weights: Path) -> None:
    features = vgg.vgg16(random_weights, block, 0, nn.Sequential()).features
    quick = winograd.accelerate(features)
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert error(quick(x), features(x)) < 1e-5
        cut = BLOCKS["block2"]  # indices are those of the original: a slice is the same part of the network
        assert error(quick[:cut](x), features[:cut](x)) < 1e-5
        assert error(quick[cut:](quick[:cut](x)), features(x)) < 1e-5


def test_the_first_layer_stays_direct(random_weights: Path) -> None:
    quick = winograd.accelerate(vgg.vgg16(random_weights, "block1", 0, nn.Sequential()).features)
    kinds = [type(module).__name__ for module in quick]
    assert kinds == ["Conv2d", "ReLU", "Convolution", "Identity", "Identity"]


@pytest.mark.real
def test_real_features_are_those_of_the_direct_convolution() -> None:
    """`fast` and `classic` backbones over official pictures against float64; both kinds of float32 are as near."""
    from attire.data.loading import load_dataset
    from attire.model import pretrained

    cpu, images = torch.device("cpu"), load_dataset().images
    for block, size, n in (("block3", 32, 48), ("block5", 224, 1)):
        pictures = vgg.preprocess(images[:n], size)

        def model(block: str = block) -> Any:
            return vgg.vgg16(pretrained.vgg16_weights(), block, 0, nn.Sequential())

        with torch.inference_mode():
            exact = model().features.double()(pictures.double()).flatten(1)
            direct = error(vgg.Backbone(model(), cpu, "fp32")(pictures), exact)
            quick = error(vgg.Backbone(model(), cpu, "fp32", use_winograd=True)(pictures), exact)
        assert direct < 2e-6
        assert quick < 1e-5  # a hundredth of what the cache's float16 rounds away
