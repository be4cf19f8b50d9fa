"""Doubles: byte for byte, shifted, faintly different; and pairs that only look alike."""

import numpy as np
import pytest

from attire.analysis import duplicates
from attire.analysis.duplicates import Images, _candidates, duplicate_groups, find_near_pairs, first_occurrences
from attire.progress import NoProgress
from tests.conftest import blocks_and_noise


def garments(rows: int) -> Images:
    """Different pictures with a dark frame of 4 px, as a shift must not push anything out."""
    rng = np.random.default_rng(0)
    images = np.zeros((rows, 28, 28), np.uint8)
    coarse = rng.integers(40, 256, (rows, 5, 5), np.uint8)
    images[:, 4:24, 4:24] = coarse.repeat(4, axis=1).repeat(4, axis=2)
    return images


def test_the_first_row_that_holds_the_same_bytes() -> None:
    images = garments(6)[[0, 1, 0, 2, 1, 0]]
    assert first_occurrences(images).tolist() == [0, 1, 0, 3, 1, 0]
    assert [rows.tolist() for rows in duplicate_groups(first_occurrences(images))] == [[0, 2, 5], [1, 4]]


def test_without_doubles_there_are_no_groups() -> None:
    assert duplicate_groups(first_occurrences(garments(5))) == []


@pytest.mark.parametrize(("down", "across"), [(0, 1), (1, 0), (-1, 1), (2, -2)])
def test_a_shifted_picture_is_found(down: int, across: int) -> None:
    images = garments(50)
    moved = np.roll(images[7], (down, across), (0, 1))
    pairs = find_near_pairs(np.concatenate([images, moved[None]]), np.arange(51))
    assert (pairs.first.tolist(), pairs.second.tolist()) == ([7], [50])
    assert pairs.distance[0] == 0


def test_faint_differences_are_near_and_strong_ones_are_not() -> None:
    images, rng = garments(50), np.random.default_rng(1)
    contrast = images[:2].std(axis=(1, 2)).mean()
    noise = rng.choice([-1, 1], (28, 28)) * contrast
    faint = (images[0] + 0.03 * noise).clip(0, 255).astype(np.uint8)
    strong = (images[1] + 0.2 * noise).clip(0, 255).astype(np.uint8)
    pairs = find_near_pairs(np.stack([*images, faint, strong]), np.arange(52))
    assert list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) == [(0, 50)]
    assert 0 < pairs.distance[0] < duplicates._NEAR


def test_the_most_alike_come_first_and_only_the_rows_asked_for() -> None:
    images = garments(40)
    faint = images[3].copy()
    faint[10, 10] ^= 16
    images = np.stack([*images, faint, np.roll(images[9], 1, 0)])
    pairs = find_near_pairs(images, np.arange(42))
    assert pairs.second.tolist() == [41, 40]
    assert (np.diff(pairs.distance) >= 0).all()
    assert len(find_near_pairs(images, np.arange(41))) == 1


def test_one_image_has_no_neighbours() -> None:
    assert len(find_near_pairs(garments(1), np.arange(1))) == 0
    assert _candidates(np.zeros((0, 3), np.float32), NoProgress()).shape == (0, 2)


def test_noise_has_no_doubles() -> None:
    assert len(find_near_pairs(blocks_and_noise(60).images, np.arange(60))) == 0
