"""The backbone's convolutions, direct and Winograd's, layer by layer and whole, with the matrix limit of the same run.

    python benchmarks/extraction.py              every layer and backbone at 32, 64 and 224 px
    python benchmarks/extraction.py --backbones  the backbones alone

Variants take turns in each round, the rate of a 2,048-square matrix product among them; medians, and the median and
range of the ratios round by round. GFLOP/s are those of the direct convolution (2 x 9 x C x K for each output place),
whatever it is computed by: what needs fewer can exceed the limit. Errors are relative norms against float64.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from attire.blocks import BLOCKS
from attire.data.loading import load_dataset
from attire.features import cache
from attire.model import devices, pretrained, vgg, winograd
from attire.model.microbatches import Microbatching
from attire.storage import memory

ROUNDS = 7
BACKBONES = (("block3", 32, 1024), ("block3", 64, 256), ("block5", 224, 16))
Times = dict[str, list[float]]


def alternate(variants: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> Times:
    """Seconds of each variant in each round; the first round warms up."""
    times: Times = {name: [] for name in variants}
    for done in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if done:
                times[name].append(time.perf_counter() - start)
    return times


def matrix_product() -> tuple[Callable[[], object], float]:
    a, b, out = (torch.rand(2048, 2048) for _ in range(3))
    return lambda: torch.mm(a, b, out=out), 2 * 2048**3


def ratio(times: Times, name: str, base: str = "direct") -> str:
    found = sorted(slow / fast for slow, fast in zip(times[base], times[name], strict=True))
    return f"{statistics.median(found):5.2f} ({found[0]:.2f}-{found[-1]:.2f})"


def rate(work: float, seconds: list[float]) -> float:
    return work / statistics.median(seconds)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def line(name: str, times: Times, work: float, images: int, note: str = "") -> None:
    """work: floating-point operations of the direct convolution for all images."""
    speed, giga = rate(images, times[name]), rate(work, times[name]) / 1e9
    print(f"    {name:32} {speed:9.1f} images/s {giga:6.0f} GFLOP/s   x {ratio(times, name)}   {note}", flush=True)


def layers(backbone: nn.Sequential, size: int, images: int) -> None:
    """Every convolution with its ReLU and pooling, on as many random images as keep both cores busy."""
    product, operations = matrix_product()
    for i, layer in enumerate(backbone):
        if not isinstance(layer, nn.Conv2d):
            size //= 2 if isinstance(layer, nn.MaxPool2d) else 1
            continue
        pool = isinstance(backbone[i + 2], nn.MaxPool2d) if i + 2 < len(backbone) else False
        x = torch.rand(images, layer.in_channels, size, size).contiguous(memory_format=torch.channels_last)
        direct = backbone[i : i + 2 + pool]
        variants: dict[str, Callable[[], object]] = {"product": product, "direct": lambda x=x, f=direct: f(x)}
        exact = direct.double()(x[:1].double())
        direct.float()
        errors = {"direct": error(direct(x[:1]), exact)}
        if layer.in_channels >= winograd._LEAST_CHANNELS:
            quick = winograd.WinogradConv2d(layer, pool)
            errors["winograd"] = error(quick(x[:1]), exact)
            variants["winograd"] = lambda x=x, f=quick: f(x)
        times = alternate(variants)
        limit = rate(operations, times["product"]) / 1e9
        print(f"  {size} px, {layer.in_channels} to {layer.out_channels}, {images} images, limit {limit:.0f} GFLOP/s")
        for name, found in errors.items():
            line(name, times, flops(layer, size) * images, images, f"error {found:.0e}")


def flops(layer: nn.Conv2d, size: int) -> float:
    return 2.0 * 9 * layer.in_channels * layer.out_channels * size**2


def backbone_flops(backbone: nn.Sequential, size: int) -> float:
    total = 0.0
    for layer in backbone:
        total += flops(layer, size) if isinstance(layer, nn.Conv2d) else 0
        size //= 2 if isinstance(layer, nn.MaxPool2d) else 1
    return total


def backbones(block: str, size: int, images: int) -> None:
    """The whole backbone on real images, preprocessed before; batches as extraction makes them."""
    cpu, weights = torch.device("cpu"), pretrained.vgg16_weights()

    def model() -> nn.Module:
        return vgg.vgg16(weights, block, 0, nn.Sequential())

    direct, quick = (vgg.Backbone(model(), cpu, "fp32", fast) for fast in (False, True))
    pictures = vgg.preprocess(load_dataset(part="test").images[:images], size)
    exact = model().features.double()(pictures[:4].double()).flatten(1)
    batches = pictures.to(memory_format=torch.channels_last).split(cache.forward_batch_size(size))
    product, operations = matrix_product()

    def batched(mode: Literal["sequential", "parallel"], backbone: vgg.Backbone) -> Callable[[Tensor], Tensor]:
        return lambda x: Microbatching(mode).run(backbone.features, x).flatten(1)

    variants: dict[str, Callable[[Tensor], Tensor]] = {
        "direct": direct,
        "direct, microbatches in turn": batched("sequential", direct),
        "direct, a microbatch a core": batched("parallel", direct),
        "winograd, microbatches in turn": batched("sequential", quick),
        "winograd, a microbatch a core": quick,
    }
    calls = {name: lambda f=f: [f(batch) for batch in batches] for name, f in variants.items()}
    times = alternate({"product": product, **calls})
    limit = rate(operations, times["product"]) / 1e9
    print(f"{block} at {size} px, {images} images, limit {limit:.0f} GFLOP/s", flush=True)
    for name, run in variants.items():
        line(
            name,
            times,
            backbone_flops(direct.features, size) * images,
            images,
            f"error {error(run(pictures[:4]), exact):.0e}",
        )
    one, other = direct(pictures), quick(pictures)
    differ = (one.half() != other.half()).float().mean().item()
    print(f"  cached in 16 bits {100 * differ:.2f} % of features differ, Winograd from direct", flush=True)


def main(arguments: list[str]) -> None:
    memory.keep_freed_memory()
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    print(f"{devices.processor_name()}, {threads}, torch {torch.__version__}, fp32")
    with torch.inference_mode():
        for block, size, images in BACKBONES:
            backbones(block, size, images)
        if "--backbones" in arguments:
            return
        for block, size, images in (("block5", 32, 64), ("block5", 64, 16), ("block5", 224, 2)):
            whole = vgg.vgg16(pretrained.vgg16_weights(), block, 0, nn.Sequential()).features
            print(f"every layer at {size} px, {BLOCKS[block]} modules")
            layers(whole.to(memory_format=torch.channels_last), size, images)


if __name__ == "__main__":
    main(sys.argv[1:])
