"""The training loss: cross-entropy, with label smoothing, CutMix, distillation and outlier exposure."""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from attire.recipes import Recipe
from attire.training.augment import Target


def training_loss(logits: Tensor, target: Target, recipe: Recipe) -> Tensor:
    """Mean loss () of logits (b, K), float32.

    With a teacher, `distill_weight` of it is the cross-entropy with the teacher's probabilities, both sides at one
    temperature (Hinton et al. 2015). The paper's factor T^2 is part of that weight, so that guessing costs ln K
    whatever the weight is. Outliers are trained towards the uniform distribution (Hendrycks et al. 2019).
    """
    if target.outliers is not None:
        return _with_outliers(logits, target, target.outliers, recipe)
    smoothing = recipe.label_smoothing
    loss = F.cross_entropy(logits, target.labels, label_smoothing=smoothing)
    if target.other_labels is not None:
        other_loss = F.cross_entropy(logits, target.other_labels, label_smoothing=smoothing)
        loss = target.label_weight * loss + (1 - target.label_weight) * other_loss
    if target.soft_targets is None:
        return loss
    distillation_loss = F.cross_entropy(logits / recipe.distill_temperature, target.soft_targets)
    return (1 - recipe.distill_weight) * loss + recipe.distill_weight * distillation_loss


def _with_outliers(logits: Tensor, target: Target, outliers: Tensor, recipe: Recipe) -> Tensor:
    outlier_loss = -F.log_softmax(logits[outliers], 1).mean(1).sum()
    garments = logits[~outliers]
    rest = replace(target.select(~outliers), outliers=None)
    loss = training_loss(garments, rest, recipe) if len(garments) else garments.sum()
    return (len(garments) * loss + outlier_loss) / len(logits)
