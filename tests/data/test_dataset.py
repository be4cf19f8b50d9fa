import re
from typing import Any

import numpy as np
import pytest

from attire.data.dataset import FASHION_CLASSES, ImageDataset, count_shared_images, split_indices
from attire.errors import AttireError, UsageError


def dataset(rows: int = 40, seed: int = 0, classes: tuple[str, ...] = FASHION_CLASSES) -> ImageDataset:
    """Every class in turn, all images different."""
    images = np.random.default_rng(seed).integers(0, 256, (rows, 28, 28), np.uint8)
    return ImageDataset(images, np.arange(rows, dtype=np.int64) % len(classes), classes, "fake")


def same(a: ImageDataset, b: ImageDataset) -> bool:
    return a.digest == b.digest


class TestImageDataset:
    def test_digests_cover_what_they_say(self) -> None:
        a = dataset()
        relabelled = ImageDataset(a.images, a.labels[::-1].copy(), a.classes, "other")
        renamed = ImageDataset(a.images, a.labels, tuple("abcdefghij"), "other")
        changed = a.images.copy()
        changed[3, 2, 1] ^= 1
        assert a.image_digest == relabelled.image_digest == renamed.image_digest
        assert a.image_digest != ImageDataset(changed, a.labels, a.classes, "x").image_digest
        assert len({a.digest, relabelled.digest, renamed.digest, a.image_digest}) == 4
        assert same(a, dataset())
        assert len(a.digest) == 64

    def test_the_digest_is_fixed_for_ever(self) -> None:
        tiny = ImageDataset(np.zeros((1, 28, 28), np.uint8), np.zeros(1, np.int64), ("a", "b"), "x")
        assert tiny.image_digest == "38d021928148d934560dd4f3487fd7d78e31c0cd1995cfa27cd01ed995c5363b"
        assert tiny.digest == "e2fc03eb3ad71e62d4ce96a7609ddbc8627c38d355092b9b413b53c1f6bcebd2"

    def test_the_digest_does_not_depend_on_memory_order(self) -> None:
        a = dataset()
        turned = ImageDataset(np.asfortranarray(a.images), a.labels, a.classes, "x")
        assert turned.image_digest == a.image_digest

    def test_subset_keeps_order_classes_and_source(self) -> None:
        part = dataset().subset([5, 2])
        assert part.labels.tolist() == [5, 2]
        assert (part.classes, part.source, len(part)) == (FASHION_CLASSES, "fake", 2)
        assert np.array_equal(part.images[1], dataset().images[2])
        assert len(dataset().subset(dataset().labels == 3)) == 4

    def test_describe(self) -> None:
        described = dataset(12, classes=("bag", "shoe", "hat")).subset(range(7)).describe()
        assert described["rows"] == 7
        assert described["rows_per_class"] == {"bag": 3, "shoe": 2, "hat": 2}
        assert described["source"] == "fake"
        assert set(described) == {"source", "rows", "rows_per_class", "digest", "image_digest"}

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (
                {"images": np.zeros((2, 28, 27), np.uint8)},
                "fake: images are (2, 28, 27) uint8, expected (N, 28, 28) uint8",
            ),
            (
                {"images": np.zeros((2, 28, 28), np.int64)},
                "fake: images are (2, 28, 28) int64, expected (N, 28, 28) uint8",
            ),
            ({"labels": np.zeros(3, np.int64)}, "fake: labels are (3,) int64, expected (2,) int64"),
            ({"labels": np.zeros(2, np.uint8)}, "fake: labels are (2,) uint8, expected (2,) int64"),
            ({"images": np.zeros((0, 28, 28), np.uint8), "labels": np.zeros(0, np.int64)}, "fake: no images"),
            (
                {"labels": np.array([0, 10])},
                "fake: label is 10, expected 0 to 9 (image 2); name the classes with --classes when they are not these",
            ),
            ({"labels": np.array([-1, 0])}, "fake: label is -1, expected 0 to 9 (image 1); "),
            ({"classes": ("one",)}, "classes: expected at least two names, found ('one',)"),
            ({"classes": ("a", "b", "a")}, "classes: a stands twice"),
            ({"classes": ("a", " ")}, "classes: a name is empty or cannot be printed"),
        ],
    )
    def test_arrays_that_disagree(self, change: dict[str, Any], said: str) -> None:
        good = {"images": np.zeros((2, 28, 28), np.uint8), "labels": np.zeros(2, np.int64)}
        with pytest.raises(AttireError, match="^" + re.escape(said)):
            ImageDataset(**{"classes": FASHION_CLASSES, "source": "fake", **good, **change})


class TestSplitIndices:
    labels = np.arange(100, dtype=np.int64) % 4

    def test_parts_are_sorted_disjoint_stratified_and_seeded(self) -> None:
        rest, part = split_indices(self.labels, 0.2, 7)
        assert part.tolist() == sorted(part.tolist())
        assert rest.tolist() == sorted(rest.tolist())
        assert sorted([*rest, *part]) == list(range(100))
        assert np.bincount(self.labels[part]).tolist() == [5, 5, 5, 5]
        assert np.array_equal(part, split_indices(self.labels, 20, 7)[1])
        assert not np.array_equal(part, split_indices(self.labels, 0.2, 8)[1])

    def test_it_is_the_split_of_scikit_learn(self) -> None:
        from sklearn.model_selection import train_test_split

        _, expected = train_test_split(np.arange(100), test_size=0.21, random_state=3, stratify=self.labels)
        assert split_indices(self.labels, 0.21, 3)[1].tolist() == sorted(expected.tolist())

    @pytest.mark.parametrize("part", [0, 0.0, 1.0, 1.5, -0.1, -3, float("nan"), True])
    def test_part_out_of_range(self, part: float) -> None:
        with pytest.raises(
            UsageError, match=r"^--test-size: found .*, expected a fraction between 0 and 1, or a count$"
        ):
            split_indices(self.labels, part, 0)

    @pytest.mark.parametrize("seed", [-1, 2**32])
    def test_seed_out_of_range(self, seed: int) -> None:
        with pytest.raises(UsageError, match=rf"^seed: found {seed}, expected 0 to 4,294,967,295$"):
            split_indices(self.labels, 0.2, seed)

    def test_too_few_rows(self) -> None:
        with pytest.raises(
            AttireError, match=r"^labels: 100 of 100 rows cannot be split off; at least one must remain$"
        ):
            split_indices(self.labels, 100, 0)
        line = r"^x.csv: 3 of 100 rows split off leave a part without one of the 4 classes; split off more or fewer, or"
        with pytest.raises(AttireError, match=line):
            split_indices(self.labels, 3, 0, name="x.csv")
        assert len(split_indices(self.labels, 3, 0, stratify=False)[1]) == 3
        lonely = np.array([0, 0, 0, 5, 1, 1])
        line = r"^labels: label 5 has one row, too few to be in both parts; add rows, or split without stratifying$"
        with pytest.raises(AttireError, match=line):
            split_indices(lonely, 0.5, 0)


def test_count_shared_counts_rows_of_the_second() -> None:
    a, b = dataset(10).images, dataset(10, seed=1).images
    assert count_shared_images(a, b) == 0
    assert count_shared_images(a, np.concatenate([b, a[:1], a[:1]])) == 2
    assert count_shared_images(np.concatenate([b, a[:1], a[:1]]), a) == 1


def test_described_rows_are_described_as_their_copy_is(synthetic: ImageDataset) -> None:
    rows = np.array([3, 1, 59, 7])
    assert synthetic.describe(rows) == synthetic.subset(rows).describe()
    assert synthetic.describe()["digest"] == synthetic.digest
    assert synthetic.describe()["image_digest"] == synthetic.image_digest


def test_shared_images_are_counted_among_the_chosen_rows(synthetic: ImageDataset) -> None:
    images = synthetic.images
    again = np.concatenate([images[:5], 255 - images[5:9], images[:1]])
    assert count_shared_images(images, again) == 6
    assert count_shared_images(images, again, np.arange(2, 60), np.arange(10)) == 3
    assert count_shared_images(images, again, np.arange(60), np.array([4, 9])) == 2
    assert count_shared_images(images, 255 - images) == 0
