"""Features of single images, looked up by each image's own digest in all entries of the feature cache.

`cache.extract` knows an array by one digest over all of it. Folds and grids hold the same images in ever other arrays.
Here only images that no entry holds go through the backbone, as a new entry of the same cache.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attire.data.dataset import FASHION_CLASSES, ImageDataset
from attire.features import cache
from attire.features.cache import FeatureExtractor, Features, FeatureSpec, ProgressCallback
from attire.storage import files

_DIGEST_BYTES = hashlib.sha256().digest_size  # one row of an index
_BLOCK_ROWS = 2048  # gathered at a time


class _InMemoryFeatures:
    """Features in memory, (N, D) float16: of images that are not to be kept."""

    def __init__(self, table: NDArray[np.float16]) -> None:
        self.table = table

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        return self.table[rows]


class _GatheredFeatures(Features):
    """Rows of several parts as one entry, (N, D) float16: row i is row `rows[i]` of `parts[part[i]]`."""

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
            mask = part == i
            out[mask] = self.parts[i].gather(self.rows[rows[mask]])
        return out

    def read(self, rows: NDArray[np.int64], out: NDArray[np.float16]) -> None:
        """Read rows into `out` (n, D), some at a time."""
        for start in range(0, len(rows), _BLOCK_ROWS):
            out[start : start + _BLOCK_ROWS] = self.gather(rows[start : start + _BLOCK_ROWS])


class _RowIndex:
    """Where the features of each image are: its digest to the number of a part and the row in it."""

    def __init__(self) -> None:
        self.parts: list[Features | _InMemoryFeatures] = []
        self.rows: dict[bytes, tuple[int, int]] = {}

    def add(self, part: Features | _InMemoryFeatures, rows: Mapping[bytes, int]) -> None:
        self.rows |= {digest: (len(self.parts), row) for digest, row in rows.items()}
        self.parts.append(part)

    def features(self, digests: Sequence[bytes], spec: FeatureSpec) -> _GatheredFeatures:
        pairs = np.array([self.rows[digest] for digest in digests], np.int64).reshape(-1, 2)
        return _GatheredFeatures(self.parts, pairs[:, 0], pairs[:, 1], spec.width)


def extract_by_image(
    images: NDArray[np.uint8],
    spec: FeatureSpec,
    load_backbone: Callable[[], FeatureExtractor],
    progress: ProgressCallback | None = None,
) -> _GatheredFeatures:
    """Features of all images (N, 28, 28) uint8; no image is computed twice, in whatever array it comes back.

    Images that no entry holds become a new entry of the feature cache. Two processes that miss some take turns, so that
    the second finds what the first has computed. Raises what `cache.extract` raises.
    """
    digests, first = _digests_of(images)
    folder = _index_folder(spec)
    index = _look_up(folder, set(first), spec)
    if len(index.rows) < len(first):
        with files.lock(folder.with_suffix(".lock")):
            index = _look_up(folder, set(first), spec)
            if missing := sorted(first[digest] for digest in first.keys() - index.rows.keys()):
                new = [digests[i] for i in missing]
                entry = _extract(images[missing], new, spec, load_backbone, progress)
                index.add(entry, {digest: row for row, digest in enumerate(new)})
    return index.features(digests, spec)


def extract_in_memory(
    images: NDArray[np.uint8],
    spec: FeatureSpec,
    load_backbone: Callable[[], FeatureExtractor],
    progress: ProgressCallback | None = None,
) -> _GatheredFeatures:
    """The same without the cache: each distinct image is computed, and its features are held in memory alone."""
    report = progress or (lambda done, total: None)
    digests, first = _digests_of(images)
    rows = list(first.values())
    table = cache.compute_shard(images[rows], spec, load_backbone(), lambda done: report(done, len(rows)))
    index = _RowIndex()
    index.add(_InMemoryFeatures(table), {digest: row for row, digest in enumerate(first)})
    return index.features(digests, spec)


def _digests_of(images: NDArray[np.uint8]) -> tuple[list[bytes], dict[bytes, int]]:
    """The digest of each image, and each distinct digest with the row where it stands first, in order."""
    digests = [hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in images]
    first: dict[bytes, int] = {}
    for i, digest in enumerate(digests):
        first.setdefault(digest, i)
    return digests, first


def _index_folder(spec: FeatureSpec) -> Path:
    """The folder of `<entry>.rows` for all entries of this spec: digests of the images, then the SHA-256 of those."""
    return files.cache_dir() / "rows" / spec.key("")


def _look_up(folder: Path, wanted: set[bytes], spec: FeatureSpec) -> _RowIndex:
    """The wanted images that finished entries hold; an index of a missing or damaged entry is deleted."""
    index = _RowIndex()
    for path in sorted(folder.glob("*.rows")):
        if len(index.rows) == len(wanted):
            break
        digests = list(_read_index(path))
        rows = {d: row for row, d in enumerate(digests) if d in wanted and d not in index.rows}
        if not rows:
            continue
        if entry := _open_entry(cache.cache_folder() / path.stem, len(digests), spec):
            index.add(entry, rows)
        else:
            path.unlink(missing_ok=True)
    return index


def _read_index(path: Path) -> Iterator[bytes]:
    """The digests of one entry's images, in the order of its rows; none where the index is damaged."""
    if files.has_valid_seal(path):
        data = path.read_bytes()[:-_DIGEST_BYTES]
        yield from (data[start : start + _DIGEST_BYTES] for start in range(0, len(data), _DIGEST_BYTES))


def _open_entry(folder: Path, rows: int, spec: FeatureSpec) -> Features | None:
    """The entry, every shard verified; None where it was deleted or a shard is damaged."""
    if not (folder / "MANIFEST.json").exists():
        return None
    with files.lock(folder.with_suffix(".lock")):
        whole = len(cache.verify_shards(folder, rows, spec)) == -(-rows // spec.shard_rows)
    return Features(folder, rows, spec.width, spec.shard_rows) if whole else None


def _extract(
    images: NDArray[np.uint8],
    digests: Sequence[bytes],
    spec: FeatureSpec,
    load_backbone: Callable[[], FeatureExtractor],
    progress: ProgressCallback | None,
) -> Features:
    """A new entry of the cache, and then the index of its rows."""
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
