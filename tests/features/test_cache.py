"""The cache: computed once, verified always, resumed where it stopped, mended where it is damaged."""

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from attire.data.dataset import ImageDataset
from attire.errors import AttireError, AttireWarning
from attire.features import cache
from attire.features.cache import Features, FeatureSpec, extract

SPEC = FeatureSpec("block2", 16, 0, "w" * 64)  # 4 x 4 x 128 = 2,048 features
Shrunk = Callable[[], "CountingBackbone"]


class CountingBackbone:
    """2,048 numbers that depend on every pixel; counts its calls, and stops at call `fail_at`."""

    def __init__(self, fail_at: int = 0) -> None:
        self.calls, self.fail_at = 0, fail_at

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        mixed = torch.linspace(-1, 1, x[0].numel() * 2).reshape(2, -1)
        return torch.cat([(x.flatten(1) @ row[:, None]).expand(-1, 1024) for row in mixed], 1) / 100


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen rows a shard, so that sixty images fill four; a batch a shard."""
    monkeypatch.setattr(cache, "_SHARD_BYTES", 16 * 2 * 2048)


def run(data: ImageDataset, backbone: CountingBackbone, spec: FeatureSpec = SPEC) -> Features:
    return extract(data.images, data.image_digest, spec, lambda: backbone)


def rows_of(features: Features) -> np.ndarray:
    return np.concatenate(list(features.blocks(7)))


def test_features_are_computed_once(synthetic: ImageDataset) -> None:
    first, second = CountingBackbone(), CountingBackbone()
    made, again = run(synthetic, first), run(synthetic, second)
    assert (first.calls, second.calls) == (4, 0)
    assert made.shape == (60, 2048)
    assert np.array_equal(rows_of(made), rows_of(again))
    assert np.array_equal(rows_of(made), cache.compute_features(synthetic.images, SPEC, CountingBackbone()))


def test_whatever_decides_a_feature_is_in_the_key() -> None:
    changed = {"freeze_to": "block3", "image_size": 32, "pool": 1, "weights": "v", "precision": "bf16"}
    changed |= {"view": "flip", "dtype": "bfloat16", "backend": "openvino-int8"}
    keys = {SPEC.key("a"), SPEC.key("b"), replace(SPEC, preprocess=99).key("a")}
    keys |= {replace(SPEC, **{name: value}).key("a") for name, value in changed.items()}  # type: ignore[arg-type]
    assert len(keys) == 3 + len(changed)
    assert {field.name for field in fields(SPEC)} == {*changed, "preprocess"}
    assert SPEC.key("a") == FeatureSpec("block2", 16, 0, "w" * 64).key("a")


@pytest.mark.parametrize("fail_at", [1, 2, 4])
def test_a_stopped_extraction_redoes_at_most_one_shard(fail_at: int, synthetic: ImageDataset) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(synthetic, CountingBackbone(fail_at))
    for entry in cache.cache_entries():  # none where not one shard was finished
        assert not entry.finished
        assert "unfinished" in entry.describe()
    rest = CountingBackbone()
    resumed = run(synthetic, rest)
    assert rest.calls == 4 - (fail_at - 1)
    assert np.array_equal(rows_of(resumed), cache.compute_features(synthetic.images, SPEC, CountingBackbone()))
    assert sorted(path.suffix for path in resumed.folder.iterdir()) == [".json"] + 4 * [".npy"]  # the manifest alone


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [flip_byte, cut, append])
def test_a_damaged_shard_is_set_aside_and_made_again_with_one_warning(
    damage: Callable[[Path], None], synthetic: ImageDataset
) -> None:
    made = run(synthetic, CountingBackbone())
    whole = rows_of(made)
    damage(cache._shard_path(made.folder, 2))
    again = CountingBackbone()
    with pytest.warns(AttireWarning, match=r"1 damaged shard set aside as \*\.damaged and made again") as caught:
        mended = run(synthetic, again)
    assert (len(caught), again.calls) == (1, 1)
    assert np.array_equal(rows_of(mended), whole)
    assert (made.folder / "shard-00002.damaged").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(synthetic, CountingBackbone(1))  # mended: nothing is computed, nothing is warned of


@pytest.mark.parametrize("text", ["{", "[]", '{"shards": 3}', '{"shards": [{"rows": "../../x", "sha256": 1}]}'])
def test_a_damaged_manifest_costs_the_entry_but_nothing_else(text: str, synthetic: ImageDataset) -> None:
    made = run(synthetic, CountingBackbone())
    whole = rows_of(made)
    (made.folder / "MANIFEST.json").write_text(text)
    with pytest.warns(AttireWarning, match="damaged shards set aside"):
        mended = run(synthetic, CountingBackbone())
    assert np.array_equal(rows_of(mended), whole)


def test_a_manifest_cannot_point_elsewhere(synthetic: ImageDataset, tmp_path: Path) -> None:
    """Shards have fixed names: whatever a manifest says besides digests and rows is not followed."""
    made = run(synthetic, CountingBackbone())
    manifest = json.loads((made.folder / "MANIFEST.json").read_text())
    for line in manifest["shards"]:
        line["file"] = "../../../outside.npy"
    (made.folder / "MANIFEST.json").write_text(json.dumps(manifest))
    assert np.array_equal(rows_of(run(synthetic, CountingBackbone(1))), rows_of(made))
    assert not list(tmp_path.glob("*.npy"))


def test_rows_come_in_the_order_asked_for_across_shards(synthetic: ImageDataset) -> None:
    features = run(synthetic, CountingBackbone())
    whole = rows_of(features)
    order = np.array([59, 0, 17, 16, 15, 31, 0, 42])
    assert np.array_equal(features.gather(order), whole[order])
    assert np.array_equal(whole[order], np.concatenate([features.shards[i // 16][None, i % 16] for i in order]))
    assert features.gather(np.empty(0, np.int64)).shape == (0, 2048)
    path = cache._shard_path(features.folder, 1)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(AttireError, match=r"shard-00001\.npy: a row is missing: the file was cut off"):
        features.gather(order)


def test_the_other_views_are_the_mirrored_and_the_negative_image(synthetic: ImageDataset) -> None:
    backbone = CountingBackbone()
    flipped = cache.compute_features(synthetic.images, replace(SPEC, view="flip"), backbone)
    assert np.array_equal(flipped, cache.compute_features(synthetic.images[:, :, ::-1].copy(), SPEC, backbone))
    negative = cache.compute_features(synthetic.images, replace(SPEC, view="negative"), backbone)
    assert np.array_equal(negative, cache.compute_features(255 - synthetic.images, SPEC, backbone))
    assert not np.array_equal(flipped, negative)


def test_progress_is_reported_in_rows(synthetic: ImageDataset) -> None:
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))

    extract(synthetic.images, synthetic.image_digest, SPEC, CountingBackbone, progress)
    assert calls == [(0, 60), (16, 60), (32, 60), (48, 60), (60, 60), (60, 60)]
    calls.clear()
    extract(synthetic.images, synthetic.image_digest, SPEC, CountingBackbone, progress)
    assert calls == [(60, 60)]


def test_shards_hold_a_power_of_two_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_SHARD_BYTES", 16 * 2**20)
    assert FeatureSpec("block3", 32, 0, "").shard_rows == 2048
    assert FeatureSpec("block5", 224, 7, "").shard_rows == 256
    assert FeatureSpec("block1", 1024, 0, "").shard_rows == 1  # one row is larger than a shard should be


def test_the_cache_is_listed_and_entries_are_deleted(synthetic: ImageDataset) -> None:
    first = run(synthetic, CountingBackbone())
    second = run(synthetic, CountingBackbone(), replace(SPEC, view="flip"))
    entries = {entry.key: entry for entry in cache.cache_entries()}
    assert set(entries) == {first.folder.name, second.folder.name}
    entry = entries[second.folder.name]
    assert entry.describe() == "60 images, block2 at 16 px, flip, fp32 torch"
    assert entry.size == sum(path.stat().st_size for path in second.folder.iterdir())
    assert entry.to_json()["manifest"]["view"] == "flip"
    assert cache.delete_entry(first.folder.name[:8]) == entries[first.folder.name].size
    assert [left.key for left in cache.cache_entries()] == [second.folder.name]


@pytest.mark.parametrize("key", ["", "zzz"])
def test_an_unknown_or_unclear_key_deletes_nothing(key: str, synthetic: ImageDataset) -> None:
    run(synthetic, CountingBackbone())
    with pytest.raises(AttireError, match=f"cache: no entries begin with '{key}'; see: attire cache"):
        cache.delete_entry(key)
    assert len(cache.cache_entries()) == 1


def test_rows_in_order_are_read_across_shards_into_place(tmp_path: Path) -> None:
    table = np.arange(50 * 8, dtype=np.float16).reshape(50, 8)
    for i, start in enumerate(range(0, 50, 16)):
        np.save(cache._shard_path(tmp_path, i), table[start : start + 16])
    stored = cache.Features(tmp_path, 50, 8, 16)
    for rows in ([0, 15, 16, 31, 49], list(range(50)), [40], []):
        out = np.empty((len(rows), 8), np.float16)
        stored.read(np.array(rows, np.int64), out)
        assert np.array_equal(out, table[rows])
