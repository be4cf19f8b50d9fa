"""Winograd's convolutions are the direct ones, for odd sizes and for parts of any size."""

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

SIZES = [(1, 1), (2, 2), (3, 5), (4, 4), (7, 8), (9, 14), (16, 13)]


def problem(channels: int, outputs: int, height: int, width: int, n: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(n, channels, height, width, generator=made)
    weight = torch.randn(outputs, channels, 3, 3, generator=made) / (9 * channels) ** 0.5
    return x, weight, torch.randn(outputs, generator=made)


def error(value: Tensor, exact: Tensor) -> float:
    assert value.shape == exact.shape
    return float((value.double() - exact.double()).norm() / exact.double().norm())


def layer(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
    convolution.load_state_dict({"weight": weight, "bias": bias})
    return convolution.requires_grad_(False)


def test_the_matrices_satisfy_winograd_s_identity_exactly() -> None:
    """One tile, one channel, small integers, in float64: y = A' [(G g G') * (B' d B)] A."""
    rng = np.random.default_rng(0)
    tile = torch.from_numpy(rng.integers(-9, 9, (6, 6)).astype(np.float64))
    kernel = torch.from_numpy(rng.integers(-9, 9, (3, 3)).astype(np.float64))
    b, g, a = (
        winograd._both_sides(matrix, torch.float64)
        for matrix in (winograd._INPUT_TRANSFORM, winograd._KERNEL_TRANSFORM, winograd._OUTPUT_TRANSFORM)
    )
    outputs = (a @ ((g @ kernel.flatten()) * (b @ tile.flatten()))).view(4, 4)
    assert torch.allclose(outputs, F.conv2d(tile[None, None], kernel[None, None])[0, 0], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_it_is_conv2d(height: int, width: int) -> None:
    """The ReLU of the layer and of its negative are the two halves of what the convolution alone gives."""
    x, weight, bias = problem(5, 7, height, width)
    with torch.inference_mode():
        upper, lower = (winograd.WinogradConv2d(layer(s * weight, s * bias), pool=False)(x) for s in (1, -1))
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    assert error(upper - lower, exact) < 3e-6


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(("height", "width"), [size for size in SIZES if min(size) > 1])
def test_a_layer_is_convolution_relu_and_pooling(height: int, width: int, pool: bool) -> None:
    x, weight, bias = problem(16, 20, height, width)
    with torch.inference_mode():
        y = winograd.WinogradConv2d(layer(weight, bias), pool)(x)
        exact = F.relu(F.conv2d(x.double(), weight.double(), bias.double(), padding=1))
        assert error(y, F.max_pool2d(exact, 2) if pool else exact) < 3e-6


@pytest.mark.parametrize("tiles", [1, 3, 4, 7, 16, 1000])
def test_a_layer_does_not_depend_on_how_it_is_cut(tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd.WinogradConv2d, "tiles", tiles)
    x, weight, bias = problem(16, 16, 14, 11, n=5)
    with torch.inference_mode():
        y = winograd.WinogradConv2d(layer(weight, bias), pool=True)(x)
        exact = F.max_pool2d(F.relu(F.conv2d(x, weight, bias, padding=1)), 2)
    assert error(y, exact) < 3e-6


def test_scratch_made_in_inference_mode_serves_outside_of_it_too() -> None:
    def run() -> None:  # in a thread, whose scratch is new
        x, weight, bias = problem(16, 16, 8, 8)
        convolution = winograd.WinogradConv2d(layer(weight, bias), pool=False)
        with torch.inference_mode():
            inside = convolution(x)
        equal.append(torch.equal(convolution(x), inside))

    equal: list[bool] = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert equal == [True]


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
    assert kinds == ["Conv2d", "ReLU", "WinogradConv2d", "Identity", "Identity"]


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
