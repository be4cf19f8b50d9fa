"""The frozen part of VGG16 as the function that extraction calls."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from attire.blocks import UNFROZEN
from attire.data.loading import load_dataset
from attire.features import cache
from attire.features.cache import FeatureSpec
from attire.model import devices, vgg

if TYPE_CHECKING:
    import torchvision


def choose_backbone(freeze_to: str, backend: str, precision: str, device: torch.device) -> tuple[str, str]:
    """Precision and backend, as a FeatureSpec has them, for what a recipe or an option asks for.

    Where nothing is frozen, no product could be in bf16. Raises UsageError for what this machine does not have.
    """
    if freeze_to == UNFROZEN:
        return "fp32", "torch"
    if backend == "torch":
        precision = devices.choose_precision(precision, device)
        return precision, devices.choose_backend(backend, precision, device)
    from attire.model import openvino  # an optional extra, imported only where it is used

    return "int8" if backend == openvino.INT8 else openvino.choose_precision(precision), backend


def load_backbone(weights: Path, spec: FeatureSpec, device: torch.device, rows: int) -> cache.FeatureExtractor:
    """`make_backbone` of VGG16 with these weights."""
    return make_backbone(vgg.vgg16(weights, spec.freeze_to, spec.pool, nn.Sequential()), spec, device, rows)


def make_backbone(
    model: "torchvision.models.VGG", spec: FeatureSpec, device: torch.device, rows: int = 0
) -> cache.FeatureExtractor:
    """The frozen part of a model on the backend that the spec names.

    rows: how many pictures are to come; see `devices.choose_microbatching`.
    """
    if spec.backend.startswith("torch"):
        backbone = vgg.Backbone(model, device, spec.precision, spec.backend == devices.WINOGRAD)
        if spec.backend == "torch" and device.type == "cpu":
            name = f"{spec.freeze_to} {spec.precision}"
            backbone.microbatching = devices.choose_microbatching(name, backbone, spec.image_size, rows)
        return backbone
    from attire.model.openvino import INT8, CompiledBackbone, Int8Backbone

    exact = vgg.Backbone(model, torch.device("cpu"), "fp32")
    if spec.backend != INT8:
        return CompiledBackbone(exact, spec.image_size, spec.precision)
    name = f"{spec.freeze_to}-{spec.image_size}-{spec.pool}-{spec.weights[:8]}"
    return Int8Backbone(exact, name, spec.image_size, load_dataset().images)
