"""VGG16's convolutions with torchvision's names, its blocks as freeze boundaries, and the one preprocessing."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from attire.blocks import ENDS, SHAPES
from attire.errors import AttireError
from attire.model import microbatches, winograd

if TYPE_CHECKING:
    import torchvision  # takes longer to import than a prediction, and only `vgg16` needs it


# ImageNet's channel means and deviations, as VGG16_Weights.IMAGENET1K_V1.transforms() normalises.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
PREPROCESS_VERSION = 1  # part of every cache key: raise it when `preprocess` changes a single bit


def preprocess(images: NDArray[np.uint8] | Tensor, size: int) -> Tensor:
    """Grey images as VGG16 wants them: scaled to 0..1, resized, stacked to three channels, normalised.

    images: (n, H, W) uint8, black background; a tensor stays on its device. Returns (n, 3, size, size) float32. The
    three channels are equal before normalisation, so the resize is done once, on one channel: bilinear, antialiased
    where it shrinks.
    """
    images = images if isinstance(images, Tensor) else torch.tensor(images)
    grey = images[:, None].float() / 255  # (n, 1, H, W), 0..1
    if grey.shape[-2:] != (size, size):
        grey = F.interpolate(grey, size=(size, size), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v, device=grey.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (grey.expand(-1, 3, -1, -1) - mean) / std  # (n, 3, size, size), normalised


def build_classifier(inputs: int, hidden: Sequence[int], classes: int, dropout: float) -> nn.Sequential:
    """Linear, ReLU, Dropout for each hidden width, then a Linear to the classes; PyTorch's default initialisation."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def vgg16(weights: Path, freeze_to: str, pool: int, classifier: nn.Sequential) -> "torchvision.models.VGG":
    """torchvision's VGG16 cut at the freeze boundary, its `features` frozen, its `classifier` replaced.

    weights: safetensors with torchvision's names (`features.0.weight` ...); pool: side that `avgpool` averages the
    feature map to, 0 to leave it as it is. Built without allocating the 123 million weights of the original
    classifier. Raises AttireError where a tensor is missing or misshapen.
    """
    import torchvision

    with torch.device("meta"):
        model = torchvision.models.vgg16(weights=None)
    model.features = model.features[: ENDS[freeze_to]]
    tensors = read_tensors(weights)
    wanted = {f"features.{name}": value for name, value in model.features.state_dict().items()}
    for name, value in wanted.items():
        if name not in tensors or tensors[name].shape != value.shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise AttireError(weights, f"expected {name} of shape {tuple(value.shape)}, found {found}")
    model.features.load_state_dict({k.removeprefix("features."): tensors[k].float() for k in wanted}, assign=True)
    model.avgpool = nn.AdaptiveAvgPool2d(pool) if pool else nn.Identity()
    model.classifier = classifier
    freeze(model.features)
    return cast("torchvision.models.VGG", model.eval())


def read_tensors(weights: Path) -> dict[str, Tensor]:
    """A safetensors file, mapped into memory. Raises AttireError where it cannot be read."""
    try:
        return load_file(weights)
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: PyTorch, which maps the file itself
        raise AttireError(weights, "cannot read", str(error).rpartition(": ")[2]) from error


class Network(nn.Module):
    """What `vgg16` returns, layer for layer, for a bundle that is loaded: without torchvision, whose import alone takes
    half as long again as the rest of a prediction."""

    def __init__(self, freeze_to: str, pool: int, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features = nn.Sequential(*(layer(i) for i in range(ENDS[freeze_to])))
        self.avgpool = nn.AdaptiveAvgPool2d(pool) if pool else nn.Identity()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(self.avgpool(self.features(x)).flatten(1)))


def layer(index: int) -> nn.Module:
    """Number `index` of torchvision's `vgg16().features`."""
    if shape := SHAPES.get(f"features.{index}.weight"):
        return nn.Conv2d(shape[1], shape[0], 3, padding=1)
    return nn.ReLU(inplace=True) if f"features.{index - 1}.weight" in SHAPES else nn.MaxPool2d(2)


def freeze(backbone: nn.Module) -> None:
    for parameter in backbone.parameters():
        parameter.requires_grad = False


class Backbone(nn.Module):
    """`features`, `avgpool` and flatten of a frozen VGG16, on its device and in its precision; no gradients.

    (n, 3, S, S) normalised pictures to (n, D) float32 features in torchvision's C, H, W order. fast: by Winograd's
    convolutions, float32 on the CPU only. `layout` may be changed at any time: it decides the speed alone.
    """

    def __init__(
        self, model: "torchvision.models.VGG", device: torch.device, precision: str, fast: bool = False
    ) -> None:
        super().__init__()
        self.device, self.dtype = device, torch.bfloat16 if precision == "bf16" else torch.float32
        # Rounded weights are a copy's: the model may be somebody's classifier, which goes on to answer in float32.
        features = copy.deepcopy(model.features) if precision == "bf16" else model.features
        features = features.to(device, self.dtype, memory_format=torch.channels_last)
        self.features = winograd.accelerate(features) if fast else features
        self.avgpool = model.avgpool
        self.layout = microbatches.Layout("side by side") if fast else microbatches.Layout()

    def forward(self, x: Tensor) -> Tensor:
        return self.spread(lambda part: self.avgpool(self.features(part).float()).flatten(1), x)

    def spread(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`function` of pictures (n, 3, S, S), which get here the device, type and layout that `features` wants."""
        x = x.to(self.device, self.dtype, memory_format=torch.channels_last)
        return microbatches.spread(function, x, self.layout)
