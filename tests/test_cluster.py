"""Two real nodes on this machine: what they make is what one process makes, whoever is killed meanwhile."""

import os
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from nodes import Nodes, nodes

from attire import features, stages
from attire.features import FeatureSpec

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'attire[ray]'"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with nodes(tmp_path_factory.mktemp("nodes")) as found, pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            patch.setenv(name, found.environment[name])
        yield found


def entry(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def work(weights: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """64 shards of 16 images, and one of 5."""
    monkeypatch.setattr(features, "SHARD_BYTES", 16 * 2 * 2048)
    images = np.random.default_rng(0).integers(0, 256, (64 * 16 + 5, 28, 28), np.uint8)
    spec = FeatureSpec("block2", 16, 0, "random", "fp32")
    assert spec.shard_rows == 16
    load = partial(stages.frozen_trunk, weights, spec, torch.device("cpu"), len(images))
    return {"images": images, "images_digest": "d", "spec": spec, "load_trunk": load}


def test_what_two_nodes_extract_is_what_one_process_extracts(
    two: Nodes, work: dict[str, object], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attire.cluster import connect

    told: list[int] = []
    with connect(two.address) as cluster:
        assert cluster.nodes == 2
        made = features.extract(**work, progress=lambda done, total: told.append(done), make=cluster.extract_shards)
    assert told == sorted(told)
    assert told[-1] == 64 * 16 + 5
    monkeypatch.setenv("ATTIRE_CACHE", f"{cache}-alone")
    alone = features.extract(**work)
    assert entry(made.folder) == entry(alone.folder)
    assert len(entry(made.folder)) == 66
    assert os.listdir(made.folder.parent) == os.listdir(alone.folder.parent)
