"""Features of single images, found by each image's own digest, whatever array they stand in now.

`features.extract` knows an array by one digest over all of it. Folds and grids hold the same images in ever other
arrays: here only those that no entry holds go through the backbone, as a new entry of the same cache.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attire.data.dataset import FASHION_CLASSES, ImageDataset
from attire.features import cache
from attire.features.cache import FeatureExtractor, FeatureSpec, Features, ProgressCallback
from attire.storage import files

_DIGEST = hashlib.sha256().digest_size  # bytes of one row of an index
_BLOCK_ROWS = 2048  # gathered at a time


class _InMemoryFeatures:
    """Features in memory, (N, D) float16: of images that are not to be kept."""

    def __init__(self, table: NDArray[np.float16]) -> None:
        self.table = table

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        return self.table[rows]


class _GatheredFeatures(Features):
    """Rows of several parts as if they were one entry, (N, D) float16: row i is row `rows[i]` of `parts[part[i]]`."""

    def __init__(
        self,
        parts: Sequence[Features | _InMemoryFeatures],
        part: NDArray[np.int64],
        rows: NDArray[np.int64],
        width: int,
    ) -> None:
        self.parts, self.part, self.rows, self.shape = parts, part, rows, (len(rows), width)

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """Rows in the order asked for, (n, D) float16."""
        out = np.empty((len(rows), self.shape[1]), np.float16)
        part = self.part[rows]
        for i in np.unique(part):
            here = part == i
            out[here] = self.parts[i].gather(self.rows[rows[here]])
        return out

    def read(self, rows: NDArray[np.int64], out: NDArray[np.float16]) -> None:
        """Rows into `out` (n, D), some at a time."""
        for start in range(0, len(rows), _BLOCK_ROWS):
            out[start : start + _BLOCK_ROWS] = self.gather(rows[start : start + _BLOCK_ROWS])


def extract_by_image(
    images: NDArray[np.uint8],
    spec: FeatureSpec,
    load_backbone: Callable[[], FeatureExtractor],
    progress: ProgressCallback | None = None,
) -> _GatheredFeatures:
    """Features of all images (N, 28, 28) uint8, each computed once however often and wherever it stands.

    What no entry holds becomes one entry more of the feature cache. Two processes that miss something take turns, so
    that the second finds what the first has computed. Raises what `features.extract` raises.
    """
    digests, first = _digests_of(images)
    folder = _index_folder(spec)
    parts, places = _found(folder, set(first), spec)
    if len(places) < len(first):
        with files.lock(folder.with_suffix(".lock")):
            parts, places = _found(folder, set(first), spec)
            if new := sorted(first[digest] for digest in first.keys() - places.keys()):
                part = _extracted(images[new], [digests[i] for i in new], spec, load_backbone, progress)
                parts, places = [*parts, part], places | _placed(new, digests, len(parts))
    return _collected(parts, places, digests, spec)


def extract_in_memory(
    images: NDArray[np.uint8],
    spec: FeatureSpec,
    load_backbone: Callable[[], FeatureExtractor],
    progress: ProgressCallback | None = None,
) -> _GatheredFeatures:
    """The same without the cache: every image that differs is computed, and held in memory alone."""
    report = progress or (lambda done, total: None)
    digests, first = _digests_of(images)
    new = sorted(first.values())
    table = cache.compute_shard(images[new], spec, load_backbone(), lambda rows: report(rows, len(new)))
    return _collected([_InMemoryFeatures(table)], _placed(new, digests, 0), digests, spec)


def _digests_of(images: NDArray[np.uint8]) -> tuple[list[bytes], dict[bytes, int]]:
    """The digest of each image, and where each that differs stands first."""
    digests = [hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in images]
    first: dict[bytes, int] = {}
    for i, digest in enumerate(digests):
        first.setdefault(digest, i)
    return digests, first


_Places = dict[bytes, tuple[int, int]]  # of an image by its digest: number of the part, row in it


def _placed(new: Sequence[int], digests: Sequence[bytes], part: int) -> _Places:
    return {digests[i]: (part, row) for row, i in enumerate(new)}


def _collected(
    parts: Sequence[Features | _InMemoryFeatures], places: _Places, digests: Sequence[bytes], spec: FeatureSpec
) -> _GatheredFeatures:
    where = np.array([places[digest] for digest in digests], np.int64).reshape(-1, 2)
    return _GatheredFeatures(parts, where[:, 0], where[:, 1], spec.width)


def _index_folder(spec: FeatureSpec) -> Path:
    """Of all entries of this spec: `<entry>.rows`, the digests of its images, and the SHA-256 of those after them."""
    return files.cache_dir() / "rows" / spec.key("")


def _found(folder: Path, wanted: set[bytes], spec: FeatureSpec) -> tuple[list[Features | _InMemoryFeatures], _Places]:
    """The sound entries that hold some of these images, and where each image is that they hold."""
    parts: list[Features | _InMemoryFeatures] = []
    places: _Places = {}
    for path in sorted(folder.glob("*.rows")):
        if len(places) == len(wanted):
            break
        known = list(_indexed(path))
        own = {digest: row for row, digest in enumerate(known) if digest in wanted and digest not in places}
        if not own:
            continue
        if entry := _opened(cache.cache_folder() / path.stem, len(known), spec):
            places |= {digest: (len(parts), row) for digest, row in own.items()}
            parts.append(entry)
        else:
            path.unlink(missing_ok=True)
    return parts, places


def _indexed(path: Path) -> Iterator[bytes]:
    """The digests of one entry's images, in the order of its rows; none where the index is not whole."""
    if files.has_valid_seal(path):
        data = path.read_bytes()[:-_DIGEST]
        yield from (data[start : start + _DIGEST] for start in range(0, len(data), _DIGEST))


def _opened(folder: Path, rows: int, spec: FeatureSpec) -> Features | None:
    """The entry, every shard verified; None where it was deleted or a shard is damaged: then its images are missing."""
    if not (folder / "MANIFEST.json").exists():
        return None
    with files.lock(folder.with_suffix(".lock")):
        whole = len(cache.verify_shards(folder, rows, spec)) == -(-rows // spec.shard_rows)
    return Features(folder, rows, spec.width, spec.shard_rows) if whole else None


def _extracted(
    images: NDArray[np.uint8],
    digests: Sequence[bytes],
    spec: FeatureSpec,
    load_backbone: Callable[[], FeatureExtractor],
    progress: ProgressCallback | None,
) -> Features:
    """A new entry, and the index of its rows once it is whole."""
    digest = ImageDataset(images, np.zeros(len(images), np.int64), FASHION_CLASSES, "images").image_digest
    entry = cache.extract(images, digest, spec, load_backbone, progress)
    with files.sealed_file(_index_folder(spec) / f"{entry.folder.name}.rows") as file:
        file.write(b"".join(digests))
    return entry


def delete_stale() -> int:
    """Remove the indices of entries that are gone; returns the bytes freed."""
    freed = 0
    for path in (files.cache_dir() / "rows").glob("*/*.rows"):
        if not (cache.cache_folder() / path.stem).exists():
            freed += path.stat().st_size
            path.unlink(missing_ok=True)
    return freed
