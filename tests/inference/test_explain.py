"""Heat maps: where they are hot, what they are worth, the pictures they become, and `attire explain`."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from attire import recipes
from attire.data.dataset import FASHION_CLASSES, ImageDataset
from attire.data.loading import load_dataset, write_csv
from attire.errors import AttireError, UsageError
from attire.inference.classifier import Classifier, load_bundle
from attire.inference.explain import _METHOD, _Explanation, _log_odds, _occlusion, _overlay, _squares, explain
from attire.inference.neighbours import NEIGHBOURS, Neighbour
from attire.inference.prediction import Prediction
from attire.training import run
from tests.command import Done, attire
from tests.conftest import blocks_and_noise


@pytest.fixture
def trained(finished: tuple[Path, Done]) -> Classifier:
    """`tiny`, trained on `blocks_and_noise(60)`."""
    return load_bundle(finished[0], "cpu")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "shoe.png"
    Image.fromarray(blocks_and_noise(8, seed=3).images[7]).save(path)
    return path


def block_of(label: int) -> NDArray[np.bool_]:
    """Where the class's bright block lies, the one informative place of the picture."""
    block = np.zeros((28, 28), bool)
    top, left = 2 + 13 * (label // 5), 1 + 5 * (label % 5)
    block[top : top + 11, left : left + 5] = True
    return block


def explained(labels: tuple[str, ...] = ()) -> _Explanation:
    near = tuple(Neighbour(label, 0.1, np.zeros((28, 28), np.uint8)) for label in labels)
    prediction = Prediction("Coat", 1.0, (("Coat", 1.0),))
    return _Explanation(np.zeros((28, 28), np.uint8), "Coat", np.zeros((28, 28), np.float32), _METHOD, prediction, near)


def test_the_heat_of_a_picture_with_one_informative_block_lies_on_the_block(trained: Classifier) -> None:
    data = blocks_and_noise(20, seed=5)
    inside = []
    for image, label in zip(data.images, data.labels.tolist(), strict=True):
        heat, block = explain(trained, image, FASHION_CLASSES[label]).heat_map, block_of(label)
        inside.append(heat[block].mean() > 2 * heat[~block].mean() and block[np.unravel_index(heat.argmax(), (28, 28))])
    assert np.mean(inside) >= 0.8


def test_heat_is_28_x_28_from_0_to_1_and_the_same_each_time(trained: Classifier, synthetic: ImageDataset) -> None:
    for image in synthetic.images[:5]:
        first, second = (explain(trained, image) for _ in range(2))
        assert first.heat_map.shape == (28, 28)
        assert first.heat_map.dtype == np.float32
        assert first.heat_map.min() >= 0
        assert first.heat_map.max() == 1
        assert np.array_equal(first.heat_map, second.heat_map)
        assert first.method == _METHOD


def test_a_black_picture_has_no_heat(trained: Classifier) -> None:
    assert not explain(trained, np.zeros((28, 28), np.uint8)).heat_map.any()


def test_the_answer_is_that_of_predict_and_another_class_may_be_asked_about(
    trained: Classifier, synthetic: ImageDataset
) -> None:
    image = synthetic.images[0]
    own = explain(trained, image)
    other = explain(trained, image.reshape(784), label="Bag")
    assert own.prediction == other.prediction == trained.predict(image)
    assert own.label == own.prediction.label
    assert other.label == "Bag"
    assert not np.array_equal(own.heat_map, other.heat_map)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("Sneeker", "--label: 'Sneeker' is none of the 10 classes; did you mean 'Sneaker'"),
        ("", "--label: '' is none of the 10 classes; the classes are T-shirt/top, Trouser"),
    ],
)
def test_a_label_that_is_no_class_is_refused(classifier: Classifier, label: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        explain(classifier, np.zeros((28, 28), np.uint8), label)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("image", [np.zeros((28, 28)), np.zeros((2, 28, 28), np.uint8), np.zeros(783, np.uint8)])
def test_what_is_no_image_is_refused(classifier: Classifier, image: NDArray[np.uint8]) -> None:
    with pytest.raises(AttireError, match="expected"):
        explain(classifier, image)


def test_every_pixel_is_covered_and_no_square_covers_nothing() -> None:
    covered = _squares()
    assert covered.any(0).all()
    assert covered.any((1, 2)).all()


def test_a_pixel_gets_the_mean_loss_of_the_squares_over_it(classifier: Classifier, synthetic: ImageDataset) -> None:
    image = synthetic.images[3]
    whole = _log_odds(classifier.logits(image[None]), 4).item()
    losses = []
    for square in _squares():
        hidden = image.copy()
        hidden[square] = 0
        losses.append(whole - _log_odds(classifier.logits(hidden[None]), 4).item())
    means = np.array([[np.mean(np.array(losses)[_squares()[:, y, x]]) for x in range(28)] for y in range(28)])
    wanted = np.maximum(means, 0) / means.max()
    assert np.allclose(_occlusion(classifier, image, 4), wanted, atol=1e-4)


def test_log_odds_are_those_of_the_softmax() -> None:
    logits = torch.tensor([[1.0, 2, 0.5], [30, -30, 0]])
    p = logits.double().softmax(1)[:, 1]
    assert torch.allclose(_log_odds(logits, 1).double(), (p / (1 - p)).log(), atol=1e-4)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (("Coat",) * 5, "5 of 5 Coat"),
        (("Coat", "Shirt", "Coat", "Bag", "Shirt"), "2 of 5 Coat, 2 Shirt, 1 Bag"),
        (("Bag",), "1 of 1 Bag"),
        ((), ""),
    ],
)
def test_neighbours_are_counted_in_words(labels: tuple[str, ...], said: str) -> None:
    assert explained(labels).tally == said


def test_a_training_picture_is_its_own_nearest(trained: Classifier) -> None:
    assert trained.neighbours is not None
    image = trained.neighbours.images[7].numpy()
    nearest = explain(trained, image).neighbours
    assert len(nearest) == 5
    assert np.array_equal(nearest[0].image, image)
    assert nearest[0].label == FASHION_CLASSES[int(trained.neighbours.labels[7])]


def test_without_neighbours_the_heat_is_there_all_the_same(classifier: Classifier, synthetic: ImageDataset) -> None:
    explanation = explain(classifier, synthetic.images[0])
    assert explanation.neighbours == ()
    assert explanation.heat_map.max() == 1


def test_the_overlay_is_lighter_where_it_is_hotter() -> None:
    heat = np.tile(np.linspace(0, 1, 28, dtype=np.float32), (28, 1))
    for level in (0, 255):
        pixels = np.asarray(_overlay(np.full((28, 28), level, np.uint8), heat, 56).convert("L"), int)
        if not level:
            assert (np.diff(pixels[28]) >= 0).all()
        assert pixels[28, -1] > pixels[28, 0]


def test_a_heat_map_becomes_a_png_of_the_size_asked_for(synthetic: ImageDataset) -> None:
    cold = replace(explained(), image=synthetic.images[0])
    data = cold.heat_map_png(100)
    with Image.open(io.BytesIO(data)) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (100, 100))
    assert data == cold.heat_map_png(100)
    assert replace(cold, heat_map=np.ones((28, 28), np.float32)).heat_map_png(100) != data


def test_json_holds_the_answer_the_heat_and_the_neighbours(trained: Classifier, synthetic: ImageDataset) -> None:
    explanation = explain(trained, synthetic.images[0], "Bag")
    values = json.loads(json.dumps(explanation.to_json()))
    assert (values["explained_label"], values["label"]) == ("Bag", explanation.prediction.label)
    assert np.allclose(values["heat_map"], explanation.heat_map, atol=1e-3)
    assert [near["label"] for near in values["neighbours"]] == [near.label for near in explanation.neighbours]


def test_explain_prints_the_answer_and_writes_a_picture(finished: tuple[Path, Done], picture: Path, here: Path) -> None:
    done = attire("explain", picture, "--model", finished[0])
    explanation = explain(load_bundle(finished[0], "cpu"), np.asarray(Image.open(picture)))
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].split(maxsplit=1) == [str(picture), str(explanation.prediction)]
    assert lines[1].split(maxsplit=1)[1].startswith(explanation.tally)
    assert lines[2].split() == ["picture", "shoe-explained.png"]
    with Image.open(here / "shoe-explained.png") as sheet:
        sheet.load()
        assert sheet.format == "PNG"
        assert min(sheet.size) > 300


def test_json_is_an_object_a_line_and_equal_names_get_files_of_their_own(
    finished: tuple[Path, Done], picture: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "shoe.png"
    Image.fromarray(blocks_and_noise(1).images[0]).save(other)
    done = attire("explain", picture, other, "--model", finished[0], "--out", tmp_path / "new", "--json")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line["file"] for line in lines] == [str(picture), str(other)]
    assert [Path(line["picture"]).name for line in lines] == ["shoe-explained.png", "shoe-2-explained.png"]
    assert all(Path(line["picture"]).is_file() for line in lines)


def test_a_bad_file_is_one_line_and_the_others_are_explained(
    finished: tuple[Path, Done], picture: Path, here: Path
) -> None:
    done = attire("explain", here / "missing.png", picture, "--model", finished[0])
    assert done.status == 1
    assert done.error.startswith(f"{here / 'missing.png'}: ")
    assert "shoe-explained.png" in done.out
    assert [path.name for path in here.iterdir()] == ["shoe-explained.png"]


def test_a_wrong_label_is_a_usage_error_said_once(finished: tuple[Path, Done], picture: Path, here: Path) -> None:
    done = attire("explain", picture, picture, "--model", finished[0], "--label", "Cota")
    assert (done.status, done.error) == (2, "--label: 'Cota' is none of the 10 classes; did you mean 'Coat'")
    assert not list(here.iterdir())


def test_a_bundle_without_neighbours_is_a_warning_and_an_explanation(bundle: Path, picture: Path, here: Path) -> None:
    done = attire("explain", picture, "--model", bundle)
    assert done.status == 0
    said = f"warning: {bundle}: this bundle holds no training images to show beside the answer; train it again\n"
    assert done.err == said
    assert "nearest" not in done.out
    assert (here / "shoe-explained.png").is_file()


def test_a_folder_that_cannot_be_written_to_is_one_line(
    finished: tuple[Path, Done], picture: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    done = attire("explain", picture, "--model", finished[0], "--out", tmp_path / "file")
    assert done.status == 1
    assert done.error.startswith(f"{tmp_path / 'file'}: cannot make the folder")


def test_class_names_of_any_letters_are_drawn(trained: Classifier, picture: Path, tmp_path: Path) -> None:
    trained.classes = ("$x$", "外套", *trained.classes[2:])
    trained.save(tmp_path / "named")
    done = attire("explain", picture, "--model", tmp_path / "named", "--label", "外套", "--out", tmp_path)
    assert (done.status, done.err) == (0, "")


@pytest.mark.real
def test_a_real_answer_is_undone_by_hiding_what_is_hot(tmp_path: Path) -> None:
    """Blackening the hottest quarter costs more of the answer than blackening as much anywhere."""
    write_csv(load_dataset().subset(range(500)), tmp_path / "some.csv")
    recipe = replace(recipes.FAST, epochs=3, batch_size=32, hidden=(32,))
    model = load_bundle(run.train(tmp_path / "some.csv", recipe, run_dir=tmp_path / "run").bundle, "cpu")
    assert (tmp_path / "run" / "model" / NEIGHBOURS).stat().st_size < 1_000_000
    rng = np.random.default_rng(0)
    hot: list[float] = []
    anywhere: list[float] = []
    for image in load_dataset(part="test").images[:20]:
        explanation = explain(model, image)
        k = model.classes.index(explanation.label)
        for costs, order in ((hot, explanation.heat_map), (anywhere, rng.random((28, 28)))):
            hidden = np.where(order > np.quantile(order, 0.75), 0, image).astype(np.uint8)
            costs.append(explanation.prediction.probability - float(model.predict_proba(hidden[None])[0, k]))
    assert np.mean(hot) > np.mean(anywhere) + 0.1
