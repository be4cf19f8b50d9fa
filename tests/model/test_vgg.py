"""The network is torchvision's, cut and frozen; the preprocessing is torchvision's transforms."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms import v2

from attire.blocks import BLOCKS, feature_shape
from attire.data.dataset import ImageDataset
from attire.errors import AttireError
from attire.features import cache, sources
from attire.model import heads, vgg
from attire.model.weights import Tensors

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [14, 28, 32, 64, 224])
def test_preprocessing_is_what_torchvision_s_transforms_give(size: int, synthetic: ImageDataset) -> None:
    published = torchvision.models.VGG16_Weights.IMAGENET1K_V1.transforms()
    steps = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize((size, size), antialias=True),
            v2.Normalize(published.mean, published.std),
        ]
    )
    grey = torch.from_numpy(synthetic.images[:6])[:, None]
    expected = steps(grey.expand(-1, 3, -1, -1))
    pictures = vgg.preprocess(synthetic.images[:6], size)
    assert pictures.shape == (6, 3, size, size)
    assert pictures.dtype == torch.float32
    assert torch.allclose(pictures, expected, atol=1e-5)


def test_preprocessing_leaves_its_input_alone(synthetic: ImageDataset) -> None:
    before = synthetic.images.copy()
    vgg.preprocess(synthetic.images, 32)
    assert np.array_equal(before, synthetic.images)


def test_the_dataset_turns_a_row_of_784_pixels_into_a_picture(synthetic: ImageDataset) -> None:
    data = sources.GarmentDataset(synthetic.images.reshape(60, 784), synthetic.labels, 64)
    picture, label = data[7]
    assert isinstance(data, torch.utils.data.Dataset)
    assert len(data) == 60
    assert picture.shape == (3, 64, 64)
    assert label == synthetic.labels[7]
    assert torch.equal(picture, vgg.preprocess(synthetic.images[7:8], 64)[0])
    by_hand = np.stack(
        [np.asarray(Image.fromarray(synthetic.images[7]).resize((64, 64), Image.Resampling.BILINEAR))] * 3
    )
    scaled = (by_hand / 255 - np.array(vgg.IMAGENET_MEAN)[:, None, None]) / np.array(vgg.IMAGENET_STD)[:, None, None]
    assert np.abs(picture.numpy() - scaled).max() < 0.02  # Pillow rounds to whole grey levels


def test_only_the_new_classifier_is_trainable(random_weights: Path) -> None:
    model = vgg.vgg16(random_weights, "block3", 0, heads.build_head((4096, 1, 1), (), (512,), 10, 0.5))
    assert isinstance(model, torchvision.models.VGG)
    assert not any(parameter.requires_grad for parameter in model.features.parameters())
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == ["classifier.0.weight", "classifier.0.bias", "classifier.3.weight", "classifier.3.bias"]


@pytest.mark.parametrize("use_winograd", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_cut_network_computes_what_the_whole_one_does(
    block: str, use_winograd: bool, random_weights: Path, random_tensors: Tensors, synthetic: ImageDataset
) -> None:
    with torch.device("meta"):
        whole = torchvision.models.vgg16(weights=None).features
    state = {name.removeprefix("features."): torch.from_numpy(value) for name, value in random_tensors.items()}
    whole.load_state_dict(state, assign=True)
    pictures = vgg.preprocess(synthetic.images[:3], 32)
    backbone = vgg.Backbone(vgg.vgg16(random_weights, block, 0, nn.Sequential()), CPU, "fp32", use_winograd)
    with torch.inference_mode():
        expected = whole[: BLOCKS[block]](pictures)
        features = backbone(pictures)
    assert features.shape == (3, int(np.prod(feature_shape(block, 32, 0))))
    assert torch.allclose(features, expected.flatten(1), rtol=1e-3, atol=1e-3)  # the order is C, H, W


def test_pooling_averages_the_map(random_weights: Path, synthetic: ImageDataset) -> None:
    pictures = vgg.preprocess(synthetic.images[:3], 32)
    with torch.inference_mode():
        whole = vgg.Backbone(vgg.vgg16(random_weights, "block3", 0, nn.Sequential()), CPU, "fp32")(pictures)
        pooled = vgg.Backbone(vgg.vgg16(random_weights, "block3", 1, nn.Sequential()), CPU, "fp32")(pictures)
    assert torch.allclose(pooled, whole.reshape(3, 256, 16).mean(2), rtol=1e-4, atol=1e-4)


def test_bf16_stays_close_to_fp32(random_weights: Path, synthetic: ImageDataset) -> None:
    pictures = vgg.preprocess(synthetic.images[:3], 32)
    with torch.inference_mode():
        exact = vgg.Backbone(vgg.vgg16(random_weights, "block3", 0, nn.Sequential()), CPU, "fp32")(pictures)
        model = vgg.vgg16(random_weights, "block3", 0, nn.Sequential())
        coarse = vgg.Backbone(model, CPU, "bf16")(pictures)
        assert torch.equal(vgg.Backbone(model, CPU, "fp32")(pictures), exact)  # the model itself was not rounded
    assert coarse.dtype == torch.float32
    error = ((exact - coarse).norm() / exact.norm()).item()
    assert 0 < error < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "most"), [("fp32", 0.003), ("bf16", 0.02)])  # fp32: cuDNN's TF32, 10 bits
def test_on_cuda_features_stay_close_to_the_cpu_s(
    precision: str, most: float, random_weights: Path, synthetic: ImageDataset
) -> None:
    images, spec = synthetic.images[:40], cache.FeatureSpec("block3", 32, 0, "", precision)
    exact = vgg.Backbone(vgg.vgg16(random_weights, "block3", 0, nn.Sequential()), CPU, "fp32")
    cuda = vgg.Backbone(vgg.vgg16(random_weights, "block3", 0, nn.Sequential()), torch.device("cuda"), precision)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in cuda.features.parameters() if p.ndim == 4)
    expected, actual = (cache.compute_features(images, spec, backbone).astype(np.float32) for backbone in (exact, cuda))
    assert 0 < np.linalg.norm(expected - actual) / np.linalg.norm(expected) < most


def test_the_classifier_is_linear_relu_dropout_then_linear() -> None:
    layers = heads.build_head((100, 1, 1), (), (32, 16), 10, 0.25)
    kinds = [type(layer).__name__ for layer in layers]
    assert kinds == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    assert [layer.out_features for layer in layers if isinstance(layer, nn.Linear)] == [32, 16, 10]
    assert [layer.p for layer in layers if isinstance(layer, nn.Dropout)] == [0.25, 0.25]


def test_a_missing_or_misshapen_tensor_is_named(random_weights: Path, tmp_path: Path) -> None:
    tensors = load_file(random_weights)
    short = {name: value for name, value in tensors.items() if name != "features.5.bias"}
    save_file(short, tmp_path / "short.safetensors")
    line = r"short.safetensors: expected features.5.bias of shape \(128,\), found nothing"
    with pytest.raises(AttireError, match=line):
        vgg.vgg16(tmp_path / "short.safetensors", "block3", 0, nn.Sequential())
    vgg.vgg16(tmp_path / "short.safetensors", "block1", 0, nn.Sequential())  # it does not need that one
    save_file({**tensors, "features.0.weight": torch.zeros(64, 3, 5, 5)}, tmp_path / "odd.safetensors")
    line = r"expected features.0.weight of shape \(64, 3, 3, 3\), found \(64, 3, 5, 5\)"
    with pytest.raises(AttireError, match=line):
        vgg.vgg16(tmp_path / "odd.safetensors", "block1", 0, nn.Sequential())


@pytest.mark.real
def test_the_real_weights_see_what_torchvision_would() -> None:
    """All of VGG16 over an official picture at 224 px, against the network as torchvision builds and runs it."""
    from attire.data.loading import load_dataset
    from attire.model import pretrained

    weights = pretrained.vgg16_weights()
    backbone = vgg.Backbone(vgg.vgg16(weights, "block5", 7, nn.Sequential()), CPU, "fp32")
    whole = torchvision.models.vgg16(weights=None).eval()
    whole.features.load_state_dict({k.removeprefix("features."): v for k, v in load_file(weights).items()})
    picture = vgg.preprocess(load_dataset().images[:1], 224)
    with torch.inference_mode():
        expected = whole.avgpool(whole.features(picture)).flatten(1)
        features = backbone(picture)
    assert features.shape == (1, 25088)
    assert torch.allclose(features, expected, rtol=1e-3, atol=1e-4)
    assert 0.05 < features.mean() < 5


@pytest.mark.parametrize("freeze_to", BLOCKS)
def test_the_network_of_a_loaded_bundle_is_torchvision_s_layer_for_layer(freeze_to: str, random_weights: Path) -> None:
    original = vgg.vgg16(random_weights, freeze_to, 0, nn.Sequential())
    own = vgg.Network(freeze_to, 0, nn.Sequential())
    assert str(own.features) == str(original.features)
    own.features.load_state_dict(original.features.state_dict())
    picture = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(own(picture), original(picture))
