"""A bundle, or what `attire export` made of it, measured on labelled images."""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from attire import calibration, devices, features, files, results, training
from attire.classifier import Classifier, load_bundle
from attire.data import ImageDataset, Part, load_dataset
from attire.errors import AttireError, UsageError
from attire.evaluation import evaluate
from attire.features import FeatureSpec
from attire.recipes import BACKENDS
from attire.runtimes import Exported, format_of, load_export
from attire.sources import CachedSource
from attire.stages import open_trunk
from attire.watching import Silent, Watcher


def evaluate_bundle(
    bundle: str | Path,
    data: str | Path | None = None,
    part: Part = "test",
    classes: Sequence[str] | None = None,
    backend: str = "torch",
    device: str = "auto",
    watcher: Watcher | None = None,
) -> results.RunResult:
    """Measure a bundle, its features taken from the cache where it has them, or an exported file in its own runtime.

    data: as for `train`; None is the official set, of which `part` is read. Raises AttireError where the data's
    classes are not the bundle's.
    """
    began, watcher = time.perf_counter(), watcher or Silent()
    if backend not in BACKENDS:
        raise UsageError("--backend", f"expected {' or '.join(BACKENDS)}, found {backend!r}")
    model = load_export(bundle) if format_of(Path(bundle)) else load_bundle(bundle, device)
    labelled = load_dataset(data, part=part, classes=classes or (model.classes if data else None))
    devices.keep_freed_memory()
    if labelled.classes != model.classes:
        raise AttireError(labelled.source, f"its classes are not the bundle's ({', '.join(model.classes)})")
    if isinstance(model, Exported):
        probabilities, facts, how = run_export(model, labelled, watcher), model.facts["facts"], model.format
    else:
        probabilities, facts, how = run_bundle(model, labelled, backend, watcher), model.facts, backend
    where = None if data is None else str(data)
    choice = {"data": where, "part": part, "classes": None if classes is None else list(classes)}
    recipe = facts.get("recipe", {})
    return results.RunResult(
        title=f"{facts.get('name', 'bundle')}, measured on {labelled.source}",
        recipe=str(recipe.get("name", "unknown")),
        seed=int(recipe.get("seed", 0)),
        command=f"attire evaluate {shlex.quote(str(bundle))}" + (f" --data {shlex.quote(where)}" if where else ""),
        test=evaluate(probabilities, labelled.labels, labelled.classes),
        predictions=results.predictions(labelled.labels, probabilities, labelled.images),
        seconds={"total": time.perf_counter() - began},
        config={"schema": 1, "bundle": str(bundle), "backend": how, "data": choice},
        environment={**devices.environment(devices.choose_device(device)), "backend": how},
        data={"name": labelled.source, "rows": {"test": len(labelled)}, "test": labelled.describe()},
    )


def run_bundle(classifier: Classifier, data: ImageDataset, backend: str, watcher: Watcher) -> NDArray[np.floating[Any]]:
    """Calibrated probabilities (n, K)."""
    source = CachedSource(bundle_features(classifier, data, backend, watcher))
    head = cast(nn.Sequential, classifier.model.classifier)
    logits = training.predict_logits(head, source, np.arange(len(data))).numpy()
    return calibration.softmax(logits, classifier.temperature)


def run_export(exported: Exported, data: ImageDataset, watcher: Watcher) -> NDArray[np.floating[Any]]:
    """Calibrated probabilities (n, K)."""
    parts = []
    for start in range(0, len(data), 1024):
        parts.append(exported.predict_proba(data.images[start : start + 1024]))
        watcher.advance("Images", min(start + 1024, len(data)), len(data))
    return np.concatenate(parts)


def bundle_features(classifier: Classifier, data: ImageDataset, backend: str, watcher: Watcher) -> features.Features:
    """Features of all images by the bundle's own trunk."""
    about, model = classifier.architecture, classifier.model
    tensors = {name: value.float().cpu().numpy() for name, value in model.features.state_dict().items()}
    whole = {f"features.{name}": value for name, value in tensors.items()}
    digest = classifier.facts.get("trunk", "") or files.sha256(b"".join(v.tobytes() for v in whole.values()))
    precision = devices.choose_precision("auto", classifier.device) if backend == "torch" else "int8"
    backend = devices.choose_backend(backend, precision, classifier.device)
    spec = FeatureSpec(about.freeze_to, about.image_size, about.pool, digest, precision, backend=backend)

    def load_trunk() -> features.Trunk:
        return open_trunk(model, spec, classifier.device)

    def progress(done: int, total: int) -> None:
        watcher.advance("Features", done, total)

    return features.extract(data.images, data.image_digest, spec, load_trunk, progress)
