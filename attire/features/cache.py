"""The feature cache: what the frozen layers compute is computed once per image."""

import io
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attire.blocks import feature_shape
from attire.errors import AttireError, AttireWarning
from attire.features import remote_cache
from attire.features.views import apply_view
from attire.model import vgg
from attire.storage import files, memory

_SHARD_BYTES = 16 * 2**20  # a stopped extraction redoes at most one shard: 2,048 rows of 4,096 features
_BATCH_PIXELS = 1_700_000  # of a forward pass: 1,660 pictures of 32 px, 415 of 64, 33 of 224
FORWARD_BYTES_PER_PIXEL = 800  # that a pass holds: 617 measured, block3 at 16 px in fp32 (docs/performance.md)
_MANIFEST = "MANIFEST.json"

FeatureExtractor = Callable[[Tensor], Tensor]  # (n, 3, S, S) normalised pictures to (n, D) float features
ProgressCallback = Callable[[int, int], None]  # (rows done, rows in all)
ShardRecords = dict[int, dict[str, Any]]  # number of a shard to its rows and SHA-256


@dataclass(frozen=True)
class FeatureSpec:
    """All that decides a feature besides the image itself; with the images' digest it gives the cache key."""

    freeze_to: str
    image_size: int
    pool: int
    weights: str  # SHA-256 over the backbone's tensors
    precision: str = "fp32"
    view: str = "plain"
    dtype: str = "float16"
    backend: str = "torch"
    preprocess: int = vgg.PREPROCESS_VERSION

    @property
    def width(self) -> int:
        """D: features of one image."""
        return int(np.prod(feature_shape(self.freeze_to, self.image_size, self.pool)))

    @property
    def shard_rows(self) -> int:
        """The largest power of two whose rows fit into a shard of 16 MB."""
        return 1 << max(0, (_SHARD_BYTES // (2 * self.width)).bit_length() - 1)

    def key(self, images_digest: str) -> str:
        return files.sha256(files.canonical_json({"images": images_digest, **asdict(self)}))[:32]


class ShardExtractor(Protocol):
    """Computes the missing shards of an entry, in this process or, as `cluster` does, in those of other machines."""

    def __call__(
        self,
        parts: dict[int, NDArray[np.uint8]],
        spec: FeatureSpec,
        load_backbone: Callable[[], FeatureExtractor],
        folder: Path,
        total: int,
        report: ProgressCallback,
    ) -> ShardRecords:
        """Commit each shard of `parts`, images (n, 28, 28) by the shard's number; returns their records.

        total: rows of the whole entry; report: progress in rows of it.
        """


class Features:
    """A finished cache entry: (N, D) float16 in memory-mapped shards, verified against the manifest's digests."""

    def __init__(self, folder: Path, rows: int, width: int, shard_rows: int) -> None:
        self.folder, self.shape, self.shard_rows = folder, (rows, width), shard_rows

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def shards(self) -> list[np.memmap[Any, np.dtype[np.float16]]]:
        count = -(-len(self) // self.shard_rows)
        return [np.load(_shard_path(self.folder, i), mmap_mode="r") for i in range(count)]

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """Rows in the order asked for, (n, D) float16.

        They are read, not mapped. Linux (6.18) keeps a file that has just been written in large pieces and maps a whole
        piece for a single row, so that whole entries would count as this process's memory.
        """
        out = np.empty((len(rows), self.shape[1]), np.float16)
        shard, size = rows // self.shard_rows, out.itemsize * out.shape[1]
        for i in np.unique(shard):
            path, places = _shard_path(self.folder, i), np.flatnonzero(shard == i)
            starts = self.shards[i].offset + size * (rows[places] - i * self.shard_rows)
            with path.open("rb", buffering=0) as file:
                for place, start in zip(places, starts.tolist(), strict=True):
                    file.seek(start)
                    if file.readinto(out[place]) != size:
                        raise AttireError(path, "a row is missing: the file was cut off", do="start the command again")
        return out

    def read(self, rows: NDArray[np.int64], out: NDArray[np.float16]) -> None:
        """Read rows in ascending order into `out` (n, D), giving mapped pages back shard by shard."""
        ends = np.searchsorted(rows, self.shard_rows * np.arange(1, len(self.shards) + 1))
        start = 0
        for i, end in enumerate(ends.tolist()):
            if end > start:
                np.take(self.shards[i], rows[start:end] - i * self.shard_rows, 0, out=out[start:end], mode="clip")
                files.release_pages(self.shards[i])
            start = end

    def blocks(self, rows: int = 2048) -> Iterator[NDArray[np.float16]]:
        """All rows in order, a block at a time."""
        for start in range(0, len(self), rows):
            yield self.gather(np.arange(start, min(start + rows, len(self))))


def _shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.npy"


def cache_folder() -> Path:
    return files.cache_dir() / "features"


def extract(
    images: NDArray[np.uint8],
    images_digest: str,
    spec: FeatureSpec,
    load_backbone: Callable[[], FeatureExtractor],
    progress: ProgressCallback | None = None,
    extract_shards: ShardExtractor | None = None,
) -> Features:
    """Features of all images, from the cache where it has them.

    images: (N, 28, 28) uint8; extract_shards: computes what is missing; None: this process. Present shards are
    verified; a damaged one is set aside and computed again with one warning. Two processes that want the same entry
    take turns; the backbone is loaded only when something is missing. An entry that another machine shares is pulled
    first, and a new one is shared; see `remote_cache`.
    """
    folder = cache_folder() / spec.key(images_digest)
    report = progress or (lambda done, total: None)
    with files.lock(folder.with_suffix(".lock")):
        starts = range(0, len(images), spec.shard_rows)
        shards = [(_shard_path(folder, i), min(spec.shard_rows, len(images) - start)) for i, start in enumerate(starts)]
        remote_cache.pull(folder, _describe(images_digest, spec, len(images)), shards, report)
        records = verify_shards(folder, len(images), spec)
        parts = {i: images[start : start + spec.shard_rows] for i, start in enumerate(starts) if i not in records}
        if parts:
            need = 2 * spec.width * sum(len(part) for part in parts.values())
            files.check_room(folder, need, "the features", "make room, or name another disk's folder in ATTIRE_CACHE")
            records |= (extract_shards or _extract_shards)(parts, spec, load_backbone, folder, len(images), report)
        if parts or not (folder / _MANIFEST).exists():
            _write_manifest(folder, images_digest, spec, records)
        for record in folder.glob("shard-*.json"):  # the manifest now holds what these did
            record.unlink()
        remote_cache.push(folder)
    report(len(images), len(images))
    return Features(folder, len(images), spec.width, spec.shard_rows)


def _extract_shards(
    parts: dict[int, NDArray[np.uint8]],
    spec: FeatureSpec,
    load_backbone: Callable[[], FeatureExtractor],
    folder: Path,
    total: int,
    report: ProgressCallback,
) -> ShardRecords:
    """Compute shards one after another; each is written while the next one is computed."""
    done = total - sum(len(part) for part in parts.values())
    report(done, total)
    backbone, pending = load_backbone(), dict[int, "Future[dict[str, Any]]"]()
    with ThreadPoolExecutor(1, "attire-writer") as writer:  # it waits for the last shard, after Ctrl-C as well
        for i, part in parts.items():
            out = compute_shard(part, spec, backbone, lambda n, d=done: report(d + n, total))  # type: ignore[misc]
            if pending:
                pending[max(pending)].result()  # one shard waits to be written, not several
            pending[i] = writer.submit(_commit_shard, out, folder, i)
            done += len(part)
            files.release_pages(part)
    return {i: record.result() for i, record in pending.items()}


def extract_shard(
    images: NDArray[np.uint8],
    spec: FeatureSpec,
    backbone: FeatureExtractor,
    folder: Path,
    index: int,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Compute one shard and commit it by itself: pure and idempotent. Returns its record (rows, sha256).

    check: called before the commit; it raises where the shard must no longer be committed.
    """
    out = compute_shard(images, spec, backbone)
    check()
    return _commit_shard(out, folder, index)


def compute_shard(
    images: NDArray[np.uint8],
    spec: FeatureSpec,
    backbone: FeatureExtractor,
    progress: Callable[[int], None] = lambda rows: None,
) -> NDArray[np.float16]:
    """Features (n, D) float16 of (n, 28, 28) uint8 images, a batch at a time."""
    out = np.empty((len(images), spec.width), np.float16)
    step = forward_batch_size(spec.image_size)
    for start in range(0, len(images), step):
        out[start : start + step] = compute_features(images[start : start + step], spec, backbone)
        progress(min(start + step, len(images)))
    return out


def _commit_shard(out: NDArray[np.float16], folder: Path, index: int) -> dict[str, Any]:
    """Write a shard and its record, which is returned."""
    buffer = io.BytesIO()
    np.save(buffer, out)
    record = {"rows": len(out), "sha256": files.sha256(buffer.getbuffer())}
    files.write_bytes(_shard_path(folder, index), buffer.getbuffer())
    files.write_json(_shard_path(folder, index).with_suffix(".json"), record)
    return record


def forward_batch_size(image_size: int) -> int:
    """Pictures of this side in one forward pass of a backbone, within the memory limit."""
    pixels = min(_BATCH_PIXELS, memory.batch_budget() // FORWARD_BYTES_PER_PIXEL)
    return max(1, pixels // image_size**2)


def compute_features(images: NDArray[np.uint8], spec: FeatureSpec, backbone: FeatureExtractor) -> NDArray[np.float16]:
    """Features (n, D) float16 of one batch of (n, 28, 28) uint8 images."""
    pictures = torch.tensor(apply_view(images, spec.view))
    device = getattr(backbone, "device", torch.device("cpu"))
    if device.type == "cuda":  # preprocessed there: 784 bytes a picture are sent instead of 602,112 at 224 px
        pictures = pictures.pin_memory().to(device, non_blocking=True)
    with torch.inference_mode():
        features = backbone(vgg.preprocess(pictures, spec.image_size))
        return features.half().cpu().numpy()


def verify_shards(folder: Path, rows: int, spec: FeatureSpec) -> ShardRecords:
    """Records of the shards whose bytes have the recorded digest; other shards are set aside with one warning.

    A shard without a record, in an entry without a manifest, counts as missing: a process was killed between writing
    the shard and writing its record.
    """
    records, damaged, finished = {}, 0, (folder / _MANIFEST).exists()
    for i, start in enumerate(range(0, rows, spec.shard_rows)):
        path = _shard_path(folder, i)
        if not path.exists():
            continue
        record = _read_record(folder, i)
        expected = min(spec.shard_rows, rows - start)
        if record and record["rows"] == expected and files.sha256_file(path) == record["sha256"]:
            records[i] = record
        elif record or finished:
            path.replace(path.with_suffix(".damaged"))
            damaged += 1
    if damaged:
        warnings.warn(
            f"{folder}: {damaged} damaged shard{'s' if damaged > 1 else ''} set aside as *.damaged and made again",
            AttireWarning,
            stacklevel=3,
        )
    return records


def _read_record(folder: Path, index: int) -> dict[str, Any] | None:
    """A shard's record from the manifest, else from its own file; None where neither is sound."""
    for path, pick in ((folder / _MANIFEST, True), (_shard_path(folder, index).with_suffix(".json"), False)):
        try:
            value = files.read_json(path) if path.exists() else {}
            record = value["shards"][index] if pick and value else value
            if isinstance(record["rows"], int) and isinstance(record["sha256"], str):
                return dict(record)
        except (AttireError, KeyError, IndexError, TypeError):
            continue
    return None


def _write_manifest(folder: Path, images_digest: str, spec: FeatureSpec, records: ShardRecords) -> None:
    """Written last: it makes the entry a finished one."""
    shards = [records[i] for i in sorted(records)]
    about = _describe(images_digest, spec, sum(shard["rows"] for shard in shards))
    files.write_json(folder / _MANIFEST, {"schema": 1, **about, "shards": shards})


def _describe(images_digest: str, spec: FeatureSpec, rows: int) -> dict[str, Any]:
    """What a manifest says of its entry besides the shards."""
    return {"images": images_digest, "rows": rows, "width": spec.width, **asdict(spec)}


@dataclass(frozen=True)
class CacheEntry:
    """One line of `attire cache`; the manifest of an unfinished entry is empty."""

    key: str
    size: int  # bytes
    manifest: dict[str, Any]

    @property
    def finished(self) -> bool:
        return bool(self.manifest)

    @property
    def rows(self) -> int:
        count: int = self.manifest["rows"] if self.finished else 0
        return count

    def describe(self) -> str:
        if not self.finished:
            return "unfinished: an extraction was stopped, and goes on when it is asked for again"
        about = self.manifest
        pool = f" pooled to {about['pool']}" if about["pool"] else ""
        kind = f"{about['view']}, {about['precision']} {about['backend']}"
        return f"{self.rows:,} images, {about['freeze_to']} at {about['image_size']} px{pool}, {kind}"

    def to_json(self) -> dict[str, Any]:
        manifest = {key: value for key, value in self.manifest.items() if key != "shards"}
        about = {"bytes": self.size, "rows": self.rows, "finished": self.finished}
        return {"key": self.key, **about, "manifest": manifest}


def cache_entries() -> list[CacheEntry]:
    entries = []
    for folder in sorted(path for path in cache_folder().glob("*") if path.is_dir()):
        entry = CacheEntry(folder.name, sum(path.stat().st_size for path in folder.iterdir()), {})
        with suppress(AttireError, KeyError, TypeError, ValueError):  # a damaged manifest counts as none
            finished = replace(entry, manifest=files.read_json(folder / _MANIFEST))
            finished.describe()
            entry = finished
        entries.append(entry)
    return entries


def delete_entry(key: str) -> int:
    """Remove one entry by its key or a unique beginning of it; returns the bytes freed.

    Raises AttireError where no entry or several entries begin with it.
    """
    entries = [entry for entry in cache_entries() if key and entry.key.startswith(key)]
    if len(entries) != 1:
        raise AttireError("cache", f"{len(entries) or 'no'} entries begin with {key!r}", do="see: attire cache")
    folder = cache_folder() / entries[0].key
    with files.lock(folder.with_suffix(".lock")):
        for path in sorted(folder.iterdir(), key=lambda path: path.name != _MANIFEST):  # the manifest first
            path.unlink()
        folder.rmdir()
    folder.with_suffix(".lock").unlink(missing_ok=True)
    return entries[0].size
