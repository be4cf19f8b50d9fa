"""The shared feature cache: pulled instead of computed, pushed once, never trusted unseen, never in the way."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from attire.data.dataset import ImageDataset
from attire.errors import AttireWarning, UsageError
from attire.features import cache, remote_cache
from attire.storage import files
from attire.storage.stores import StorageLocation, StoreError, open_location
from tests.features.test_cache import SPEC, CountingBackbone, rows_of, run, small_shards  # noqa: F401  (a fixture)


@pytest.fixture(params=["folder", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StorageLocation:
    root = str(tmp_path / "shared") if request.param == "folder" else request.getfixturevalue("bucket")
    monkeypatch.setenv(remote_cache._VARIABLE, f"{root}/features/")
    return open_location(f"{root}/features")


@pytest.fixture
def entry(remote: StorageLocation, synthetic: ImageDataset) -> StorageLocation:
    """What the first machine shared; the local cache is empty again."""
    run(synthetic, CountingBackbone())
    forget()
    return open_location(f"{remote.url}/{SPEC.key(synthetic.image_digest)}")


def forget() -> None:
    shutil.rmtree(cache.cache_folder())


def test_what_one_machine_made_another_pulls(entry: StorageLocation, synthetic: ImageDataset) -> None:
    assert sorted(name[:11] for name in entry.sizes()) == ["MANIFEST.js", *(f"shard-{i:05d}" for i in range(4))]
    backbone, calls = CountingBackbone(), list[tuple[int, int]]()

    def progress(done: int, total: int) -> None:
        calls.append((done, total))

    pulled = cache.extract(synthetic.images, synthetic.image_digest, SPEC, lambda: backbone, progress)
    assert backbone.calls == 0
    assert calls[:4] == [(16, 60), (32, 60), (48, 60), (60, 60)]
    assert np.array_equal(rows_of(pulled), cache.compute_features(synthetic.images, SPEC, CountingBackbone()))
    assert sorted(path.name for path in pulled.folder.iterdir()) == [
        "MANIFEST.json",
        *(f"shard-{i:05d}.npy" for i in range(4)),
    ]


def test_a_finished_entry_is_never_written_again(entry: StorageLocation, synthetic: ImageDataset) -> None:
    entry.write("MANIFEST.json", entry.read("MANIFEST.json").replace(b'"schema": 1', b'"schema": 1, "first": true'))
    run(synthetic, CountingBackbone())
    run(synthetic, CountingBackbone())
    assert b'"first": true' in entry.read("MANIFEST.json")


@pytest.mark.parametrize("harm", ["flipped", "cut off", "gone"])
def test_a_damaged_shard_is_computed_here(harm: str, entry: StorageLocation, synthetic: ImageDataset) -> None:
    name = next(name for name in sorted(entry.sizes()) if name.startswith("shard-00002"))
    data = entry.read(name)
    if harm == "gone":
        entry.remove(name)
    else:
        entry.write(name, data[:-1] if harm == "cut off" else data[:500] + bytes([data[500] ^ 1]) + data[501:])
    backbone = CountingBackbone()
    line = rf"^{remote_cache._VARIABLE}: .*{name}: damaged or missing; features are computed here$"
    with pytest.warns(AttireWarning, match=line) as caught:
        features = run(synthetic, backbone)
    assert (backbone.calls, len(caught)) == (1, 1)
    assert np.array_equal(rows_of(features), cache.compute_features(synthetic.images, SPEC, CountingBackbone()))


@pytest.mark.parametrize("text", [b"", b"[]", b'{"shards": []}', b'{"shards": 1}'])
def test_a_damaged_manifest_is_as_good_as_none(text: bytes, entry: StorageLocation, synthetic: ImageDataset) -> None:
    entry.write("MANIFEST.json", text)
    backbone = CountingBackbone()
    with pytest.warns(AttireWarning, match="damaged, or not of these features; delete it there; features are computed"):
        run(synthetic, backbone)
    assert backbone.calls == 4


def test_features_of_other_images_are_not_taken(entry: StorageLocation, synthetic: ImageDataset) -> None:
    """Whatever lies under the key: the manifest must say of itself what the key is made of."""
    lied = entry.read("MANIFEST.json").replace(synthetic.image_digest.encode(), b"0" * 64)
    entry.write("MANIFEST.json", lied)
    with pytest.warns(AttireWarning, match="not of these features"):
        run(synthetic, CountingBackbone())


def test_a_push_that_was_stopped_is_finished_later(
    remote: StorageLocation, synthetic: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = StorageLocation.write, list[str]()

    def write(self: StorageLocation, name: str, data: bytes) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(name)
        real(self, name, data)

    monkeypatch.setattr(remote_cache, "_THREADS", 1)
    monkeypatch.setattr(StorageLocation, "write", write)
    with pytest.raises(KeyboardInterrupt):
        run(synthetic, CountingBackbone())
    monkeypatch.setattr(StorageLocation, "write", real)
    at = open_location(f"{remote.url}/{SPEC.key(synthetic.image_digest)}")
    assert "MANIFEST.json" not in at.sizes()
    backbone = CountingBackbone()
    run(synthetic, backbone)
    assert backbone.calls == 0
    assert len(at.sizes()) == 5


def test_two_machines_that_made_it_differently_do_not_mix(entry: StorageLocation, synthetic: ImageDataset) -> None:
    """Another kernel rounds otherwise: its shards have other digests, and so other names."""
    there = entry.sizes()
    entry.remove("MANIFEST.json")
    run(synthetic, Doubled())
    assert len(entry.sizes()) == len(there) + 4
    forget()
    features = run(synthetic, CountingBackbone(fail_at=1))
    assert np.array_equal(rows_of(features), cache.compute_features(synthetic.images, SPEC, Doubled()))


class Doubled(CountingBackbone):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


def test_without_the_store_work_goes_on(synthetic: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv(remote_cache._VARIABLE, "s3://bucket/features")
    with pytest.warns(AttireWarning, match="the store did not serve it .*; features are computed here"):
        run(synthetic, CountingBackbone())
    run(synthetic.subset(range(20)), CountingBackbone())  # it is not asked again: here a warning would be an error


def test_who_may_not_write_goes_on_reading(
    entry: StorageLocation, synthetic: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: StorageLocation, name: str, data: bytes) -> None:
        raise StoreError(self.url_of(name), "the store did not serve it", "ACCESS_DENIED")

    monkeypatch.setattr(StorageLocation, "write", refused)
    with pytest.warns(AttireWarning, match="ACCESS_DENIED.*; new features are not shared"):
        run(synthetic.subset(range(20)), CountingBackbone())
    run(synthetic.subset(range(30)), CountingBackbone())  # warned of once
    backbone = CountingBackbone()
    run(synthetic, backbone)
    assert backbone.calls == 0


def test_a_name_that_cannot_be_meant_is_an_error(synthetic: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remote_cache._VARIABLE, "ftp://host/x")
    with pytest.raises(UsageError, match="ftp:// is not known"):
        run(synthetic, CountingBackbone())


def test_nothing_is_shared_unless_it_is_asked_for(synthetic: ImageDataset, tmp_path: Path) -> None:
    run(synthetic, CountingBackbone())
    assert remote_cache._open_shared("key", set()) is None
    assert files.cache_dir().parent == tmp_path
    assert not (tmp_path / "shared").exists()
