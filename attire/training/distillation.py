"""Distillation: besides labels a student learns from the averaged probabilities of a teacher, one bundle or several."""

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from attire.data.dataset import ImageDataset, Splits
from attire.errors import AttireError, AttireWarning
from attire.features.views import OUTLIER, SYNTHETIC_DRAWING, flipped
from attire.inference.bundle_files import MODEL_JSON, find_bundle
from attire.inference.classifier import Classifier, load_bundle
from attire.inference.ensemble import cached_probabilities
from attire.progress import Progress
from attire.recipes import Recipe
from attire.storage import files

_FILE = "teacher.npy"  # in the run's folder: probabilities (V, N, K) float32, then the SHA-256 of the file before it
_SPLIT_FIELDS = ("split_seed", "val_size", "stratify")  # of a recipe: what decides which rows are validation


@dataclass(frozen=True)
class Teacher:
    """One bundle or more by folder, and the SHA-256 of the `model.json` of each: with others it is another teacher."""

    bundles: tuple[str, ...]
    digests: tuple[str, ...]

    @classmethod
    def find(cls, teacher: "Sequence[str | Path] | Mapping[str, Any] | Teacher | None") -> "Teacher | None":
        """The teacher of these folders of runs or bundles, or of what `config.json` holds; None where there is none."""
        if isinstance(teacher, Teacher):
            return teacher
        if not teacher:
            return None
        if isinstance(teacher, Mapping):
            return cls(tuple(teacher["bundles"]), tuple(teacher["digests"]))
        folders = [find_bundle(path).absolute() for path in teacher]
        return cls(tuple(map(str, folders)), tuple(files.sha256_file(folder / MODEL_JSON) for folder in folders))

    def to_json(self) -> dict[str, Any]:
        return {"bundles": list(self.bundles), "digests": list(self.digests)}

    def describe(self, recipe: Recipe) -> str:
        count = len(self.bundles)
        who = "one bundle" if count == 1 else f"{count} bundles averaged"
        return f"{who}: {100 * recipe.distill_weight:.0f} % of the loss, softened at {recipe.distill_temperature:g}"

    def soft_targets(
        self,
        splits: Splits,
        views: Sequence[str],
        recipe: Recipe,
        folder: Path,
        progress: Progress,
        recorded: Mapping[str, Any] | None = None,
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """The teacher's probabilities for each view of each image, (V, N, K), softened by the recipe's temperature; and
        what `data.json` records of them.

        For a synthetic drawing the teacher sees the photograph that it was drawn from: both show the same garment, and
        no teacher has seen drawings. An outlier gets the uniform distribution.

        Computed once, from cached features, and kept in `folder`: a resumed run learns from the very same numbers.
        recorded: what an earlier start of the run recorded. Raises AttireError where a bundle is not the one that was
        named or has other classes than the data, or where the numbers are no longer those that were recorded.
        """
        data = splits.data
        path, shape = folder / _FILE, (len(views), len(data), len(data.classes))
        if (probabilities := _stored_probabilities(path, shape)) is None:
            members = _load_members(self, splits, recipe)
            by_view = {OUTLIER: np.full(shape[1:], 1 / shape[2], np.float32)}
            for view in dict.fromkeys(_photograph_view(view) for view in views if view != OUTLIER):
                by_view[view] = _mean_probabilities(members, data, view, progress)
            probabilities = np.stack([by_view[_photograph_view(view)] for view in views])
            with files.sealed_file(path) as file:
                np.lib.format.write_array(cast(IO[bytes], file), probabilities, allow_pickle=False)
        digest = files.sha256(probabilities.tobytes())
        if recorded and recorded.get("targets") != digest:
            raise AttireError(path, "lost, and made again it is not what the run began with", do="start a new run")
        return _soften(probabilities, recipe.distill_temperature), {**self.to_json(), "targets": digest}


def _photograph_view(view: str) -> str:
    """The view of the photograph that a synthetic drawing was made from; any other view is its own."""
    return {SYNTHETIC_DRAWING: "plain", flipped(SYNTHETIC_DRAWING): "flip"}.get(view, view)


def _stored_probabilities(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """What an earlier start wrote; None where there is nothing sound of this shape, to be computed again."""
    if not path.exists() or not files.has_valid_seal(path):
        return None
    try:
        stored = np.lib.format.read_array(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except ValueError:
        return None
    return stored if stored.shape == shape and stored.dtype == np.float32 else None


def _load_members(teacher: Teacher, splits: Splits, recipe: Recipe) -> list[Classifier]:
    members = []
    for folder, digest in zip(map(Path, teacher.bundles), teacher.digests, strict=True):
        if (now := files.sha256_file(find_bundle(folder) / MODEL_JSON)) != digest:
            what = f"not the teacher that was named: digest {now[:12]}, expected {digest[:12]}"
            raise AttireError(folder / MODEL_JSON, what, do="start a new run with --teacher")
        member = load_bundle(folder)
        if member.classes != splits.data.classes:
            raise AttireError(folder, f"its classes are not those of {splits.data.source}", do="choose another teacher")
        _check_split(folder, member.metadata, splits, recipe)
        members.append(member)
    return members


def _check_split(folder: Path, metadata: Mapping[str, Any], splits: Splits, recipe: Recipe) -> None:
    """Warn where a teacher may have trained on the student's validation or test rows: it would pass their labels on.

    Judged by what decides the split: the recipe's fields, the data set that test rows come from, and their number.
    """
    theirs, ours = metadata.get("recipe", {}), recipe.to_json()
    differences = [
        f"{name} {theirs.get(name)} there, {ours[name]} here"
        for name in _SPLIT_FIELDS
        if theirs.get(name) != ours[name]
    ]
    tested = (metadata.get("test_digest"), metadata.get("test", {}).get("n"))
    if tested != (splits.test_data.image_digest, len(splits.test_rows)):
        differences.append("tested on other images")
    if differences:
        rows = "this teacher may have trained on this run's validation or test rows"
        what = f"{folder}: {rows} ({', '.join(differences)}); what they measure may be too good"
        warnings.warn(what, AttireWarning, stacklevel=2)


def _mean_probabilities(
    members: Sequence[Classifier], data: ImageDataset, view: str, progress: Progress
) -> NDArray[np.float32]:
    """Mean of the members' calibrated probabilities (N, K) of all images in this view."""
    probabilities = [cached_probabilities(member, data, (view,), progress=progress) for member in members]
    return np.asarray(np.mean(probabilities, axis=0), np.float32)


def _soften(probabilities: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """softmax(ln p / T) over the last axis."""
    raised = probabilities ** np.float32(1 / temperature)
    return np.asarray(raised / raised.sum(-1, keepdims=True), np.float32)
