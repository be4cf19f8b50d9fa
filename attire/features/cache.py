"""Extraction and the feature cache: what lies below the freeze boundary is computed once per image."""

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
_BATCH_PIXELS = 1_700_000  # pictures a forward pass: 1,660 of 32 px, 415 of 64, 33 of 224
FORWARD_BYTES_PER_PIXEL = 800  # that a pass holds for each of them: 617 measured, block3 at 16 px in fp32 (docs/performance.md)

FeatureExtractor = Callable[[Tensor], Tensor]  # (n, 3, S, S) normalised pictures to (n, D) float features
ProgressCallback = Callable[[int, int], None]  # (rows done, rows in all)
ShardRecords = dict[int, dict[str, Any]]  # of a shard's number its line: rows, sha256


@dataclass(frozen=True)
class FeatureSpec:
    """All that decides a feature besides the image itself: with the images' digest it is the cache key."""

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
        return int(np.prod(feature_shape(self.freeze_to, self.image_size, self.pool)))

    @property
    def shard_rows(self) -> int:
        """The largest power of two whose rows fit SHARD_BYTES."""
        return 1 << max(0, (_SHARD_BYTES // (2 * self.width)).bit_length() - 1)

    def key(self, images_digest: str) -> str:
        return files.sha256(files.canonical_json({"images": images_digest, **asdict(self)}))[:32]


class ShardExtractor(Protocol):
    """Makes the missing shards of an entry: `extract_shards` in this process, `cluster` in those of other machines."""

    def __call__(
        self,
        parts: dict[int, NDArray[np.uint8]],
        spec: FeatureSpec,
        load_backbone: Callable[[], FeatureExtractor],
        folder: Path,
        total: int,
        report: ProgressCallback,
    ) -> ShardRecords:
        """Each shard of `parts`, committed with its own ledger line; those lines."""


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

        They are read, not mapped: a file that has just been written Linux (6.18) keeps in large pieces, and it maps all
        of one for a single row, so that whole entries would count as this process's memory.
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
        """Rows in ascending order into `out` (n, D); mapped pages are given back as it goes."""
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
    make: ShardExtractor | None = None,
) -> Features:
    """Features of all images, from the cache where it has them.

    images: (N, 28, 28) uint8; make: who makes what is missing, None: this process. Missing shards are computed,
    present ones verified; a damaged shard is set aside and made again with one warning. Two processes that want the
    same entry take turns; the backbone is loaded only when something is missing. An entry that another machine shares is
    pulled first, a new one is shared; see `shared`.
    """
    folder = cache_folder() / spec.key(images_digest)
    with files.lock(folder.with_suffix(".lock")):
        starts = range(0, len(images), spec.shard_rows)
        shards = [(_shard_path(folder, i), min(spec.shard_rows, len(images) - start)) for i, start in enumerate(starts)]
        remote_cache.pull(folder, _made_by(images_digest, spec, len(images)), shards, progress)
        ledger = verify_shards(folder, len(images), spec)
        missing = [i for i in range(len(starts)) if i not in ledger]
        report = progress or (lambda done, total: None)
        if missing:
            parts = {i: images[starts[i] : starts[i] + spec.shard_rows] for i in missing}
            need = 2 * spec.width * sum(len(part) for part in parts.values())
            files.check_room(folder, need, "the features", "make room, or name another disk's folder in ATTIRE_CACHE")
            ledger |= (make or _extract_shards)(parts, spec, load_backbone, folder, len(images), report)
        if missing or not (folder / "MANIFEST.json").exists():
            _write_manifest(folder, images_digest, spec, ledger)
        for line in folder.glob("shard-*.json"):  # the manifest holds what the shards' own ledger lines did
            line.unlink()
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
    """Shards by their number, one after another; each is written while the next one is computed."""
    done = total - sum(len(part) for part in parts.values())
    report(done, total)
    backbone, pending = load_backbone(), dict[int, "Future[dict[str, Any]]"]()
    with ThreadPoolExecutor(1, "attire-writer") as writer:  # its end waits for the last one, after Ctrl-C as well
        for i, part in parts.items():
            out = compute_shard(part, spec, backbone, lambda n, d=done: report(d + n, total))  # type: ignore[misc]
            if pending:
                pending[max(pending)].result()  # never more than one: what is computed may not pile up
            pending[i] = writer.submit(_commit_shard, out, folder, i)
            done += len(part)
            files.release_pages(part)
    return {i: line.result() for i, line in pending.items()}


def extract_shard(
    images: NDArray[np.uint8],
    spec: FeatureSpec,
    backbone: FeatureExtractor,
    folder: Path,
    index: int,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Compute one shard and commit it by itself: pure and idempotent. Returns its ledger line (rows, sha256).

    check: raises where it must no longer be committed once it is computed.
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
    """(n, D) float16, a batch at a time."""
    out = np.empty((len(images), spec.width), np.float16)
    step = forward_batch_size(spec.image_size)
    for start in range(0, len(images), step):
        out[start : start + step] = compute_features(images[start : start + step], spec, backbone)
        progress(min(start + step, len(images)))
    return out


def _commit_shard(out: NDArray[np.float16], folder: Path, index: int) -> dict[str, Any]:
    """Write a shard and its ledger line, which is returned."""
    buffer = io.BytesIO()
    np.save(buffer, out)
    line = {"rows": len(out), "sha256": files.sha256(buffer.getbuffer())}
    files.write_bytes(_shard_path(folder, index), buffer.getbuffer())
    files.write_json(_shard_path(folder, index).with_suffix(".json"), line)
    return line


def forward_batch_size(image_size: int) -> int:
    pixels = min(_BATCH_PIXELS, memory.batch_budget() // FORWARD_BYTES_PER_PIXEL)
    return max(1, pixels // image_size**2)


def compute_features(images: NDArray[np.uint8], spec: FeatureSpec, backbone: FeatureExtractor) -> NDArray[np.float16]:
    """(n, D) float16 features of (n, 28, 28) uint8 images, by the one path of cache, prediction and training."""
    pictures = torch.tensor(apply_view(images, spec.view))
    device = getattr(backbone, "device", torch.device("cpu"))
    if device.type == "cuda":  # 784 bytes a picture instead of 602,112 at 224 px: it is prepared there
        pictures = pictures.pin_memory().to(device, non_blocking=True)
    with torch.inference_mode():
        features = backbone(vgg.preprocess(pictures, spec.image_size))
        return features.half().cpu().numpy()


def verify_shards(folder: Path, rows: int, spec: FeatureSpec) -> ShardRecords:
    """Ledger lines of the shards on disk whose bytes are what their digests say; the rest is set aside.

    A shard that no line speaks of, in an entry without a manifest, was written by a process that was killed before it
    could write the line: it is only missing.
    """
    ledger, damaged, finished = {}, 0, (folder / "MANIFEST.json").exists()
    for i, start in enumerate(range(0, rows, spec.shard_rows)):
        path = _shard_path(folder, i)
        if not path.exists():
            continue
        line = _ledger_line(folder, i)
        expected = min(spec.shard_rows, rows - start)
        if line and line["rows"] == expected and files.sha256_file(path) == line["sha256"]:
            ledger[i] = line
        elif line or finished:
            path.replace(path.with_suffix(".damaged"))
            damaged += 1
    if damaged:
        warnings.warn(
            f"{folder}: {damaged} damaged shard{'s' if damaged > 1 else ''} set aside as *.damaged and made again",
            AttireWarning,
            stacklevel=3,
        )
    return ledger


def _ledger_line(folder: Path, index: int) -> dict[str, Any] | None:
    """The line from the manifest, else from the shard's own file; None where neither is sound."""
    for path, pick in ((folder / "MANIFEST.json", True), (_shard_path(folder, index).with_suffix(".json"), False)):
        try:
            value = files.read_json(path) if path.exists() else {}
            line = value["shards"][index] if pick and value else value
            if isinstance(line, dict) and isinstance(line.get("rows"), int) and isinstance(line.get("sha256"), str):
                return line
        except (AttireError, KeyError, IndexError, TypeError):
            continue
    return None


def _write_manifest(folder: Path, images_digest: str, spec: FeatureSpec, ledger: ShardRecords) -> None:
    """Written last."""
    lines = [ledger[i] for i in sorted(ledger)]
    made = _made_by(images_digest, spec, sum(line["rows"] for line in lines))
    files.write_json(folder / "MANIFEST.json", {"schema": 1, **made, "shards": lines})


def _made_by(images_digest: str, spec: FeatureSpec, rows: int) -> dict[str, Any]:
    """What a manifest says of its entry."""
    return {"images": images_digest, "rows": rows, "width": spec.width, **asdict(spec)}


@dataclass(frozen=True)
class CacheEntry:
    """One line of `attire cache`: what made the entry, how large it is, whether it is finished."""

    key: str
    size: int  # bytes
    rows: int
    finished: bool
    made_by: dict[str, Any]

    def describe(self) -> str:
        if not self.finished:
            return "unfinished: an extraction was stopped, and goes on when it is asked for again"
        made = self.made_by
        pool = f" pooled to {made['pool']}" if made["pool"] else ""
        kind = f"{made['view']}, {made['precision']} {made['backend']}"
        return f"{self.rows:,} images, {made['freeze_to']} at {made['image_size']} px{pool}, {kind}"

    def to_json(self) -> dict[str, Any]:
        made = {key: value for key, value in self.made_by.items() if key != "shards"}
        return {"key": self.key, "bytes": self.size, "rows": self.rows, "finished": self.finished, "made_by": made}


def cache_entries() -> list[CacheEntry]:
    entries = []
    for folder in sorted(path for path in cache_folder().glob("*") if path.is_dir()):
        size = sum(path.stat().st_size for path in folder.iterdir())
        entry = CacheEntry(folder.name, size, 0, False, {})
        with suppress(AttireError, KeyError, TypeError, ValueError):  # of a damaged manifest no more is told
            manifest = files.read_json(folder / "MANIFEST.json")
            told = replace(entry, rows=manifest["rows"], finished=True, made_by=manifest)
            told.describe()
            entry = told
        entries.append(entry)
    return entries


def delete_entry(key: str) -> int:
    """Remove one entry by its key or a unique beginning of it; returns the bytes freed."""
    found = [entry for entry in cache_entries() if key and entry.key.startswith(key)]
    if len(found) != 1:
        raise AttireError("cache", f"{len(found) or 'no'} entries begin with {key!r}", do="see: attire cache")
    folder = cache_folder() / found[0].key
    with files.lock(folder.with_suffix(".lock")):
        for path in sorted(folder.iterdir(), key=lambda path: path.name != "MANIFEST.json"):  # the manifest first
            path.unlink()
        folder.rmdir()
    folder.with_suffix(".lock").unlink(missing_ok=True)
    return found[0].size


def _with_view(spec: FeatureSpec, view: str) -> FeatureSpec:
    return replace(spec, view=view)
