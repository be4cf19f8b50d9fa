"""Attire: garment classification by transfer learning with an ImageNet-pretrained VGG16, measured honestly."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attire.data.dataset import ImageDataset as ImageDataset
    from attire.data.loading import load_dataset as load_dataset
    from attire.errors import AttireError as AttireError
    from attire.estimator import VGGClassifier as VGGClassifier
    from attire.inference.classifier import Classifier as Classifier
    from attire.inference.classifier import load_bundle as load
    from attire.recipes import Recipe as Recipe
    from attire.training.run import resume as resume
    from attire.training.run import train as train

# Imported when first used, so that `attire --help` does not wait for torch.
_HOMES = {
    "__version__": ("attire.version", "__version__"),
    "AttireError": ("attire.errors", "AttireError"),
    "Classifier": ("attire.inference.classifier", "Classifier"),
    "ImageDataset": ("attire.data.dataset", "ImageDataset"),
    "Recipe": ("attire.recipes", "Recipe"),
    "VGGClassifier": ("attire.estimator", "VGGClassifier"),
    "load": ("attire.inference.classifier", "load_bundle"),
    "load_dataset": ("attire.data.loading", "load_dataset"),
    "resume": ("attire.training.run", "resume"),
    "train": ("attire.training.run", "train"),
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
