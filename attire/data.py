"""Labelled garment images from CSV, IDX or folders of pictures, and their division into training and test set."""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attire import files, idx, objects, parquet, photos, pictures, tables
from attire.copies import read_table
from attire.errors import AttireError, AttireWarning, UsageError, one_line
from attire.files import canonical_json
from attire.formats import is_folder
from attire.idx import read_idx
from attire.storage import is_url
from attire.tables import read_frame

__all__ = [
    "FASHION_CLASSES",
    "ImageDataset",
    "Splits",
    "count_shared",
    "load_dataset",
    "load_splits",
    "read_csv",
    "read_frame",
    "read_idx",
    "read_idx_folder",
    "read_idx_pair",
    "read_image_folder",
    "read_parquet",
    "split_indices",
    "write_csv",
]

# In the order of the labels 0..9: https://github.com/zalandoresearch/fashion-mnist#labels
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
OFFICIAL = "fashion-mnist"

Part = Literal["train", "test"]


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Images (N, 28, 28) uint8 with 0 as the black background, labels (N,) int64 into `classes`; N >= 1.

    Raises AttireError when the arrays do not agree with that; they are not to be changed afterwards.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    source: str  # what a person calls it: a file's name, or "fashion-mnist"

    def __post_init__(self) -> None:
        check_classes(self.classes)
        if self.images.shape[1:] != (28, 28) or self.images.dtype != np.uint8:
            found = f"{self.images.shape} {self.images.dtype}"
            raise AttireError(self.source, f"images are {found}, expected (N, 28, 28) uint8")
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != np.int64:
            found, expected = f"{self.labels.shape} {self.labels.dtype}", f"({len(self.images)},) int64"
            raise AttireError(self.source, f"labels are {found}, expected {expected}")
        if not len(self.images):
            raise AttireError(self.source, "no images")
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.classes)))
        if len(wrong):
            what = f"label is {self.labels[wrong[0]]}, expected 0 to {len(self.classes) - 1}"
            do = "name the classes with --classes when they are not these"
            raise AttireError(self.source, what, f"image {wrong[0] + 1:,}", do)

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def image_digest(self) -> str:
        """SHA-256 over shape and pixels, not labels: what features computed from the images depend on."""
        return self._hash().hexdigest()

    @cached_property
    def digest(self) -> str:
        """SHA-256 over images, labels and class names."""
        return self._with_labels(self._hash(), self.labels)

    def _with_labels(self, sha: "hashlib._Hash", labels: NDArray[np.int64]) -> str:
        sha.update(labels.astype("<i8").tobytes())
        sha.update(canonical_json(list(self.classes)))
        return sha.hexdigest()

    def _hash(self, rows: NDArray[np.int64] | None = None) -> "hashlib._Hash":
        """Over all images or these rows, without a copy of them."""
        count = len(self) if rows is None else len(rows)
        sha = hashlib.sha256(canonical_json([count, *self.images.shape[1:]]))
        for block in blocks(self.images, rows):
            sha.update(block.data)
        return sha

    def subset(self, indices: ArrayLike) -> "ImageDataset":
        """The rows `indices` (integers, or a boolean mask), copied, in that order."""
        chosen = np.asarray(indices)
        return ImageDataset(self.images[chosen], self.labels[chosen], self.classes, self.source)

    def describe(self, rows: NDArray[np.int64] | None = None) -> dict[str, Any]:
        """What `data.json` records of all rows or of these: source, rows, rows per class, digests."""
        labels = self.labels if rows is None else self.labels[rows]
        counts = np.bincount(labels, minlength=len(self.classes)).tolist()
        sha = self._hash(rows)
        return {
            "source": self.source,
            "rows": len(labels),
            "rows_per_class": dict(zip(self.classes, counts, strict=True)),
            "digest": self._with_labels(sha.copy(), labels),
            "image_digest": sha.hexdigest(),
        }


@dataclass(frozen=True, eq=False)
class Splits:
    """Which rows of `data` train (validation is split off them later), and which of `test_data` test, once, at the end.

    Rows, not copies: features are kept for the whole of `data`, so that another split finds them in the cache.
    """

    data: ImageDataset
    train_rows: NDArray[np.int64]
    test_data: ImageDataset  # `data` itself where the test part was split off it
    test_rows: NDArray[np.int64]
    shared: int  # test images that stand in the training set too, byte for byte
    how: Mapping[str, Any]  # {"test": "own"}, or test_size, seed and stratify when it was split off

    @cached_property
    def train(self) -> ImageDataset:
        return self.data.subset(self.train_rows)

    @cached_property
    def test(self) -> ImageDataset:
        return self.test_data.subset(self.test_rows)

    def describe(self) -> dict[str, Any]:
        """What `data.json` records."""
        return {**self._parts, "test_images_in_train": self.shared, "split": dict(self.how)}

    @cached_property
    def _parts(self) -> dict[str, Any]:
        return {"train": self.data.describe(self.train_rows), "test": self.test_data.describe(self.test_rows)}


Reader = Callable[[Sequence[str] | None], ImageDataset]


def load_dataset(
    data: str | Path | None = None, *, part: Part = "train", classes: Sequence[str] | None = None
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
    shared = count_shared(everything.images, held_out.images, rows, test_rows)
    if shared:
        what = f"{shared:,} of {len(test_rows):,} test images also stand in the training set"
        line = f"{one_line(held_out.source)}: {what}; the measured accuracy will be too high"
        warnings.warn(line, AttireWarning, stacklevel=2)
    return Splits(everything, rows, held_out, test_rows, shared, how)


def find_readers(data: str | Path | None) -> dict[str, Reader]:
    """Who reads what: {"train": ..., "test": ...} where the source has both parts, else one of them or "all"."""
    if data is None or data == OFFICIAL:
        from attire.fetch import official_data  # only this needs the network code

        folder = official_data()
        return {part: partial(read_idx_folder, folder, part, source=OFFICIAL) for part in ("train", "test")}
    path = objects.local(data)
    readers = path_readers(path)
    if is_url(data):
        return {part: partial(named, reader, path, str(data)) for part, reader in readers.items()}
    return readers


def path_readers(path: Path) -> dict[str, Reader]:
    if is_folder(path):
        return folder_readers(path)
    if parquet.is_parquet(path):
        return {"all": partial(read_parquet, parquet.paths(path))}
    if pair := idx.partner(path):
        return {"all": partial(read_idx_pair, *pair)}
    return {"all": partial(read_csv, path)}


def named(reader: Reader, copy: Path, url: str, classes: Sequence[str] | None) -> ImageDataset:
    """What a reader makes of the copy of a URL; errors name the URL, not the copy."""
    try:
        return reader(classes)
    except AttireError as error:
        if not error.subject.startswith(str(copy)) or isinstance(error, UsageError):
            raise
        subject = url.rstrip("/") + error.subject.removeprefix(str(copy))
        raise AttireError(subject, error.what, error.where, error.do) from error


def folder_readers(folder: Path) -> dict[str, Reader]:
    """For IDX files, for `*train.csv` and `*test.csv` (as on Kaggle), for Parquet files, those of `train*` and `test*`
    apart (as on Hugging Face), for train/ and test/, or for class folders."""
    parts = [part for part in ("train", "test") if idx.find_pair(folder, part)]
    if parts:
        return {part: partial(read_idx_folder, folder, part) for part in parts}
    entries = pictures.visible(folder)
    csvs = [entry for entry in entries if entry.suffix.lower() == ".csv"]
    if csvs:
        named = {part: [path for path in csvs if path.stem.endswith(part)] for part in ("train", "test")}
        if len(csvs) != 2 or any(len(paths) != 1 for paths in named.values()):
            what = f"{len(csvs)} CSV file{'s' if len(csvs) > 1 else ''} in it, expected ...train.csv and ...test.csv"
            raise AttireError(folder, what, do="give one file's own path instead")
        return {part: partial(read_csv, paths[0]) for part, paths in named.items()}
    if parquets := [entry for entry in entries if parquet.is_parquet(entry) and entry.is_file()]:
        both = {part: [path for path in parquets if path.name.startswith(part)] for part in ("train", "test")}
        if not all(both.values()):
            return {"all": partial(read_parquet, parquets)}
        if len(both["train"]) + len(both["test"]) < len(parquets):
            other = next(path for path in parquets if path not in both["train"] + both["test"])
            raise AttireError(other, "a third part beside train and test", do="give one part's pattern instead")
        return {part: partial(read_parquet, found) for part, found in both.items()}
    names = {entry.name for entry in entries if entry.is_dir()}
    if {"train", "test"} <= names and not all(entry.is_file() for entry in pictures.visible(folder / "train")):
        if extra := sorted(names - {"train", "test"}):
            raise AttireError(folder / extra[0], "a third part beside train and test", do="merge it into train")
        return {part: partial(read_image_folder, folder / part) for part in ("train", "test")}
    return {"all": partial(read_image_folder, folder)}


def read_csv(path: str | Path, classes: Sequence[str] | None = None) -> ImageDataset:
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
    tables.write_table(path, dataset.images, dataset.labels)


def read_idx_pair(images: str | Path, labels: str | Path, classes: Sequence[str] | None = None) -> ImageDataset:
    """Two IDX files, plain or .gz, that belong together; see `read_idx`."""
    return ImageDataset(*idx.read_idx_pair(images, labels), check_classes(classes), Path(images).name)


def read_idx_folder(
    folder: str | Path, part: str = "train", classes: Sequence[str] | None = None, source: str = ""
) -> ImageDataset:
    """`train-images-idx3-ubyte` and `train-labels-idx1-ubyte` (part "test": `t10k-...`), plain or .gz."""
    pair = idx.find_pair(Path(folder), part)
    if pair is None:
        raise AttireError(folder, f"no {idx.PREFIXES[part]}-images-idx3-ubyte (or .gz)")
    names = check_classes(classes)
    return ImageDataset(*idx.read_idx_pair(*pair), names, source or pair[0].name)


def read_image_folder(folder: str | Path, classes: Sequence[str] | None = None) -> ImageDataset:
    """`<folder>/<class name>/*.png|jpg|jpeg|webp|bmp`, each as predictions see it: `photos.prepare`."""
    names = None if classes is None else check_classes(classes)
    found = pictures.read_folder(folder, names, lambda path: photos.prepare(path).image)
    return ImageDataset(*found, Path(folder).name)


def read_parquet(paths: str | Path | Sequence[Path], classes: Sequence[str] | None = None) -> ImageDataset:
    """Pictures as bytes in a column `image`, labels in `label`; see `parquet.read_table`."""
    found = [Path(paths)] if isinstance(paths, str | Path) else list(paths)
    table, names = parquet.read_table(found, None if classes is None else check_classes(classes))
    assert table.labels is not None  # as they are read for this alone
    return ImageDataset(table.pixels.reshape(-1, 28, 28), table.labels, check_classes(names), found[0].name)


def check_classes(classes: Sequence[str] | None) -> tuple[str, ...]:
    """The names as a tuple, Fashion-MNIST's for None; UsageError unless there are two or more, all different."""
    names = FASHION_CLASSES if classes is None else tuple(classes)
    if isinstance(classes, str) or len(names) < 2:
        raise UsageError("classes", f"expected at least two names, found {classes!r}")
    if any(not name.strip() or not name.isprintable() for name in names):
        raise UsageError("classes", "a name is empty or cannot be printed")
    if doubled := [name for name in names if names.count(name) > 1]:
        raise UsageError("classes", f"{doubled[0]} stands twice")
    return names


def split_indices(
    labels: NDArray[np.int64], part: float | int, seed: int, stratify: bool = True, *, name: str = "labels"
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(rest, part): sorted indices, drawn by scikit-learn's `train_test_split`; `part` is a fraction or a count.

    Raises UsageError for a `part` or `seed` out of range, AttireError (about `name`) where there are too few rows.
    """
    from sklearn.model_selection import train_test_split  # takes a second to import, and only this needs it

    rows = len(labels)
    check_part(part)
    if not 0 <= seed < 2**32:
        raise UsageError("seed", f"found {seed}, expected 0 to 4,294,967,295")
    count = part if isinstance(part, int) else int(np.ceil(part * rows))
    if count >= rows:
        raise AttireError(name, f"{count:,} of {rows:,} rows cannot be split off", do="at least one must remain")
    if stratify:
        found, counts = np.unique(labels, return_counts=True)
        if counts.min() < 2:
            label = found[counts.argmin()]
            do = "add rows, or split without stratifying"
            raise AttireError(name, f"label {label} has one row, too few to be in both parts", do=do)
        if min(count, rows - count) < len(found):
            what = f"{count:,} of {rows:,} rows split off leave a part without one of the {len(found)} classes"
            raise AttireError(name, what, do="split off more or fewer, or split without stratifying")
    options = {"test_size": count, "random_state": seed, "stratify": labels if stratify else None}
    rest, chosen = train_test_split(np.arange(rows), **options)
    return np.sort(rest), np.sort(chosen)


def check_part(part: float | int) -> None:
    if isinstance(part, bool) or not (0 < part < 1 or (isinstance(part, int) and part >= 1)):
        raise UsageError("--test-size", f"found {part}, expected a fraction between 0 and 1, or a count")


def count_shared(
    a: NDArray[np.uint8],
    b: NDArray[np.uint8],
    a_rows: NDArray[np.int64] | None = None,
    b_rows: NDArray[np.int64] | None = None,
) -> int:
    """How many images of `b` (of its rows `b_rows`, when given) stand in `a` too, byte for byte."""
    rows = [np.arange(len(x)) if chosen is None else chosen for x, chosen in ((a, a_rows), (b, b_rows))]
    sums = [checksums(x, chosen) for x, chosen in zip((a, b), rows, strict=True)]
    alike = [chosen[np.isin(own, other)] for chosen, own, other in zip(rows, sums, sums[::-1], strict=True)]
    known = {a[i].tobytes() for i in alike[0]}
    return sum(b[i].tobytes() in known for i in alike[1])


def checksums(images: NDArray[np.uint8], rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """(n,): equal for equal images, and for few others: a sum of the pixels with fixed random 64-bit weights."""
    weights = np.random.default_rng(0).integers(2**64, size=images[0].size, dtype=np.uint64) | np.uint64(1)
    parts = [block.reshape(len(block), -1).astype(np.uint64) @ weights for block in blocks(images, rows, 2048)]
    return np.concatenate(parts)


def blocks(
    images: NDArray[np.uint8], rows: NDArray[np.int64] | None = None, size: int = 16_384
) -> Iterator[NDArray[np.uint8]]:
    """All images or these rows, contiguous, some at a time; of a memory map no more stays resident."""
    for start in range(0, len(images) if rows is None else len(rows), size):
        part = slice(start, start + size)
        yield np.ascontiguousarray(images[part] if rows is None else images[rows[part]])
        files.release(images)
