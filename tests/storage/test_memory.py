"""One limit on memory: what is planned within it, and what is refused before it begins."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from attire.data.dataset import ImageDataset
from attire.errors import AttireError, UsageError
from attire.features import cache as feature_cache
from attire.features import sources
from attire.features.cache import FeatureSpec
from attire.features.sources import CachedSource
from attire.model import heads
from attire.recipes import _BEST, _CLASSIC, Recipe
from attire.storage import files, memory
from tests.command import TINY, attire


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("1500mb", 15 * 10**8), ("4096", 4096), (4096, 4096), ("7kB", 7000)],
)
def test_a_size_is_read(text: str | int, size: int) -> None:
    assert memory._parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "2 apples", "GB", "1e9", "nan", "2TB", "9" * 40, "1.2345GB", "２GB"])
def test_what_is_no_size_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="--memory-limit: expected a size such as 2GB"):
        memory._parse_size(text)


def test_without_a_limit_nothing_is_planned_smaller() -> None:
    assert feature_cache.forward_batch_size(32) == feature_cache._BATCH_PIXELS // 32**2
    assert memory.row_budget() > sources._IN_MEMORY_BYTES
    memory.reserve(10**15, "all of it")
    assert memory.row_budget() > sources._IN_MEMORY_BYTES


def test_a_limit_holds_inside_its_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_resident_memory", lambda: 600 * 10**6)
    with memory.limit_memory("1GB"):
        assert memory._spare() == 400 * 10**6
        assert feature_cache.forward_batch_size(32) == 200 * 10**6 // feature_cache.FORWARD_BYTES_PER_PIXEL // 32**2
        monkeypatch.setattr(memory, "_resident_memory", lambda: 900 * 10**6)
        assert memory._spare() == 400 * 10**6  # a plan does not change while it is carried out
        memory.reserve(300 * 10**6, "training")
        assert memory.row_budget() == 100 * 10**6
    assert memory._spare() == memory._UNLIMITED


@pytest.mark.skipif(sys.platform != "linux", reason="reads proc(5); asks glibc")
def test_freed_memory_is_kept_except_under_a_limit() -> None:
    """Blocks of 16 MB, each with a small one after it that stays: what is left of them when they are freed."""
    run = """
import sys, torch
from attire.storage import memory
with memory.limit_memory(sys.argv[1] or None):
    memory.keep_freed_memory()
    before, kept = memory._resident_memory(), []
    for _ in range(8):
        large = [torch.ones(4 * 2**20) for _ in range(4)]
        kept += [torch.ones(2**14) for _ in range(16)]
    kept.append(torch.ones(4 * 2**20))
    del large
    from pathlib import Path
    import re
    print((1024 * int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) - before) // 2**20)
"""
    left = [int(subprocess.check_output([sys.executable, "-c", run, limit], text=True)) for limit in ("", "9GB")]
    assert left[0] > 40  # the 16 MB that stay, the small ones, and what is kept for later
    assert left[1] < 32


def test_what_does_not_fit_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_resident_memory", lambda: 600 * 10**6)
    with memory.limit_memory("700MB"), pytest.raises(AttireError) as caught:
        memory.reserve(150 * 10**6, "recipe fast")
    assert str(caught.value) == (
        "--memory-limit: 700.0 MB is too little (recipe fast needs about 750.0 MB in all, 150.0 MB of them beside what "
        "is held already); give a higher one"
    )


def test_what_a_process_holds_is_measured() -> None:
    before = memory._resident_memory()
    held = np.ones(2**25, np.uint8)
    assert memory._resident_memory() - before > 2**24
    assert held.sum() == 2**25


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system counts otherwise")
def test_the_peak_is_the_process_s_own_and_not_that_of_who_started_it() -> None:
    ballast = np.ones(2**26)  # 512 MiB
    run = "from attire.storage.memory import peak_memory; a = peak_memory(); b = b'1' * 2**27; print(a, peak_memory())"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert ballast.nbytes == 2**29 <= memory.peak_memory()
    assert before > 2**24
    assert before + 2**26 < after < before + 2**28


@pytest.mark.parametrize("recipe", [_CLASSIC, _BEST], ids=lambda recipe: recipe.name)
def test_weights_are_counted_as_they_will_be(recipe: Recipe, random_weights: Path) -> None:
    shape = (recipe.conv, recipe.hidden, 10, recipe.dropout)
    if recipe.finetune_blocks:
        head: torch.nn.Module = heads.FineTunedHead.from_imagenet(
            random_weights, recipe, heads.build_head((256, 6, 6), *shape)
        )
    else:
        head = heads.build_head((512, 7, 7), *shape)
    true = sum(p.numel() for p in head.parameters())
    assert heads.parameter_count(recipe, 10) == pytest.approx(true, rel=0.001)  # without batch normalisation's
    assert heads.training_bytes(recipe, 10) > 16 * true


def test_features_that_are_read_as_needed_are_the_same(
    synthetic: ImageDataset, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)

    def backbone(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(rng.random((len(x), 2048), np.float32))

    made = feature_cache.extract(
        synthetic.images, synthetic.image_digest, FeatureSpec("block2", 16, 0, "x"), lambda: backbone
    )
    held = CachedSource([made])
    monkeypatch.setattr(memory, "_resident_memory", lambda: 0)
    with memory.limit_memory(2 * 2 * 60 * 2048 - 2):  # of which half is for rows: a byte less than they take
        read = CachedSource([made])
    assert (held.table is None, read.table is None, read.stretch) == (False, True, None)
    order = np.arange(60)[::-1].copy()
    pairs = zip(held.batches(order, 7, None), read.batches(order, 7, None), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_run_within_a_limit_is_the_run_without_one(
    small_csv: Path, weights: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_resident_memory", lambda: 0)
    for name, more in (("free", []), ("bound", ["--memory-limit", "300MB"])):
        assert attire("train", "--data", small_csv, *TINY, "--out", name, *more, "--json").status == 0
    digests = [files.read_json(here / name / "model" / "model.json")["sha256"] for name in ("free", "bound")]
    assert digests[0] == digests[1]


def test_a_limit_that_is_too_low_is_refused_before_anything_is_computed(
    small_csv: Path, weights: Path, here: Path, cache: Path
) -> None:
    done = attire("train", "--data", small_csv, *TINY, "--out", "run", "--memory-limit", "100MB", "--json")
    assert (done.status, "--memory-limit: 100.0 MB is too little (recipe" in done.error) == (1, True)
    assert not (cache / "features").exists()
    assert not (here / "run").exists()
    assert attire("train", "--data", small_csv, "--memory-limit", "much").status == 2


def test_a_disk_that_is_too_full_for_checkpoints_is_refused_before_anything_is_computed(
    small_csv: Path, weights: Path, here: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_free_bytes", lambda folder: 10**6)
    done = attire("train", "--data", small_csv, *TINY, "--out", "run", "--json")
    assert done.status == 1
    assert done.error.startswith("run: not enough room for checkpoints and bundle (")
    assert "MB needed, 1.0 MB free); make room, or give --out a folder on another disk" in done.error
    assert not (cache / "features").exists()
    assert not (here / "run").exists()
