"""A teacher: bundles whose averaged answers for the training images a student learns from, besides the labels."""

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
_SPLIT = ("split_seed", "val_size", "stratify")  # what decides which rows are validation


@dataclass(frozen=True)
class Teacher:
    """One bundle or more by folder, and the SHA-256 of the `model.json` of each: with others it is another teacher."""

    bundles: tuple[str, ...]
    digests: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"bundles": list(self.bundles), "digests": list(self.digests)}


def choose(given: "Sequence[str | Path] | Mapping[str, Any] | Teacher | None") -> Teacher | None:
    """The teacher that folders of runs or bundles name, or that a `config.json` holds; None for nobody."""
    if isinstance(given, Teacher):
        return given
    if not given:
        return None
    if isinstance(given, Mapping):
        return Teacher(tuple(given["bundles"]), tuple(given["digests"]))
    folders = [find_bundle(path).absolute() for path in given]
    return Teacher(tuple(map(str, folders)), tuple(files.sha256_file(folder / MODEL_JSON) for folder in folders))


def targets(
    teacher: Teacher,
    splits: Splits,
    views: Sequence[str],
    recipe: Recipe,
    folder: Path,
    progress: Progress,
    recorded: Mapping[str, Any] | None = None,
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """What the teacher answers for each view of each image, (V, N, K), softened by the recipe's temperature; and what
    `data.json` records of it. Of a drawn view it is asked for the picture that was drawn: a drawing shows the same
    garment, and no teacher has seen one. What is none of the classes is each of them alike.

    Computed once, from cached features, and kept in `folder`: who goes on with a run learns from the very same
    numbers. recorded: what an earlier start of the run recorded. Raises AttireError where a bundle is not the one that
    was named or has other classes than the data, or where the numbers are no longer those that were recorded.
    """
    data = splits.data
    path, shape = folder / _FILE, (len(views), len(data), len(data.classes))
    if (found := _kept(path, shape)) is None:
        taught = _members(teacher, splits, recipe)
        asked = dict.fromkeys(_shown(view) for view in views if view != OUTLIER)
        told = {view: _answers(taught, data, view, progress) for view in asked}
        told[OUTLIER] = np.full(shape[1:], 1 / shape[2], np.float32)
        found = np.stack([told[_shown(view)] for view in views])
        with files.sealed_file(path) as file:
            np.lib.format.write_array(cast(IO[bytes], file), found, allow_pickle=False)
    digest = files.sha256(found.tobytes())
    if recorded and recorded.get("targets") != digest:
        raise AttireError(path, "lost, and made again it is not what the run began with", do="start a new run")
    return _soften(found, recipe.distill_temperature), {**teacher.to_json(), "targets": digest}


def _shown(view: str) -> str:
    """The view of the picture that this one was drawn from; of others the view itself."""
    return {SYNTHETIC_DRAWING: "plain", flipped(SYNTHETIC_DRAWING): "flip"}.get(view, view)


def _kept(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """What `targets` wrote; None where there is nothing sound of this shape, and it is then computed again."""
    if not path.exists() or not files.has_valid_seal(path):
        return None
    try:
        found = np.lib.format.read_array(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except ValueError:
        return None
    return found if found.shape == shape and found.dtype == np.float32 else None


def _members(teacher: Teacher, splits: Splits, recipe: Recipe) -> list[Classifier]:
    found, data = [], splits.data
    for folder, digest in zip(map(Path, teacher.bundles), teacher.digests, strict=True):
        if (now := files.sha256_file(find_bundle(folder) / MODEL_JSON)) != digest:
            what = f"not the teacher that was named: digest {now[:12]}, expected {digest[:12]}"
            raise AttireError(folder / MODEL_JSON, what, do="start a new run with --teacher")
        member = load_bundle(folder)
        if member.classes != data.classes:
            raise AttireError(folder, f"its classes are not those of {data.source}", do="choose another teacher")
        _check_split(folder, member.metadata, splits, recipe)
        found.append(member)
    return found


def _check_split(folder: Path, facts: Mapping[str, Any], splits: Splits, recipe: Recipe) -> None:
    """A teacher that trained on the student's validation or test rows hands their labels on: a warning.

    Told by what decides the division: the recipe's fields, the data set that test rows come from, and their number.
    """
    taught, own = facts.get("recipe", {}), recipe.to_json()
    told = [f"{name} {taught.get(name)} there, {own[name]} here" for name in _SPLIT if taught.get(name) != own[name]]
    tested = (facts.get("test_digest"), facts.get("test", {}).get("n"))
    if tested != (splits.test_data.image_digest, len(splits.test_rows)):
        told.append("tested on other images")
    if told:
        what = f"{folder}: this teacher may have trained on this run's validation or test rows ({', '.join(told)})"
        warnings.warn(f"{what}; what they measure may be too good", AttireWarning, stacklevel=2)


def _answers(members: Sequence[Classifier], data: ImageDataset, view: str, progress: Progress) -> NDArray[np.float32]:
    """Mean of the members' calibrated probabilities (N, K) of all images in this view."""
    found = [cached_probabilities(member, data, (view,), progress=progress) for member in members]
    return np.asarray(np.mean(found, axis=0), np.float32)


def _soften(probabilities: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """softmax(ln p / T) over the last axis."""
    raised = probabilities ** np.float32(1 / temperature)
    return np.asarray(raised / raised.sum(-1, keepdims=True), np.float32)


def describe(teacher: Teacher, recipe: Recipe) -> str:
    count = len(teacher.bundles)
    who = "one bundle" if count == 1 else f"{count} bundles averaged"
    return f"{who}: {100 * recipe.distill_weight:.0f} % of the loss, softened at {recipe.distill_temperature:g}"
