"""A backbone of low rank: each convolution of block1 to block3 split into a narrower 3x3 and a 1x1, against the whole.

    python research/low_rank.py           images/s in turn, and the accuracy of a ridge classifier; ten minutes

Zhang et al. 2015, "Accelerating Very Deep Convolutional Networks", without their term for the ReLU: the outputs of each
layer, over 1,500 training images and divided by their deviations, are projected on their first principal components.
The ridge classifier is fitted on 12,000 training images and scored on 5,000 others; the test set is not read.
"""

import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attire.data import dataset, loading
from attire.model import pretrained, vgg

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from measuring import seconds

SIZE, BATCH = 32, 250
SHARES = (0.995, 0.99, 0.98)  # of the variance that the components keep
ROUNDS = 5
Images = NDArray[np.uint8]


def batches(images: Images) -> list[Tensor]:
    parts = [vgg.preprocess(images[i : i + BATCH], SIZE) for i in range(0, len(images), BATCH)]
    return [part.to(memory_format=torch.channels_last) for part in parts]


def components(layer: nn.Conv2d, inputs: list[Tensor], share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (K,), and factors (K, r) with y - mean = back @ there.T @ (y - mean) but for the rest of the variance."""
    rows = [layer(x).permute(0, 2, 3, 1).reshape(-1, layer.out_channels).double() for x in inputs]
    count, mean = sum(map(len, rows)), sum(y.sum(0) for y in rows) / sum(map(len, rows))
    covariance = sum(y.T @ y for y in rows) / count - torch.outer(mean, mean)
    deviation = covariance.diagonal().clamp_min(1e-12).sqrt()
    deviation = deviation + 0.05 * deviation.mean()
    values, vectors = torch.linalg.eigh(covariance / torch.outer(deviation, deviation))
    kept = int((values.flip(0).cumsum(0) / values.sum() < share).sum()) + 1
    first = vectors.flip(1)[:, : min(len(mean), -(-kept // 8) * 8)]  # whole vectors of eight channels
    return mean, first / deviation[:, None], first * deviation[:, None]


def split(layer: nn.Conv2d, inputs: list[Tensor], share: float) -> list[nn.Module]:
    """The layer in two, or as it is where that saves less than a tenth."""
    mean, there, back = components(layer, inputs, share)
    rank, wide = there.shape[1], 9 * layer.in_channels
    if wide * layer.out_channels < 1.1 * rank * (wide + layer.out_channels):
        return [layer]
    narrow = nn.Conv2d(layer.in_channels, rank, 3, padding=1, bias=False)
    widen = nn.Conv2d(rank, layer.out_channels, 1)
    weight, bias = layer.weight.double(), layer.bias.double()  # type: ignore[union-attr]
    narrow.weight.copy_((there.T @ weight.flatten(1)).view(rank, layer.in_channels, 3, 3))
    widen.weight.copy_(back[:, :, None, None])
    widen.bias.copy_(mean - back @ (there.T @ (mean - bias)))  # type: ignore[union-attr]
    return [narrow, widen]


def low_rank(backbone: nn.Sequential, images: Images, share: float) -> nn.Sequential:
    """Layer after layer, each fitted to what the split ones before it hand on."""
    layers: list[nn.Module] = []
    current = batches(images)
    for layer in backbone:
        deep = isinstance(layer, nn.Conv2d) and layer.in_channels > 3
        found = split(layer, current, share) if deep else [layer]  # type: ignore[arg-type]
        for part in found:
            part.to(memory_format=torch.channels_last)
            current = [x.relu() if isinstance(part, nn.ReLU) else part(x) for x in current]
        layers += found
    return nn.Sequential(*layers)


def features(backbone: nn.Sequential, images: Images) -> Tensor:
    return torch.cat([backbone(x).flatten(1) for x in batches(images)])


def right(backbone: nn.Sequential, train: dataset.ImageDataset, val: dataset.ImageDataset) -> Tensor:
    """(n,) bool of the validation images, by ridge regression on standardised features (see `attire.ridge`)."""
    x, other = features(backbone, train.images), features(backbone, val.images)
    deviation, mean = torch.std_mean(x, 0)
    scale = deviation + 0.05 * deviation.mean()
    x, other = (x - mean) / scale, (other - mean) / scale
    targets = nn.functional.one_hot(torch.from_numpy(train.labels), 10).float() - 0.1
    weights = torch.linalg.solve(x.T @ x / len(x) + 0.3 * torch.eye(x.shape[1]), x.T @ targets / len(x))
    return (other @ weights).argmax(1) == torch.from_numpy(val.labels)


def main() -> None:
    train = loading.load_dataset()
    order = np.random.default_rng(1).permutation(len(train))
    images, fitted, scored = train.images[order[:1500]], train.subset(order[2000:14000]), train.subset(order[-5000:])
    whole = vgg.vgg16(pretrained.vgg16_weights(), "block3", 0, nn.Sequential()).features
    whole = whole.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        backbones = {"whole": whole} | {f"{100 * s:g} %": low_rank(whole, images, s) for s in SHARES}
        pictures = batches(images[:1000])
        times: dict[str, list[float]] = {name: [] for name in backbones}
        for _ in range(ROUNDS + 1):
            for name, backbone in backbones.items():
                times[name].append(seconds(lambda backbone=backbone: [backbone(x) for x in pictures]))  # type: ignore[misc]
        base = right(whole, fitted, scored)
        for name, backbone in backbones.items():
            found = right(backbone, fitted, scored)
            ratio = statistics.median(a / b for a, b in zip(times["whole"][1:], times[name][1:], strict=True))
            lost, won = int((base & ~found).sum()), int((found & ~base).sum())
            widths = [layer.out_channels for layer in backbone if isinstance(layer, nn.Conv2d) and layer.bias is None]
            speed = 1000 / statistics.median(times[name][1:])
            accuracy = 100 * found.float().mean()
            print(
                f"{name:8} {speed:5.0f} images/s, x {ratio:.2f}, {accuracy:.2f} %, -{lost} +{won}, {widths}", flush=True
            )


if __name__ == "__main__":
    main()
