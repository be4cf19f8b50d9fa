"""Classifier: a frozen backbone, a trained head and the classes, complete enough to predict, save and load."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from attire.blocks import CHANNELS, above, feature_shape
from attire.data.dataset import check_classes
from attire.errors import AttireError, UsageError
from attire.evaluation import calibration
from attire.features import views as features_views
from attire.features.views import answer_views
from attire.inference import out_of_distribution
from attire.inference.bundle_files import ABOUT, GRAPH, WEIGHTS, find_bundle
from attire.inference.bundle_files import SHIPPED as SHIPPED
from attire.inference.neighbours import NEAREST, Neighbour, Neighbours, read, write
from attire.inference.out_of_distribution import OODDetector
from attire.inference.prediction import Prediction, as_images, ranked, read_picture
from attire.model import devices, heads, vgg
from attire.recipes import Recipe
from attire.storage import files

if TYPE_CHECKING:
    import torchvision


_SCHEMA = 1
_BATCH_PIXELS = 400_000  # pictures a forward pass: bounded memory for any number of images
CANNOT_REJECT = "this bundle cannot tell what is none of its classes"
TRAIN_AGAIN = "train it again, with 200 images or more"
_STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}  # of weights on disk


@dataclass(frozen=True)
class Architecture:
    """What decides the network's shape. Its fields stand in `model.json`; they are valid once constructed."""

    freeze_to: str
    image_size: int
    pool: int
    hidden: tuple[int, ...]
    dropout: float
    finetune_blocks: int = 0  # blocks above `freeze_to` that are part of `features`, their weights no longer ImageNet's
    conv: tuple[int, ...] = ()
    tta: int = 1  # views of a picture whose logits are averaged for its answer

    def __post_init__(self) -> None:
        object.__setattr__(self, "conv", tuple(self.conv))
        Recipe(**self.__dict__, standardise=False)  # raises UsageError for what no recipe can ask for

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the views that are averaged, the plain one first."""
        return answer_views(self.tta)

    @property
    def end(self) -> str:
        """The block that `features` ends with."""
        return above(self.freeze_to, self.finetune_blocks)

    def build(self, classes: int) -> nn.Sequential:
        """A new classifier for the features of this backbone, initialised from torch's random state."""
        shape = feature_shape(self.end, self.image_size, self.pool)
        return heads.build(shape, self.conv, self.hidden, classes, self.dropout)


class Classifier:
    """VGG16 cut at the freeze boundary with its new classifier, from uint8 images to calibrated probabilities.

    model: torchvision's VGG with `features`, `avgpool` and `classifier`; temperature divides the logits (Guo et al.
    2017), 1 for none; facts: what the bundle says of itself besides (metrics, recipe, digests), plain JSON;
    ood_detector: None where it cannot tell what is none of its classes; neighbours: None where it holds no training images.
    """

    def __init__(
        self,
        model: "torchvision.models.VGG",
        architecture: Architecture,
        classes: Sequence[str],
        temperature: float = 1.0,
        facts: dict[str, Any] | None = None,
        device: torch.device | None = None,
        ood_detector: OODDetector | None = None,
        neighbours: Neighbours | None = None,
    ) -> None:
        self.ood_detector, self.neighbours = ood_detector, neighbours
        self.architecture, self.classes = architecture, tuple(classes)
        self.temperature, self.facts = temperature, dict(facts or {})
        self.device = device or torch.device("cpu")
        self.model = model.to(self.device, memory_format=torch.channels_last).eval()

    def logits(self, images: NDArray[np.uint8]) -> Tensor:
        """(n, K) float32 on the CPU, for (n, 28, 28) uint8 images with a black background: the mean over the views."""
        parts = [found for _, found in self._answers(images)]
        return torch.cat(parts) if parts else torch.empty(0, len(self.classes))

    def _answers(self, images: NDArray[np.uint8]) -> Iterator[tuple[Tensor, Tensor]]:
        """Plain features (b, D) and logits (b, K), the mean over the views, a batch at a time."""
        for parts in zip(*(self._features(images, view) for view in self.architecture.views), strict=True):
            yield parts[0], torch.stack([self._head(x) for x in parts]).mean(0)

    def _features(self, images: NDArray[np.uint8], view: str = "plain") -> Iterator[Tensor]:
        """(b, D) float32 on the device, a batch at a time: what torchvision's `forward` hands to its classifier."""
        step = max(1, _BATCH_PIXELS // self.architecture.image_size**2)
        for start in range(0, len(images), step):
            seen = features_views.seen(images[start : start + step], view)
            x = vgg.preprocess(seen, self.architecture.image_size)
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
        """How far from the training images each image lies, (n,) float32; above `ood_detector.threshold` it is rejected.

        images: as for `predict_proba`. Raises AttireError where the bundle has no OODDetector.
        """
        if self.ood_detector is None:
            raise AttireError("bundle", CANNOT_REJECT, do=TRAIN_AGAIN)
        found = self._answers(as_images(images))
        parts = [self.ood_detector.distances(x, self._probabilities(logits)) for x, logits in found]
        return np.concatenate([np.empty(0, np.float32), *parts])

    def nearest(self, images: ArrayLike, count: int = NEAREST) -> list[tuple[Neighbour, ...]]:
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
        images = read_picture(what)[None] if isinstance(what, str | Path) else np.asarray(what)
        if images.shape in ((28, 28), (784,)):
            images, single = images[None], True
        found: list[Prediction] = []
        for x, logits in self._answers(as_images(images)):
            sure = self._probabilities(logits)
            distances = [None] * len(x) if self.ood_detector is None else self.ood_detector.distances(x, sure).tolist()
            found += map(self.ranked, sure, distances)
        return found[0] if single else found

    def ranked(self, probabilities: NDArray[np.floating[Any]], distance: float | None = None) -> Prediction:
        """One row of `predict_proba`, and its distance, as a Prediction."""
        return ranked(self.classes, probabilities, distance, self.ood_detector.threshold if self.ood_detector else None)

    def save(self, folder: Path, dtype: str = "float32") -> None:
        """Write the bundle: `model.safetensors` and `neighbours.safetensors`, then `model.json`, which holds their
        digests and is written last.

        dtype: of the network's weights on disk, float32, float16 or bfloat16; they are computed with in float32, and
        the OODDetector's tensors stay float32. Raises UsageError for another, AttireError for a weight that is too large.
        """
        body = save(self._stored(dtype) | (self.ood_detector.tensors() if self.ood_detector else {}), {"format": "pt"})
        stored = self.neighbours.encoded() if self.neighbours else None
        about = {
            "schema": _SCHEMA,
            "classes": list(self.classes),
            "architecture": {
                **self.architecture.__dict__,
                "hidden": list(self.architecture.hidden),
                "conv": list(self.architecture.conv),
            },
            "preprocess": {"version": vgg.PREPROCESS_VERSION, "mean": vgg.MEAN, "std": vgg.STD},
            "temperature": self.temperature,
            "ood": self.ood_detector.about() if self.ood_detector else None,
            "neighbours": {"sha256": files.sha256(stored)} if stored else None,
            "sha256": files.sha256(body),
            "facts": self.facts,
        }
        sealed = {**about, "seal": files.sha256(files.canonical_json(about))}
        for stale in (GRAPH, ABOUT):
            (folder / stale).unlink(missing_ok=True)
        files.write_bytes(folder / WEIGHTS, body)
        write(folder, stored)
        files.write_json(folder / ABOUT, sealed)

    def _stored(self, dtype: str) -> dict[str, Tensor]:
        if dtype not in _STORED:
            raise UsageError("dtype", f"expected {', '.join(_STORED)}, found {dtype!r}")
        kept = {}
        for name, value in self.model.state_dict().items():
            kept[name] = value.detach().float().cpu().to(_STORED[dtype]).contiguous()
            if not torch.isfinite(kept[name]).all():
                raise AttireError(name, f"too large for {dtype}", do="save it as float32 or bfloat16")
        return kept


def load_bundle(folder: str | Path | None = None, device: str = "auto") -> Classifier:
    """The classifier that `save` wrote, None: the one that is part of the package; needs no download.

    Raises AttireError for anything that is not sound.
    """
    folder = find_bundle(folder)
    about = _read_about(folder / ABOUT)
    tensors = _read_tensors(folder / WEIGHTS, about["sha256"])
    architecture = Architecture(**{**about["architecture"], "hidden": tuple(about["architecture"]["hidden"])})
    network = {name: value for name, value in tensors.items() if not name.startswith(out_of_distribution.PREFIX)}
    model = assemble(architecture, len(about["classes"]), network, folder)
    ood_detector = None  # of a bundle made before there was one, or from too few images
    if told := about.get("ood"):
        ood_detector = out_of_distribution.restore(tensors, told, CHANNELS[architecture.end], folder)
    width = heads.last_linear(model.classifier).in_features
    near = read(folder, about.get("neighbours"), len(about["classes"]), width)
    where, hot = devices.choose_device(device), about["temperature"]
    return Classifier(model, architecture, about["classes"], hot, about["facts"], where, ood_detector, near)


def _read_about(path: Path) -> dict[str, Any]:
    """`model.json`, checked: its schema, its seal, its preprocessing, its values."""
    about = files.read_json(path)
    schema = about.get("schema")
    if isinstance(schema, int) and schema > _SCHEMA:
        raise AttireError(
            path, f"made by a newer Attire (schema {schema}, this one reads {_SCHEMA})", do="update attire"
        )
    if not _is_sealed(about):
        raise AttireError(path, "not one of ours, or changed after it was written", do="use a fresh copy")
    try:
        if schema != _SCHEMA:
            raise ValueError(f"schema {schema!r}")
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


def _is_sealed(about: dict[str, Any]) -> bool:
    try:
        body = files.canonical_json({key: value for key, value in about.items() if key != "seal"})
    except ValueError:  # NaN or infinity, which `save` never writes
        return False
    return bool(about.get("seal") == files.sha256(body))


def _read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
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
    """The network around these tensors, in float32. Names one that is missing, extra, misshapen or not finite."""
    with torch.device("meta"):
        model = vgg.Network(architecture.end, architecture.pool, architecture.build(classes))
    wanted = model.state_dict()
    for name in sorted(set(wanted) ^ set(tensors)):
        raise AttireError(where, f"tensor {name} is {'missing' if name in wanted else 'not part of this model'}")
    for name, value in sorted(tensors.items()):
        if value.shape != wanted[name].shape:
            raise AttireError(where, f"tensor {name} is {tuple(value.shape)}, expected {tuple(wanted[name].shape)}")
        if value.dtype not in _STORED.values():
            found = str(value.dtype).removeprefix("torch.")
            raise AttireError(where, f"tensor {name} is {found}, expected {', '.join(_STORED)}")
        if not torch.isfinite(value).all():
            raise AttireError(where, f"tensor {name} holds NaN or infinity", do="use a fresh copy")
    model.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    vgg.freeze(model.features)
    return model.eval()
