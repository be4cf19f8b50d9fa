"""The bench: what it measures, its ratios, its table, picture and refusals. No test looks at a time."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from attire.analysis import bench
from attire.analysis.bench import BenchmarkResult, _Candidate, _time_calls, write_bench
from attire.data.dataset import ImageDataset
from attire.data.loading import write_csv
from attire.evaluation.intervals import wilson
from tests.command import attire


def measured(name: str, *speeds: float) -> _Candidate:
    return _Candidate(name, "bundle", "fp32", 10**7, 100, 2.0, 3.5, 32, speeds, 2**28, 2**29, wilson(9, 10))


def test_ratios_are_taken_round_by_round() -> None:
    result = BenchmarkResult((measured("a", 100, 50, 200), measured("b", 150, 100, 200)), {})
    assert result.ratio(result.candidates[1]) == (1.5, 1.0, 2.0)
    assert result.ratio(result.candidates[0]) == (1, 1, 1)
    assert result.candidates[1].speed == 150


def test_the_files(tmp_path: Path) -> None:
    picture = write_bench(BenchmarkResult((measured("a", 1, 2, 3), measured("b", 2, 4, 6)), {"cores": 2}), tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert [row["ratio"][0] for row in stored["candidates"]] == [1, 2]
    assert stored["environment"] == {"cores": 2}


def test_few_images_make_any_batch(synthetic: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Model:
        def predict_proba(self, images: np.ndarray) -> np.ndarray:
            asked.append(len(images))
            return np.zeros((len(images), 10))

    monkeypatch.setattr(bench, "_model", Model())
    monkeypatch.setattr(bench, "_SECONDS", 0)
    for batch in (1, 32, 60, 256):
        assert len(_time_calls(synthetic.images, batch)) == 3
    assert asked == [1] * 3 + [32] * 3 + [60] * 3 + [256] * 3


def test_the_command_measures_a_bundle_and_an_export(
    bundle: Path, synthetic: ImageDataset, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_BATCHES", (1, 8))
    monkeypatch.setattr(bench, "_ROUNDS", 1)
    write_csv(synthetic, "test.csv")
    from attire.export.export import export

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        export(bundle, "torch-export", out=Path("m.pt2"), data=synthetic)
    done = attire("bench", bundle, "m.pt2", "--data", "test.csv", "--images", 40, "--json")
    assert done.status == 0, done
    stored = json.loads(done.out)
    one, two = stored["candidates"]
    assert (one["kind"], two["kind"]) == ("bundle", "torch-export")
    assert one["accuracy"] == two["accuracy"]
    assert one["accuracy"]["n"] == 40
    assert two["size"] == Path("m.pt2").stat().st_size
    assert min(one["memory"], two["memory"]) > 2**26
    assert one["ratio"] == [1, 1, 1]
    assert 0 < one["p50"] <= one["p99"]
    assert Path(stored["picture"]).exists()


def test_what_is_no_model_is_one_line(here: Path, small_csv: Path) -> None:
    assert attire("bench", "nothing", "--data", small_csv).status == 1
    assert "nothing" in attire("bench", "nothing", "--data", small_csv).error
    assert not Path("bench").exists()


def test_a_bundle_s_size_leaves_out_the_training_images(tmp_path: Path) -> None:
    for name, size in (("model.safetensors", 70), ("model.json", 7), ("neighbours.safetensors", 1000)):
        (tmp_path / name).write_bytes(bytes(size))
    assert bench._size_of(tmp_path) == 77
    assert bench._size_of(tmp_path / "model.json") == 7
