"""Training images in a bundle: which are kept, what is nearest, how they are written and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from attire.data.dataset import ImageDataset
from attire.errors import AttireError
from attire.inference import neighbours
from attire.inference.classifier import Classifier, load_bundle
from attire.inference.neighbours import NEIGHBOURS, Neighbours, choose_neighbour_rows, read_neighbours
from attire.recipes import Recipe
from attire.storage import files
from attire.training import run as training_run
from tests.conftest import blocks_and_noise

WIDTH, NAMES = 8, ("a", "b", "c")


def hidden_of(images: Any) -> Tensor:
    """A fake hidden layer of 8: brightness of 8 strips of the picture."""
    return torch.from_numpy(np.asarray(images, np.float32)[:, :, :24].reshape(-1, 28, 8, 3).mean((1, 3)))


@pytest.fixture
def stored() -> Neighbours:
    images = blocks_and_noise(30).images
    return Neighbours.fit(hidden_of(images), images, np.arange(30) % 3)


def test_a_stored_picture_is_its_own_nearest_at_no_distance(stored: Neighbours) -> None:
    images = blocks_and_noise(30).images
    for i, nearest in enumerate(stored.nearest(hidden_of(images), NAMES, 5)):
        assert nearest[0].distance == 0
        assert np.array_equal(nearest[0].image, images[i])
        assert nearest[0].label == NAMES[i % 3]


def test_neighbours_come_nearest_first_and_are_those_of_the_whole_hidden_layer(stored: Neighbours) -> None:
    images, asked = blocks_and_noise(30).images, blocks_and_noise(5, seed=7).images
    centre = hidden_of(images).mean(0)
    alike = torch.cosine_similarity(hidden_of(asked)[:, None] - centre, hidden_of(images) - centre, 2)  # (5, 30)
    wanted = alike.argsort(1, descending=True)[:, :5]
    seen: list[list[float]] = []
    for nearest, rows in zip(stored.nearest(hidden_of(asked), NAMES, 5), wanted, strict=True):
        gaps = [one.distance for one in nearest]
        assert gaps == sorted(gaps)
        assert [one.image.tobytes() for one in nearest] == [images[i].tobytes() for i in rows]  # 8 components of 8
        assert [gap**2 for gap in gaps] == pytest.approx((2 - 2 * alike[len(seen), rows]).tolist(), abs=2e-3)
        seen.append(gaps)


def test_points_have_length_1(stored: Neighbours) -> None:
    assert torch.allclose(stored.points.float().norm(dim=1), torch.ones(30), atol=1e-3)


def test_more_are_asked_for_than_stored(stored: Neighbours) -> None:
    (nearest,) = stored.nearest(hidden_of(blocks_and_noise(1).images), NAMES, count=99)
    assert len(nearest) == 30


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_few_images_and_equal_ones_are_stored_all_the_same(rows: int) -> None:
    images = np.repeat(blocks_and_noise(1).images, rows, 0)
    fitted = Neighbours.fit(hidden_of(images), images, np.zeros(rows, np.int64))
    assert torch.isfinite(fitted.points).all()
    (near,) = fitted.nearest(hidden_of(images[:1]), NAMES, 5)
    assert len(near) == rows
    assert near[0].distance == 0


def test_fitting_twice_gives_the_same_bytes_and_leaves_torch_s_random_state() -> None:
    images = blocks_and_noise(30).images
    state = torch.random.get_rng_state()
    first, second = (Neighbours.fit(hidden_of(images), images, np.arange(30) % 3).encoded() for _ in range(2))
    assert first == second
    assert torch.equal(torch.random.get_rng_state(), state)


def test_all_rows_are_kept_where_there_are_few() -> None:
    rows = np.arange(10, 300)
    assert np.array_equal(choose_neighbour_rows(rows, np.zeros(300, np.int64), 0), rows)


def test_of_many_rows_each_class_keeps_its_share() -> None:
    labels = np.repeat([0, 1, 2], [6000, 3000, 3000])
    rows = np.arange(2000, 12_000)  # 4,000, 3,000 and 3,000
    chosen = choose_neighbour_rows(rows, labels, 0)
    assert np.isin(chosen, rows).all()
    assert len(np.unique(chosen)) == neighbours._ROWS
    assert np.bincount(labels[chosen]).tolist() == [2000, 1500, 1500]
    assert np.array_equal(chosen, choose_neighbour_rows(rows, labels, 0))
    assert not np.array_equal(chosen, choose_neighbour_rows(rows, labels, 1))


def test_a_class_of_one_row_stops_nothing() -> None:
    labels = np.repeat([0, 1], [8000, 1])
    assert len(choose_neighbour_rows(np.arange(8001), labels, 0)) == neighbours._ROWS


def test_a_run_s_bundle_holds_its_training_rows_and_no_others(
    weights: Path, small_csv: Path, tiny: Recipe, tmp_path: Path, synthetic: ImageDataset
) -> None:
    run = training_run.train(small_csv, tiny, run_dir=tmp_path / "run")
    model = load_bundle(run.bundle, "cpu")
    assert model.neighbours is not None
    images, labels = model.neighbours.images.numpy(), model.neighbours.labels.tolist()
    held = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    known = dict(zip((image.tobytes() for image in synthetic.images), synthetic.labels.tolist(), strict=True))
    assert held.items() <= known.items()
    assert len(held) == len(known) - len(run.result.predictions.images) - 10  # 10 rows validate
    assert not held.keys() & {image.tobytes() for image in run.result.predictions.images}


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": ()},
        {"conv": (8,), "hidden": (), "standardise": False},
        {"finetune_blocks": 1, "hidden": (), "standardise": False},
        {"pool": 2},
    ],
    ids=str,
)
def test_every_head_finds_a_training_picture_again(
    weights: Path, small_csv: Path, tiny: Recipe, tmp_path: Path, change: dict[str, Any]
) -> None:
    model = load_bundle(training_run.train(small_csv, replace(tiny, **change), run_dir=tmp_path / "run").bundle, "cpu")
    assert model.neighbours is not None
    images = model.neighbours.images[:5].numpy()
    for image, nearest in zip(images, model.nearest(images), strict=True):
        assert np.array_equal(nearest[0].image, image)
        assert nearest[0].distance < 0.02  # cached features are rounded to 16 bits
        assert nearest[1].distance > 5 * nearest[0].distance


@pytest.fixture
def explained(classifier: Classifier, tmp_path: Path, synthetic: ImageDataset) -> Path:
    """A bundle with neighbours, whose hidden layer has 8 values."""
    with torch.inference_mode():
        hidden = torch.cat([classifier.model.classifier[:-1](x) for x in classifier._features(synthetic.images)])
    classifier.neighbours = Neighbours.fit(hidden, synthetic.images, synthetic.labels)
    classifier.save(tmp_path / "explained")
    return tmp_path / "explained"


def test_neighbours_survive_the_journey_to_disk(
    explained: Path, classifier: Classifier, synthetic: ImageDataset
) -> None:
    loaded = load_bundle(explained, "cpu")
    assert loaded.neighbours is not None
    assert classifier.neighbours is not None
    assert loaded.neighbours.encoded() == classifier.neighbours.encoded()
    for image, nearest in zip(synthetic.images, loaded.nearest(synthetic.images), strict=True):
        assert any(np.array_equal(one.image, image) for one in nearest if one.distance < 1e-3)
    assert files.read_json(explained / "model.json")["neighbours"] == {
        "sha256": files.sha256_file(explained / NEIGHBOURS)
    }


def test_answers_are_the_same_with_and_without(bundle: Path, explained: Path, synthetic: ImageDataset) -> None:
    plain, more = (load_bundle(path, "cpu").predict_proba(synthetic.images) for path in (bundle, explained))
    assert np.array_equal(plain, more)


def test_a_bundle_without_them_loads_and_finds_none(bundle: Path, synthetic: ImageDataset) -> None:
    model = load_bundle(bundle, "cpu")
    assert not (bundle / NEIGHBOURS).exists()
    assert model.neighbours is None
    assert model.nearest(synthetic.images[:3]) == [(), (), ()]


def test_the_file_may_be_deleted(explained: Path, synthetic: ImageDataset) -> None:
    (explained / NEIGHBOURS).unlink()
    assert load_bundle(explained, "cpu").nearest(synthetic.images[:1]) == [()]


def test_saving_without_them_takes_an_earlier_file_away(explained: Path, classifier: Classifier) -> None:
    classifier.neighbours = None
    classifier.save(explained)
    assert not (explained / NEIGHBOURS).exists()
    assert load_bundle(explained, "cpu").neighbours is None


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_damaged_file_is_refused_in_one_line(explained: Path, change: Callable[[bytes], bytes]) -> None:
    path = explained / NEIGHBOURS
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(AttireError) as caught:
        load_bundle(explained, "cpu")
    said = f"{path}: damaged: its digest is not the one in model.json; use a fresh copy, or delete this file"
    assert str(caught.value) == said


def test_a_folder_in_its_place_is_refused(explained: Path) -> None:
    (explained / NEIGHBOURS).unlink()
    (explained / NEIGHBOURS).mkdir()
    with pytest.raises(AttireError, match="cannot read"):
        load_bundle(explained, "cpu")


def refused(tmp_path: Path, body: bytes, about: Any = None) -> str:
    (tmp_path / NEIGHBOURS).write_bytes(body)
    with pytest.raises(AttireError) as caught:
        read_neighbours(tmp_path, about or {"sha256": files.sha256(body)}, len(NAMES), WIDTH)
    return str(caught.value).removeprefix(f"{tmp_path / NEIGHBOURS}: ")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("images", None, "tensor images is missing"),
        ("more", torch.zeros(1), "tensor more is not part of this file"),
        ("images", torch.zeros(30, 27, 28, dtype=torch.uint8), r"tensor images is (30, 27, 28) uint8, expected"),
        ("images", torch.zeros((), dtype=torch.uint8), "tensor images is () uint8, expected (0, 28, 28) uint8"),
        ("labels", torch.zeros(29, dtype=torch.int32), "tensor labels is (29,) int32, expected (30,) int32"),
        ("labels", torch.full((30,), 3, dtype=torch.int32), "no images, or a label that is none of the 3 classes"),
        ("labels", torch.full((30,), -1, dtype=torch.int32), "no images, or a label that is none of the 3 classes"),
        ("labels", torch.zeros(30, dtype=torch.int64), "tensor labels is (30,) int64, expected (30,) int32"),
        ("points", torch.full((30, 8), torch.nan).half(), "tensor points holds NaN or infinity"),
        ("centre", torch.zeros(9), "tensor centre is (9,) float32, expected (8,) float32"),
        ("axes", torch.full((8, 8), torch.inf), "tensor axes holds NaN or infinity"),
        ("axes", torch.zeros(8), "tensor axes is (8,) float32, expected (8, 8) float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_no_such_file_holds_is_named(
    stored: Neighbours, tmp_path: Path, name: str, value: Tensor | None, said: str
) -> None:
    tensors = load(stored.encoded())
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    assert refused(tmp_path, save(tensors)).startswith(said)


def test_a_file_without_images_is_refused(stored: Neighbours, tmp_path: Path) -> None:
    tensors = load(stored.encoded())
    empty = {name: tensors[name][:0].contiguous() for name in ("images", "labels", "points")}
    assert refused(tmp_path, save({**tensors, **empty})).startswith("no images")


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, b"\x80\x04 a pickle, or text").startswith("not a safetensors file (")


@pytest.mark.parametrize("about", ["text", {"sha256": None}, {"rows": 5}], ids=str)
def test_what_model_json_cannot_say_of_it_is_refused(stored: Neighbours, tmp_path: Path, about: Any) -> None:
    assert refused(tmp_path, stored.encoded(), about).startswith("damaged: its digest is not the one in model.json")
