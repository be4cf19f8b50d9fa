"""Read labelled images from CSV, IDX, Parquet or folders of pictures, as a dataset or as splits."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attire.data import csv_table, idx, image_folder, parquet, photos
from attire.data.dataset import (
    FASHION_MNIST,
    ImageDataset,
    SplitName,
    Splits,
    check_classes,
    check_test_size,
    count_shared_images,
    split_indices,
)
from attire.data.table_cache import read_table
from attire.errors import AttireError, AttireWarning, UsageError, one_line
from attire.recipes import Recipe
from attire.storage import url_copies
from attire.storage.formats import is_folder
from attire.storage.stores import is_url

_Reader = Callable[[Sequence[str] | None], ImageDataset]  # from class names, None for the source's own
_Readers = dict[str, _Reader]  # {"train": ..., "test": ...} where a source has both, else one of them or "all"


def load_dataset(
    data: str | Path | None = None, *, part: SplitName = "train", classes: Sequence[str] | None = None
) -> ImageDataset:
    """Load every image of a CSV file, an IDX file (its partner beside it), Parquet files or a folder.

    data: a path, or a URL, of which a local copy is read; None is Fashion-MNIST. part: which part to load where the
    source has a training and a test part. Raises AttireError for whatever cannot be read in full.
    """
    readers = find_readers(data)
    return readers.get(part, next(iter(readers.values())))(classes)


def load_splits(
    data: str | Path | None = None,
    *,
    test: str | Path | None = None,
    test_size: float | int = 0.2,
    seed: int = 42,
    stratify: bool = True,
    classes: Sequence[str] | None = None,
) -> Splits:
    """Load training and test set: `test` when given, else the source's own test part, else `test_size` of it.

    test_size: a fraction below 1 or a count of rows, drawn by `seed`; `stratify` keeps each class's share. Raises
    AttireError, and warns (AttireWarning) with the count of test images that also stand in the training set.
    """
    readers = find_readers(data)
    train = readers.get("train", next(iter(readers.values())))(classes)
    rows, method = np.arange(len(train)), dict[str, Any](test="own")
    if test is not None:
        held_out = load_dataset(test, part="test", classes=train.classes)
    elif len(readers) == 2:
        held_out = readers["test"](train.classes)
    else:
        held_out = train
    test_rows = np.arange(len(held_out))
    if held_out is train:
        rows, test_rows = _split_off(train, test_size, seed, stratify)
        method = {"test": "split off", "test_size": test_size, "seed": seed, "stratify": stratify}
    _check_two_classes(train, rows)
    shared = count_shared_images(train.images, held_out.images, rows, test_rows)
    if shared:
        what = f"{shared:,} of {len(test_rows):,} test images also stand in the training set"
        line = f"{one_line(held_out.source)}: {what}; the measured accuracy will be too high"
        warnings.warn(line, AttireWarning, stacklevel=2)
    return Splits(train, rows, held_out, test_rows, shared, method)


def _split_off(
    dataset: ImageDataset, test_size: float | int, seed: int, stratify: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return training and test rows of a dataset without a test part."""
    if isinstance(test_size, int) and test_size >= len(dataset):
        what = f"found {test_size:,}, expected fewer than the {len(dataset):,} rows of {dataset.source}"
        raise UsageError("--test-size", what)
    return split_indices(dataset.labels, test_size, seed, stratify, name=dataset.source)


def _check_two_classes(dataset: ImageDataset, rows: NDArray[np.int64]) -> None:
    labels = dataset.labels[rows]
    if not np.ptp(labels):
        what = f"every training image has the label {labels[0]}, {dataset.classes[labels[0]]}"
        raise AttireError(dataset.source, what, do="training needs at least two classes")


def find_readers(data: str | Path | None) -> _Readers:
    """Return who reads which part: "train" and "test" where the source has both, else one of them or "all"."""
    if data is None or data == FASHION_MNIST:
        from attire.data.fashion_mnist import official_data  # only this needs the network code

        return _idx_layout(official_data(), source=FASHION_MNIST)
    path = url_copies.local_copy(data)
    readers = _path_readers(path)
    if is_url(data):
        return {part: partial(_read_copy, reader, path, str(data)) for part, reader in readers.items()}
    return readers


def _path_readers(path: Path) -> _Readers:
    if is_folder(path):
        layouts = (_idx_layout, _csv_layout, _parquet_layout, _split_folders_layout)
        default: _Readers = {"all": partial(_read_image_folder, path)}
        return next((readers for layout in layouts if (readers := layout(path))), default)
    if parquet.is_parquet(path):
        return {"all": partial(_read_parquet, parquet.find_files(path))}
    if pair := idx.find_partner(path):
        return {"all": partial(_read_idx, pair)}
    return {"all": partial(_read_csv, path)}


def _read_copy(reader: _Reader, copy: Path, url: str, classes: Sequence[str] | None) -> ImageDataset:
    """Read the copy of a URL; errors name the URL instead of the copy."""
    try:
        return reader(classes)
    except AttireError as error:
        if not error.subject.startswith(str(copy)) or isinstance(error, UsageError):
            raise
        subject = url.rstrip("/") + error.subject.removeprefix(str(copy))
        raise AttireError(subject, error.what, error.where, error.do) from error


# Layouts of a folder. Each returns no reader where the folder is laid out otherwise.


def _idx_layout(folder: Path, source: str = "") -> _Readers:
    """Read `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and `t10k-...`, as Fashion-MNIST is published."""
    pairs = {part: idx.find_pair(folder, part) for part in ("train", "test")}
    return {part: partial(_read_idx, pair, source=source) for part, pair in pairs.items() if pair}


def _csv_layout(folder: Path) -> _Readers:
    """Read `*train.csv` and `*test.csv`, as on Kaggle."""
    paths = [path for path in image_folder.list_visible(folder) if path.suffix.lower() == ".csv"]
    if not paths:
        return {}
    parts = {part: [path for path in paths if path.stem.endswith(part)] for part in ("train", "test")}
    if len(paths) != 2 or any(len(chosen) != 1 for chosen in parts.values()):
        what = f"{len(paths)} CSV file{'s' if len(paths) > 1 else ''} in it, expected ...train.csv and ...test.csv"
        raise AttireError(folder, what, do="give one file's own path instead")
    return {part: partial(_read_csv, chosen[0]) for part, chosen in parts.items()}


def _parquet_layout(folder: Path) -> _Readers:
    """Read Parquet files, those of `train*` and `test*` apart, as on Hugging Face."""
    paths = [path for path in image_folder.list_visible(folder) if parquet.is_parquet(path) and path.is_file()]
    parts = {part: [path for path in paths if path.name.startswith(part)] for part in ("train", "test")}
    if not all(parts.values()):
        return {"all": partial(_read_parquet, paths)} if paths else {}
    if others := [path for path in paths if path not in parts["train"] + parts["test"]]:
        raise AttireError(others[0], "a third part beside train and test", do="give one part's pattern instead")
    return {part: partial(_read_parquet, chosen) for part, chosen in parts.items()}


def _split_folders_layout(folder: Path) -> _Readers:
    """Read class folders in train/ and test/, unless these two are class folders themselves."""
    names = {path.name for path in image_folder.list_visible(folder) if path.is_dir()}
    if not {"train", "test"} <= names or all(path.is_file() for path in image_folder.list_visible(folder / "train")):
        return {}
    if extra := sorted(names - {"train", "test"}):
        raise AttireError(folder / extra[0], "a third part beside train and test", do="merge it into train")
    return {part: partial(_read_image_folder, folder / part) for part in ("train", "test")}


# One reader a format.


def _read_csv(path: Path, classes: Sequence[str] | None = None) -> ImageDataset:
    """Read `label,pixel1,...,pixel784` with labels into `classes` (default: Fashion-MNIST's ten)."""
    names = check_classes(classes)
    return _from_table(read_table(path, len(names)), names, path.name)


def _from_table(table: csv_table.Table, classes: tuple[str, ...], source: str) -> ImageDataset:
    assert table.labels is not None  # the readers refuse a table without labels unless asked for one
    return ImageDataset(table.pixels.reshape(-1, 28, 28), table.labels, classes, source)


def read_csv_images(path: str | Path, classes: Sequence[str] | None = None) -> NDArray[np.uint8]:
    """Read (N, 28, 28) uint8 from a CSV file with or without labels. Raises AttireError."""
    return read_table(path, len(check_classes(classes)), labelled=False).pixels.reshape(-1, 28, 28)


def write_csv(dataset: ImageDataset, path: str | Path) -> None:
    """Write images and labels as `label,pixel1,...,pixel784`, atomically. The form has no class names."""
    csv_table.write_table(path, dataset.images, dataset.labels)


def _read_idx(pair: tuple[Path, Path], classes: Sequence[str] | None = None, source: str = "") -> ImageDataset:
    """Read two IDX files, images and labels, plain or .gz."""
    images_path, labels_path = pair
    images, labels = idx.read_pair(images_path, labels_path)
    return ImageDataset(images, labels, check_classes(classes), source or images_path.name)


def _read_image_folder(folder: Path, classes: Sequence[str] | None = None) -> ImageDataset:
    """Read `<folder>/<class name>/*.png|jpg|jpeg|webp|bmp`, each prepared as for a prediction."""
    names = None if classes is None else check_classes(classes)
    images, labels, names = image_folder.read_class_folders(folder, names, lambda path: photos.prepare(path).image)
    return ImageDataset(images, labels, names, folder.name)


def _read_parquet(paths: Sequence[Path], classes: Sequence[str] | None = None) -> ImageDataset:
    """Read pictures as bytes from the column `image`, labels from `label`."""
    table, names = parquet.read_table(paths, None if classes is None else check_classes(classes))
    return _from_table(table, check_classes(names), paths[0].name)


@dataclass(frozen=True)
class DataChoice:
    """Where the images come from, as `config.json` records it. Raises UsageError for a `test_size` out of range."""

    data: str | None = None  # None: Fashion-MNIST
    test: str | None = None
    test_size: float | int = 0.2
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_test_size(self.test_size)

    def load(self, recipe: Recipe) -> Splits:
        return load_splits(
            self.data,
            test=self.test,
            test_size=self.test_size,
            seed=recipe.split_seed,
            stratify=recipe.stratify,
            classes=self.classes,
        )
