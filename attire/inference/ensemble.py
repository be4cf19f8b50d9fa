"""Bundles that answer through the feature cache, alone or several averaged as one model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attire.blocks import BLOCK_ENDS
from attire.data.dataset import ImageDataset
from attire.errors import AttireError, UsageError
from attire.evaluation import calibration
from attire.features import cache
from attire.features.backbones import choose_backbone, make_backbone
from attire.features.cache import FeatureSpec
from attire.features.logits import predict_logits
from attire.features.sources import CachedSource
from attire.inference.bundle_files import MODEL_JSON, find_bundle
from attire.inference.classifier import Classifier, load_bundle
from attire.progress import NoProgress, Progress
from attire.storage import files

_KIND = "ensemble"  # the value of that key in the file


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Bundles of the same classes as one model: the arithmetic mean of their calibrated probabilities.

    bundles: the folder of each member. Each member averages its own views. Raises AttireError for classes that differ.
    """

    members: tuple[Classifier, ...]
    bundles: tuple[Path, ...]

    def __post_init__(self) -> None:
        if len(self.members) < 2:
            raise UsageError(_KIND, f"expected two bundles or more, found {len(self.members)}")
        for folder, member in zip(self.bundles, self.members, strict=True):
            if member.classes != self.classes:
                raise AttireError(folder, f"its classes are not those of {self.bundles[0]}")

    @property
    def classes(self) -> tuple[str, ...]:
        return self.members[0].classes

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """SHA-256 of each member's `model.json`, which holds the digest of its weights."""
        return tuple(files.sha256_file(folder / MODEL_JSON) for folder in self.bundles)

    def predict_proba(self, images: ArrayLike) -> NDArray[np.float32]:
        """Probabilities (n, K) float32 of (n, 28, 28) or (n, 784) uint8 images, without the cache."""
        return np.asarray(self.mean([member.predict_proba(images) for member in self.members]), np.float32)

    @staticmethod
    def mean(probabilities: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
        """The mean of probabilities (n, K) of each member, in double precision."""
        return np.asarray(np.mean([np.asarray(part, np.float64) for part in probabilities], axis=0))

    def to_json(self) -> list[dict[str, str]]:
        """The members by folder and digest."""
        members = zip(self.bundles, self.digests, strict=True)
        return [{"bundle": str(folder.absolute()), "sha256": digest} for folder, digest in members]

    def save(self, path: Path) -> None:
        """A small JSON file that names the members; `open_ensemble` reads it."""
        files.write_json(path, {"schema": 1, "kind": _KIND, "members": self.to_json()})


def open_ensemble(what: Sequence[str | Path], device: str = "auto") -> Ensemble:
    """Bundles or runs by their folders, or one file that `Ensemble.save` wrote.

    Raises AttireError where a bundle is unsound, or is not the one that the file means.
    """
    paths, expected = [Path(part) for part in what], None
    if len(paths) == 1 and paths[0].is_file() and paths[0].name != MODEL_JSON:
        paths, expected = _read_members(paths[0])
    folders = tuple(find_bundle(path) for path in paths)
    ensemble = Ensemble(tuple(load_bundle(folder, device) for folder in folders), folders)
    for folder, digest, wanted in zip(folders, ensemble.digests, expected or ensemble.digests, strict=True):
        if digest != wanted:
            what = f"changed since it was named: digest {digest[:12]}, expected {wanted[:12]}"
            raise AttireError(folder / MODEL_JSON, what, do="use the bundle that was meant")
    return ensemble


def _read_members(path: Path) -> tuple[list[Path], tuple[str, ...]]:
    value = files.read_json(path)
    try:
        if value["kind"] != _KIND or value["schema"] != 1:
            raise ValueError(json.dumps(value["kind"]))
        return [Path(row["bundle"]) for row in value["members"]], tuple(str(row["sha256"]) for row in value["members"])
    except (KeyError, TypeError, ValueError) as error:
        raise AttireError(path, "not a file that `attire ensemble` wrote", str(error)[:80]) from error


# Answers through the feature cache.


def cached_probabilities(
    classifier: Classifier,
    data: ImageDataset,
    views: Sequence[str] = (),
    backend: str = "torch",
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Calibrated probabilities (n, K) of all images, averaged over these views, by default the bundle's own.

    Only what lies below the freeze boundary comes from the cache; members with one backbone share it. The temperature
    is the bundle's, whatever the views.
    """
    names = tuple(views) or classifier.architecture.views
    parts = [_bundle_features(classifier, data, view, backend, progress or NoProgress()) for view in names]
    source = CachedSource(parts, names=names)
    logits = predict_logits(classifier.head(), source, np.arange(len(data)), 1024, range(len(names))).numpy()
    return calibration.softmax(logits, classifier.temperature)


def _bundle_features(
    classifier: Classifier, data: ImageDataset, view: str, backend: str, progress: Progress
) -> cache.Features:
    """Features of all images in this view at the bundle's freeze boundary, by the bundle's own backbone."""
    about = classifier.architecture
    precision, backend = choose_backbone(about.freeze_to, backend, "auto", classifier.device)
    spec = FeatureSpec(
        about.freeze_to,
        about.image_size,
        0 if about.finetune_blocks else about.pool,
        _backbone_digest(classifier),
        precision,
        backend=backend,
        view=view,
    )
    label = "Features" if view == "plain" else f"Features  {view}"

    def load_backbone() -> cache.FeatureExtractor:
        return make_backbone(classifier.backbone(), spec, classifier.device, len(data))

    def advance(done: int, total: int) -> None:
        progress.advance(label, done, total)

    return cache.extract(data.images, data.image_digest, spec, load_backbone, advance)


def _backbone_digest(classifier: Classifier) -> str:
    if digest := classifier.metadata.get("backbone_digest", ""):
        return str(digest)
    end = BLOCK_ENDS[classifier.architecture.freeze_to]
    values = classifier.model.features[:end].state_dict().values()
    return files.sha256(b"".join(value.float().cpu().numpy().tobytes() for value in values))
