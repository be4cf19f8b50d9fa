"""The training loss with a teacher."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from attire.training.augment import Target
from attire.training.loss import training_loss
from tests.small_training import RECIPE


def test_a_teacher_s_answers_are_a_share_of_the_loss() -> None:
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(6, 10), torch.arange(6)
    recipe = replace(RECIPE, label_smoothing=0.0, distill_weight=0.7, distill_temperature=2.0)
    hard = F.cross_entropy(logits, labels)
    sure = F.one_hot(labels, 10).float()
    same = training_loss(logits, Target(labels, soft_targets=sure), replace(recipe, distill_temperature=1.0))
    assert same.item() == pytest.approx(hard.item())
    soft = (logits / 2).softmax(1)
    alone = training_loss(logits, Target(labels, soft_targets=soft), replace(recipe, distill_weight=1.0))
    entropy = -(soft * soft.log()).sum(1).mean()
    assert alone.item() == pytest.approx(entropy.item(), rel=1e-5)  # no loss beyond the teacher's own doubt
    both = training_loss(logits, Target(labels, soft_targets=soft), recipe)
    assert both.item() == pytest.approx(0.3 * hard.item() + 0.7 * entropy.item(), rel=1e-5)
    guess = training_loss(torch.zeros(6, 10), Target(labels, soft_targets=soft), recipe)
    assert guess.item() == pytest.approx(math.log(10))
