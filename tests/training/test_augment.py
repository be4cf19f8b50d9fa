"""Erased rectangles, mixed batches, and the same ones again from the same seed and step."""

from dataclasses import replace

import numpy as np
import torch

from attire.recipes import FAST
from attire.training.augment import Target, _boxes, _cutmix, _erase, _jitter, augment

RECIPE = replace(FAST, random_erasing=0.5, cutmix=1.0)


def test_without_settings_nothing_happens() -> None:
    x = torch.ones(4, 12)
    found, target = augment(x, Target(torch.arange(4)), FAST, 0, 0)
    assert found is x
    assert (target.others, target.share) == (None, 1.0)


def test_the_same_step_is_augmented_the_same_and_another_is_not() -> None:
    def made(step: int) -> torch.Tensor:
        x = torch.arange(8.0)[:, None].repeat(1, 4096) + 1
        return augment(x, Target(torch.arange(8)), RECIPE, 2, step)[0]

    assert torch.equal(made(3), made(3))
    assert not torch.equal(made(3), made(4))


def test_maps_are_moved_by_one_place_in_every_direction_and_the_edge_comes_in() -> None:
    picture = torch.arange(16.0).reshape(1, 4, 4)
    maps = picture.repeat(400, 2, 1, 1)
    _jitter(maps, 1.0, np.random.default_rng(0))
    inside = maps[:, 0, 1:3, 1:3]
    moves = sorted(set((5 - inside[:, 0, 0]).int().tolist()))  # 4 a row down, 1 a place right
    assert moves == [-5, -4, -3, -1, 0, 1, 3, 4, 5]
    down = maps[(5 - inside[:, 0, 0]) == 4][0, 1]
    assert torch.equal(down, picture[0, [0, 0, 1, 2]])
    right = maps[(5 - inside[:, 0, 0]) == 1][0, 1]
    assert torch.equal(right, picture[0][:, [0, 0, 1, 2]])


def test_a_moved_map_is_the_map_of_the_moved_picture_but_for_its_edge() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    with torch.no_grad():
        picture = torch.rand(1, 1, 16, 16)
        maps = layer(picture).repeat(40, 1, 1, 1)
        _jitter(maps, 1.0, np.random.default_rng(0))
        expected = layer(picture.roll((2, -2), (2, 3)))[0, :, 2:-2, 2:-2]
    assert any(torch.allclose(found[:, 2:-2, 2:-2], expected) for found in maps)


def test_half_of_the_maps_are_looked_at_for_moving() -> None:
    maps = torch.arange(16.0).reshape(1, 1, 4, 4).repeat(900, 1, 1, 1)
    before = maps.clone()
    _jitter(maps, 0.5, np.random.default_rng(0))
    assert 350 < int((maps != before).flatten(1).any(1).sum()) < 450  # half, of which a ninth stay where they are


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
    assert target.others is not None
    for row in range(6):
        own = float((maps[row] == row).float().mean())
        other = int(target.others[row])
        assert own == (1.0 if other == row else target.share)
        assert float((maps[row] == other).float().mean()) == (1.0 if other == row else 1 - target.share)


def test_cutmix_mixes_a_teacher_s_answers_as_it_weighs_labels() -> None:
    maps, labels = torch.arange(6.0)[:, None, None, None].repeat(1, 2, 8, 8), torch.arange(6)
    target = _cutmix(maps, Target(labels, soft=torch.eye(6)), np.random.default_rng(1))
    assert target.others is not None
    assert target.soft is not None
    expected = target.share * torch.eye(6) + (1 - target.share) * torch.eye(6)[target.others]
    assert torch.allclose(target.soft, expected)
