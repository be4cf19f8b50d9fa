import gzip
import os
import re
import struct
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attire.data.dataset import FASHION_CLASSES, ImageDataset, count_shared_images, split_indices
from attire.data.loading import _read_csv, _read_idx_folder, _read_image_folder, load_dataset, load_splits, write_csv
from attire.errors import AttireError, AttireWarning, UsageError


def dataset(rows: int = 40, seed: int = 0, classes: tuple[str, ...] = FASHION_CLASSES) -> ImageDataset:
    """Every class in turn, all images different."""
    images = np.random.default_rng(seed).integers(0, 256, (rows, 28, 28), np.uint8)
    return ImageDataset(images, np.arange(rows, dtype=np.int64) % len(classes), classes, "fake")


def write_idx(folder: Path, prefix: str, data: ImageDataset, gz: bool = False) -> None:
    folder.mkdir(exist_ok=True)
    images = struct.pack(">IIII", 0x803, len(data), 28, 28) + data.images.tobytes()
    labels = struct.pack(">II", 0x801, len(data)) + data.labels.astype(np.uint8).tobytes()
    for name, content in (("images-idx3", images), ("labels-idx1", labels)):
        path = folder / f"{prefix}-{name}-ubyte{'.gz' if gz else ''}"
        path.write_bytes(gzip.compress(content) if gz else content)


def write_folder(folder: Path, data: ImageDataset) -> None:
    for i, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        (folder / data.classes[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / data.classes[label] / f"{i}.png")


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
        said = dataset(12, classes=("bag", "shoe", "hat")).subset(range(7)).describe()
        assert said["rows"] == 7
        assert said["rows_per_class"] == {"bag": 3, "shoe": 2, "hat": 2}
        assert said["source"] == "fake"
        assert set(said) == {"source", "rows", "rows_per_class", "digest", "image_digest"}

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


class TestFiles:
    def test_csv_round_trip(self, tmp_path: Path) -> None:
        write_csv(dataset(), tmp_path / "mine.csv")
        found = _read_csv(tmp_path / "mine.csv")
        assert same(found, dataset())
        assert found.source == "mine.csv"
        assert found.images.flags.c_contiguous
        assert found.images.flags.writeable
        assert found.labels.flags.writeable
        assert same(load_dataset(tmp_path / "mine.csv"), dataset())

    def test_a_pipe_is_opened_once(self, tmp_path: Path) -> None:
        write_csv(dataset(), tmp_path / "mine.csv")
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        writer = threading.Thread(target=lambda: pipe.write_bytes((tmp_path / "mine.csv").read_bytes()))
        writer.start()
        assert same(load_dataset(pipe), dataset())
        writer.join()

    def test_csv_with_other_classes(self, tmp_path: Path) -> None:
        names = tuple(f"class {i}" for i in range(12))
        write_csv(dataset(24, classes=names), tmp_path / "mine.csv")
        assert _read_csv(tmp_path / "mine.csv", names).classes == names
        line = r"label is 10, expected .* 0 to 9 \(line 12\); name the classes with --classes when they are not these$"
        with pytest.raises(AttireError, match=line):
            load_dataset(tmp_path / "mine.csv")
        with pytest.raises(UsageError, match=r"^classes: expected at least two names, found 'bag'$"):
            load_dataset(tmp_path / "mine.csv", classes="bag")

    def test_idx_file_finds_its_partner(self, tmp_path: Path) -> None:
        write_idx(tmp_path, "train", dataset(), gz=True)
        for name in ("images-idx3", "labels-idx1"):
            found = load_dataset(tmp_path / f"train-{name}-ubyte.gz")
            assert same(found, dataset())
            assert found.source == "train-images-idx3-ubyte.gz"

    def test_idx_file_with_another_name(self, tmp_path: Path) -> None:
        write_idx(tmp_path, "train", dataset())
        lost = (tmp_path / "train-images-idx3-ubyte").rename(tmp_path / "mine.bin")
        line = r"mine.bin: an IDX file of images, expected CSV text; name the pair \.\.\.-images-idx3-ubyte and "
        with pytest.raises(AttireError, match=line):
            load_dataset(lost)
        with pytest.raises(AttireError, match=r"train-images-idx3-ubyte: no such file$"):
            load_dataset(tmp_path / "train-images-idx3-ubyte")

    def test_idx_folder(self, tmp_path: Path) -> None:
        write_idx(tmp_path, "train", dataset(40))
        with pytest.raises(AttireError, match=r": no t10k-images-idx3-ubyte \(or .gz\)$"):
            _read_idx_folder(tmp_path, "test")
        assert same(load_dataset(tmp_path, part="test"), dataset(40))
        write_idx(tmp_path, "t10k", dataset(20, seed=1), gz=True)
        assert same(load_dataset(tmp_path), dataset(40))
        assert same(load_dataset(tmp_path, part="test"), dataset(20, seed=1))

    def test_idx_labels_beyond_the_classes(self, tmp_path: Path) -> None:
        write_idx(tmp_path, "train", dataset())
        with pytest.raises(AttireError, match=r"train-images-idx3-ubyte: label is 2, expected 0 to 1 \(image 3\)"):
            load_dataset(tmp_path, classes=("bag", "shoe"))

    def test_image_folder(self, tmp_path: Path) -> None:
        names = ("bag", "shoe")
        write_folder(tmp_path / "mine", dataset(6, classes=names))
        found = load_dataset(tmp_path / "mine")
        assert (found.classes, found.source) == (names, "mine")
        assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert np.array_equal(found.images[3], dataset(6).images[1])
        assert _read_image_folder(tmp_path / "mine", ["shoe", "bag"]).labels.tolist() == [0, 0, 0, 1, 1, 1]

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(AttireError, match=r"none: no such file$"):
            load_dataset(tmp_path / "none")
        with pytest.raises(AttireError, match=r": 0 class folders, expected at least two$"):
            load_dataset(tmp_path)
        with pytest.raises(AttireError, match=r"x: cannot read \(File name too long\)$"):
            load_dataset("x" * 300)


class TestSplits:
    def test_one_file_is_split(self, tmp_path: Path) -> None:
        write_csv(dataset(50), tmp_path / "mine.csv")
        splits = load_splits(tmp_path / "mine.csv")
        assert (len(splits.train), len(splits.test), splits.shared) == (40, 10, 0)
        assert sorted(splits.test.labels.tolist()) == list(range(10))
        assert splits.how == {"test": "split off", "test_size": 0.2, "seed": 42, "stratify": True}
        assert same(splits.test, load_splits(tmp_path / "mine.csv").test)
        assert not same(splits.test, load_splits(tmp_path / "mine.csv", seed=1).test)
        assert len(load_splits(tmp_path / "mine.csv", test_size=13, stratify=False).test) == 13

    def test_a_test_file_is_the_test_set(self, tmp_path: Path) -> None:
        write_csv(dataset(40), tmp_path / "a.csv")
        write_idx(tmp_path, "t10k", dataset(20, seed=1))
        splits = load_splits(tmp_path / "a.csv", test=tmp_path / "t10k-images-idx3-ubyte")
        assert same(splits.train, dataset(40))
        assert same(splits.test, dataset(20, seed=1))
        assert splits.how == {"test": "own"}

    def test_shared_images_are_a_warning_with_the_count(self, tmp_path: Path) -> None:
        write_csv(dataset(40), tmp_path / "a.csv")
        write_csv(dataset(40).subset([7, 3, 3]), tmp_path / "b.csv")
        line = r"^b.csv: 3 of 3 test images also stand in the training set; the measured accuracy will be too high$"
        with pytest.warns(AttireWarning, match=line) as caught:
            splits = load_splits(tmp_path / "a.csv", test=tmp_path / "b.csv")
        assert caught[0].filename == __file__
        assert splits.shared == splits.describe()["test_images_in_train"] == 3

    def test_the_classes_of_both_parts_agree(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "a", dataset(6, classes=("bag", "shoe")))
        write_folder(tmp_path / "b", dataset(6, seed=1, classes=("bag", "hat")))
        with pytest.raises(AttireError, match=r"b: no folder for the class shoe; each class needs its folder$"):
            load_splits(tmp_path / "a", test=tmp_path / "b")

    def test_a_source_with_its_own_test_part(self, tmp_path: Path) -> None:
        train, test = dataset(40), dataset(20, seed=1)
        write_idx(tmp_path / "idx", "train", train)
        write_idx(tmp_path / "idx", "t10k", test)
        (tmp_path / "kaggle").mkdir()
        write_csv(train, tmp_path / "kaggle" / "fashion-mnist_train.csv")
        write_csv(test, tmp_path / "kaggle" / "fashion-mnist_test.csv")
        for folder in ("idx", "kaggle"):
            splits = load_splits(tmp_path / folder)
            assert same(splits.train, train)
            assert same(splits.test, test)
            assert splits.how == {"test": "own"}

    def test_train_and_test_folders(self, tmp_path: Path) -> None:
        names = ("bag", "shoe")
        write_folder(tmp_path / "train", dataset(8, classes=names))
        write_folder(tmp_path / "test", dataset(4, seed=1, classes=names))
        splits = load_splits(tmp_path)
        assert (len(splits.train), len(splits.test), splits.test.classes) == (8, 4, names)
        (tmp_path / "val").mkdir()
        with pytest.raises(AttireError, match=r"val: a third part beside train and test; merge it into train$"):
            load_splits(tmp_path)

    def test_classes_may_be_called_train_and_test(self, tmp_path: Path) -> None:
        write_folder(tmp_path, dataset(10, classes=("test", "train")))
        assert load_splits(tmp_path).train.classes == ("test", "train")

    def test_csv_files_without_parts(self, tmp_path: Path) -> None:
        write_csv(dataset(), tmp_path / "mine.csv")
        line = r": 1 CSV file in it, expected \.\.\.train\.csv and \.\.\.test\.csv; give one file's own path instead$"
        with pytest.raises(AttireError, match=line):
            load_splits(tmp_path)

    def test_one_class_cannot_be_learned(self, tmp_path: Path) -> None:
        write_csv(dataset(100).subset(range(3, 100, 10)), tmp_path / "mine.csv")
        line = r"mine.csv: every training image has the label 3, Dress; training needs at least two classes$"
        with pytest.raises(AttireError, match=line):
            load_splits(tmp_path / "mine.csv")

    def test_the_official_data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_idx(tmp_path, "train", dataset(40))
        write_idx(tmp_path, "t10k", dataset(20, seed=1))
        fetch = types.ModuleType("attire.data.fashion_mnist")
        vars(fetch)["official_data"] = lambda: tmp_path
        monkeypatch.setitem(sys.modules, "attire.data.fashion_mnist", fetch)
        for name in (None, "fashion-mnist"):
            splits = load_splits(name)
            assert (len(splits.train), len(splits.test)) == (40, 20)
            assert splits.train.source == splits.test.source == "fashion-mnist"
        assert len(load_dataset()) == 40
        assert len(load_dataset(part="test")) == 20

    def test_describe_is_json(self, tmp_path: Path) -> None:
        write_csv(dataset(50), tmp_path / "mine.csv")
        said = load_splits(tmp_path / "mine.csv").describe()
        assert said["split"] == {"test": "split off", "test_size": 0.2, "seed": 42, "stratify": True}
        assert (said["train"]["rows"], said["test"]["rows"], said["test_images_in_train"]) == (40, 10, 0)


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
