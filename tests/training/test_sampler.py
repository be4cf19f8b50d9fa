"""An epoch's order: every row once, the same again from the same seed and epoch."""

from dataclasses import replace

import numpy as np

from attire.training import sampler
from tests.small_training import RECIPE, TRAIN


def test_an_epoch_holds_each_row_once_in_an_order_of_its_own() -> None:
    first, mirrored = sampler.epoch_order(TRAIN, RECIPE, 0)
    assert sorted(first) == TRAIN.tolist()
    assert mirrored is not None
    assert 0.2 < mirrored.mean() < 0.8
    assert np.array_equal(first, sampler.epoch_order(TRAIN, RECIPE, 0)[0])
    assert not np.array_equal(first, sampler.epoch_order(TRAIN, RECIPE, 1)[0])
    assert not np.array_equal(first, sampler.epoch_order(TRAIN, replace(RECIPE, seed=1), 0)[0])
    assert sampler.epoch_order(TRAIN, replace(RECIPE, flips=False), 0)[1] is None


def test_the_order_of_a_streamed_source_keeps_neighbours_within_a_window() -> None:
    rows = np.random.default_rng(0).permutation(1000)[:700]
    stretch = (10, 100)
    order, _ = sampler.epoch_order(rows, RECIPE, 0, stretch)
    assert np.array_equal(np.sort(order), np.sort(rows))
    assert np.array_equal(order, sampler.epoch_order(rows, RECIPE, 0, stretch)[0])
    assert not np.array_equal(order, sampler.epoch_order(rows, RECIPE, 1, stretch)[0])
    place = np.searchsorted(np.sort(rows), order)
    for start in range(0, 700, 100):  # ten stretches each, from anywhere, their rows mixed
        window = place[start : start + 100]
        assert len(np.unique(window // 10)) == 10
        assert np.ptp(window) > 300
        assert not np.array_equal(window // 10, np.repeat(window[::10] // 10, 10))
