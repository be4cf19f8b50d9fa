"""Where the blocks end, held against torchvision's own network."""

import pytest
import torch
import torchvision

from attire.blocks import BLOCK_ENDS, BLOCKS, CHANNELS, feature_shape, map_side
from attire.errors import UsageError


@pytest.mark.parametrize("name", BLOCK_ENDS)
@pytest.mark.parametrize("size", [32, 48, 50, 64, 224])
def test_shapes_are_those_of_torchvisions_network(name: str, size: int) -> None:
    with torch.device("meta"):
        features = torchvision.models.vgg16(weights=None).features[: BLOCK_ENDS[name]]
        shape = features(torch.empty(1, 3, size, size)).shape[1:]
    assert tuple(shape) == feature_shape(name, size, 0)
    assert shape[1] == map_side(name, size)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_ends_with_its_pooling(name: str) -> None:
    with torch.device("meta"):
        layers = torchvision.models.vgg16(weights=None).features
    assert isinstance(layers[BLOCKS[name] - 1], torch.nn.MaxPool2d)
    last = next(layer for layer in reversed(layers[: BLOCKS[name]]) if isinstance(layer, torch.nn.Conv2d))
    assert last.out_channels == CHANNELS[name]


def test_pooling_sets_the_side() -> None:
    assert feature_shape("block5", 224, 7) == (512, 7, 7)
    assert feature_shape("block3", 64, 4) == (256, 4, 4)


def test_what_leaves_nothing_is_refused_with_the_least_size() -> None:
    with pytest.raises(UsageError, match="--image-size: 31 px leaves no feature at block5; use 32 px or more"):
        feature_shape("block5", 31, 0)
    assert feature_shape("block5", 32, 0) == (512, 1, 1)
    with pytest.raises(UsageError, match=r"--freeze-to: expected one of none, block1, .*, found 'block9'"):
        feature_shape("block9", 224, 0)
