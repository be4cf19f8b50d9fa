"""What is none of the classes: the distance, its threshold, the rows behind them, and where a verdict is shown."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor

import attire
from attire import recipes
from attire.cli.main import cli
from attire.data.dataset import ImageDataset
from attire.data.loading import load_dataset, write_csv
from attire.errors import AttireError
from attire.features.sources import Standardiser
from attire.inference import out_of_distribution
from attire.inference.classifier import Classifier, load_bundle
from attire.inference.out_of_distribution import (
    OODDetector,
    _find_confidence_weight,
    _find_threshold,
    _fit_classes,
    mahalanobis_distance,
    pool_features,
    split_calibration_rows,
)
from attire.recipes import Recipe
from attire.storage import files
from attire.training import run as training_run
from tests.conftest import blocks_and_noise


def clusters(rows: int = 4000) -> tuple[Tensor, Tensor]:
    """Three classes in four dimensions, one shared covariance: (rows, 4) and (rows,)."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((4, 4)) * [3, 1, 0.3, 0.1]
    labels = rng.integers(0, 3, rows)
    centres = np.array([[0.0, 0, 0, 0], [50, 0, 0, 0], [0, 50, 0, 0]])
    return torch.from_numpy(centres[labels] + rng.standard_normal((rows, 4)) @ mixing), torch.from_numpy(labels)


@pytest.fixture
def ood_detector() -> OODDetector:
    """For the 128 channels of block2: class means at 0 and at 1, no correlation, a threshold of 6."""
    means = torch.stack([torch.zeros(128), torch.ones(128)])
    return OODDetector(torch.zeros(128), torch.eye(128), means, 6.0, 100)


@pytest.fixture
def many_csv(tmp_path: Path) -> Path:
    """Images that can be learnt, enough of them for a threshold: 260, of which 20 validate and 52 test."""
    path = tmp_path / "many.csv"
    write_csv(blocks_and_noise(260), path)
    return path


def test_pooled_takes_the_root_of_each_channel_s_mean_over_the_map() -> None:
    features = torch.tensor([[1.0, 2, 3, 10, 16, 16, 16, 16]])  # two channels of 2 x 2, channel after channel
    assert pool_features(features, 2).tolist() == [[2.0, 4.0]]


def test_a_rounding_below_zero_is_no_nan() -> None:
    assert pool_features(torch.tensor([[-1e-7, 0.0]]), 1).tolist() == [[0.0]]


def test_the_distance_is_mahalanobis_s_to_the_nearest_class() -> None:
    x, labels = clusters()
    centre, whiten, means = _fit_classes(x, labels, shrinkage=0)
    class_means = torch.stack([x[labels == k].mean(0) for k in range(3)])
    rest = x - class_means[labels]
    precision = torch.linalg.inv(rest.T @ rest / len(x))
    points = torch.tensor([[25.0, 20, 1, -1], [0, 0, 0, 0], [51, 0, 2, 0]], dtype=torch.double)
    gaps = points[:, None] - class_means  # (3, K, 4)
    wanted = torch.einsum("nkc,cd,nkd->nk", gaps, precision, gaps).amin(1).sqrt()
    assert torch.allclose(mahalanobis_distance(points.float(), centre, whiten, means).double(), wanted, atol=1e-3)


def test_a_class_mean_lies_at_no_distance_and_garments_at_about_the_root_of_the_width() -> None:
    x, labels = clusters()
    fitted = _fit_classes(x, labels, shrinkage=0)
    assert mahalanobis_distance(x[labels == 1].mean(0, keepdim=True).float(), *fitted).item() < 0.05
    assert mahalanobis_distance(x.float(), *fitted).square().mean().item() == pytest.approx(4, rel=0.02)


def test_a_class_without_a_row_has_no_mean() -> None:
    x, labels = clusters()
    *_, means = _fit_classes(x, labels * 2)  # classes 0, 2 and 4
    assert means.shape == (3, 4)
    assert torch.isfinite(means).all()


def test_fewer_rows_than_channels_give_finite_distances() -> None:
    x = torch.from_numpy(np.random.default_rng(0).random((12, 40)))
    distances = mahalanobis_distance(x.float(), *_fit_classes(x, torch.arange(12) % 3))
    assert torch.isfinite(distances).all()


def test_features_that_never_vary_do_not_stop_the_fit() -> None:
    fitted = _fit_classes(torch.ones(20, 3), torch.zeros(20, dtype=torch.long))
    assert all(torch.isfinite(value).all() for value in fitted)


@pytest.mark.parametrize(("rows", "rank"), [(19, 19), (99, 95), (100, 96), (5000, 4751)])
def test_the_threshold_is_the_distance_of_the_conformal_rank(rows: int, rank: int) -> None:
    shuffled = np.random.default_rng(0).permutation(np.arange(1.0, rows + 1))
    assert _find_threshold(shuffled, 0.05) == rank


@pytest.mark.parametrize("rows", [0, 1, 18])
def test_too_few_rows_give_no_threshold(rows: int) -> None:
    assert _find_threshold(np.arange(float(rows)), 0.05) is None


def test_fresh_rows_exceed_the_threshold_as_often_as_stated() -> None:
    rng = np.random.default_rng(0)
    shares = [np.mean(rng.random(200) > (_find_threshold(rng.random(39), 0.05) or 0)) for _ in range(2000)]
    assert np.mean(shares) == pytest.approx(0.05, abs=0.004)


def test_the_threshold_is_set_on_validation_rows() -> None:
    fitted, held = split_calibration_rows(np.arange(100), np.arange(200, 230), seed=1)
    assert fitted.tolist() == list(range(100))
    assert held.tolist() == list(range(200, 230))


def test_without_validation_rows_a_tenth_is_kept_from_the_fit() -> None:
    fitted, held = split_calibration_rows(np.arange(1000), np.empty(0, np.int64), seed=1)
    assert (len(fitted), len(held)) == (900, 100)
    assert sorted([*fitted, *held]) == list(range(1000))
    assert np.array_equal(held, split_calibration_rows(np.arange(1000), np.empty(0, np.int64), seed=1)[1])


def test_many_rows_are_sampled_in_ascending_order() -> None:
    fitted, held = split_calibration_rows(np.arange(48_000), np.empty(0, np.int64), seed=1)
    assert (len(fitted), len(held)) == (5000, 4800)
    assert (np.diff(fitted) > 0).all()
    assert (np.diff(held) > 0).all()
    assert fitted[0] < 100 < 47_900 < fitted[-1]


def test_undoing_the_scaling_gives_the_features_again() -> None:
    x = torch.rand(5, 3)
    scaled = Standardiser(torch.tensor([1.0, 2, 3]), torch.tensor([0.5, 2, 1]))
    assert torch.allclose(scaled.undo(scaled(x.clone())), x, atol=1e-6)
    assert Standardiser().undo(x) is x


def trained(path: Path, recipe: Recipe, folder: Path) -> Classifier:
    return load_bundle(training_run.train(path, recipe, run_dir=folder).bundle, "cpu")


def test_a_run_s_bundle_rejects_noise_and_takes_garments(
    weights: Path, many_csv: Path, tiny: Recipe, tmp_path: Path
) -> None:
    model = trained(many_csv, tiny, tmp_path / "run")
    noise = np.random.default_rng(1).integers(0, 256, (40, 28, 28), np.uint8)
    assert all(answer.out_of_distribution for answer in model.predict(noise))
    garments = model.predict(blocks_and_noise(200, seed=9).images)
    assert np.mean([answer.out_of_distribution for answer in garments]) < 0.2


def test_metrics_tell_the_share_of_test_rows_rejected(
    weights: Path, many_csv: Path, tiny: Recipe, tmp_path: Path
) -> None:
    run = training_run.train(many_csv, tiny, run_dir=tmp_path / "run")
    values = json.loads((run.folder / "evaluation" / "metrics.json").read_text())["ood"]
    model = load_bundle(run.bundle, "cpu")
    assert model.ood_detector is not None
    assert values["threshold"] == model.ood_detector.threshold
    assert (values["false_alarm_rate"], values["calibration_rows"], values["test"]["n"]) == (0.05, 20, 52)
    assert values["test"]["low"] <= values["test"]["value"] <= values["test"]["high"]
    assert attire.evaluation.run_result.load_result(run.folder).ood == values


def test_test_rows_counted_from_the_cache_are_those_the_bundle_rejects(
    weights: Path, many_csv: Path, tiny: Recipe, tmp_path: Path
) -> None:
    run = training_run.train(many_csv, tiny, run_dir=tmp_path / "run")
    assert run.result.ood is not None
    answer = load_bundle(run.bundle, "cpu").predict(run.result.predictions.images)
    assert np.mean([one.out_of_distribution for one in answer]) == pytest.approx(
        run.result.ood["test"]["value"], abs=0.02
    )


@pytest.mark.parametrize("change", [{"val_size": 0}, {"flips": False}, {"standardise": False}], ids=str)
def test_every_recipe_gets_a_threshold(
    weights: Path, many_csv: Path, tiny: Recipe, tmp_path: Path, change: dict[str, Any]
) -> None:
    model = trained(many_csv, replace(tiny, **change), tmp_path / "run")
    assert model.ood_detector is not None
    assert model.ood_detector.calibration_rows == 20


def test_the_cache_changes_nothing(weights: Path, many_csv: Path, tiny: Recipe, tmp_path: Path) -> None:
    thresholds = []
    for cache in (True, False):
        run = training_run.train(many_csv, replace(tiny, epochs=1), run_dir=tmp_path / str(cache), cache=cache)
        assert run.result.ood is not None
        thresholds.append(run.result.ood["threshold"])
    assert thresholds[0] == pytest.approx(thresholds[1], rel=1e-3)


def test_mirrored_pictures_count_where_the_recipe_uses_them(
    weights: Path, many_csv: Path, tiny: Recipe, tmp_path: Path
) -> None:
    mirrored = blocks_and_noise(100, seed=3).images[:, :, ::-1].copy()
    shares = []
    for flips in (True, False):
        model = trained(many_csv, replace(tiny, flips=flips), tmp_path / str(flips))
        shares.append(np.mean([answer.out_of_distribution for answer in model.predict(mirrored)]))
    assert shares[0] < shares[1]


def test_too_few_images_give_a_bundle_that_says_it_cannot_reject(
    weights: Path, small_csv: Path, tiny: Recipe, tmp_path: Path, synthetic: ImageDataset
) -> None:
    run = training_run.train(small_csv, tiny, run_dir=tmp_path / "run")
    model = load_bundle(run.bundle, "cpu")
    assert run.result.ood is None
    answer = model.predict(synthetic.images[0])
    assert (answer.out_of_distribution, answer.distance) == (None, None)
    with pytest.raises(AttireError, match="cannot tell what is none of its classes"):
        model.distances(synthetic.images)


def test_a_detector_survives_the_journey_to_disk(
    classifier: Classifier, ood_detector: OODDetector, tmp_path: Path, synthetic: ImageDataset
) -> None:
    classifier.ood_detector = ood_detector
    classifier.save(tmp_path / "model")
    loaded = load_bundle(tmp_path / "model", "cpu")
    assert loaded.ood_detector is not None
    assert (
        loaded.ood_detector.threshold,
        loaded.ood_detector.calibration_rows,
        loaded.ood_detector.false_alarm_rate,
    ) == (6.0, 100, 0.05)
    distances = loaded.distances(synthetic.images)
    assert distances.shape == (60,)
    assert np.array_equal(distances, classifier.distances(synthetic.images))


def test_probabilities_are_the_same_with_and_without(
    classifier: Classifier, ood_detector: OODDetector, synthetic: ImageDataset
) -> None:
    before = classifier.predict_proba(synthetic.images)
    classifier.ood_detector = ood_detector
    assert np.array_equal(classifier.predict_proba(synthetic.images), before)
    assert [answer.probability for answer in classifier.predict(synthetic.images)] == before.max(1).tolist()


def test_what_is_answered_in_doubt_is_farther(
    classifier: Classifier, ood_detector: OODDetector, tmp_path: Path, synthetic: ImageDataset
) -> None:
    classifier.ood_detector = ood_detector
    plain, sure = classifier.distances(synthetic.images), classifier.predict_proba(synthetic.images).max(1)
    classifier.ood_detector = replace(ood_detector, confidence_weight=2.5)
    assert np.allclose(classifier.distances(synthetic.images), plain - 2.5 * np.log(sure), atol=1e-4)
    assert np.allclose(
        [one.distance for one in classifier.predict(synthetic.images)], plain - 2.5 * np.log(sure), atol=1e-4
    )
    classifier.save(tmp_path / "model")
    loaded = load_bundle(tmp_path / "model", "cpu")
    assert loaded.ood_detector is not None
    assert loaded.ood_detector.confidence_weight == 2.5


def test_distance_and_doubt_spread_alike_among_garments() -> None:
    rng = np.random.default_rng(0)
    distances = torch.from_numpy(rng.normal(15, 2, 500)).float()
    sure = torch.from_numpy(np.exp(-rng.exponential(0.1, (500, 1)))).float()
    doubt = _find_confidence_weight(distances, sure)
    assert (doubt * sure.amax(1).log()).std().item() == pytest.approx(2, rel=0.1)
    assert np.isfinite(_find_confidence_weight(distances, torch.ones(500, 1)))


@pytest.mark.filterwarnings("ignore:the first loss")  # of a random backbone's features of strange shapes
def test_doubt_counts_where_strange_shapes_were_trained_on(
    weights: Path, many_csv: Path, tiny: Recipe, tmp_path: Path
) -> None:
    plain = trained(many_csv, tiny, tmp_path / "plain").ood_detector
    exposed = trained(
        many_csv, replace(tiny, synthetic_drawings=True, outlier_exposure=True), tmp_path / "exposed"
    ).ood_detector
    assert plain is not None
    assert exposed is not None
    assert plain.confidence_weight == 0
    assert exposed.confidence_weight > 0
    assert (plain.calibration_rows, exposed.calibration_rows) == (20, 40)  # the threshold is set on drawn views as well


def test_a_verdict_is_a_distance_above_the_threshold(
    classifier: Classifier, ood_detector: OODDetector, synthetic: ImageDataset
) -> None:
    classifier.ood_detector = ood_detector
    distances = np.sort(classifier.distances(synthetic.images))
    classifier.ood_detector = replace(ood_detector, threshold=float(distances[29]))
    answers = classifier.predict(synthetic.images)
    assert sum(one.out_of_distribution for one in answers) == 30
    assert all(one.out_of_distribution == (one.distance > distances[29]) for one in answers)


@pytest.mark.parametrize(
    ("name", "value"), [("centre", torch.zeros(3)), ("whitening", torch.full((128, 128), torch.nan))]
)
def test_tensors_that_do_not_belong_are_refused(ood_detector: OODDetector, name: str, value: Tensor) -> None:
    with pytest.raises(AttireError, match="ood: "):
        OODDetector.from_bundle(
            {**ood_detector.tensors(), OODDetector.PREFIX + name: value}, ood_detector.to_json(), 128, "bundle"
        )


def test_a_missing_tensor_is_refused(ood_detector: OODDetector) -> None:
    tensors = ood_detector.tensors()
    del tensors[OODDetector.PREFIX + "class_means"]
    with pytest.raises(AttireError, match=r"expected tensors for 128 channels, found \(128,\), \(0,\), \(128, 128\)"):
        OODDetector.from_bundle(tensors, ood_detector.to_json(), 128, "bundle")


@pytest.mark.parametrize(
    "change", [{"threshold": None}, {"threshold": float("nan")}, {"false_alarm_rate": 1}, {"calibration_rows": "many"}]
)
def test_a_threshold_that_is_none_is_refused(ood_detector: OODDetector, change: dict[str, Any]) -> None:
    with pytest.raises(AttireError, match="not what a bundle holds"):
        OODDetector.from_bundle(ood_detector.tensors(), {**ood_detector.to_json(), **change}, 128, "bundle")


def test_tensors_left_without_a_threshold_are_not_used(
    classifier: Classifier, ood_detector: OODDetector, tmp_path: Path
) -> None:
    classifier.ood_detector = ood_detector
    classifier.save(tmp_path)
    about = files.read_json(tmp_path / "model.json")
    del about["seal"], about["ood"]
    about["seal"] = files.sha256(files.canonical_json(about))
    (tmp_path / "model.json").write_text(json.dumps(about))
    assert any(name.startswith(OODDetector.PREFIX) for name in load_file(tmp_path / "model.safetensors"))
    assert load_bundle(tmp_path, "cpu").ood_detector is None


@pytest.fixture
def strict_bundle(classifier: Classifier, ood_detector: OODDetector, tmp_path: Path) -> Path:
    """A bundle that rejects everything, and a picture beside it."""
    classifier.ood_detector = replace(ood_detector, threshold=0.0)
    classifier.save(tmp_path / "model")
    Image.fromarray(blocks_and_noise(1).images[0]).save(tmp_path / "cat.png")
    return tmp_path / "model"


def test_predict_says_none_of_the_ten_and_what_is_closest(strict_bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "cat.png"
    done = CliRunner().invoke(cli, ["predict", str(strict_bundle), str(picture)])
    answer = load_bundle(strict_bundle, "cpu").predict(picture)
    assert done.output.split(maxsplit=1)[1] == f"none of the ten (closest: {answer.label} {answer.probability:.2f})\n"


def test_predict_tells_the_verdict_in_json(strict_bundle: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["predict", "--json", str(strict_bundle), str(tmp_path / "cat.png")])
    values = json.loads(done.output)
    assert values["out_of_distribution"] is True
    assert values["distance"] > 0
    assert values["label"] in values["probabilities"]


def test_predict_warns_of_a_bundle_that_cannot_reject(bundle: Path, tmp_path: Path) -> None:
    Image.fromarray(blocks_and_noise(1).images[0]).save(tmp_path / "a.png")
    done = CliRunner().invoke(cli, ["predict", "--json", str(bundle), str(tmp_path / "a.png")])
    assert "cannot tell what is none of its classes" in done.stderr
    assert json.loads(done.stdout)["out_of_distribution"] is None
    assert json.loads(done.stdout)["distance"] is None


@pytest.mark.real
def test_digits_and_noise_are_rejected_and_garments_are_not(tmp_path: Path) -> None:
    write_csv(load_dataset().subset(range(500)), tmp_path / "some.csv")
    recipe = replace(recipes.FAST, epochs=2, batch_size=32, hidden=(16,))
    model = trained(tmp_path / "some.csv", recipe, tmp_path / "run")
    small = (load_digits().images[:100] / 16 * 255).astype(np.uint8)
    digits = np.stack([np.array(Image.fromarray(x).resize((28, 28), Image.Resampling.BICUBIC)) for x in small])
    noise = np.random.default_rng(0).integers(0, 256, (50, 28, 28), np.uint8)
    limit = model.ood_detector.threshold if model.ood_detector else 0
    assert np.mean(model.distances(digits) > limit) >= 0.9
    assert np.mean(model.distances(noise) > limit) == 1
    assert np.mean(model.distances(load_dataset(part="test").images[:200]) > limit) < 0.2


def test_the_stated_rate_is_the_one_in_the_help() -> None:
    assert out_of_distribution._FALSE_ALARM_RATE == 0.05
    assert "5 % of garments" in " ".join(CliRunner().invoke(cli, ["predict", "--help"]).output.split())
