"""A bundle, what `attire export` made of it, or several bundles as one, measured on labelled images."""

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attire.data.dataset import ImageDataset, Part
from attire.data.loading import load_dataset
from attire.errors import AttireError, UsageError, one_line
from attire.evaluation import run_result
from attire.evaluation.compare import Pair, paired
from attire.evaluation.metrics import evaluate
from attire.features.views import answer_views
from attire.inference.classifier import load_bundle
from attire.inference.ensemble import KIND, Ensemble, cached_probabilities, mean, open_ensemble
from attire.inference.runtimes import Exported, format_of, load_export
from attire.model import devices
from attire.progress import NoProgress, Progress, in_parts
from attire.recipes import BACKENDS, MOST_VIEWS
from attire.storage import memory, url_copies


def evaluate_bundle(
    bundle: str | Path,
    data: str | Path | None = None,
    part: Part = "test",
    classes: Sequence[str] | None = None,
    backend: str = "torch",
    device: str = "auto",
    progress: Progress | None = None,
    views: int | None = None,
) -> run_result.RunResult:
    """Measure a bundle, its features taken from the cache where it has them, or an exported file in its own runtime.

    data: as for `train`; None is the official set, of which `part` is read. views: how many of each image are averaged,
    None for the bundle's own number; the temperature stays the bundle's. Raises AttireError where the data's classes
    are not the bundle's, UsageError where an exported file, which holds its views, is to average others.
    """
    began, progress, names = time.perf_counter(), progress or NoProgress(), _views_of(views)
    if backend not in BACKENDS:
        raise UsageError("--backend", f"expected torch, openvino or openvino-int8, found {backend!r}")
    model = load_export(bundle) if format_of(Path(bundle)) else load_bundle(bundle, device)
    url_copies.bring(data, progress=progress.advance)
    asked = _EvaluationRequest(data, part, classes, device, views)
    labelled = asked.load(model.classes)
    if isinstance(model, Exported):
        if names:
            raise UsageError("--views", "an exported file holds its own", do="measure the bundle it was made of")
        probabilities, facts, how = _run_export(model, labelled, progress), model.facts["facts"], model.format
        count = int(model.facts["architecture"].get("tta", 1))
    else:
        names = names or model.architecture.views
        probabilities = cached_probabilities(model, labelled, names, backend, progress)
        facts, how, count = model.facts, backend, len(names)
    config = {"bundle": str(bundle), "backend": how, "views": count}
    return asked.result(probabilities, labelled, facts, asked.command("evaluate", [bundle]), config, began)


@dataclass(frozen=True)
class _EvaluationRequest:
    """What something is to be measured on, and how; `views` as the command line has it."""

    data: str | Path | None
    part: Part
    classes: Sequence[str] | None
    device: str
    views: int | None

    def load(self, classes: Sequence[str]) -> ImageDataset:
        """The labelled images. Raises AttireError where they are not of these classes."""
        found = load_dataset(self.data, part=self.part, classes=self.classes or (classes if self.data else None))
        memory.keep_freed()
        if found.classes != tuple(classes):
            raise AttireError(found.source, f"its classes are not the bundle's ({', '.join(classes)})")
        return found

    def command(self, name: str, models: Sequence[str | Path]) -> str:
        parts = ["attire", name, *map(str, models), *(["--data", str(self.data)] if self.data else [])]
        return shlex.join([*parts, *(["--views", str(self.views)] if self.views else [])])

    def result(
        self,
        probabilities: NDArray[np.floating[Any]],
        labelled: ImageDataset,
        facts: Mapping[str, Any],
        command: str,
        config: Mapping[str, Any],
        began: float,
    ) -> run_result.RunResult:
        """Every figure of these probabilities (n, K). facts: a bundle's; config: what measured, for config.json."""
        recipe, where = facts.get("recipe", {}), None if self.data is None else str(self.data)
        choice = {"data": where, "part": self.part, "classes": None if self.classes is None else list(self.classes)}
        backend = {"backend": config["backend"]} if "backend" in config else {}
        return run_result.RunResult(
            title=f"{facts.get('name', 'bundle')}, measured on {labelled.source}",
            recipe=str(recipe.get("name", "unknown")),
            seed=int(recipe.get("seed", 0)),
            command=command,
            test=evaluate(probabilities, labelled.labels, labelled.classes),
            predictions=run_result.predictions(labelled.labels, probabilities, labelled.images),
            seconds={"total": time.perf_counter() - began},
            config={"schema": 1, **config, "data": choice},
            environment={**devices.environment(devices.choose_device(self.device)), **backend},
            data={"name": labelled.source, "rows": {"test": len(labelled)}, "test": labelled.describe()},
        )


def _views_of(count: int | None) -> tuple[str, ...]:
    """Names of so many views; none for None."""
    if count is not None and not 1 <= count <= MOST_VIEWS:
        raise UsageError("--views", f"expected 1 to {MOST_VIEWS}, found {count}")
    return answer_views(count or 0)


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
        rows = zip(self.ensemble.to_json(), self.members, strict=True)
        pair = {**asdict(self.pair), "difference": self.pair.difference.to_json(), "text": str(self.pair)}
        members = [{**about, **member.test.to_json()} for about, member in rows]
        return {**run_result.metrics(self.result), "pair": pair, "members": members}


def evaluate_ensemble(
    what: Sequence[str | Path],
    data: str | Path | None = None,
    part: Part = "test",
    classes: Sequence[str] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    views: int | None = None,
) -> _EnsembleEvaluation:
    """Measure several bundles or runs, or the file that names them, as one model that averages their probabilities.

    Features come from the cache, and members that share a backbone share them. The rest as for `evaluate_bundle`.
    """
    began, names, found = time.perf_counter(), _views_of(views), open_ensemble(what, device)
    asked = _EvaluationRequest(data, part, classes, device, views)
    url_copies.bring(data, progress=(progress or NoProgress()).advance)
    labelled, members, parts = asked.load(found.classes), [], []
    for folder, member in zip(found.bundles, found.members, strict=True):
        own, start = names or member.architecture.views, time.perf_counter()
        parts.append(cached_probabilities(member, labelled, own, progress=progress))
        about = {"bundle": str(folder), "views": len(own)}
        alone = asked.command("evaluate", [folder])
        members.append(asked.result(parts[-1], labelled, member.facts, alone, about, start))
    about = {"ensemble": found.to_json(), "views": sum(member.config["views"] for member in members)}
    facts = {"name": f"Ensemble of {len(members)} bundles", "recipe": {"name": KIND}}
    whole = asked.result(mean(parts), labelled, facts, asked.command(KIND, what), about, began)
    best = max(range(len(members)), key=lambda i: members[i].test.correct)
    pair = paired([one_line(str(found.bundles[best])), "the ensemble"], [members[best], whole], 0, 1)
    return _EnsembleEvaluation(found, whole, tuple(members), pair)


def _run_export(exported: Exported, data: ImageDataset, progress: Progress) -> NDArray[np.floating[Any]]:
    """Calibrated probabilities (n, K)."""
    return np.concatenate([exported.predict_proba(part) for part in in_parts(data.images, 1024, "Images", progress)])
