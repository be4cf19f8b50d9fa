"""Which pictures a bundle calls none of its classes, at the threshold that rejects 5 % of validation garments.

    pip install scikit-image                        (its photographs are among the strangers)
    attire train --out runs/fast
    python research/reject.py runs/fast/model

Three tables: methods, on the strangers and altered validation garments that the method was chosen by; the bundle as it
is, on strangers of other kinds and on test garments; and classes held out, two at a time. Fixed seeds.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from strangers import ALTERED, SETS, Images
from torch import Tensor

from attire import recipes
from attire.blocks import CHANNELS
from attire.data.dataset import ImageDataset
from attire.data.loading import load_dataset
from attire.evaluation.intervals import wilson
from attire.features import cache
from attire.features.cache import FeatureSpec
from attire.features.sources import CachedSource
from attire.inference import out_of_distribution
from attire.inference.classifier import Classifier, load_bundle
from attire.model import devices, vgg
from attire.training.experiment import validation_rows

Score = Callable[[Tensor], Tensor]  # (n, D) features to (n,), higher for what is stranger
PAIRS = ((5, 8), (1, 9), (0, 6), (3, 7), (2, 4))  # every class is held out once
COMPONENTS, NEIGHBOURS, ALTERED_ROWS = 256, 50, 500


def main(bundle: str) -> None:
    classifier = load_bundle(bundle, "cpu")
    print(f"{bundle}; {devices.processor_name()}, {os.cpu_count()} cores, torch {torch.__version__}\n")
    data, test = load_dataset(part="train"), load_dataset(part="test")
    recipe = recipes.from_json(classifier.metadata["recipe"])
    train, val = validation_rows(data, np.arange(len(data)), recipe)
    source = CachedSource([cached(classifier, data, view) for view in ("plain", "flip")[: 1 + recipe.flips]])
    rows = out_of_distribution.split_calibration_rows(train, val, recipe.split_seed)
    choose(classifier, data, source, rows)
    report(classifier, test)
    tested = CachedSource([cached(classifier, test, "plain")])
    hold_out(classifier, (data, source), (test, tested), rows)


def make_spec(classifier: Classifier) -> FeatureSpec:
    about = classifier.architecture
    precision = devices.choose_precision("auto", classifier.device)
    return FeatureSpec(about.freeze_to, about.image_size, about.pool, classifier.metadata["backbone_digest"], precision)


def cached(classifier: Classifier, data: ImageDataset, view: str) -> cache.Features:
    spec = replace(make_spec(classifier), view=view)
    return cache.extract(data.images, data.image_digest, spec, lambda: make_backbone(classifier))


def make_backbone(classifier: Classifier) -> cache.FeatureExtractor:
    return vgg.Backbone(classifier.model, classifier.device, make_spec(classifier).precision)


def fresh(classifier: Classifier, images: Images) -> Tensor:
    """Features (n, D) of pictures that no cache has."""
    spec, backbone = make_spec(classifier), make_backbone(classifier)
    parts = [cache.compute_features(images[i : i + 250], spec, backbone) for i in range(0, len(images), 250)]
    return torch.from_numpy(np.concatenate(parts)).float()


def all_rows(source: CachedSource, rows: NDArray[np.int64], mirrored: bool = False) -> Tensor:
    views = np.full(len(rows), mirrored)
    return torch.cat(list(source.batches(rows, len(rows), views)))


def altered(images: Images, name: str) -> Images:
    rng = np.random.default_rng(list(ALTERED).index(name))
    return np.stack([ALTERED[name](image, rng) for image in images])


def sets(part: str) -> dict[str, Images]:
    return {name: make(np.random.default_rng(i)) for i, (name, make) in enumerate(SETS[part].items(), 1)}


def choose(
    classifier: Classifier, data: ImageDataset, source: CachedSource, rows: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> None:
    """Every method on what the method was chosen by."""
    fitted, held = rows
    strangers = {name: fresh(classifier, images) for name, images in sets("choosing").items()}
    garments = data.images[held[:ALTERED_ROWS]]
    changed = torch.cat([fresh(classifier, altered(garments, name)) for name in ALTERED])
    scores = methods(classifier, data, source, fitted)
    validation = all_rows(source, held)
    print(f"Choosing: % rejected. {', '.join(strangers)} (n = 1,000 each); validation garments altered in")
    print(f"{len(ALTERED)} ways (n = {len(changed):,}).\n")
    for name, score in scores.items():
        threshold = out_of_distribution._find_threshold(score(validation).numpy()) or np.inf
        shares = [(score(x) > threshold).float().mean().item() for x in (*strangers.values(), changed)]
        print(f"{name:40}" + "".join(f"{100 * share:6.1f}" for share in shares), flush=True)


def methods(
    classifier: Classifier, data: ImageDataset, source: CachedSource, rows: NDArray[np.int64]
) -> dict[str, Score]:
    views = [all_rows(source, rows, mirrored) for mirrored in (False, True)[: len(source.views)]]
    x, labels = torch.cat(views), torch.from_numpy(np.tile(data.labels[rows], len(views)))
    channels, head = CHANNELS[classifier.architecture.freeze_to], classifier.model.classifier
    hot = classifier.temperature

    def logits(rows: Tensor) -> Tensor:
        with torch.inference_mode():
            return head(rows) / hot

    def hidden(rows: Tensor) -> Tensor:
        with torch.inference_mode():
            return head[:2](rows)

    def mean(rows: Tensor) -> Tensor:
        return rows.view(len(rows), channels, -1).mean(2)

    def moments(rows: Tensor) -> Tensor:
        maps = rows.view(len(rows), channels, -1)
        return torch.cat([maps.mean(2), maps.std(2, correction=0)], 1)

    def root(rows: Tensor) -> Tensor:
        return out_of_distribution.pool_features(rows, channels)

    return {
        "max softmax": lambda rows: -logits(rows).softmax(1).amax(1),
        "max logit": lambda rows: -logits(rows).amax(1),
        "energy": lambda rows: -logits(rows).logsumexp(1),
        "Mahalanobis, hidden layer": mahalanobis(hidden, x, labels),
        "Mahalanobis, channel means": mahalanobis(mean, x, labels),
        "Mahalanobis, means and deviations": mahalanobis(moments, x, labels),
        "Mahalanobis, roots of both": mahalanobis(lambda rows: moments(rows).sqrt(), x, labels),
        "Mahalanobis, logarithms of both": mahalanobis(lambda rows: (moments(rows) + 0.05).log(), x, labels),
        "Mahalanobis, roots of means, shrunk 0.01": mahalanobis(root, x, labels, 0.01),
        "Mahalanobis, roots of means, one centre": mahalanobis(root, x, torch.zeros_like(labels)),
        "Mahalanobis, roots of means, plain only": mahalanobis(root, views[0], labels[: len(rows)]),
        "Mahalanobis, roots of means (kept)": mahalanobis(root, x, labels),
        "residual of 256 components, features": residual(lambda rows: rows, x),
        "residual of 64 components, roots": residual(root, x, 64),
        "50th neighbour, features": neighbours(lambda rows: rows, x),
        "50th neighbour, roots of means": neighbours(root, x),
    }


def mahalanobis(describe: Score, x: Tensor, labels: Tensor, shrinkage: float = out_of_distribution._SHRINKAGE) -> Score:
    fitted = out_of_distribution._fit_classes(describe(x), labels, shrinkage)
    return lambda rows: out_of_distribution.mahalanobis_distance(describe(rows), *fitted)


def residual(describe: Score, x: Tensor, components: int = COMPONENTS) -> Score:
    """What principal components leave of a row (as in ViM, Wang et al. 2022), on scaled values."""
    table = describe(x)
    centre, scale = table.mean(0), table.std(0) + 0.05 * table.std(0).mean()
    _, _, axes = torch.svd_lowrank((table - centre) / scale, components, niter=2)

    def score(rows: Tensor) -> Tensor:
        z = (describe(rows) - centre) / scale
        return (z - z @ axes @ axes.T).norm(dim=1)

    return score


def neighbours(describe: Score, x: Tensor) -> Score:
    """Distance to the 50th nearest training row, rows of unit length (Sun et al. 2022)."""
    table = torch.nn.functional.normalize(describe(x))

    def score(rows: Tensor) -> Tensor:
        z = torch.nn.functional.normalize(describe(rows))
        parts = [torch.cdist(part, table).topk(NEIGHBOURS, largest=False).values[:, -1] for part in z.split(500)]
        return torch.cat(parts)

    return score


def report(classifier: Classifier, test: ImageDataset) -> None:
    """The bundle as it ships, on pictures that nothing was chosen by."""
    ood_detector = classifier.ood_detector
    if ood_detector is None:
        raise SystemExit("this bundle has no OODDetector")

    def line(name: str, images: Images) -> None:
        found = classifier.distances(images) > ood_detector.threshold
        print(f"{name:40}{wilson(int(found.sum()), len(found)).percent()}", flush=True)

    print(
        f"\nReporting: out-of-distribution, Wilson 95 %; threshold {ood_detector.threshold:.2f}"
        f" from {ood_detector.calibration_rows:,} rows\n"
    )
    line("test garments (false positives)", test.images)
    for name, images in sets("reporting").items():
        line(name, images)
    print()
    for name in ALTERED:
        line(f"test garments, {name}", altered(test.images[:ALTERED_ROWS], name))


def certain(rows: NDArray[np.int64], view: int) -> NDArray[np.float32]:
    """Probabilities (n, 1) for a distance that no answer's doubt adds to."""
    return np.ones((len(rows), 1), np.float32)


def hold_out(
    classifier: Classifier,
    training: tuple[ImageDataset, CachedSource],
    testing: tuple[ImageDataset, CachedSource],
    rows: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> None:
    """Fitted on eight classes, with their own threshold; the two others are strangers."""
    (data, source), (test, tested) = training, testing
    print("\nHeld-out classes: rejected, Wilson 95 %\n")
    for pair in PAIRS:
        known = tuple(part[~np.isin(data.labels[part], pair)] for part in rows)
        channels = CHANNELS[classifier.architecture.freeze_to]
        ood_detector = out_of_distribution.fit_detector(
            source,
            data.labels,
            known[0],
            known[1],
            channels=channels,
            fit_views=range(len(source.views)),
            calibration_views=(0,),
        )
        assert ood_detector is not None
        for name, inside in ((" and ".join(data.classes[c] for c in pair), True), ("  the eight others", False)):
            chosen = np.flatnonzero(np.isin(test.labels, pair) == inside)
            told = ood_detector.evaluate(tested, chosen, certain(chosen, 0))["test"]
            share = wilson(round(told["value"] * told["n"]), told["n"])
            print(f"{name:40}{share.percent()}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
