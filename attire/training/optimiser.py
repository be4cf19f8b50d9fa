"""Adam over a head, the moving average of its weights, and the learning-rate schedule."""

import math

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from attire.model import heads
from attire.recipes import Recipe

_WARM_UP = 0.1  # fraction of the steps of a cosine schedule that rise to the full learning rate


def make_optimiser(head: nn.Module, recipe: Recipe) -> torch.optim.Adam:
    """Adam over the head's parameters; AdamW's decoupled decay where the recipe asks for decay."""
    parameters = heads.parameter_groups(head, recipe.layer_decay)
    if recipe.weight_decay:
        return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.Adam(parameters, lr=recipe.lr, fused=True)


def make_average(head: nn.Module, recipe: Recipe) -> AveragedModel | None:
    """The exponential moving average of weights and batch statistics, where the recipe asks for one."""
    if not recipe.ema:
        return None
    update = get_ema_multi_avg_fn(recipe.ema)  # type: ignore[no-untyped-call]
    return AveragedModel(head, multi_avg_fn=update, use_buffers=True)


def set_learning_rate(optimiser: torch.optim.Adam, recipe: Recipe, step: int, steps_per_epoch: int) -> None:
    """Set the rate of step `step`, counted over all epochs.

    The schedule runs over the epochs after `head_epochs`; those have the full rate.
    """
    head_steps = recipe.head_epochs * steps_per_epoch
    factor = 1.0
    if step >= head_steps:
        factor = _schedule_factor(recipe.schedule, step - head_steps, recipe.epochs * steps_per_epoch - head_steps)
    for group in optimiser.param_groups:
        group["lr"] = recipe.lr * group["scale"] * factor


def _schedule_factor(schedule: str, step: int, total: int) -> float:
    """Constant, or a linear warm-up followed by half a cosine (Loshchilov and Hutter, 2017)."""
    if schedule == "constant":
        return 1.0
    warm_up = max(1, round(_WARM_UP * total))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))
