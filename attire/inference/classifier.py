"""Classifier: a frozen backbone, a trained head and the classes, complete enough to predict, save and load."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from attire.blocks import BLOCK_ENDS, CHANNELS, block_above, feature_shape
from attire.data.dataset import check_classes
from attire.errors import AttireError, UsageError
from attire.evaluation import calibration
from attire.features.views import apply_view, tta_views
from attire.inference.bundle_files import GRAPH, MODEL_JSON, WEIGHTS, find_bundle
from attire.inference.neighbours import Neighbour, Neighbours, read_neighbours, write_neighbours
from attire.inference.out_of_distribution import OODDetector
from attire.inference.prediction import NO_OOD_DETECTOR, Prediction, as_images, read_picture
from attire.model import devices, heads, vgg
from attire.recipes import Recipe
from attire.storage import files

if TYPE_CHECKING:
    import torchvision


_SCHEMA = 1
_BATCH_PIXELS = 400_000  # pixels a forward pass: bounded memory for any number of images
_WEIGHT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}  # on disk


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
        for name in ("conv", "hidden"):  # which JSON holds as lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        Recipe(**self.__dict__, standardise=False)  # raises UsageError for what no recipe can ask for

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the views that are averaged, the plain one first."""
        return tta_views(self.tta)

    @property
    def end(self) -> str:
        """The block that `features` ends with."""
        return block_above(self.freeze_to, self.finetune_blocks)

    def build_head(self, num_classes: int) -> nn.Sequential:
        """A new head for the features of this backbone, initialised from torch's random state."""
        shape = feature_shape(self.end, self.image_size, self.pool)
        return heads.build_head(shape, self.conv, self.hidden, num_classes, self.dropout)

    def load_network(self, num_classes: int, tensors: dict[str, Tensor], where: Path) -> "torchvision.models.VGG":
        """The network that these tensors are the weights of, in float32, its `features` frozen.

        where: the bundle, for error messages. Raises AttireError, which names the tensor, where one is missing, extra,
        misshapen or not finite.
        """
        with torch.device("meta"):
            model = vgg.Network(self.end, self.pool, self.build_head(num_classes))
        expected = model.state_dict()
        for name in sorted(set(expected) ^ set(tensors)):
            raise AttireError(where, f"tensor {name} is {'missing' if name in expected else 'not part of this model'}")
        for name, value in sorted(tensors.items()):
            if value.shape != expected[name].shape:
                shapes = f"{tuple(value.shape)}, expected {tuple(expected[name].shape)}"
                raise AttireError(where, f"tensor {name} is {shapes}")
            if value.dtype not in _WEIGHT_DTYPES.values():
                dtype = str(value.dtype).removeprefix("torch.")
                raise AttireError(where, f"tensor {name} is {dtype}, expected {', '.join(_WEIGHT_DTYPES)}")
            if not torch.isfinite(value).all():
                raise AttireError(where, f"tensor {name} holds NaN or infinity", do="use a fresh copy")
        model.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
        model.features.requires_grad_(False)
        return model.eval()


class Classifier:
    """VGG16 cut at the freeze boundary with its new head, from uint8 images to calibrated probabilities.

    model: torchvision's VGG with `features`, `avgpool` and `classifier`; temperature divides the logits (Guo et al.
    2017), 1 for none; metadata: what the bundle says of itself besides (metrics, recipe, digests), plain JSON;
    ood_detector: None where too few images trained it; neighbours: None where the bundle holds no training images.
    """

    def __init__(
        self,
        model: "torchvision.models.VGG",
        architecture: Architecture,
        classes: Sequence[str],
        temperature: float = 1.0,
        metadata: dict[str, Any] | None = None,
        device: torch.device | None = None,
        ood_detector: OODDetector | None = None,
        neighbours: Neighbours | None = None,
    ) -> None:
        self.ood_detector, self.neighbours = ood_detector, neighbours
        self.architecture, self.classes = architecture, tuple(classes)
        self.temperature, self.metadata = temperature, dict(metadata or {})
        self.device = device or torch.device("cpu")
        self.model = model.to(self.device, memory_format=torch.channels_last).eval()

    # The network's two parts.

    def backbone(self) -> "torchvision.models.VGG":
        """The frozen network, up to the freeze boundary alone where blocks above it were fine-tuned."""
        if not self.architecture.finetune_blocks:
            return self.model
        freeze_to = self.architecture.freeze_to
        with torch.device("meta"):
            backbone: Any = vgg.Network(freeze_to, 0, nn.Sequential())
        backbone.features = self.model.features[: BLOCK_ENDS[freeze_to]]
        return backbone.eval()

    def head(self) -> nn.Sequential:
        """What was trained, from features (n, D) at the freeze boundary to logits: fine-tuned blocks, `classifier`."""
        about, model = self.architecture, self.model
        if not about.finetune_blocks:
            return nn.Sequential(model.classifier)
        shape = feature_shape(about.freeze_to, about.image_size, 0)
        blocks = model.features[BLOCK_ENDS[about.freeze_to] :]
        return nn.Sequential(nn.Unflatten(1, shape), blocks, model.avgpool, nn.Flatten(), model.classifier)

    # Answers.

    def logits(self, images: NDArray[np.uint8]) -> Tensor:
        """(n, K) float32 on the CPU, for (n, 28, 28) uint8 images with a black background: the mean over the views."""
        parts = [logits for _, logits in self._features_and_logits(images)]
        return torch.cat(parts) if parts else torch.empty(0, len(self.classes))

    def _features_and_logits(self, images: NDArray[np.uint8]) -> Iterator[tuple[Tensor, Tensor]]:
        """The plain view's features (b, D) and logits (b, K), the mean over the views, a batch at a time."""
        views = [self._features(images, view) for view in self.architecture.views]
        for parts in zip(*views, strict=True):
            yield parts[0], torch.stack([self._logits_of(x) for x in parts]).mean(0)

    def _features(self, images: NDArray[np.uint8], view: str = "plain") -> Iterator[Tensor]:
        """(b, D) float32 on the device, a batch at a time: what torchvision's `forward` hands to its `classifier`."""
        step = max(1, _BATCH_PIXELS // self.architecture.image_size**2)
        for start in range(0, len(images), step):
            x = vgg.preprocess(apply_view(images[start : start + step], view), self.architecture.image_size)
            with torch.inference_mode():
                x = x.to(self.device, memory_format=torch.channels_last)
                x = self.model.avgpool(self.model.features(x)).flatten(1)
            yield x

    def _logits_of(self, x: Tensor) -> Tensor:
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
        """How far each image lies from the training images, (n,) float32, see `OODDetector`.

        An image is out-of-distribution above `ood_detector.threshold`. images: as for `predict_proba`. Raises
        AttireError where the bundle has no OODDetector.
        """
        if self.ood_detector is None:
            raise AttireError("bundle", NO_OOD_DETECTOR)
        parts = [np.empty(0, np.float32)]
        for x, logits in self._features_and_logits(as_images(images)):
            parts.append(self.ood_detector.distances(x, self._probabilities(logits)))
        return np.concatenate(parts)

    def nearest(self, images: ArrayLike, count: int = 5) -> list[tuple[Neighbour, ...]]:
        """For each image the stored training images that the last hidden layer finds most like it, nearest first.

        images: as for `predict_proba`. The tuples are empty where the bundle holds no training images.
        """
        nearest: list[tuple[Neighbour, ...]] = []
        for x in self._features(as_images(images)):
            if self.neighbours is None:
                nearest += [()] * len(x)
                continue
            with torch.inference_mode():
                hidden = heads.penultimate_layers(self.model.classifier)(x)
            nearest += self.neighbours.nearest(hidden, self.classes, count)
        return nearest

    def predict(self, what: str | Path | ArrayLike) -> Any:
        """A Prediction for a picture file or one (28, 28) image; a list of them for (n, 28, 28) or (n, 784)."""
        single = isinstance(what, str | Path)
        images = read_picture(what)[None] if isinstance(what, str | Path) else np.asarray(what)
        if images.shape in ((28, 28), (784,)):
            images, single = images[None], True
        predictions: list[Prediction] = []
        for x, logits in self._features_and_logits(as_images(images)):
            predictions += self._predictions(x, self._probabilities(logits))
        return predictions[0] if single else predictions

    def _predictions(self, x: Tensor, probabilities: NDArray[np.float32]) -> Iterator[Prediction]:
        """The answers for plain features (b, D) with these probabilities (b, K)."""
        distances, threshold = [None] * len(x), None
        if self.ood_detector is not None:
            distances = self.ood_detector.distances(x, probabilities).tolist()
            threshold = self.ood_detector.threshold
        for row, distance in zip(probabilities, distances, strict=True):
            yield Prediction.from_probabilities(self.classes, row, distance, threshold)

    # Files.

    def save(self, folder: Path, dtype: str = "float32") -> None:
        """Write the bundle; `model.json`, which holds the digests of the other files, comes last.

        dtype: of the network's weights on disk, float32, float16 or bfloat16; the OODDetector's tensors stay float32.
        Raises UsageError for another dtype, AttireError for a weight that is too large for it.
        """
        tensors = self._weights(dtype) | (self.ood_detector.tensors() if self.ood_detector else {})
        body = save(tensors, {"format": "pt"})
        neighbours = self.neighbours.encoded() if self.neighbours else None
        about = {
            "schema": _SCHEMA,
            "classes": list(self.classes),
            "architecture": asdict(self.architecture),
            "preprocess": {"version": vgg.PREPROCESS_VERSION, "mean": vgg.IMAGENET_MEAN, "std": vgg.IMAGENET_STD},
            "temperature": self.temperature,
            "ood": self.ood_detector.to_json() if self.ood_detector else None,
            "neighbours": {"sha256": files.sha256(neighbours)} if neighbours else None,
            "sha256": files.sha256(body),
            "metadata": self.metadata,
        }
        sealed = {**about, "seal": files.sha256(files.canonical_json(about))}
        for stale in (GRAPH, MODEL_JSON):
            (folder / stale).unlink(missing_ok=True)
        files.write_bytes(folder / WEIGHTS, body)
        write_neighbours(folder, neighbours)
        files.write_json(folder / MODEL_JSON, sealed)

    def _weights(self, dtype: str) -> dict[str, Tensor]:
        """The network's tensors in the type of this name. Raises as `save` does."""
        if dtype not in _WEIGHT_DTYPES:
            raise UsageError("dtype", f"expected {', '.join(_WEIGHT_DTYPES)}, found {dtype!r}")
        tensors = {}
        for name, value in self.model.state_dict().items():
            tensors[name] = value.detach().float().cpu().to(_WEIGHT_DTYPES[dtype]).contiguous()
            if not torch.isfinite(tensors[name]).all():
                raise AttireError(name, f"too large for {dtype}", do="save it as float32 or bfloat16")
        return tensors


def load_bundle(folder: str | Path | None = None, device: str = "auto") -> Classifier:
    """The classifier that `save` wrote, None: the one that is part of the package; needs no download.

    Raises AttireError for anything that is not sound.
    """
    folder = find_bundle(folder)
    about = _read_about(folder / MODEL_JSON)
    tensors = _read_tensors(folder / WEIGHTS, about["sha256"])
    architecture, num_classes = Architecture(**about["architecture"]), len(about["classes"])
    network = {name: value for name, value in tensors.items() if not name.startswith(OODDetector.PREFIX)}
    model = architecture.load_network(num_classes, network, folder)
    ood_detector = None  # of a bundle made from too few images
    if thresholds := about.get("ood"):
        ood_detector = OODDetector.from_bundle(tensors, thresholds, CHANNELS[architecture.end], folder)
    width = heads.last_linear(model.classifier).in_features
    return Classifier(
        model,
        architecture,
        about["classes"],
        about["temperature"],
        about["metadata"],
        devices.choose_device(device),
        ood_detector,
        read_neighbours(folder, about.get("neighbours"), num_classes, width),
    )


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
        Architecture(**about["architecture"])
        if not (0 < about["temperature"] < math.inf and about["sha256"] and isinstance(about["metadata"], dict)):
            raise ValueError(f"temperature {about['temperature']}, digest {about['sha256']}")
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        reason = f"{type(error).__name__} {error}"[:80]
        raise AttireError(path, "not what a bundle holds", reason, "use a fresh copy") from error
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
        raise files.io_error("read", path, error) from error
    if files.sha256(data) != digest:
        raise AttireError(path, "damaged: its digest is not the one in model.json", do="use a fresh copy")
    try:
        return load(data)
    except SafetensorError as error:
        raise AttireError(path, "not a safetensors file", str(error)[:80]) from error
