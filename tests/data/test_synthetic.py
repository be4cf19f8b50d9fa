"""Pictures that training makes for itself: the same for the same image, and stretched as photographs are."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from attire.data import synthetic
from attire.data.photos import render
from attire.errors import UsageError
from attire.features import views as features_views
from attire.recipes import FAST, Recipe
from attire.training import loop
from attire.training.augment import Target
from attire.training.loss import training_loss
from attire.training.sampler import epoch_order

Make = Callable[[np.ndarray], np.ndarray]


@pytest.fixture
def garments() -> np.ndarray:
    """(40, 28, 28): trapezes of several heights and shades with a stripe."""
    images = np.zeros((40, 28, 28), np.uint8)
    for i, image in enumerate(images):
        for row in range(4, 14 + i // 4):
            image[row, 10 - row // 4 : 18 + row // 4] = 90 + 4 * i
        image[8] = image[8] // 2
    return images


@pytest.mark.parametrize("make", [synthetic.draw_garments, synthetic.draw_outliers])
def test_what_is_drawn_depends_on_the_image_alone(
    make: Callable[[np.ndarray], np.ndarray], garments: np.ndarray
) -> None:
    drawings = make(garments)
    assert drawings.shape == garments.shape
    assert drawings.dtype == np.uint8
    assert np.array_equal(make(garments[[7, 3]]), drawings[[7, 3]])  # whatever stands beside it
    assert len({image.tobytes() for image in drawings}) == len(garments)
    assert np.mean([not np.array_equal(a, b) for a, b in zip(drawings, garments, strict=True)]) > 0.9
    assert np.mean(drawings.max((1, 2)) > 200) > 0.8


def test_a_drawing_keeps_the_garments_place_and_a_strange_shape_does_not(garments: np.ndarray) -> None:
    def overlap(drawn: np.ndarray, whole: np.ndarray) -> float:
        ours, theirs = whole > synthetic._CLOTH, drawn > synthetic._CLOTH
        return float(np.median((ours & theirs).sum((1, 2)) / (ours | theirs).sum((1, 2))))

    whole = np.stack([render(image.astype(float), image > 8)[1] for image in garments])
    assert overlap(synthetic.draw_garments(garments), whole) > 0.7
    assert overlap(synthetic.draw_outliers(garments), whole) < 0.6


def test_what_is_drawn_is_wider_or_narrower_and_fills_the_picture(garments: np.ndarray) -> None:
    drawings = synthetic.draw_garments(np.concatenate([garments + np.uint8(i) * (garments > 0) for i in range(4)]))
    high, wide = (drawings.any(axis).sum(1) for axis in (2, 1))
    assert (np.maximum(high, wide) == 28).mean() > 0.95
    shapes = wide / high
    assert shapes.std() > 0.1


def test_views_change_their_name_with_what_is_drawn() -> None:
    """Cached features of another drawing would be taken for those of this one."""
    assert str(synthetic.VERSION) in features_views.SYNTHETIC_DRAWING
    assert str(synthetic.VERSION) in features_views.OUTLIER


@pytest.mark.parametrize("level", [0, 255, 10])
def test_an_image_without_a_garment_is_drawn_without_fault(level: int) -> None:
    image = np.full((1, 28, 28), level, np.uint8)
    assert synthetic.draw_garments(image).shape == synthetic.draw_outliers(image).shape == image.shape
    assert synthetic.draw_outliers(image).any()


def test_views_are_numbered_with_the_strange_one_last(garments: np.ndarray) -> None:
    names = features_views.augmentation_views(True, 1, True, True)
    ours = (features_views.SYNTHETIC_DRAWING, f"{features_views.SYNTHETIC_DRAWING} flip", features_views.OUTLIER)
    assert names == ("plain", "flip", "shift+0-2", "shift+0-2 flip", *ours)
    recipe = Recipe(shifts=1, synthetic_drawings=True, outlier_exposure=True)
    assert recipe.training_views == len(names)
    drawn, mirrored = (features_views.apply_view(garments, name) for name in ours[:2])
    assert np.array_equal(mirrored, drawn[:, :, ::-1])
    assert np.array_equal(
        features_views.apply_view(garments, features_views.OUTLIER), synthetic.draw_outliers(garments)
    )
    _, views = epoch_order(np.arange(3000), recipe, 0)
    assert views is not None
    shares = np.bincount(views, minlength=7) / 3000
    assert np.abs(shares - np.array([2, 2, 2, 2, 1, 1, 1]) / 11).max() < 0.03  # a picture's own views count twice


def test_rows_that_are_none_of_the_classes_are_to_be_answered_with_each_alike() -> None:
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    labels, none = torch.arange(6), torch.tensor([False, True, False, False, True, False])
    loss = training_loss(logits, Target(labels, outliers=none), FAST)
    known = F.cross_entropy(logits[~none], labels[~none], label_smoothing=FAST.label_smoothing, reduction="sum")
    alike = F.cross_entropy(logits[none], torch.full((2, 10), 0.1), reduction="sum")
    assert torch.allclose(loss, (known + alike) / 6)
    for every in (torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)):
        assert torch.isfinite(training_loss(logits, Target(labels, outliers=every), FAST))
    part = Target(labels, outliers=none).select(slice(1, 3))
    assert part.outliers is not None
    assert part.outliers.tolist() == [True, False]


def test_strange_shapes_and_cutmix_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="--outlier-exposure: expected no, as CutMix mixes rows"):
        Recipe(outlier_exposure=True, cutmix=0.5)


def test_a_classifier_learns_to_doubt_what_is_strange() -> None:
    """Two classes on either side of 0, strange rows far up: certain about the classes, not about those."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(0, 0.3, (600, 2)).astype(np.float32))
    labels, none = torch.arange(600) % 2, torch.arange(600) % 3 == 2
    x[:, 0] += labels * 4 - 2
    x[none, 1] += 6
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    recipe = Recipe(precision="fp32", label_smoothing=0.0)
    for _ in range(200):
        loop._train_step(net, optimiser, x, Target(labels, outliers=none), recipe)
    sure = net(x).softmax(1).amax(1)
    assert sure[~none].min() > 0.9
    assert sure[none].median() < 0.7
