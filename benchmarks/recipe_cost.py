"""What a recipe will cost on this machine, from a few batches of each of its stages.

    python benchmarks/recipe_cost.py frozen-best best            on 2 cores a minute each

Extraction: images/s through the frozen part. Training: seconds of a step, the median of --steps, on random features;
for a recipe that trains blocks, while they wait and while they learn. The estimate is for 60,000 + 10,000 images with
nothing cached, and leaves out reading from the disk, the evaluation of single epochs, report and bundle.
"""

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from attire.blocks import block_above, feature_shape
from attire.data.loading import load_dataset
from attire.evaluation.report import format_duration
from attire.features import cache
from attire.features import views as features_views
from attire.features.backbones import make_backbone
from attire.features.cache import FeatureSpec
from attire.model import devices, heads, pretrained, vgg
from attire.model.weights import read_weights, tensor_digest
from attire.recipes import RECIPES, Recipe, named
from attire.training import augment, loop
from attire.training.optimiser import make_average, make_optimiser

TRAIN, TEST = 60_000, 10_000


def extraction(recipe: Recipe, weights: Any, seconds: float) -> float:
    """Images/s of preprocessing and backbone, as extraction runs them, over so many seconds."""
    device = devices.choose_device("cpu")
    precision = devices.choose_precision(recipe.precision, device)
    backend = devices.choose_backend(recipe.backend, precision, device)
    pool = 0 if recipe.finetune_blocks else recipe.pool
    digest = tensor_digest(read_weights(weights))
    spec = FeatureSpec(recipe.freeze_to, recipe.image_size, pool, digest, precision, backend=backend)
    backbone = make_backbone(vgg.vgg16(weights, recipe.freeze_to, pool, nn.Sequential()), spec, device)
    images = load_dataset().images[: cache.forward_batch_size(recipe.image_size)]
    cache.compute_features(images[:64], spec, backbone)
    began, rows = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        cache.compute_features(images, spec, backbone)
        rows += len(images)
    return rows / spent


def new_head(recipe: Recipe, weights: Any) -> nn.Sequential:
    shape = feature_shape(block_above(recipe.freeze_to, recipe.finetune_blocks), recipe.image_size, recipe.pool)
    head = heads.build_head(shape, recipe.conv, recipe.hidden, 10, recipe.dropout)
    if recipe.finetune_blocks:
        head = heads.FineTunedHead.from_imagenet(weights, recipe, head)
    return head.to(memory_format=torch.channels_last)


def step_seconds(recipe: Recipe, head: nn.Sequential, probing: bool, steps: int) -> float:
    width = int(np.prod(recipe.map_shape))
    optimiser, average = make_optimiser(head, recipe), make_average(head, recipe)
    labels, spent = torch.arange(recipe.batch_size) % 10, []
    heads.set_train_mode(head, probing)
    for step in range(steps + 1):
        x = torch.rand(recipe.batch_size, width)
        began = time.perf_counter()
        x, target = augment.augment(x, augment.Target(labels), recipe, 0, step)
        loop._train_step(head, optimiser, x, target, recipe)
        if average is not None:
            average.update_parameters(head)
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[1:])


def answer_rate(recipe: Recipe, head: nn.Sequential) -> float:
    """Rows/s through what is behind the freeze boundary."""
    head.eval()
    x = torch.rand(512, int(np.prod(recipe.map_shape)))
    with torch.inference_mode():
        head(x[:64])
        began = time.perf_counter()
        head(x)
    return len(x) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", help=", ".join(RECIPES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="for which extraction is watched")
    given = parser.parse_args()
    weights = pretrained.vgg16_weights()
    print(f"{devices.processor_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    cpu = devices.choose_device("cpu")
    for recipe in map(named, given.recipes):
        rate = extraction(recipe, weights, given.seconds)
        head = new_head(recipe, weights)
        timed = replace(recipe, precision=devices.choose_train_precision(recipe.precision, cpu))
        learning = step_seconds(timed, head, False, given.steps)
        probing = step_seconds(timed, head, True, given.steps) if recipe.head_epochs else 0.0
        back = answer_rate(recipe, head)
        views = len(dict.fromkeys((*features_views.augmentation_views(recipe.flips, recipe.shifts),)))
        extract = (TRAIN * views + TEST * recipe.tta) / rate
        steps = -(-(TRAIN - recipe.val_size) // recipe.batch_size)
        train = steps * (probing * recipe.head_epochs + learning * (recipe.epochs - recipe.head_epochs))
        answers = recipe.tta * (TRAIN + TEST) / back
        width = int(np.prod(recipe.map_shape))
        print(
            f"{recipe.name}: {views} views of {2 * width / 1000:.0f} kB, {2e-9 * width * views * TRAIN:.1f} GB on disk"
        )
        print(f"  extraction  {rate:,.0f} images/s        {format_duration(extract)}")
        print(
            f"  a step      {learning:.3f} s, {probing:.3f} s of the head alone   {format_duration(train)}"
            f" for {recipe.epochs} epochs"
        )
        print(f"  answers     {back:,.0f} rows/s          {format_duration(answers)}")
        print(f"  in all about {format_duration(extract + train + answers)}", flush=True)


if __name__ == "__main__":
    main()
