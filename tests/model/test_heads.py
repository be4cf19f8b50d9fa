"""Fine-tuned blocks start as ImageNet's, keep their function when normalised, and fold back into a VGG16."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attire
from attire.data.dataset import ImageDataset
from attire.errors import UsageError
from attire.features import cache, views
from attire.inference.classifier import load_bundle
from attire.model import heads, vgg
from attire.recipes import Recipe

TUNED = Recipe(
    name="tuned",
    freeze_to="block1",
    image_size=16,
    pool=2,
    flips=False,
    standardise=False,
    finetune_blocks=2,
    batch_norm=True,
    head_epochs=1,
    layer_decay=0.5,
    hidden=(16,),
    epochs=3,
    batch_size=16,
    ema=0.5,
    clip_grad=1.0,
    random_erasing=0.5,
    cutmix=0.5,
    lr=1e-3,
    precision="fp32",
)


def head_of(weights: Path, recipe: Recipe = TUNED) -> heads.FineTunedHead:
    torch.manual_seed(0)
    return heads.FineTunedHead.from_imagenet(weights, recipe, heads.build_head((256, 2, 2), (), (16,), 10, 0.5)).eval()


@pytest.fixture
def rows(random_weights: Path, synthetic: ImageDataset) -> Tensor:
    """Features of block1, (60, 64 * 8 * 8)."""
    backbone = vgg.Backbone(vgg.vgg16(random_weights, "block1", 0, nn.Sequential()), torch.device("cpu"), "fp32")
    features: Tensor = backbone(vgg.preprocess(synthetic.images, 16))
    return features.detach()


def test_untrained_blocks_are_torchvision_s(random_weights: Path, rows: Tensor, synthetic: ImageDataset) -> None:
    head = head_of(random_weights, replace(TUNED, batch_norm=False))
    whole = vgg.vgg16(random_weights, "block3", 2, head.head.eval())
    expected = whole(vgg.preprocess(synthetic.images, 16))
    assert torch.allclose(head(rows), expected, rtol=1e-4, atol=1e-4)
    assert not head.norms()


def test_normalisation_is_put_in_without_changing_the_function(random_weights: Path, rows: Tensor) -> None:
    plain, normed = head_of(random_weights, replace(TUNED, batch_norm=False)), head_of(random_weights)
    normed.calibrate_batch_norm([rows[:40], rows[40:]])
    assert len(normed.norms()) == 5
    expected = plain(rows)
    assert torch.allclose(normed.eval()(rows), expected, rtol=1e-3, atol=1e-3)
    heads.set_train_mode(normed, False)
    one_batch = normed.forward_features(rows)  # the same moments, taken from the batch this time
    assert torch.allclose(one_batch, plain.forward_features(rows), rtol=1e-2, atol=1e-2)


def test_normalisation_folds_away(random_weights: Path, rows: Tensor, synthetic: ImageDataset) -> None:
    head = head_of(random_weights)
    head.calibrate_batch_norm([rows])
    with torch.no_grad():
        for norm in head.norms():
            norm.weight.mul_(1.1), norm.bias.add_(0.1)
    head.eval()
    model = vgg.vgg16(random_weights, "block3", 2, head.head)
    before = model(vgg.preprocess(synthetic.images, 16))
    model.load_state_dict({**model.state_dict(), **head.folded_convolutions()})
    after = model(vgg.preprocess(synthetic.images, 16))
    assert torch.allclose(after, head(rows), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(after, before, atol=1e-2)


def test_the_probe_trains_the_classifier_alone(random_weights: Path) -> None:
    head = head_of(random_weights)
    heads.set_train_mode(head, True)
    assert not head.blocks.training
    assert head.head.training
    assert {name.split(".")[0] for name, p in head.named_parameters() if p.requires_grad} == {"head"}
    heads.set_train_mode(head, False)
    assert head.blocks.training
    assert all(p.requires_grad for p in head.parameters())


def test_the_learning_rate_falls_from_block_to_block(random_weights: Path) -> None:
    head = head_of(random_weights)
    groups = heads.parameter_groups(head, 0.5)
    scale = {id(p): group["scale"] for group in groups for p in group["params"]}
    assert {scale[id(p)] for p in head.head.parameters()} == {1.0}
    assert {scale[id(p)] for p in head.blocks[1].parameters()} == {0.5}
    assert {scale[id(p)] for p in head.blocks[0].parameters()} == {0.25}
    assert sum(len(group["params"]) for group in groups) == len(list(head.parameters()))


def test_a_plain_classifier_is_one_group() -> None:
    head = heads.build_head((3, 2, 2), (), (8,), 10, 0.5)
    (group,) = heads.parameter_groups(head, 0.5)
    assert [id(p) for p in group["params"]] == [id(p) for p in head.parameters()]


def test_a_convolutional_classifier_takes_flat_rows() -> None:
    head = heads.build_head((6, 4, 4), (8, 12), (16,), 10, 0.5)
    assert head(torch.randn(5, 96)).shape == (5, 10)
    assert heads.last_linear(head).out_features == 10


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"finetune_blocks": 5}, "--finetune-blocks: expected at most 4 above block1, found 5"),
        ({"finetune_blocks": 4}, "--image-size"),
        ({"standardise": True}, "--standardise: expected no"),
        ({"head_epochs": 3}, "--head-epochs: expected at most 2, found 3"),
        ({"finetune_blocks": 0, "head_epochs": 0}, "--batch-norm: expected no"),
        (
            {"freeze_to": "none", "finetune_blocks": 0},
            "--finetune-blocks: expected at least 1, as nothing is frozen, found 0",
        ),
        (
            {"freeze_to": "none", "backend": "openvino"},
            "--backend: expected torch, as nothing is frozen, found openvino",
        ),
        ({"ema": 1.0}, "--ema: expected at least 0, below 1"),
        ({"random_erasing": 1.5}, "--random-erasing: expected a probability"),
    ],
)
def test_settings_that_cannot_be_meant_are_named(changes: dict[str, object], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        replace(TUNED, **changes)  # type: ignore[arg-type]


@pytest.mark.usefixtures("weights")
def test_a_tuned_run_ends_in_a_plain_bundle(small_csv: Path, tmp_path: Path, random_weights: Path) -> None:
    run = attire.train(small_csv, replace(TUNED, shifts=1, flips=True), run_dir=tmp_path / "run")
    model = load_bundle(run.bundle)
    names = set(model.model.state_dict())
    assert {"features.14.weight", "classifier.0.weight"} <= names
    assert not [name for name in names if "norm" in name]
    saved = {name: value for name, value in model.model.state_dict().items() if name.startswith("features.")}
    frozen = vgg.vgg16(random_weights, "block3", 2, nn.Sequential()).state_dict()
    same = {name for name, value in saved.items() if torch.equal(value, frozen[name])}
    assert same == {f"features.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}
    predictions = run.result.predictions
    likeliest = np.argmax(predictions.probabilities, 1)
    assert model.predict_proba(predictions.images).argmax(1).tolist() == likeliest.tolist()


@pytest.mark.usefixtures("weights")
def test_where_nothing_is_frozen_every_convolution_is_trained_and_no_cache_is_needed(
    small_csv: Path, tmp_path: Path, random_weights: Path
) -> None:
    recipe = replace(TUNED, freeze_to="none", flips=True, tta=2)
    run = attire.train(small_csv, recipe, run_dir=tmp_path / "run", cache=False)
    assert not cache.cache_entries()
    model = load_bundle(run.bundle)
    before = vgg.vgg16(random_weights, "block2", 2, nn.Sequential()).features.state_dict()
    after = model.model.features.state_dict()
    assert set(after) == set(before)
    assert not [name for name, value in after.items() if torch.equal(value, before[name])]
    predictions = run.result.predictions
    assert np.allclose(model.predict_proba(predictions.images), predictions.probabilities, atol=1e-3)
    cached = attire.train(small_csv, recipe, run_dir=tmp_path / "cached")
    assert np.allclose(cached.result.predictions.probabilities, predictions.probabilities, atol=1e-5)
    assert {entry.manifest["width"] for entry in cache.cache_entries()} == {3 * 16 * 16}
    assert cache.cache_entries()[0].manifest["precision"] == "fp32"


@pytest.mark.usefixtures("weights")
def test_a_convolutional_run_is_saved_and_loaded(small_csv: Path, tmp_path: Path) -> None:
    recipe = replace(TUNED, finetune_blocks=0, batch_norm=False, head_epochs=0, pool=0, conv=(8, 8), flips=True)
    run = attire.train(small_csv, recipe, run_dir=tmp_path / "run")
    assert load_bundle(run.bundle).architecture.conv == (8, 8)


def test_views_are_numbered_and_shifted() -> None:
    assert views.augmentation_views(True, 1) == ("plain", "flip", "shift+0-2", "shift+0-2 flip")
    assert views.augmentation_views(False, 0) == ("plain",)
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, 10, 10] = 9
    assert views.apply_view(image, "shift+1-2")[0, 11, 8] == 9
    assert views.apply_view(image, "shift+1-2 flip")[0, 11, 27 - 8] == 9
    assert views.apply_view(image, "shift-2+2").sum() == 9
