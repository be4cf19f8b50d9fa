"""VGG16's convolutions with torchvision's names, its blocks as freeze boundaries, and the one preprocessing."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from attire.blocks import BLOCK_ENDS, WEIGHT_SHAPES
from attire.errors import AttireError
from attire.model import winograd
from attire.model.microbatches import Microbatching

if TYPE_CHECKING:
    import torchvision  # takes longer to import than a prediction, and only `vgg16` needs it


# Channel means and standard deviations of VGG16_Weights.IMAGENET1K_V1.transforms().
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PREPROCESS_VERSION = 1  # part of every cache key: raise it when `preprocess` changes a single bit


def preprocess(images: NDArray[np.uint8] | Tensor, size: int) -> Tensor:
    """Grey images as VGG16 takes them: scaled to 0..1, resized, stacked to three channels, normalised.

    images: (n, H, W) uint8, black background; a tensor stays on its device. Returns (n, 3, size, size) float32. The
    three channels are equal before normalisation, so the resize is done once, on one channel: bilinear, antialiased
    where it shrinks.
    """
    images = images if isinstance(images, Tensor) else torch.tensor(images)
    grey = images[:, None].float() / 255  # (n, 1, H, W), 0..1
    if grey.shape[-2:] != (size, size):
        grey = F.interpolate(grey, size=(size, size), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v, device=grey.device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (grey.expand(-1, 3, -1, -1) - mean) / std  # (n, 3, size, size), normalised


def vgg16(weights: Path, freeze_to: str, pool: int, classifier: nn.Sequential) -> "torchvision.models.VGG":
    """torchvision's VGG16 cut at the freeze boundary, its `features` frozen, its `classifier` replaced.

    weights: safetensors with torchvision's names (`features.0.weight` ...); pool: side that `avgpool` averages the
    feature map to, 0 to leave it as it is. The 123 million weights of the original classifier are never allocated.
    Raises AttireError where a tensor is missing or misshapen.
    """
    import torchvision

    with torch.device("meta"):
        model = torchvision.models.vgg16(weights=None)
    model.features = model.features[: BLOCK_ENDS[freeze_to]]
    tensors = read_tensors(weights)
    wanted = {f"features.{name}": value for name, value in model.features.state_dict().items()}
    for name, value in wanted.items():
        if name not in tensors or tensors[name].shape != value.shape:
            actual = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise AttireError(weights, f"expected {name} of shape {tuple(value.shape)}, found {actual}")
    model.features.load_state_dict({k.removeprefix("features."): tensors[k].float() for k in wanted}, assign=True)
    model.avgpool = nn.AdaptiveAvgPool2d(pool) if pool else nn.Identity()
    model.classifier = classifier
    model.features.requires_grad_(False)
    return cast("torchvision.models.VGG", model.eval())


def read_tensors(weights: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory. Raises AttireError where it cannot be read."""
    try:
        return load_file(weights)
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: PyTorch, which maps the file itself
        raise AttireError(weights, "cannot read", str(error).rpartition(": ")[2]) from error


class Network(nn.Module):
    """What `vgg16` returns, layer for layer, without torchvision, whose import alone takes half as long again as the
    rest of a prediction: for a bundle that is loaded."""

    def __init__(self, freeze_to: str, pool: int, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features = nn.Sequential(*(build_layer(i) for i in range(BLOCK_ENDS[freeze_to])))
        self.avgpool = nn.AdaptiveAvgPool2d(pool) if pool else nn.Identity()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(self.avgpool(self.features(x)).flatten(1)))


def build_layer(index: int) -> nn.Module:
    """A new layer like number `index` of torchvision's `vgg16().features`."""
    if shape := WEIGHT_SHAPES.get(f"features.{index}.weight"):
        return nn.Conv2d(shape[1], shape[0], 3, padding=1)
    return nn.ReLU(inplace=True) if f"features.{index - 1}.weight" in WEIGHT_SHAPES else nn.MaxPool2d(2)


class Backbone(nn.Module):
    """`features`, `avgpool` and flatten of a frozen VGG16, on its device and in its precision; no gradients.

    (n, 3, S, S) normalised pictures to (n, D) float32 features in torchvision's C, H, W order. use_winograd: compute
    by Winograd's convolutions, in float32 on a CPU only. `microbatching` may be changed at any time: it decides the
    speed alone.
    """

    def __init__(
        self, model: "torchvision.models.VGG", device: torch.device, precision: str, use_winograd: bool = False
    ) -> None:
        super().__init__()
        self.device, self.dtype = device, torch.bfloat16 if precision == "bf16" else torch.float32
        # bf16 rounds a copy: the model may belong to a Classifier, which goes on to answer in float32.
        features = copy.deepcopy(model.features) if precision == "bf16" else model.features
        features = features.to(device, self.dtype, memory_format=torch.channels_last)
        self.features = winograd.accelerate(features) if use_winograd else features
        self.avgpool = model.avgpool
        self.microbatching = Microbatching("parallel") if use_winograd else Microbatching()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(lambda part: self.avgpool(self.features(part).float()).flatten(1), x)

    def run(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`function` of pictures (n, 3, S, S), in microbatches, on the device and in the type of `features`."""
        x = x.to(self.device, self.dtype, memory_format=torch.channels_last)
        return self.microbatching.run(function, x)
