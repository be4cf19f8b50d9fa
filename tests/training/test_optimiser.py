"""What Adam gets, and the learning-rate schedule."""

from dataclasses import replace

import pytest
import torch

from attire.training import optimiser as training_optimiser
from tests.small_training import RECIPE, new_head


def test_the_cosine_schedule_warms_up_and_ends_near_nothing() -> None:
    factors = [training_optimiser._schedule_factor("cosine", step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[99] < 0.001
    assert training_optimiser._schedule_factor("constant", 50, 100) == 1
    assert training_optimiser._schedule_factor("cosine", 0, 1) == 1


def test_adam_gets_the_classifier_s_parameters_and_decay_only_where_asked() -> None:
    head = new_head()
    plain = training_optimiser.make_optimiser(head, replace(RECIPE, weight_decay=0))
    assert type(plain) is torch.optim.Adam
    assert [id(p) for p in plain.param_groups[0]["params"]] == [id(p) for p in head.parameters()]
    decayed = training_optimiser.make_optimiser(head, replace(RECIPE, weight_decay=0.1))
    assert type(decayed) is torch.optim.AdamW
    assert decayed.param_groups[0]["weight_decay"] == 0.1
