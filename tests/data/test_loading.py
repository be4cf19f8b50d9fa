import gzip
import os
import struct
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attire.data.dataset import FASHION_CLASSES, ImageDataset
from attire.data.loading import _read_csv, find_readers, load_dataset, load_splits, write_csv
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


class TestFiles:
    def test_csv_round_trip(self, tmp_path: Path) -> None:
        write_csv(dataset(), tmp_path / "mine.csv")
        read = _read_csv(tmp_path / "mine.csv")
        assert same(read, dataset())
        assert read.source == "mine.csv"
        assert read.images.flags.c_contiguous
        assert read.images.flags.writeable
        assert read.labels.flags.writeable
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
            loaded = load_dataset(tmp_path / f"train-{name}-ubyte.gz")
            assert same(loaded, dataset())
            assert loaded.source == "train-images-idx3-ubyte.gz"

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
        assert list(find_readers(tmp_path)) == ["train"]
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
        loaded = load_dataset(tmp_path / "mine")
        assert (loaded.classes, loaded.source) == (names, "mine")
        assert loaded.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert np.array_equal(loaded.images[3], dataset(6).images[1])
        assert load_dataset(tmp_path / "mine", classes=["shoe", "bag"]).labels.tolist() == [0, 0, 0, 1, 1, 1]

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
        assert splits.method == {"test": "split off", "test_size": 0.2, "seed": 42, "stratify": True}
        assert same(splits.test, load_splits(tmp_path / "mine.csv").test)
        assert not same(splits.test, load_splits(tmp_path / "mine.csv", seed=1).test)
        assert len(load_splits(tmp_path / "mine.csv", test_size=13, stratify=False).test) == 13

    def test_a_test_file_is_the_test_set(self, tmp_path: Path) -> None:
        write_csv(dataset(40), tmp_path / "a.csv")
        write_idx(tmp_path, "t10k", dataset(20, seed=1))
        splits = load_splits(tmp_path / "a.csv", test=tmp_path / "t10k-images-idx3-ubyte")
        assert same(splits.train, dataset(40))
        assert same(splits.test, dataset(20, seed=1))
        assert splits.method == {"test": "own"}

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
            assert splits.method == {"test": "own"}

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
