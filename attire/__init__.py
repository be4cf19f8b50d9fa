"""Attire: garment classification by transfer learning with an ImageNet-pretrained VGG16, measured honestly."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attire.classifier import Classifier as Classifier
    from attire.classifier import load_bundle as load
    from attire.data import ImageDataset as ImageDataset
    from attire.data import load_dataset as load_dataset
    from attire.errors import AttireError as AttireError
    from attire.estimator import VGGClassifier as VGGClassifier
    from attire.recipes import Recipe as Recipe
    from attire.runs import resume as resume
    from attire.runs import train as train

__version__ = "0.1.0"

# Imported when first used, so that `attire --help` does not wait for torch.
_HOMES = {
    "AttireError": ("attire.errors", "AttireError"),
    "Classifier": ("attire.classifier", "Classifier"),
    "ImageDataset": ("attire.data", "ImageDataset"),
    "Recipe": ("attire.recipes", "Recipe"),
    "VGGClassifier": ("attire.estimator", "VGGClassifier"),
    "load": ("attire.classifier", "load_bundle"),
    "load_dataset": ("attire.data", "load_dataset"),
    "resume": ("attire.runs", "resume"),
    "train": ("attire.runs", "train"),
}
__all__ = [
    "AttireError",
    "Classifier",
    "ImageDataset",
    "Recipe",
    "VGGClassifier",
    "load",
    "load_dataset",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'attire' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
