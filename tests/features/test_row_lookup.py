"""Images found one by one: what an entry holds is computed no second time, in whatever array it comes back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from attire.errors import AttireWarning
from attire.features import cache as feature_cache
from attire.features import row_lookup
from attire.features.cache import FeatureSpec
from tests.conftest import blocks_and_noise

SPEC = FeatureSpec("block5", 32, 0, "weights")  # (512, 1, 1)
IMAGES = blocks_and_noise(40).images


class Counting:
    """A backbone that gives each picture's own mean in every column, and counts the pictures."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, pictures: Tensor) -> Tensor:
        self.rows += len(pictures)
        return pictures.mean((1, 2, 3))[:, None].expand(-1, SPEC.width)


@pytest.fixture
def backbone() -> Counting:
    return Counting()


@pytest.fixture
def load(backbone: Counting) -> Callable[[], Counting]:
    return lambda: backbone


def expected(images: NDArray[np.uint8]) -> NDArray[np.float16]:
    return feature_cache.compute_features(images, SPEC, Counting())


def rows_of(features: feature_cache.Features) -> NDArray[np.float16]:
    return np.concatenate(list(features.blocks(7)))


def test_only_images_that_no_entry_holds_are_computed(backbone: Counting, load: Callable[[], Counting]) -> None:
    row_lookup.extract_by_image(IMAGES[:20], SPEC, load)
    assert backbone.rows == 20
    mixed = IMAGES[[25, 3, 30, 3, 19, 25]]
    assert np.array_equal(rows_of(row_lookup.extract_by_image(mixed, SPEC, load)), expected(mixed))
    assert backbone.rows == 22  # 25 and 30, once each
    everything = row_lookup.extract_by_image(IMAGES, SPEC, load)
    assert backbone.rows == 40
    assert np.array_equal(rows_of(everything), expected(IMAGES))
    assert everything.shape == (40, 512)
    row_lookup.extract_by_image(IMAGES[::-1], SPEC, load)
    assert backbone.rows == 40


def test_rows_come_in_any_order_and_into_a_given_array(load: Callable[[], Counting]) -> None:
    row_lookup.extract_by_image(IMAGES[::2], SPEC, load)
    features, asked = row_lookup.extract_by_image(IMAGES, SPEC, load), np.array([39, 0, 5, 5])
    assert np.array_equal(features.gather(asked), expected(IMAGES[asked]))
    out = np.empty((3, 512), np.float16)
    features.read(np.array([1, 4, 8]), out)
    assert np.array_equal(out, expected(IMAGES[[1, 4, 8]]))


def test_another_spec_has_features_of_its_own(backbone: Counting, load: Callable[[], Counting]) -> None:
    row_lookup.extract_by_image(IMAGES[:9], SPEC, load)
    row_lookup.extract_by_image(IMAGES[:9], replace(SPEC, view="flip"), load)
    assert backbone.rows == 18


def test_an_array_that_is_an_entry_already_is_taken_as_one(backbone: Counting, load: Callable[[], Counting]) -> None:
    """What `attire train` has extracted."""
    data = blocks_and_noise(40)
    feature_cache.extract(data.images, data.image_digest, SPEC, load)
    row_lookup.extract_by_image(data.images, SPEC, load)
    assert backbone.rows == 40


def test_without_the_cache_nothing_is_written(backbone: Counting, load: Callable[[], Counting], cache: Path) -> None:
    calls: list[tuple[int, int]] = []
    double = np.concatenate([IMAGES[:9], IMAGES[:3]])
    features = row_lookup.extract_in_memory(double, SPEC, load, lambda done, total: calls.append((done, total)))
    assert np.array_equal(rows_of(features), expected(double))
    assert (backbone.rows, calls[-1]) == (9, (9, 9))
    assert not cache.exists()
    assert row_lookup.extract_in_memory(IMAGES[:0], SPEC, load).shape == (0, 512)


def test_a_deleted_entry_is_computed_again(backbone: Counting, load: Callable[[], Counting]) -> None:
    row_lookup.extract_by_image(IMAGES[:9], SPEC, load)
    feature_cache.delete_entry(feature_cache.cache_entries()[0].key)
    assert np.array_equal(rows_of(row_lookup.extract_by_image(IMAGES[3:9], SPEC, load)), expected(IMAGES[3:9]))
    assert backbone.rows == 15


def test_a_damaged_entry_is_computed_again(backbone: Counting, load: Callable[[], Counting]) -> None:
    entry = row_lookup.extract_by_image(IMAGES[:9], SPEC, load).parts[0]
    assert isinstance(entry, feature_cache.Features)
    shard = feature_cache._shard_path(entry.folder, 0)
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x99")
    with pytest.warns(AttireWarning, match="1 damaged shard set aside"):
        features = row_lookup.extract_by_image(IMAGES[3:9], SPEC, load)
    assert np.array_equal(rows_of(features), expected(IMAGES[3:9]))
    assert backbone.rows == 15


@pytest.mark.parametrize("spoil", [lambda data: data[:-5], lambda data: b"?" + data[1:], lambda data: b""])
def test_a_damaged_index_is_passed_over(
    spoil: Callable[[bytes], bytes], backbone: Counting, load: Callable[[], Counting]
) -> None:
    row_lookup.extract_by_image(IMAGES[:9], SPEC, load)
    (path,) = row_lookup._index_folder(SPEC).glob("*.rows")
    path.write_bytes(spoil(path.read_bytes()))
    assert np.array_equal(rows_of(row_lookup.extract_by_image(IMAGES[3:9], SPEC, load)), expected(IMAGES[3:9]))
    assert backbone.rows == 15


def test_deleted_entries_leave_no_index(load: Callable[[], Counting]) -> None:
    row_lookup.extract_by_image(IMAGES[:9], SPEC, load)
    row_lookup.extract_by_image(IMAGES[9:], SPEC, load)
    assert row_lookup.delete_stale() == 0
    feature_cache.delete_entry(next(entry.key for entry in feature_cache.cache_entries() if entry.rows == 9))
    assert row_lookup.delete_stale() == (9 + 1) * row_lookup._DIGEST_BYTES
    assert len(list(row_lookup._index_folder(SPEC).glob("*.rows"))) == 1
