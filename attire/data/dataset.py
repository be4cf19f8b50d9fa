"""Labelled images and their division into training, validation and test rows."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attire.errors import AttireError, UsageError
from attire.storage import files
from attire.storage.files import canonical_json

# In the order of labels 0 to 9: https://github.com/zalandoresearch/fashion-mnist#labels
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
FASHION_MNIST = "fashion-mnist"

SplitName = Literal["train", "test"]

RowIndices = NDArray[np.int64]
ViewIndices = NDArray[np.bool_] | NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Images (N, 28, 28) uint8 with 0 as the black background, labels (N,) int64 into `classes`; N >= 1.

    Raises AttireError for arrays that differ from that. They must not be changed afterwards.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    source: str  # the name shown to people: a file's, or "fashion-mnist"

    def __post_init__(self) -> None:
        check_classes(self.classes)
        if self.images.shape[1:] != (28, 28) or self.images.dtype != np.uint8:
            form = f"{self.images.shape} {self.images.dtype}"
            raise AttireError(self.source, f"images are {form}, expected (N, 28, 28) uint8")
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != np.int64:
            form, expected = f"{self.labels.shape} {self.labels.dtype}", f"({len(self.images)},) int64"
            raise AttireError(self.source, f"labels are {form}, expected {expected}")
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
        """SHA-256 over shape and pixels, without labels. The cache keys of features hold it."""
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
        """Hash all images or these rows, without copying them."""
        count = len(self) if rows is None else len(rows)
        sha = hashlib.sha256(canonical_json([count, *self.images.shape[1:]]))
        for block in _blocks(self.images, rows):
            sha.update(block.data)
        return sha

    def subset(self, indices: ArrayLike) -> "ImageDataset":
        """Copy the rows `indices` (integers, or a boolean mask), in that order."""
        chosen = np.asarray(indices)
        return ImageDataset(self.images[chosen], self.labels[chosen], self.classes, self.source)

    def describe(self, rows: NDArray[np.int64] | None = None) -> dict[str, Any]:
        """Return what `data.json` records of all rows or of these: source, rows, rows per class, digests."""
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
    """Training rows of `data`, of which validation rows are split off later, and test rows of `test_data`.

    Features are cached for the whole of `data`, so that another split finds them in the cache.
    """

    data: ImageDataset
    train_rows: NDArray[np.int64]
    test_data: ImageDataset  # `data` itself where the test part was split off it
    test_rows: NDArray[np.int64]
    shared: int  # test images that stand in the training set too, byte for byte
    method: Mapping[str, Any]  # {"test": "own"}, or test_size, seed and stratify of a test part split off

    @cached_property
    def train(self) -> ImageDataset:
        return self.data.subset(self.train_rows)

    @cached_property
    def test(self) -> ImageDataset:
        return self.test_data.subset(self.test_rows)

    def describe(self) -> dict[str, Any]:
        """Return what `data.json` records."""
        return {**self._parts, "test_images_in_train": self.shared, "split": dict(self.method)}

    @cached_property
    def _parts(self) -> dict[str, Any]:
        return {"train": self.data.describe(self.train_rows), "test": self.test_data.describe(self.test_rows)}


def check_classes(classes: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names as a tuple, for None Fashion-MNIST's. Raises UsageError unless two or more differ."""
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
    """Split off a part by scikit-learn's `train_test_split`; returns sorted indices (rest, part).

    part: a fraction or a count. Raises UsageError for a `part` or `seed` out of range, AttireError about `name` where
    there are too few rows.
    """
    from sklearn.model_selection import train_test_split  # takes a second to import, and only this needs it

    rows = len(labels)
    check_test_size(part)
    if not 0 <= seed < 2**32:
        raise UsageError("seed", f"found {seed}, expected 0 to 4,294,967,295")
    count = part if isinstance(part, int) else int(np.ceil(part * rows))
    if count >= rows:
        raise AttireError(name, f"{count:,} of {rows:,} rows cannot be split off", do="at least one must remain")
    if stratify:
        _check_strata(labels, count, name)
    options = {"test_size": count, "random_state": seed, "stratify": labels if stratify else None}
    rest, chosen = train_test_split(np.arange(rows), **options)
    return np.sort(rest), np.sort(chosen)


def _check_strata(labels: NDArray[np.int64], count: int, name: str) -> None:
    """Raise AttireError where `count` rows, or the rest, cannot have a row of each class."""
    present, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        label = present[counts.argmin()]
        do = "add rows, or split without stratifying"
        raise AttireError(name, f"label {label} has one row, too few to be in both parts", do=do)
    if min(count, len(labels) - count) < len(present):
        what = f"{count:,} of {len(labels):,} rows split off leave a part without one of the {len(present)} classes"
        raise AttireError(name, what, do="split off more or fewer, or split without stratifying")


def check_test_size(part: float | int) -> None:
    """Raise UsageError unless it is a fraction between 0 and 1, or a count."""
    if isinstance(part, bool) or not (0 < part < 1 or (isinstance(part, int) and part >= 1)):
        raise UsageError("--test-size", f"found {part}, expected a fraction between 0 and 1, or a count")


def count_shared_images(
    a: NDArray[np.uint8],
    b: NDArray[np.uint8],
    a_rows: NDArray[np.int64] | None = None,
    b_rows: NDArray[np.int64] | None = None,
) -> int:
    """Count the images of `b` (of `b_rows`) that stand in `a` (in `a_rows`) too, byte for byte."""
    rows = [np.arange(len(x)) if chosen is None else chosen for x, chosen in ((a, a_rows), (b, b_rows))]
    sums = [_checksums(x, chosen) for x, chosen in zip((a, b), rows, strict=True)]
    alike = [chosen[np.isin(own, other)] for chosen, own, other in zip(rows, sums, sums[::-1], strict=True)]
    known = {a[i].tobytes() for i in alike[0]}
    return sum(b[i].tobytes() in known for i in alike[1])


def _checksums(images: NDArray[np.uint8], rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return (n,) sums of pixels with fixed random 64-bit weights: equal for equal images, and for few others."""
    weights = np.random.default_rng(0).integers(2**64, size=images[0].size, dtype=np.uint64) | np.uint64(1)
    parts = [block.reshape(len(block), -1).astype(np.uint64) @ weights for block in _blocks(images, rows, 2048)]
    return np.concatenate(parts)


def _blocks(
    images: NDArray[np.uint8], rows: NDArray[np.int64] | None = None, size: int = 16_384
) -> Iterator[NDArray[np.uint8]]:
    """Yield all images or these rows, contiguous, `size` at a time. Of a memory map no more stays resident."""
    for start in range(0, len(images) if rows is None else len(rows), size):
        part = slice(start, start + size)
        yield np.ascontiguousarray(images[part] if rows is None else images[rows[part]])
        files.release_pages(images)
