"""VGGClassifier: Attire as a scikit-learn estimator, for pipelines, cross-validation and grids."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from attire import recipes
from attire.data.dataset import ImageDataset, Splits
from attire.data.loading import DataChoice
from attire.errors import AttireError, Stopped, UsageError
from attire.evaluation import calibration
from attire.features import row_lookup
from attire.features.backbones import make_backbone
from attire.features.cache import Features, FeatureSpec
from attire.features.logits import predict_logits
from attire.features.sources import CachedSource
from attire.inference.classifier import Architecture, Classifier
from attire.model import devices
from attire.progress import Progress
from attire.recipes import Recipe
from attire.terminal import Terminal
from attire.training.experiment import Experiment
from attire.training.extraction import Extraction
from attire.training.head_training import train_head
from attire.training.outcome import HeadEvaluator
from attire.training.saving import assemble_network

_PIXELS = 28 * 28
_MIN_CALIBRATED = 200  # with fewer rows none are held out: a temperature fitted on fewer than 20 says nothing
_MIN_CACHED = 8  # features of fewer images are not cached by a prediction: they cost less than an entry does


class _InputError(AttireError, ValueError):
    """An AttireError that is also a ValueError, as scikit-learn expects for unsuitable data."""


class VGGClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A garment classifier for scikit-learn: VGG16 frozen up to a block, and a new head trained on it.

    X: (n, 784) or (n, 28, 28), whole numbers from 0 to 255 with 0 as the black background, in any numeric type;
    fractions are rounded; anything else, such as pixels scaled to 0..1, raises a ValueError. y: (n,) labels of any
    kind, two classes or more. `fit`, `predict` and `predict_proba` keep features in Attire's cache, image by image, so
    that folds and grids compute no image twice.

    recipe: a name (`fast`, `classic`, `frozen-best`, `best`) or a Recipe; the fields given besides replace the
    recipe's own. device: auto, cpu, cuda or mps. cache=False: every call computes its features and
    holds them in memory only. random_state: an integer is the recipe's seed. verbose: show progress on stderr.

    After `fit`: `classes_`, `n_features_in_`, `history_` (epochs with their losses), and `classifier_`, whose
    `save(folder)` writes a bundle for `attire predict`, `attire serve` and `attire.load`. With 200 rows or more a tenth
    of them, at most the recipe's `val_size`, is held out and calibrates the probabilities (temperature scaling).
    """

    def __init__(
        self,
        recipe: str | Recipe = "fast",
        *,
        freeze_to: str | None = None,
        image_size: int | None = None,
        hidden: Sequence[int] | None = None,
        dropout: float | None = None,
        lr: float | None = None,
        weight_decay: float | None = None,
        batch_size: int | None = None,
        epochs: int | None = None,
        device: str = "auto",
        cache: bool = True,
        random_state: Any = 0,
        verbose: bool = False,
    ) -> None:
        self.recipe = recipe
        self.freeze_to = freeze_to
        self.image_size = image_size
        self.hidden = hidden
        self.dropout = dropout
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.epochs = epochs
        self.device = device
        self.cache = cache
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: ArrayLike, y: ArrayLike) -> "VGGClassifier":  # noqa: N803
        """Train on these images and labels.

        Raises ValueError for data that cannot be trained on, KeyboardInterrupt at Ctrl-C: features computed by then
        stay in the cache.
        """
        table, y = validate_data(self, _flat(X), y)
        check_classification_targets(y)
        classes, labels = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise _InputError("y", f"one class, {classes[0]!r}", do="training needs two classes or more")
        images = self._images(table)
        terminal = Terminal(quiet=not self.verbose)
        try:
            data = _ArrayData(dataset=ImageDataset(images, labels.astype(np.int64), _names_of(classes), "X"))
            experiment = Experiment.prepare(self._recipe(labels), data, devices.choose_device(self.device), terminal)
            self._train(experiment, terminal)
        except UsageError as error:
            raise _InputError("VGGClassifier", str(error)) from error
        except Stopped as stop:
            raise KeyboardInterrupt from stop
        finally:
            terminal.close()
        self.classes_ = classes
        return self

    def _train(self, experiment: Experiment, progress: Progress) -> None:
        sources = _ArrayExtraction(experiment, progress, self.cache).sources()
        with tempfile.TemporaryDirectory(prefix="attire-") as folder:
            head, self.history_ = train_head(experiment, sources.train, Path(folder), progress)
        temperature = HeadEvaluator(experiment, head, sources).temperature()
        recipe, backbone = experiment.recipe.to_json(), experiment.spec.weights
        self.classifier_ = Classifier(
            assemble_network(experiment, head, sources.train.standardise),
            experiment.architecture,
            experiment.splits.data.classes,
            temperature,
            metadata={"name": "VGGClassifier", "recipe": recipe, "backbone_digest": backbone},
            device=experiment.device,
        )
        self._spec = experiment.spec

    def predict(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """The likeliest class of each image, (n,), one of `classes_`."""
        likeliest = self.predict_proba(X).argmax(1)
        return np.asarray(self.classes_[likeliest])

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float32]:  # noqa: N803
        """Calibrated probabilities (n, K) float32, columns in the order of `classes_`."""
        check_is_fitted(self, "classifier_")
        images = self._images(validate_data(self, _flat(X), reset=False))
        names = self.classifier_.architecture.views
        features = [self._features(images, replace(self._spec, view=name)) for name in names]
        source, rows = CachedSource(features, names=names), np.arange(len(images))
        logits = predict_logits(self.classifier_.head(), source, rows, views=range(len(names))).numpy()
        return np.asarray(calibration.softmax(logits, self.classifier_.temperature), np.float32)

    def _features(self, images: NDArray[np.uint8], spec: FeatureSpec) -> Features:
        use_cache = self.cache and len(images) >= _MIN_CACHED
        extract = row_lookup.extract_by_image if use_cache else row_lookup.extract_in_memory
        load_backbone = partial(make_backbone, self.classifier_.backbone(), spec, self.classifier_.device, len(images))
        return extract(images, spec, load_backbone)

    def _images(self, table: NDArray[Any]) -> NDArray[np.uint8]:
        """Images (n, 28, 28) of a table (n, 784) of finite numbers. Raises _InputError for others than 0 to 255."""
        if table.min() < 0:
            raise _InputError("X", "Negative values in data", do="expected pixels from 0 (black) to 255")
        if table.shape[1] != _PIXELS:
            raise _InputError("X", f"{table.shape[1]} feature(s), expected {_PIXELS} pixels, or images of (28, 28)")
        if (most := table.max()) > 255:
            raise _InputError("X", f"a pixel of {most:g}, expected 0 to 255")
        if 0 < most <= 1 and (table % 1).any():
            raise _InputError("X", "pixels scaled to 0..1, expected 0 to 255", do="multiply by 255")
        return np.ascontiguousarray(np.rint(table) if table.dtype.kind == "f" else table, np.uint8).reshape(-1, 28, 28)

    def _recipe(self, labels: NDArray[np.int64]) -> Recipe:
        chosen = self.recipe if isinstance(self.recipe, Recipe) else recipes.named(self.recipe)
        fields = ("freeze_to", "image_size", "hidden", "dropout", "lr", "weight_decay", "batch_size", "epochs")
        given = {name: value for name in fields if (value := getattr(self, name)) is not None}
        if len(labels) < _MIN_CALIBRATED or np.bincount(labels).min() < 2:
            given["val_size"] = 0
        seed = self.random_state
        if not isinstance(seed, int | np.integer):
            seed = check_random_state(seed).randint(2**31)
        return replace(chosen, seed=int(seed), **given)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.input_tags.positive_only = True
        return tags

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: arrays and plain values instead of the network, the frozen part included."""
        state = dict(super().__getstate__())
        if classifier := state.pop("classifier_", None):
            state["_network"] = {
                "tensors": {name: value.cpu().numpy() for name, value in classifier.model.state_dict().items()},
                "architecture": asdict(classifier.architecture),
                "classes": classifier.classes,
                "temperature": classifier.temperature,
                "metadata": classifier.metadata,
                "spec": asdict(state.pop("_spec")),
            }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        network = (state := dict(state)).pop("_network", None)
        super().__setstate__(state)
        if network:
            architecture = Architecture(**network["architecture"])
            tensors = {name: torch.tensor(value) for name, value in network["tensors"].items()}
            model = architecture.load_network(len(network["classes"]), tensors, Path("VGGClassifier"))
            classes, temperature, metadata = (network[name] for name in ("classes", "temperature", "metadata"))
            device = devices.choose_device(self.device)
            self.classifier_ = Classifier(model, architecture, classes, temperature, metadata, device)
            spec = FeatureSpec(**network["spec"])
            if spec.backend.startswith("torch"):  # this machine's, which may not be the one that trained
                spec = replace(spec, backend=devices.choose_backend("torch", spec.precision, device))
            self._spec = spec


@dataclass(frozen=True)
class _ArrayData(DataChoice):
    """Images that are in memory already, all of them to train on."""

    dataset: ImageDataset | None = None

    def load(self, recipe: Recipe) -> Splits:
        assert self.dataset is not None
        everything, nothing = np.arange(len(self.dataset)), np.empty(0, np.int64)
        return Splits(self.dataset, everything, self.dataset, nothing, 0, {"test": "none"})


class _ArrayExtraction(Extraction):
    """Extraction that looks features up image by image."""

    def __init__(self, experiment: Experiment, progress: Progress, cache: bool) -> None:
        super().__init__(experiment, progress)
        self.extract_features = row_lookup.extract_by_image if cache else row_lookup.extract_in_memory

    def extract(self, data: ImageDataset, view: str, label: str) -> Features:
        def advance(done: int, total: int) -> None:
            self.progress.advance(f"Features  {label}", done, total)

        spec = replace(self.experiment.spec, view=view)
        return self.extract_features(data.images, spec, self.experiment.load_backbone, advance)


def _flat(images: Any) -> Any:
    """Images (n, 28, 28) as a table (n, 784); anything else is left to scikit-learn's own checks."""
    table = np.asarray(images) if isinstance(images, list | tuple) else images
    if tuple(getattr(table, "shape", ()))[1:] == (28, 28):
        return np.asarray(table).reshape(-1, _PIXELS)
    return table


def _names_of(classes: NDArray[Any]) -> tuple[str, ...]:
    """The labels as class names of a bundle; their numbers where some of them are no proper or no distinct names."""
    names = [str(label) for label in classes]
    proper = len(set(names)) == len(names) and all(name.strip() and name.isprintable() for name in names)
    return tuple(names if proper else map(str, range(len(names))))
