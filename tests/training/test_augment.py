"""Erased rectangles, mixed batches, and the same ones again from the same seed and step."""

from dataclasses import replace

import numpy as np
import torch

from attire.recipes import FAST
from attire.training.augment import Target, _boxes, _cutmix, _erase, augment

RECIPE = replace(FAST, random_erasing=0.5, cutmix=1.0)


def test_without_settings_nothing_happens() -> None:
    x = torch.ones(4, 12)
    found, target = augment(x, Target(torch.arange(4)), FAST, 0, 0)
    assert found is x
    assert (target.other_labels, target.label_weight) == (None, 1.0)


def test_the_same_step_is_augmented_the_same_and_another_is_not() -> None:
    def made(step: int) -> torch.Tensor:
        x = torch.arange(8.0)[:, None].repeat(1, 4096) + 1
        return augment(x, Target(torch.arange(8)), RECIPE, 2, step)[0]

    assert torch.equal(made(3), made(3))
    assert not torch.equal(made(3), made(4))


def test_erasing_empties_one_rectangle_of_every_channel() -> None:
    maps = torch.ones(200, 3, 8, 8)
    _erase(maps, 0.5, np.random.default_rng(0))
    hit = (maps == 0).any(1).flatten(1).any(1)
    assert 70 < int(hit.sum()) < 130
    for one in maps[hit]:
        empty = (one == 0).all(0)
        assert torch.equal(empty, (one == 0).any(0))
        assert int(empty.sum()) == int(empty.any(1).sum()) * int(empty.any(0).sum())


def test_boxes_have_the_size_asked_for_and_stay_inside() -> None:
    found = _boxes(np.full(100, 3.0), np.full(100, 2.0), 5, np.random.default_rng(0))
    assert (found.sum((1, 2)) == 6).all()
    assert found.any(0).all()


def test_cutmix_takes_a_rectangle_of_another_row_and_weighs_labels_by_area() -> None:
    maps = torch.arange(6.0)[:, None, None, None].repeat(1, 2, 8, 8)
    target = _cutmix(maps, Target(torch.arange(6)), np.random.default_rng(1))
    assert target.other_labels is not None
    for row in range(6):
        own = float((maps[row] == row).float().mean())
        other = int(target.other_labels[row])
        assert own == (1.0 if other == row else target.label_weight)
        assert float((maps[row] == other).float().mean()) == (1.0 if other == row else 1 - target.label_weight)


def test_cutmix_mixes_a_teacher_s_answers_as_it_weighs_labels() -> None:
    maps, labels = torch.arange(6.0)[:, None, None, None].repeat(1, 2, 8, 8), torch.arange(6)
    target = _cutmix(maps, Target(labels, soft_targets=torch.eye(6)), np.random.default_rng(1))
    assert target.other_labels is not None
    assert target.soft_targets is not None
    expected = target.label_weight * torch.eye(6) + (1 - target.label_weight) * torch.eye(6)[target.other_labels]
    assert torch.allclose(target.soft_targets, expected)
