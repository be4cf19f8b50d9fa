"""A bundle, what `attire export` made of it, or several bundles as one, measured on labelled images."""

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attire.data.dataset import ImageDataset, SplitName
from attire.data.loading import load_dataset
from attire.errors import AttireError, UsageError, one_line
from attire.evaluation import run_result
from attire.evaluation.compare import Pair
from attire.evaluation.metrics import evaluate
from attire.features.views import tta_views
from attire.inference.classifier import load_bundle
from attire.inference.ensemble import Ensemble, cached_probabilities, open_ensemble
from attire.inference.runtimes import ExportedModel, format_of, load_export
from attire.model import devices
from attire.progress import NoProgress, Progress, in_batches
from attire.recipes import BACKENDS, MOST_VIEWS
from attire.storage import memory, url_copies


def evaluate_bundle(
    bundle: str | Path,
    data: str | Path | None = None,
    part: SplitName = "test",
    classes: Sequence[str] | None = None,
    backend: str = "torch",
    device: str = "auto",
    progress: Progress | None = None,
    tta: int | None = None,
) -> run_result.RunResult:
    """Measure a bundle, its features taken from the cache where it has them, or an exported file in its own runtime.

    data: as for `train`; None is the official set, of which `part` is read. tta: how many views of each image are
    averaged, None for the bundle's own number; the temperature stays the bundle's. Raises AttireError where the data's
    classes are not the bundle's, UsageError where an exported file, which holds its views, is to average others.
    """
    began, progress, names = time.perf_counter(), progress or NoProgress(), _view_names(tta)
    if backend not in BACKENDS:
        raise UsageError("--backend", f"expected torch, openvino or openvino-int8, found {backend!r}")
    model = load_export(bundle) if format_of(Path(bundle)) else load_bundle(bundle, device)
    url_copies.prefetch(data, progress=progress.advance)
    request = _EvaluationRequest(data, part, classes, device, tta)
    labelled = request.load(model.classes)
    if isinstance(model, ExportedModel):
        if names:
            raise UsageError("--tta", "an exported file holds its own", do="measure the bundle it was made of")
        parts = in_batches(labelled.images, 1024, "Images", progress)
        probabilities: NDArray[Any] = np.concatenate([model.predict_proba(part) for part in parts])
        metadata, backend = model.metadata["bundle_metadata"], model.format
        count = int(model.metadata["architecture"].get("tta", 1))
    else:
        names = names or model.architecture.views
        probabilities = cached_probabilities(model, labelled, names, backend, progress)
        metadata, count = model.metadata, len(names)
    config = {"bundle": str(bundle), "backend": backend, "tta": count}
    return request.result(probabilities, labelled, metadata, request.command("evaluate", [bundle]), config, began)


@dataclass(frozen=True)
class _EvaluationRequest:
    """What a model is to be measured on, and how; `tta` as the command line has it."""

    data: str | Path | None
    part: SplitName
    classes: Sequence[str] | None
    device: str
    tta: int | None

    def load(self, classes: Sequence[str]) -> ImageDataset:
        """The labelled images. Raises AttireError where they are not of these classes."""
        labelled = load_dataset(self.data, part=self.part, classes=self.classes or (classes if self.data else None))
        memory.keep_freed_memory()
        if labelled.classes != tuple(classes):
            raise AttireError(labelled.source, f"its classes are not the bundle's ({', '.join(classes)})")
        return labelled

    def command(self, name: str, models: Sequence[str | Path]) -> str:
        parts = ["attire", name, *map(str, models), *(["--data", str(self.data)] if self.data else [])]
        return shlex.join([*parts, *(["--tta", str(self.tta)] if self.tta else [])])

    def result(
        self,
        probabilities: NDArray[np.floating[Any]],
        labelled: ImageDataset,
        metadata: Mapping[str, Any],
        command: str,
        config: Mapping[str, Any],
        began: float,
    ) -> run_result.RunResult:
        """Every figure of these probabilities (n, K). metadata: a bundle's; config: for config.json."""
        recipe, where = metadata.get("recipe", {}), None if self.data is None else str(self.data)
        choice = {"data": where, "part": self.part, "classes": None if self.classes is None else list(self.classes)}
        backend = {"backend": config["backend"]} if "backend" in config else {}
        return run_result.RunResult(
            title=f"{metadata.get('name', 'bundle')}, measured on {labelled.source}",
            recipe=str(recipe.get("name", "unknown")),
            seed=int(recipe.get("seed", 0)),
            command=command,
            test=evaluate(probabilities, labelled.labels, labelled.classes),
            predictions=run_result.Predictions.of_test_set(labelled.labels, probabilities, labelled.images),
            seconds={"total": time.perf_counter() - began},
            config={"schema": 1, **config, "data": choice},
            environment={**devices.environment(devices.choose_device(self.device)), **backend},
            data={"name": labelled.source, "rows": {"test": len(labelled)}, "test": labelled.describe()},
        )


def _view_names(count: int | None) -> tuple[str, ...]:
    """Names of the first `count` views of test-time augmentation; none for None."""
    if count is not None and not 1 <= count <= MOST_VIEWS:
        raise UsageError("--tta", f"expected 1 to {MOST_VIEWS}, found {count}")
    return tta_views(count or 0)


@dataclass(frozen=True)
class _EnsembleEvaluation:
    """An ensemble measured as one model, each of its members alone, and the ensemble against the best of those.

    The best member is picked on these same images, which favours it: what the ensemble gains is rather more.
    """

    ensemble: Ensemble
    result: run_result.RunResult
    members: tuple[run_result.RunResult, ...]
    pair: Pair

    @property
    def names(self) -> list[str]:
        return ["ensemble", *(one_line(str(folder)) for folder in self.ensemble.bundles)]

    def to_json(self) -> dict[str, Any]:
        pairs = zip(self.ensemble.to_json(), self.members, strict=True)
        members = [{**about, **member.test.to_json()} for about, member in pairs]
        return {**self.result.metrics(), "pair": self.pair.to_json(), "members": members}


def evaluate_ensemble(
    what: Sequence[str | Path],
    data: str | Path | None = None,
    part: SplitName = "test",
    classes: Sequence[str] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    tta: int | None = None,
) -> _EnsembleEvaluation:
    """Measure several bundles or runs, or the file that names them, as one model that averages their probabilities.

    Features come from the cache, and members that share a backbone share them. The rest as for `evaluate_bundle`.
    """
    began, names, ensemble = time.perf_counter(), _view_names(tta), open_ensemble(what, device)
    request = _EvaluationRequest(data, part, classes, device, tta)
    url_copies.prefetch(data, progress=(progress or NoProgress()).advance)
    labelled, members, parts = request.load(ensemble.classes), [], []
    for folder, member in zip(ensemble.bundles, ensemble.members, strict=True):
        own, start = names or member.architecture.views, time.perf_counter()
        parts.append(cached_probabilities(member, labelled, own, progress=progress))
        config: dict[str, Any] = {"bundle": str(folder), "tta": len(own)}
        command = request.command("evaluate", [folder])
        members.append(request.result(parts[-1], labelled, member.metadata, command, config, start))
    config = {"ensemble": ensemble.to_json(), "tta": sum(member.config["tta"] for member in members)}
    metadata = {"name": f"Ensemble of {len(members)} bundles", "recipe": {"name": "ensemble"}}
    command = request.command("ensemble", what)
    whole = request.result(ensemble.mean(parts), labelled, metadata, command, config, began)
    best = max(range(len(members)), key=lambda i: members[i].test.correct)
    best_name = one_line(str(ensemble.bundles[best]))
    pair = Pair.of(best_name, "the ensemble", members[best].predictions, whole.predictions)
    return _EnsembleEvaluation(ensemble, whole, tuple(members), pair)
