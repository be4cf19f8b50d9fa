"""Classifier: a frozen trunk, a trained head and the classes, complete enough to predict, save and load."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from attire import calibration, devices, files, heads, neighbours, reject, vgg
from attire.blocks import CHANNELS, above, feature_shape
from attire.data import check_classes
from attire.errors import AttireError, UsageError
from attire.neighbours import Neighbour, Neighbours
from attire.pictures import read_image
from attire.recipes import Recipe
from attire.reject import Rejecter

if TYPE_CHECKING:
    import torchvision

SCHEMA = 1
BATCH_PIXELS = 400_000  # pictures a forward pass: bounded memory for any number of images
CANNOT_REJECT = "this bundle cannot tell what is none of its classes"
TRAIN_AGAIN = "train it again, with 200 images or more"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@dataclass(frozen=True)
class Architecture:
    """What decides the network's shape. Its fields stand in `model.json`; they are valid once constructed."""

    freeze_to: str
    image_size: int
    pool: int
    hidden: tuple[int, ...]
    dropout: float
    train_blocks: int = 0  # blocks above `freeze_to` that are part of `features`, their weights no longer ImageNet's
    conv: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "conv", tuple(self.conv))
        Recipe(**self.__dict__, standardise=False)  # raises UsageError for what no recipe can ask for

    @property
    def end(self) -> str:
        """The block that `features` ends with."""
        return above(self.freeze_to, self.train_blocks)

    def build(self, classes: int) -> nn.Sequential:
        """A new classifier for the features of this trunk, initialised from torch's random state."""
        shape = feature_shape(self.end, self.image_size, self.pool)
        return heads.build(shape, self.conv, self.hidden, classes, self.dropout)


@dataclass(frozen=True)
class Prediction:
    """The answer for one image: the likeliest class first, with its calibrated probability, then the others.

    distance: from the training images, see `Classifier.distances`; rejected: whether it is farther than all but 5 % of
    garments, and so rather none of the classes. Both are None where the bundle cannot tell. Label and probabilities
    are those of the closest classes all the same.
    """

    label: str
    probability: float
    ranking: tuple[tuple[str, float], ...]
    distance: float | None = None
    rejected: bool | None = None

    def __str__(self) -> str:
        if self.rejected:
            count = len(self.ranking)
            known = NUMBERS[count] if count < len(NUMBERS) else count
            return f"none of the {known} (closest: {self.label} {self.probability:.2f})"
        return f"{self.label} {self.probability:.3f}"


class Classifier:
    """VGG16 cut at the freeze boundary with its new classifier, from uint8 images to calibrated probabilities.

    model: torchvision's VGG with `features`, `avgpool` and `classifier`; temperature divides the logits (Guo et al.
    2017), 1 for none; facts: what the bundle says of itself besides (metrics, recipe, digests), plain JSON;
    rejecter: None where it cannot tell what is none of its classes; neighbours: None where it holds no training images.
    """

    def __init__(
        self,
        model: "torchvision.models.VGG",
        architecture: Architecture,
        classes: Sequence[str],
        temperature: float = 1.0,
        facts: dict[str, Any] | None = None,
        device: torch.device | None = None,
        rejecter: Rejecter | None = None,
        neighbours: Neighbours | None = None,
    ) -> None:
        self.rejecter, self.neighbours = rejecter, neighbours
        self.architecture, self.classes = architecture, tuple(classes)
        self.temperature, self.facts = temperature, dict(facts or {})
        self.device = device or torch.device("cpu")
        self.model = model.to(self.device, memory_format=torch.channels_last).eval()

    def logits(self, images: NDArray[np.uint8]) -> Tensor:
        """(n, K) float32 on the CPU, for (n, 28, 28) uint8 images with a black background."""
        parts = [self._head(x) for x in self._features(images)]
        return torch.cat(parts) if parts else torch.empty(0, len(self.classes))

    def _features(self, images: NDArray[np.uint8]) -> Iterator[Tensor]:
        """(b, D) float32 on the device, a batch at a time: what torchvision's `forward` hands to its classifier."""
        step = max(1, BATCH_PIXELS // self.architecture.image_size**2)
        for start in range(0, len(images), step):
            x = vgg.preprocess(images[start : start + step], self.architecture.image_size)
            with torch.inference_mode():
                x = x.to(self.device, memory_format=torch.channels_last)
                x = self.model.avgpool(self.model.features(x)).flatten(1)
            yield x

    def _head(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.model.classifier(x)
            return logits.float().cpu()

    def predict_proba(self, images: ArrayLike) -> NDArray[np.float32]:
        """Calibrated probabilities (n, K) float32, rows summing to 1, columns in the order of `classes`.

        images: (n, 28, 28) or (n, 784) uint8, garments light on a black background. Raises AttireError for any
        other shape or type.
        """
        return self._probabilities(self.logits(as_images(images)))

    def _probabilities(self, logits: Tensor) -> NDArray[np.float32]:
        return np.asarray(calibration.softmax(logits.numpy(), self.temperature), dtype=np.float32)

    def distances(self, images: ArrayLike) -> NDArray[np.float32]:
        """How far from the training images each image lies, (n,) float32; above `rejecter.threshold` it is rejected.

        images: as for `predict_proba`. Raises AttireError where the bundle has no Rejecter.
        """
        if self.rejecter is None:
            raise AttireError("bundle", CANNOT_REJECT, do=TRAIN_AGAIN)
        parts = [self.rejecter.distances(x) for x in self._features(as_images(images))]
        return np.concatenate([np.empty(0, np.float32), *parts])

    def nearest(self, images: ArrayLike, count: int = neighbours.NEAREST) -> list[tuple[Neighbour, ...]]:
        """For each image the training images in the bundle that its last hidden layer finds most like it, if any.

        images: as for `predict_proba`.
        """
        found: list[tuple[Neighbour, ...]] = []
        for x in self._features(as_images(images)):
            if self.neighbours is None:
                found += [()] * len(x)
                continue
            with torch.inference_mode():
                hidden = heads.last_hidden(self.model.classifier)(x)
            found += self.neighbours.nearest(hidden, self.classes, count)
        return found

    def predict(self, what: str | Path | ArrayLike) -> Any:
        """A Prediction for a picture file or one (28, 28) image; a list of them for (n, 28, 28) or (n, 784)."""
        single = isinstance(what, str | Path)
        images = read_image(what)[None] if isinstance(what, str | Path) else np.asarray(what)
        if images.shape in ((28, 28), (784,)):
            images, single = images[None], True
        found: list[Prediction] = []
        for x in self._features(as_images(images)):
            distances = [None] * len(x) if self.rejecter is None else self.rejecter.distances(x).tolist()
            found += map(self.ranked, self._probabilities(self._head(x)), distances)
        return found[0] if single else found

    def ranked(self, probabilities: NDArray[np.floating[Any]], distance: float | None = None) -> Prediction:
        """One row of `predict_proba`, and its distance, as a Prediction."""
        rejected = None if distance is None or self.rejecter is None else distance > self.rejecter.threshold
        return replace(ranked(self.classes, probabilities), distance=distance, rejected=rejected)

    def save(self, folder: Path) -> None:
        """Write the bundle: `model.safetensors` and `neighbours.safetensors`, then `model.json`, which holds their
        digests and is written last."""
        tensors = {name: value.detach().float().cpu().contiguous() for name, value in self.model.state_dict().items()}
        body = save(tensors | (self.rejecter.tensors() if self.rejecter else {}), {"format": "pt"})
        stored = self.neighbours.encoded() if self.neighbours else None
        about = {
            "schema": SCHEMA,
            "classes": list(self.classes),
            "architecture": {
                **self.architecture.__dict__,
                "hidden": list(self.architecture.hidden),
                "conv": list(self.architecture.conv),
            },
            "preprocess": {"version": vgg.PREPROCESS_VERSION, "mean": vgg.MEAN, "std": vgg.STD},
            "temperature": self.temperature,
            "reject": self.rejecter.about() if self.rejecter else None,
            "neighbours": {"sha256": files.sha256(stored)} if stored else None,
            "sha256": files.sha256(body),
            "facts": self.facts,
        }
        sealed = {**about, "seal": files.sha256(files.canonical_json(about))}
        (folder / "model.json").unlink(missing_ok=True)
        files.write_bytes(folder / "model.safetensors", body)
        neighbours.write(folder, stored)
        files.write_json(folder / "model.json", sealed)


def ranked(classes: Sequence[str], probabilities: NDArray[np.floating[Any]]) -> Prediction:
    """One row of probabilities as a Prediction without a verdict on whether it is any of the classes."""
    order = np.argsort(-probabilities, kind="stable")
    ranking = tuple((classes[i], float(probabilities[i])) for i in order)
    return Prediction(*ranking[0], ranking)


def as_images(images: ArrayLike) -> NDArray[np.uint8]:
    """(n, 28, 28) uint8 of (n, 28, 28) or (n, 784) uint8; other types are refused, never silently scaled."""
    found = np.asarray(images)
    if found.ndim == 2 and found.shape[1] == 784:
        found = found.reshape(-1, 28, 28)
    if found.dtype != np.uint8 or found.shape[1:] != (28, 28):
        what = f"expected (n, 28, 28) or (n, 784) uint8 from 0 to 255, found {found.shape} {found.dtype}"
        raise AttireError("images", what)
    return found


def load_bundle(folder: str | Path, device: str = "auto") -> Classifier:
    """The classifier that `save` wrote; needs no download. Raises AttireError for anything that is not sound."""
    folder = Path(folder)
    if folder.name == "model.json":
        folder = folder.parent
    if not (folder / "model.json").exists() and (folder / "model" / "model.json").exists():
        folder = folder / "model"  # a run's folder is as good as its bundle's
    if not (folder / "model.json").exists():
        what = "not a bundle: it holds no model.json" if folder.is_dir() else "no such bundle"
        raise AttireError(folder, what, do="give a folder such as runs/1/model")
    about = read_about(folder / "model.json")
    tensors = read_tensors(folder / "model.safetensors", about["sha256"])
    architecture = Architecture(**{**about["architecture"], "hidden": tuple(about["architecture"]["hidden"])})
    network = {name: value for name, value in tensors.items() if not name.startswith(reject.PREFIX)}
    model = assemble(architecture, len(about["classes"]), network, folder)
    rejecter = None  # of a bundle made before there was one, or from too few images
    if told := about.get("reject"):
        rejecter = reject.restore(tensors, told, CHANNELS[architecture.end], folder)
    width = heads.last_linear(model.classifier).in_features
    near = neighbours.read(folder, about.get("neighbours"), len(about["classes"]), width)
    where, hot = devices.choose_device(device), about["temperature"]
    return Classifier(model, architecture, about["classes"], hot, about["facts"], where, rejecter, near)


def read_about(path: Path) -> dict[str, Any]:
    """`model.json`, checked: its schema, its seal, its preprocessing, its values."""
    about = files.read_json(path)
    schema = about.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise AttireError(
            path, f"made by a newer Attire (schema {schema}, this one reads {SCHEMA})", do="update attire"
        )
    if not is_sealed(about):
        raise AttireError(path, "not one of ours, or changed after it was written", do="use a fresh copy")
    try:
        if about["preprocess"]["version"] != vgg.PREPROCESS_VERSION:
            raise AttireError(path, "its preprocessing is of another version than this Attire's", do="train it again")
        check_classes(tuple(about["classes"]))
        Architecture(**{**about["architecture"], "hidden": tuple(about["architecture"]["hidden"])})
        if not (0 < about["temperature"] < math.inf and about["sha256"] and isinstance(about["facts"], dict)):
            raise ValueError(f"temperature {about['temperature']}, digest {about['sha256']}")
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        found = f"{type(error).__name__} {error}"[:80]
        raise AttireError(path, "not what a bundle holds", found, "use a fresh copy") from error
    return about


def is_sealed(about: dict[str, Any]) -> bool:
    try:
        body = files.canonical_json({key: value for key, value in about.items() if key != "seal"})
    except ValueError:  # NaN or infinity, which `save` never writes
        return False
    return bool(about.get("seal") == files.sha256(body))


def read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise files.cannot("read", path, error) from error
    if files.sha256(data) != digest:
        raise AttireError(path, "damaged: its digest is not the one in model.json", do="use a fresh copy")
    try:
        return load(data)
    except SafetensorError as error:
        raise AttireError(path, "not a safetensors file", str(error)[:80]) from error


def assemble(architecture: Architecture, classes: int, tensors: dict[str, Tensor], where: Path) -> Any:
    """The network around these tensors. Names a tensor that is missing, extra, misshapen or not finite."""
    with torch.device("meta"):
        model = vgg.Network(architecture.end, architecture.pool, architecture.build(classes))
    wanted = model.state_dict()
    for name in sorted(set(wanted) ^ set(tensors)):
        raise AttireError(where, f"tensor {name} is {'missing' if name in wanted else 'not part of this model'}")
    for name, value in sorted(tensors.items()):
        if value.shape != wanted[name].shape:
            raise AttireError(where, f"tensor {name} is {tuple(value.shape)}, expected {tuple(wanted[name].shape)}")
        if value.dtype != torch.float32:
            raise AttireError(where, f"tensor {name} is {str(value.dtype).removeprefix('torch.')}, expected float32")
        if not torch.isfinite(value).all():
            raise AttireError(where, f"tensor {name} holds NaN or infinity", do="use a fresh copy")
    model.load_state_dict(tensors, assign=True)
    vgg.freeze(model.features)
    return model.eval()


def fold_standardisation(classifier: nn.Sequential, mean: Tensor, scale: Tensor) -> None:
    """Move (x - mean) / scale into the first Linear: W' = W / scale, b' = b - W' mean. The function stays the same."""
    first = next(layer for layer in classifier if isinstance(layer, nn.Linear))
    with torch.no_grad():
        weight = first.weight.double().cpu() / scale.double()  # (H, D)
        bias = first.bias.double().cpu() - weight @ mean.double()
        first.weight.copy_(weight)
        first.bias.copy_(bias)
