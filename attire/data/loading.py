"""Labelled images from CSV, IDX, Parquet or folders of pictures, as a dataset or as splits."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attire.data import csv_table, idx, image_folder, parquet, photos
from attire.data.dataset import FASHION_MNIST, ImageDataset, SplitName, Splits, check_classes, check_test_size, count_shared_images, split_indices
from attire.data.table_cache import read_table
from attire.errors import AttireError, AttireWarning, UsageError, one_line
from attire.recipes import Recipe
from attire.storage import url_copies
from attire.storage.formats import is_folder
from attire.storage.stores import is_url

if TYPE_CHECKING:
    pass


_Reader = Callable[[Sequence[str] | None], ImageDataset]


def load_dataset(
    data: str | Path | None = None, *, part: SplitName = "train", classes: Sequence[str] | None = None
) -> ImageDataset:
    """Every image of a CSV file, an IDX file (its partner beside it), Parquet files or a folder; None is the official
    data. A URL stands for the copy of what it names, see `objects.local`.

    Where the source has a training and a test part, the one that `part` names; otherwise all of it.
    Raises AttireError for whatever cannot be read in full.
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
    """Training and test set: `test` when given, else the source's own test part, else `test_size` of it split off.

    `test_size` is a fraction below 1 or a count; the split is drawn by `seed`, and keeps each class's share with
    `stratify`. Warns (AttireWarning) with the count of test images that also stand in the training set.
    """
    readers = find_readers(data)
    how: dict[str, Any] = {"test": "own"}
    everything = readers.get("train", next(iter(readers.values())))(classes)
    rows = np.arange(len(everything))
    if test is not None or len(readers) == 2:
        if test is None:
            held_out = readers["test"](everything.classes)
        else:
            held_out = load_dataset(test, part="test", classes=everything.classes)
        test_rows = np.arange(len(held_out))
    else:
        if isinstance(test_size, int) and test_size >= len(everything):
            what = f"found {test_size:,}, expected fewer than the {len(everything):,} rows of {everything.source}"
            raise UsageError("--test-size", what)
        held_out = everything
        rows, test_rows = split_indices(everything.labels, test_size, seed, stratify, name=everything.source)
        how = {"test": "split off", "test_size": test_size, "seed": seed, "stratify": stratify}
    found = everything.labels[rows]
    if not np.ptp(found):
        what = f"every training image has the label {found[0]}, {everything.classes[found[0]]}"
        raise AttireError(everything.source, what, do="training needs at least two classes")
    shared = count_shared_images(everything.images, held_out.images, rows, test_rows)
    if shared:
        what = f"{shared:,} of {len(test_rows):,} test images also stand in the training set"
        line = f"{one_line(held_out.source)}: {what}; the measured accuracy will be too high"
        warnings.warn(line, AttireWarning, stacklevel=2)
    return Splits(everything, rows, held_out, test_rows, shared, how)


def find_readers(data: str | Path | None) -> dict[str, _Reader]:
    """Who reads what: {"train": ..., "test": ...} where the source has both parts, else one of them or "all"."""
    if data is None or data == FASHION_MNIST:
        from attire.data.fashion_mnist import official_data  # only this needs the network code

        folder = official_data()
        return {part: partial(_read_idx_folder, folder, part, source=FASHION_MNIST) for part in ("train", "test")}
    path = url_copies.local_copy(data)
    readers = _path_readers(path)
    if is_url(data):
        return {part: partial(_named, reader, path, str(data)) for part, reader in readers.items()}
    return readers


def _path_readers(path: Path) -> dict[str, _Reader]:
    if is_folder(path):
        return _folder_readers(path)
    if parquet.is_parquet(path):
        return {"all": partial(_read_parquet, parquet.find_files(path))}
    if pair := idx.find_partner(path):
        return {"all": partial(_read_idx_pair, *pair)}
    return {"all": partial(_read_csv, path)}


def _named(reader: _Reader, copy: Path, url: str, classes: Sequence[str] | None) -> ImageDataset:
    """What a reader makes of the copy of a URL; errors name the URL, not the copy."""
    try:
        return reader(classes)
    except AttireError as error:
        if not error.subject.startswith(str(copy)) or isinstance(error, UsageError):
            raise
        subject = url.rstrip("/") + error.subject.removeprefix(str(copy))
        raise AttireError(subject, error.what, error.where, error.do) from error


def _folder_readers(folder: Path) -> dict[str, _Reader]:
    """For IDX files, for `*train.csv` and `*test.csv` (as on Kaggle), for Parquet files, those of `train*` and `test*`
    apart (as on Hugging Face), for train/ and test/, or for class folders."""
    parts = [part for part in ("train", "test") if idx.find_pair(folder, part)]
    if parts:
        return {part: partial(_read_idx_folder, folder, part) for part in parts}
    entries = image_folder.list_visible(folder)
    csvs = [entry for entry in entries if entry.suffix.lower() == ".csv"]
    if csvs:
        named = {part: [path for path in csvs if path.stem.endswith(part)] for part in ("train", "test")}
        if len(csvs) != 2 or any(len(paths) != 1 for paths in named.values()):
            what = f"{len(csvs)} CSV file{'s' if len(csvs) > 1 else ''} in it, expected ...train.csv and ...test.csv"
            raise AttireError(folder, what, do="give one file's own path instead")
        return {part: partial(_read_csv, paths[0]) for part, paths in named.items()}
    if parquets := [entry for entry in entries if parquet.is_parquet(entry) and entry.is_file()]:
        both = {part: [path for path in parquets if path.name.startswith(part)] for part in ("train", "test")}
        if not all(both.values()):
            return {"all": partial(_read_parquet, parquets)}
        if len(both["train"]) + len(both["test"]) < len(parquets):
            other = next(path for path in parquets if path not in both["train"] + both["test"])
            raise AttireError(other, "a third part beside train and test", do="give one part's pattern instead")
        return {part: partial(_read_parquet, found) for part, found in both.items()}
    names = {entry.name for entry in entries if entry.is_dir()}
    if {"train", "test"} <= names and not all(entry.is_file() for entry in image_folder.list_visible(folder / "train")):
        if extra := sorted(names - {"train", "test"}):
            raise AttireError(folder / extra[0], "a third part beside train and test", do="merge it into train")
        return {part: partial(_read_image_folder, folder / part) for part in ("train", "test")}
    return {"all": partial(_read_image_folder, folder)}


def _read_csv(path: str | Path, classes: Sequence[str] | None = None) -> ImageDataset:
    """`label,pixel1,...,pixel784` with labels into `classes` (default: Fashion-MNIST's ten); see `read_frame`."""
    names = check_classes(classes)
    table = read_table(path, len(names))
    assert table.labels is not None  # as it was not asked for otherwise
    return ImageDataset(table.pixels.reshape(-1, 28, 28), table.labels, names, Path(path).name)


def read_csv_images(path: str | Path, classes: Sequence[str] | None = None) -> NDArray[np.uint8]:
    """(N, 28, 28): the rows of a file that `read_csv` reads, or of one with `pixel1,...,pixel784` and no label."""
    return read_table(path, len(check_classes(classes)), labelled=False).pixels.reshape(-1, 28, 28)


def write_csv(dataset: ImageDataset, path: str | Path) -> None:
    """Write what `read_csv` reads. Class names are not part of that form; labels are."""
    csv_table.write_table(path, dataset.images, dataset.labels)


def _read_idx_pair(images: str | Path, labels: str | Path, classes: Sequence[str] | None = None) -> ImageDataset:
    """Two IDX files, plain or .gz, that belong together; see `read_idx`."""
    return ImageDataset(*idx.read_pair(images, labels), check_classes(classes), Path(images).name)


def _read_idx_folder(
    folder: str | Path, part: str = "train", classes: Sequence[str] | None = None, source: str = ""
) -> ImageDataset:
    """`train-images-idx3-ubyte` and `train-labels-idx1-ubyte` (part "test": `t10k-...`), plain or .gz."""
    pair = idx.find_pair(Path(folder), part)
    if pair is None:
        raise AttireError(folder, f"no {idx.PREFIXES[part]}-images-idx3-ubyte (or .gz)")
    names = check_classes(classes)
    return ImageDataset(*idx.read_pair(*pair), names, source or pair[0].name)


def _read_image_folder(folder: str | Path, classes: Sequence[str] | None = None) -> ImageDataset:
    """`<folder>/<class name>/*.png|jpg|jpeg|webp|bmp`, each as predictions see it: `photos.prepare`."""
    names = None if classes is None else check_classes(classes)
    found = image_folder.read_class_folders(folder, names, lambda path: photos.prepare(path).image)
    return ImageDataset(*found, Path(folder).name)


def _read_parquet(paths: str | Path | Sequence[Path], classes: Sequence[str] | None = None) -> ImageDataset:
    """Pictures as bytes in a column `image`, labels in `label`; see `parquet.read_table`."""
    found = [Path(paths)] if isinstance(paths, str | Path) else list(paths)
    table, names = parquet.read_table(found, None if classes is None else check_classes(classes))
    assert table.labels is not None  # as they are read for this alone
    return ImageDataset(table.pixels.reshape(-1, 28, 28), table.labels, check_classes(names), found[0].name)


@dataclass(frozen=True)
class DataChoice:
    """Where the images come from, in words that can be written to `config.json` and given back."""

    data: str | None = None  # None: the official set
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
