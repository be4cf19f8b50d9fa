"""Which heat map and which feature space explain an answer best, measured on a bundle and the official test images.

    pip install captum                                (BSD-3; only this benchmark needs it)
    attire train --out runs/fast
    python research/explain.py runs/fast/model heat
    python research/explain.py runs/fast/model neighbours
    python research/explain.py runs/fast/model time

heat: deletion and insertion (RISE, Petsiuk et al. 2018) of 28x28 heat maps. Pixels are taken in the order of their
heat, 56 at a time: deletion blackens them in the picture, insertion puts them into the blurred picture; the figure is
the mean over the steps of the probability of the class that the model answered for the whole picture. A good map has a
low deletion and a high insertion. Random, a centred blob and the picture's own brightness stand beside the methods.

neighbours: whether the nearest training images have the class that the model answers, and the true one.

time: of `attire.explain.explain`, a picture after the other. Fixed seeds.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from reject import all_rows, cached
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from attire import recipes
from attire.blocks import CHANNELS
from attire.data.dataset import ImageDataset, split_indices
from attire.data.loading import load_dataset
from attire.evaluation.intervals import wilson
from attire.features.sources import CachedSource
from attire.inference import out_of_distribution
from attire.inference.classifier import Classifier, load_bundle
from attire.inference.explain import explain
from attire.model import devices, vgg
from attire.training.experiment import validation_rows

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from measuring import seconds, spread, told

Image = NDArray[np.uint8]  # (28, 28)
Heat = NDArray[np.floating]  # (28, 28), any scale
Method = Callable[[Image, int], Heat]  # of the class with this number
STEP, BLUR = 56, 3.0  # pixels a step; px, Gaussian: nothing finer than a sleeve is left
ROUNDS, BATCH = 7, 1500


class Whole(nn.Module):
    """(n, 1, 28, 28) float32 grey of 0..255 to logits (n, K), differentiable: `vgg.preprocess` and the network."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.model, self.size = classifier.model, classifier.architecture.image_size

    def forward(self, grey: Tensor) -> Tensor:
        x = F.interpolate(grey / 255, size=(self.size, self.size), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (vgg.IMAGENET_MEAN, vgg.IMAGENET_STD))
        found: Tensor = self.model((x.expand(-1, 3, -1, -1) - mean) / std)
        return found


def as_grey(image: Image) -> Tensor:
    return torch.from_numpy(image.copy()).float()[None, None]


def resized(heat: Tensor) -> Heat:
    """(1, 1, h, w) at the picture's own size."""
    found = F.interpolate(heat.detach(), size=(28, 28), mode="bilinear", align_corners=False)
    return found[0, 0].numpy()


def grad_cam(classifier: Classifier, layer: int) -> Method:
    from captum.attr import LayerGradCam

    whole = Whole(classifier)
    method = LayerGradCam(whole, classifier.model.features[layer])
    return lambda image, k: resized(method.attribute(as_grey(image), k, relu_attributions=True))


def grad_x_activation(classifier: Classifier, layer: int, smooth: float = 0.0) -> Method:
    from captum.attr import LayerGradientXActivation

    method = LayerGradientXActivation(Whole(classifier), classifier.model.features[layer])

    def heat(image: Image, k: int) -> Heat:
        found = resized(method.attribute(as_grey(image), k).sum(1, keepdim=True))
        return gaussian_filter(found, smooth) if smooth else found

    return heat


def integrated(classifier: Classifier, steps: int, smooth: float) -> Method:
    """From black; the signed attributions, smoothed."""
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(Whole(classifier))

    def heat(image: Image, k: int) -> Heat:
        black = torch.zeros(1, 1, 28, 28)
        found = method.attribute(as_grey(image), black, k, n_steps=steps, internal_batch_size=32)
        return gaussian_filter(found[0, 0].numpy(), smooth)

    return heat


def captum_occlusion(classifier: Classifier, side: int, stride: int) -> Method:
    from captum.attr import Occlusion

    method = Occlusion(Whole(classifier))

    def heat(image: Image, k: int) -> Heat:
        with torch.no_grad():
            found = method.attribute(
                as_grey(image), (1, side, side), (1, stride, stride), 0, k, perturbations_per_eval=200
            )
        return found[0, 0].numpy()

    return heat


def occlusion(scorer: "Classifier | Quick", side: int, stride: int, blurred: bool = False, odds: bool = True) -> Method:
    """The mean loss of the class's log odds, or probability, over the squares that cover a pixel."""

    def heat(image: Image, k: int) -> Heat:
        starts = np.arange(stride - side, 28, stride)
        squares = np.zeros((len(starts) ** 2, 28, 28), bool)
        for i, square in enumerate(squares):
            top, left = starts[i // len(starts)], starts[i % len(starts)]
            square[max(0, top) : top + side, max(0, left) : left + side] = True
        fill = gaussian_filter(image, BLUR) if blurred else np.zeros_like(image)
        copies = np.concatenate([image[None], np.where(squares, fill, image)])
        z = scorer.logits(copies)
        score = log_odds(z, k) if odds else (z / scorer.temperature).softmax(1)[:, k]
        loss = (score[0] - score[1:]).numpy()
        return np.tensordot(loss, squares, 1) / squares.sum(0)

    return heat


def log_odds(logits: Tensor, k: int) -> Tensor:
    rest = torch.cat([logits[:, :k], logits[:, k + 1 :]], 1)
    return logits[:, k] - rest.logsumexp(1)


def methods(classifier: Classifier, scorer: "Classifier | Quick") -> dict[str, Callable[[], Method]]:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:28, :28] - 13.5
    relus = [i for i, layer in enumerate(classifier.model.features) if isinstance(layer, nn.ReLU)]
    pools = [i for i, layer in enumerate(classifier.model.features) if isinstance(layer, nn.MaxPool2d)]
    ends = [pool - 1 for pool in pools]  # the last ReLU of each block
    told: dict[str, Callable[[], Method]] = {
        "random": lambda: lambda image, k: rng.random((28, 28)),
        "centred blob": lambda: lambda image, k: np.exp(-(x**2 + y**2) / 2 / 7**2),
        "brightness": lambda: lambda image, k: image.astype(float),
        "Grad-CAM, last convolution": lambda: grad_cam(classifier, relus[-1]),
        "Grad-CAM, last pooling": lambda: grad_cam(classifier, pools[-1]),
    }
    for number, layer in list(enumerate(ends, 1))[::-1]:
        told[f"gradient x activation, block{number}"] = lambda i=layer: grad_x_activation(classifier, i)
    for number in (1, 2):
        name = f"gradient x activation, block{number}, smoothed 2 px"
        told[name] = lambda i=ends[number - 1]: grad_x_activation(classifier, i, 2)
    for steps, smooth in ((4, 2), (8, 2), (8, 3), (32, 2)):
        told[f"integrated gradients, {steps} steps, smoothed {smooth} px"] = lambda a=steps, b=smooth: integrated(
            classifier, a, b
        )
    told["Captum's occlusion, 7 px by 3"] = lambda: captum_occlusion(classifier, 7, 3)
    for side, stride in ((7, 2), (7, 3), (7, 5), (9, 3), (9, 4)):
        told[f"occlusion, {side} px by {stride}"] = lambda a=side, b=stride: occlusion(scorer, a, b)
    told["occlusion, 7 px by 3, blurred"] = lambda: occlusion(scorer, 7, 3, blurred=True)
    told["occlusion, 7 px by 3, probability"] = lambda: occlusion(scorer, 7, 3, odds=False)
    return told


class Quick:
    """A classifier's logits by Winograd's convolutions, on all cores: what the curves take by the hundred thousand."""

    def __init__(self, classifier: Classifier) -> None:
        self.backbone = vgg.Backbone(classifier.model, classifier.device, "fp32", use_winograd=True)
        self.head, self.classes = classifier.model.classifier, len(classifier.classes)
        self.size, self.temperature = classifier.architecture.image_size, classifier.temperature

    def logits(self, images: NDArray[np.uint8]) -> Tensor:
        with torch.inference_mode():
            parts = np.array_split(images, -(-len(images) // BATCH))
            return torch.cat([self.head(self.backbone(vgg.preprocess(part, self.size))) for part in parts])


def altered(image: Image, heat: Heat) -> NDArray[np.uint8]:
    """(30, 28, 28): the steps of deletion, then of insertion."""
    rank = np.empty(784, np.int64)
    rank[np.argsort(-heat.ravel(), kind="stable")] = np.arange(784)
    taken = rank.reshape(28, 28) < np.arange(0, 785, STEP)[:, None, None]  # (15, 28, 28)
    soft = gaussian_filter(image, BLUR)
    return np.concatenate([np.where(taken, 0, image), np.where(taken, image, soft)]).astype(np.uint8)


def areas(quick: Quick, images: NDArray[np.uint8], heats: Sequence[Heat], answers: NDArray[np.int64]) -> NDArray[Any]:
    """Deletion and insertion of each image (n, 2): the areas under its curves, 0..1."""
    copies = np.concatenate([altered(*pair) for pair in zip(images, heats, strict=True)])
    p = (quick.logits(copies) / quick.temperature).softmax(1).numpy().reshape(len(images), 2, -1, quick.classes)
    own = np.take_along_axis(p, answers[:, None, None, None], 3)[..., 0]  # (n, 2, 15)
    return (own[..., 1:] + own[..., :-1]).mean(2) / 2


def interval(values: NDArray[Any]) -> str:
    """Mean and its normal 95 % interval."""
    half = 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return f"{np.mean(values):6.3f} +- {half:.3f}"


def heat(classifier: Classifier, test: ImageDataset, count: int, only: Sequence[str]) -> None:
    _, rows = split_indices(test.labels, count, 0)
    images, quick = test.images[rows], Quick(classifier)
    answers = classifier.predict_proba(images).argmax(1)
    print(f"{count} test images, as many of each class; mean and 95 % interval; median time of {ROUNDS} pictures\n")
    print(f"{'':46}{'deletion':>15}{'insertion':>17}{'difference':>17}{'ms':>8}", flush=True)
    timed = methods(classifier, classifier)
    for name, make in methods(classifier, quick).items():
        if only and name not in only:
            continue
        method = make()
        heats = [method(image, k) for image, k in zip(images, answers.tolist(), strict=True)]
        deletion, insertion = areas(quick, images, heats, answers).T
        own = timed[name]()
        taken = statistics.median(
            [seconds(lambda i=i, m=own: m(images[i], int(answers[i]))) for i in range(ROUNDS)]  # type: ignore[misc]
        )
        figures = "  ".join(map(interval, (deletion, insertion, insertion - deletion)))
        print(f"{name:46}{figures}{1000 * taken:8.1f}", flush=True)


Rows = NDArray[np.int64]
KEPT = "hidden layer, 64 components, unit length"


def neighbours(classifier: Classifier, data: ImageDataset, test: ImageDataset) -> None:
    recipe = recipes.from_json(classifier.metadata["recipe"])
    train, _ = validation_rows(data, np.arange(len(data)), recipe)
    source = CachedSource([cached(classifier, data, "plain")])
    tested = CachedSource([cached(classifier, test, "plain")])
    x = all_rows(tested, np.arange(len(test)))
    with torch.inference_mode():
        answers = classifier.model.classifier(x).argmax(1).numpy()
    print(f"{len(test):,} test images; the model answers {wilson(int((answers == test.labels).sum()), len(test))}\n")
    print(f"{'':42}{'kB':>7}{'5 agree':>9}{'all 5':>8}{'alike':>7}   nearest, then 5 nearest: true class")
    for count in (1000, 2000, 5000, 10_000):
        _, part = split_indices(data.labels[train], count, recipe.split_seed)
        rows = train[part]
        stored = all_rows(source, rows)
        for name, describe in spaces(classifier, stored).items():
            if count == 5000 or name == KEPT:
                with torch.inference_mode():
                    table, queries = describe(stored).half().float(), describe(x).half().float()
                size = count * (784 + 2 * table.shape[1]) / 1000
                compare(f"{count:,}, {name}", size, (table, data, rows), (queries, test, answers))


def spaces(classifier: Classifier, stored: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every one maps features (n, D) to (n, d); fitted on the stored rows."""
    head = classifier.model.classifier[:-1]
    ood_detector, channels = classifier.ood_detector, CHANNELS[classifier.architecture.end]
    assert ood_detector is not None

    def pooled(x: Tensor) -> Tensor:
        return out_of_distribution.pool_features(x, channels)

    def unit(describe: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: F.normalize(describe(x))

    scale = stored.std(0) + 0.05 * stored.std(0).mean()
    return {
        "pooled, whitened as for reject": lambda x: (pooled(x) - ood_detector.centre) @ ood_detector.whiten,
        "pooled, 64 components": components(pooled, stored, 64),
        "features, 64 components": components(lambda x: x / scale, stored, 64),
        "hidden layer": head,
        "hidden layer, unit length": unit(head),
        "hidden layer, 16 components": components(head, stored, 16),
        "hidden layer, 32 components": components(head, stored, 32),
        "hidden layer, 64 components": components(head, stored, 64),
        KEPT: unit(components(head, stored, 64)),
    }


def components(describe: Callable[[Tensor], Tensor], stored: Tensor, count: int) -> Callable[[Tensor], Tensor]:
    with torch.inference_mode():
        z = describe(stored)
        centre = z.mean(0)
        torch.manual_seed(0)
        _, _, axes = torch.pca_lowrank(z - centre, count, center=False, niter=4)
    return lambda x: (describe(x) - centre) @ axes


def compare(
    name: str, size: float, stored: tuple[Tensor, ImageDataset, Rows], asked: tuple[Tensor, ImageDataset, Rows]
) -> None:
    (table, data, rows), (queries, test, answers) = stored, asked
    labels = torch.from_numpy(data.labels[rows])
    near = torch.cat([torch.cdist(part, table).topk(5, largest=False).indices for part in queries.split(1000)])
    found = labels[near]  # (n, 5), nearest first
    votes = F.one_hot(found, len(data.classes)).sum(1).double()
    votes.scatter_add_(1, found[:, :1], torch.full((len(found), 1), 0.5, dtype=torch.double))  # ties: the nearest
    majority = votes.argmax(1).numpy()
    agree = wilson(int((majority == answers).sum()), len(answers))
    whole = float((found == torch.from_numpy(answers)[:, None]).all(1).double().mean())
    a, b = test.images.reshape(len(test), -1).astype(np.float32), data.images[rows[near[:, 0].numpy()]]
    alike = np.abs(a - b.reshape(len(b), -1)).mean()
    first, five = (wilson(int((x == test.labels).sum()), len(test)) for x in (found[:, 0].numpy(), majority))
    told = f"{first.value:.2%} ({first.span()})  {five.value:.2%} ({five.span()})"
    print(f"{name:42}{size:7,.0f}{agree.value:9.2%}{whole:8.1%}{alike:7.1f}   {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("part", choices=("heat", "neighbours", "time"))
    parser.add_argument("--images", type=int, default=200, help="test images for heat maps")
    parser.add_argument("--only", nargs="*", default=[], help="these methods alone")
    given = parser.parse_args()
    classifier, test = load_bundle(given.bundle, "cpu"), load_dataset(part="test")
    print(f"{given.bundle}; {devices.processor_name()}, {os.cpu_count()} cores, torch {torch.__version__}\n")
    if given.part == "heat":
        heat(classifier, test, given.images, given.only)
    elif given.part == "time":
        rows = split_indices(test.labels, 50, 0)[1]
        explain(classifier, test.images[rows[0]])
        taken = [1000 * seconds(lambda i=i: explain(classifier, test.images[i])) for i in rows]  # type: ignore[misc]
        print(f"explain: {told(spread(taken))} ms, median and range")
    else:
        neighbours(classifier, load_dataset(part="train"), test)


if __name__ == "__main__":
    main()
