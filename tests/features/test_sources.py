"""Cached rows, from memory or from disk, and rows computed on the fly are the same numbers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from attire.data.dataset import ImageDataset
from attire.features import cache, sources
from attire.features.cache import Features, FeatureSpec
from attire.features.sources import CachedSource, OnTheFlySource, Standardiser
from attire.model import vgg
from attire.recipes import FAST
from attire.training.sampler import epoch_order

SPEC = FeatureSpec("block2", 16, 0, "w" * 64)
ORDER = np.array([5, 59, 0, 31, 32, 7, 5])
MASK = np.array([True, False, True, True, False, False, False])


@pytest.fixture
def backbone(random_weights: Path) -> vgg.Backbone:
    return vgg.Backbone(vgg.vgg16(random_weights, "block2", 0, nn.Sequential()), torch.device("cpu"), "fp32")


@pytest.fixture
def views(synthetic: ImageDataset, backbone: vgg.Backbone) -> list[Features]:
    def made(view: str) -> Features:
        spec = replace(SPEC, view=view)
        return cache.extract(synthetic.images, synthetic.image_digest, spec, lambda: backbone)

    return [made("plain"), made("flip")]


def gather(source: CachedSource | OnTheFlySource, mask: np.ndarray | None = None) -> torch.Tensor:
    return torch.cat(list(source.batches(ORDER, 3, mask)))


def test_rows_from_memory_from_disk_and_on_the_fly_are_equal(
    views: list[Features], backbone: vgg.Backbone, synthetic: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = CachedSource(views)
    monkeypatch.setattr(sources, "_IN_MEMORY_BYTES", 0)
    from_disk = CachedSource(views)
    assert in_memory.table is not None
    assert from_disk.table is None
    on_the_fly = OnTheFlySource(sources.GarmentDataset(synthetic.images, synthetic.labels, 16), backbone, 2)
    for mask in (None, MASK):
        expected = gather(in_memory, mask)
        assert expected.shape == (7, 2048)
        assert torch.equal(gather(from_disk, mask), expected)
        assert torch.allclose(gather(on_the_fly, mask), expected, rtol=2e-3, atol=2e-3)  # batches of other sizes


def test_the_mask_picks_the_mirrored_view(views: list[Features]) -> None:
    rows = gather(CachedSource(views), MASK)
    plain, mirrored = (torch.from_numpy(view.gather(ORDER)).float() for view in views)
    assert torch.equal(rows, torch.where(torch.from_numpy(MASK)[:, None], mirrored, plain))
    assert not torch.equal(plain, mirrored)


def test_without_a_mirrored_view_the_mask_has_nothing_to_pick(views: list[Features]) -> None:
    alone = CachedSource([views[0]])
    assert torch.equal(gather(alone, MASK), gather(alone))


def test_a_standardiser_brings_the_measured_rows_to_mean_0_and_deviation_1() -> None:
    rows = torch.randn(400, 20, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 21) + 5
    rows[:, 3] = 7  # a feature that never varies
    scaled = Standardiser.fit(iter([rows[:150], rows[150:]]))(rows.clone())
    assert scaled.mean(0).abs().max() < 1e-4
    deviation = scaled.std(0, correction=0)
    assert deviation[3] == 0
    assert ((deviation[4:] > 0.8) & (deviation[4:] <= 1)).all()  # a little less: small deviations are not blown up
    assert torch.isfinite(scaled).all()


def test_without_moments_nothing_changes() -> None:
    rows = torch.randn(5, 4)
    assert Standardiser()(rows) is rows


def test_a_source_standardises_what_it_gives(views: list[Features]) -> None:
    source = CachedSource([views[0]])
    plain = gather(source)
    source.standardise = Standardiser.fit(iter([plain]))
    assert torch.allclose(gather(source), Standardiser.fit(iter([plain]))(plain.clone()))


def test_on_the_fly_rows_draw_nothing_from_the_global_random_state(
    backbone: vgg.Backbone, synthetic: ImageDataset
) -> None:
    on_the_fly = OnTheFlySource(sources.GarmentDataset(synthetic.images, synthetic.labels, 16), backbone, 8)
    before = torch.get_rng_state()
    gather(on_the_fly, MASK)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_source_beyond_memory_reads_windows_of_stretches_and_gives_the_same_rows(
    views: list[Features], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = CachedSource(views)
    assert in_memory.stretch is None
    monkeypatch.setattr(sources, "_IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(sources, "_STREAMED_BYTES", 0)
    monkeypatch.setattr(sources, "_STRETCH_BYTES", 4 * 4096)
    monkeypatch.setattr(sources, "WINDOW_BYTES", 12 * 4096)
    streamed = CachedSource(views)
    assert streamed.stretch == (4, 12)
    order, mirrored = epoch_order(np.arange(60), FAST, 0, streamed.stretch)
    for mask in (None, mirrored):
        pairs = zip(in_memory.batches(order, 5, mask), streamed.batches(order, 5, mask), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
