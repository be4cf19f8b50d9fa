"""Bytes that change on the disk: in whatever Attire keeps, each change is noticed before it could do harm."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from attire.data.dataset import ImageDataset
from attire.errors import AttireError
from attire.evaluation import run_result
from attire.export.export import export
from attire.features import cache
from attire.features.cache import FeatureSpec
from attire.inference.classifier import Classifier, load_bundle
from attire.inference.runtimes import load_export
from attire.model import vgg
from attire.recipes import FAST
from attire.storage import files
from attire.training import checkpoints, optimiser
from tests.command import attire

PAGE = 4096


def damages(data: bytes, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """200 changed bytes, 50 cuts, 20 pages of zeros, 10 tails; what changes nothing is left out."""
    rng = np.random.default_rng(seed)
    for place, change in zip(rng.integers(0, len(data), 200).tolist(), rng.integers(1, 256, 200).tolist(), strict=True):
        yield f"byte {place} changed", data[:place] + bytes([data[place] ^ change]) + data[place + 1 :]
    for end in rng.integers(0, len(data), 50).tolist():
        yield f"cut at {end}", data[:end]
    for page in rng.integers(0, -(-len(data) // PAGE), 20).tolist():
        start, end = page * PAGE, min((page + 1) * PAGE, len(data))
        if any(data[start:end]):
            yield f"page {page} zeroed", data[:start] + bytes(end - start) + data[end:]
    for length in rng.integers(1, 2 * PAGE, 10).tolist():
        yield f"{length} bytes appended", data + rng.bytes(length)


def refused(path: Path, read: Callable[[], object]) -> None:
    """`read` raises an AttireError for each damage of the file, and nothing once it is whole again."""
    whole = path.read_bytes()
    for what, data in damages(whole):
        path.write_bytes(data)
        try:
            read()
        except AttireError:
            continue
        pytest.fail(f"{path.name}: {what}: not noticed")
    path.write_bytes(whole)
    read()


@pytest.mark.parametrize("name", ["model.safetensors", "neighbours.safetensors"])
def test_a_damaged_bundle_is_refused(name: str, finished: tuple[Path, object], tmp_path: Path) -> None:
    bundle = shutil.copytree(finished[0] / "model", tmp_path / "model")
    refused(bundle / name, lambda: load_bundle(bundle, "cpu"))


def test_a_damaged_description_of_a_bundle_is_refused_or_says_the_same(
    finished: tuple[Path, object], tmp_path: Path
) -> None:
    """JSON may change in its spaces, and mean what it did."""
    bundle = shutil.copytree(finished[0] / "model", tmp_path / "model")
    path = bundle / "model.json"
    whole, meaning = path.read_bytes(), files.read_json(path)
    for what, data in damages(whole):
        path.write_bytes(data)
        try:
            load_bundle(bundle, "cpu")
        except AttireError:
            continue
        assert json.loads(data) == meaning, what


@pytest.mark.parametrize("kind", ["onnx"])
def test_a_damaged_export_is_refused(kind: str, bundle: Path, synthetic: ImageDataset, tmp_path: Path) -> None:
    made = export(bundle, kind, out=tmp_path / f"network.{kind}", data=synthetic).path
    refused(made, lambda: load_export(made))


def test_a_damaged_checkpoint_is_not_gone_on_from(tmp_path: Path) -> None:
    head = torch.nn.Sequential(torch.nn.Linear(40, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    checkpoints.Checkpoints(head, optimiser.make_optimiser(head, FAST), tmp_path).save(
        checkpoints.TrainingState(epoch=1)
    )
    (path,) = checkpoints._checkpoints(tmp_path)
    refused(path, lambda: checkpoints._read_checkpoint(path))


REPORTED = [
    *run_result._DIGESTED_FILES,
    *(f"evaluation/{name}" for name in ("metrics.json", "predictions.csv", "gallery.png")),
]


@pytest.mark.parametrize("name", REPORTED)
def test_no_report_is_made_of_damaged_figures(name: str, finished: tuple[Path, object], tmp_path: Path) -> None:
    run = shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("model", "checkpoints"))
    refused(run / name, lambda: run_result.load_result(run))


def test_damaged_digests_of_a_report_are_noticed_or_say_the_same(finished: tuple[Path, object], tmp_path: Path) -> None:
    run = shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("model", "checkpoints"))
    path = run / run_result._DIGESTS_FILE
    whole, meaning = path.read_bytes(), files.read_json(path)
    for what, data in damages(whole):
        path.write_bytes(data)
        try:
            run_result.load_result(run)
        except AttireError:
            continue
        assert json.loads(data) == meaning, what


@pytest.mark.parametrize("command", ["report", "compare"])
def test_commands_refuse_damaged_figures_in_one_line(
    command: str, finished: tuple[Path, object], tmp_path: Path
) -> None:
    run = shutil.copytree(finished[0], tmp_path / "run")
    path = run / "evaluation" / "predictions.csv"
    path.write_bytes(path.read_bytes().replace(b"0.9", b"0.8", 1))
    done = attire(command, run, *([finished[0]] if command == "compare" else []))
    assert (done.status, done.error.startswith(f"{path}: damaged: its digest is not the one in ")) == (1, True)


def test_a_run_from_before_there_were_digests_is_read(finished: tuple[Path, object], tmp_path: Path) -> None:
    run = shutil.copytree(finished[0], tmp_path / "run")
    (run / run_result._DIGESTS_FILE).unlink()
    assert run_result.load_result(run).command == run_result.load_result(finished[0]).command


class Counting:
    """A backbone that counts its pictures."""

    def __init__(self, classifier: Classifier) -> None:
        self.backbone, self.pictures = vgg.Backbone(classifier.model, torch.device("cpu"), "fp32"), 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.pictures += len(x)
        return self.backbone(x)  # type: ignore[no-any-return]


def test_a_damaged_shard_is_made_again_with_one_warning(
    classifier: Classifier, synthetic: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_SHARD_BYTES", 2**16)  # sixteen rows
    backbone, spec = Counting(classifier), FeatureSpec("block2", 16, 0, "x")
    made = cache.extract(synthetic.images, "digest", spec, lambda: backbone)
    expected = [np.array(shard) for shard in made.shards]
    path = cache._shard_path(made.folder, 1)
    whole = path.read_bytes()
    for what, data in damages(whole):
        path.write_bytes(data)
        backbone.pictures = 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again = cache.extract(synthetic.images, "digest", spec, lambda: backbone)
        assert [str(line.message).endswith("set aside as *.damaged and made again") for line in caught] == [True], what
        assert backbone.pictures == 16, what
        assert all(map(np.array_equal, again.shards, expected)), what


def test_whatever_happens_to_a_manifest_no_wrong_feature_comes_of_it(
    classifier: Classifier, synthetic: ImageDataset
) -> None:
    backbone, spec = Counting(classifier), FeatureSpec("block2", 16, 0, "x")
    made = cache.extract(synthetic.images[:8], "digest", spec, lambda: backbone)
    expected, path = np.array(made.shards[0]), made.folder / "MANIFEST.json"
    for what, data in damages(path.read_bytes()):
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = cache.extract(synthetic.images[:8], "digest", spec, lambda: backbone)
        assert np.array_equal(again.shards[0], expected), what
