"""The bundle: what it answers, that it survives the journey to disk, and every way in which it can be unsound."""

import json
import os
import pickle
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save
from scipy.special import softmax
from torch import Tensor, nn

from attire.data import fashion_mnist
from attire.data.dataset import FASHION_CLASSES, ImageDataset
from attire.errors import AttireError, UsageError
from attire.features import views
from attire.inference import classifier as module
from attire.inference.classifier import Architecture, Classifier, load_bundle
from attire.inference.prediction import Prediction, as_images
from attire.model import pretrained, vgg
from attire.model.heads import fold_standardisation
from attire.storage import files

Change = Callable[[dict[str, Tensor]], object]


def rewrite(folder: Path, change: Change | bytes = lambda tensors: None, **about: Any) -> None:
    """Other tensors, or other bytes, or other values of model.json, with a digest and a seal that fit them."""
    tensors = load_file(folder / "model.safetensors")
    if isinstance(change, bytes):
        body = change
    else:
        change(tensors)
        body = save({name: value.contiguous() for name, value in tensors.items()})
    (folder / "model.safetensors").write_bytes(body)
    about_model = {**files.read_json(folder / "model.json"), "sha256": files.sha256(body), **about}
    del about_model["seal"]
    seal = files.sha256(files.canonical_json(about_model))
    (folder / "model.json").write_text(json.dumps({**about_model, "seal": seal}))


def refused(folder: Path) -> str:
    """The error's line, after the bundle's folder."""
    with pytest.raises(AttireError) as caught:
        load_bundle(folder)
    text = str(caught.value)
    assert text.startswith(str(folder))
    assert text.isprintable()
    return text.removeprefix(str(folder))


def test_a_loaded_bundle_answers_as_the_one_that_was_saved(
    classifier: Classifier, bundle: Path, synthetic: ImageDataset
) -> None:
    loaded = load_bundle(bundle)
    assert np.array_equal(loaded.predict_proba(synthetic.images), classifier.predict_proba(synthetic.images))
    assert (loaded.classes, loaded.temperature, loaded.metadata) == (FASHION_CLASSES, 1.7, {"name": "small"})
    assert loaded.architecture == classifier.architecture
    assert not any(parameter.requires_grad for parameter in loaded.model.features.parameters())


def test_a_loaded_bundle_is_saved_as_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    load_bundle(bundle).save(tmp_path / "again")
    for name in ("model.safetensors", "model.json"):
        assert (tmp_path / "again" / name).read_bytes() == (bundle / name).read_bytes()


def test_a_run_s_folder_and_model_json_are_as_good_as_the_bundle(bundle: Path, synthetic: ImageDataset) -> None:
    assert bundle.name == "model"
    expected = load_bundle(bundle).predict_proba(synthetic.images[:2])
    for name in (bundle.parent, str(bundle.parent), bundle / "model.json"):
        assert np.array_equal(load_bundle(name).predict_proba(synthetic.images[:2]), expected)


def test_loading_opens_no_network(bundle: Path, synthetic: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **named: object) -> None:
        pytest.fail("a bundle asked for the network")

    for home, name in ((pretrained, "vgg16_weights"), (fashion_mnist, "official_data"), (socket.socket, "connect")):
        monkeypatch.setattr(home, name, refuse)
    assert load_bundle(bundle).predict(synthetic.images[0]).label in FASHION_CLASSES


def test_a_save_that_fails_leaves_no_bundle_that_could_be_taken_for_whole(
    classifier: Classifier, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise AttireError("disk", "full")

    monkeypatch.setattr(files, "write_bytes", full)
    with pytest.raises(AttireError, match="disk: full"):
        classifier.save(bundle)
    assert refused(bundle) == ": not a bundle: it holds no model.json; give a folder such as runs/1/model"


# Answers.


def test_probabilities_are_the_softmax_of_the_logits_over_the_temperature(
    classifier: Classifier, synthetic: ImageDataset
) -> None:
    probabilities = classifier.predict_proba(synthetic.images)
    assert probabilities.shape == (60, 10)
    assert probabilities.dtype == np.float32
    assert np.allclose(probabilities.sum(1), 1, atol=1e-6)
    logits = classifier.logits(synthetic.images).numpy()
    assert np.allclose(probabilities, softmax(logits / 1.7, axis=1), atol=1e-6)
    classifier.temperature = 1000.0
    flat = classifier.predict_proba(synthetic.images)
    assert np.allclose(flat, softmax(logits / 1000, axis=1), atol=1e-6)
    assert flat.max() < probabilities.max() / 2


def test_logits_are_those_of_torchvision_s_forward(classifier: Classifier, synthetic: ImageDataset) -> None:
    x = vgg.preprocess(synthetic.images[:5], 16)
    with torch.inference_mode():
        assert torch.allclose(classifier.logits(synthetic.images[:5]), classifier.model(x), atol=1e-5)


def test_batches_do_not_change_the_answer(
    classifier: Classifier, synthetic: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = classifier.logits(synthetic.images)
    monkeypatch.setattr(module, "_BATCH_PIXELS", 7 * 16**2)
    assert torch.allclose(classifier.logits(synthetic.images), whole, atol=1e-5)
    assert classifier.logits(synthetic.images[:0]).shape == (0, 10)


def test_several_views_are_averaged_and_distances_are_of_the_plain_one(
    classifier: Classifier, synthetic: ImageDataset, tmp_path: Path
) -> None:
    images = synthetic.images[:9]
    names = views.tta_views(4)
    assert names == ("plain", "flip", "shift+0-2", "shift+0-2 flip")
    expected = torch.stack([classifier.logits(views.apply_view(images, name)) for name in names]).mean(0)
    plain = classifier.predict_proba(images)
    classifier.architecture = replace(classifier.architecture, tta=4)
    assert torch.allclose(classifier.logits(images), expected, atol=1e-5)
    assert not np.allclose(classifier.predict_proba(images), plain, atol=1e-3)
    largest = classifier.predict_proba(images).max(1).tolist()
    assert [prediction.probability for prediction in classifier.predict(images)] == largest
    classifier.save(tmp_path / "model")
    again = load_bundle(tmp_path / "model", "cpu")
    assert again.architecture.tta == 4
    assert np.array_equal(again.predict_proba(images), classifier.predict_proba(images))


def test_one_image_one_file_and_many_give_the_same_predictions(
    classifier: Classifier, synthetic: ImageDataset, tmp_path: Path
) -> None:
    path = tmp_path / "a garment.png"
    Image.fromarray(synthetic.images[0]).save(path)
    expected = classifier.predict_proba(synthetic.images[:1])[0]
    for what in (path, str(path), synthetic.images[0], synthetic.images[0].ravel()):
        one = classifier.predict(what)
        assert one.label == FASHION_CLASSES[expected.argmax()]
        assert one.probability == expected.max()
        assert str(one) == f"{one.label} {one.probability:.3f}"
        assert [p for _, p in one.ranking] == sorted(expected.tolist(), reverse=True)
        assert {label for label, _ in one.ranking} == set(FASHION_CLASSES)
    for what in (synthetic.images[:3], synthetic.images[:3].reshape(3, 784)):
        assert [prediction.label for prediction in classifier.predict(what)] == [
            classifier.predict(image).label for image in synthetic.images[:3]
        ]
    assert classifier.predict(synthetic.images[:0]) == []


def test_equal_probabilities_keep_the_order_of_the_classes(classifier: Classifier) -> None:
    answer = Prediction.from_probabilities(classifier.classes, np.full(10, 0.1))
    assert [label for label, _ in answer.ranking] == list(FASHION_CLASSES)


@pytest.mark.parametrize(
    ("images", "actual"),
    [
        (np.zeros((2, 28, 28)), r"\(2, 28, 28\) float64"),
        (np.zeros((2, 28, 28), np.float32), r"\(2, 28, 28\) float32"),
        (np.zeros((2, 28, 28), np.int64), r"\(2, 28, 28\) int64"),
        (np.zeros((2, 28, 28), np.bool_), r"\(2, 28, 28\) bool"),
        (np.zeros((2, 32, 32), np.uint8), r"\(2, 32, 32\) uint8"),
        (np.zeros((2, 3, 28, 28), np.uint8), r"\(2, 3, 28, 28\) uint8"),
        (np.zeros((28, 28), np.uint8), r"\(28, 28\) uint8"),
        (np.zeros((2, 785), np.uint8), r"\(2, 785\) uint8"),
        (np.uint8(3), r"\(\) uint8"),
        ([], r"\(0,\) float64"),
    ],
)
def test_images_of_another_type_or_shape_are_refused(images: NDArray[Any], actual: str) -> None:
    expected = rf"^images: expected \(n, 28, 28\) or \(n, 784\) uint8 from 0 to 255, found {actual}$"
    with pytest.raises(AttireError, match=expected):
        as_images(images)


def test_rows_of_pixels_become_images(synthetic: ImageDataset) -> None:
    assert np.array_equal(as_images(synthetic.images.reshape(60, 784)), synthetic.images)


def test_folding_the_scaling_into_the_first_layer_leaves_the_function_the_same() -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(40, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x, mean, scale = 5 * torch.randn(50, 40), 3 * torch.randn(40), 0.1 + torch.rand(40)
    with torch.inference_mode():
        expected = head((x - mean) / scale)
    fold_standardisation(head, mean, scale)
    with torch.inference_mode():
        assert torch.allclose(head(x), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(head((x - mean) / scale), expected, rtol=1e-2, atol=1e-2)


def test_a_device_that_is_not_there_is_a_usage_error(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--device: cuda was asked for, but PyTorch finds none here"):
        load_bundle(bundle, "cuda")


# Bundles that are not sound.

NOT_OURS = "/model.json: not one of ours, or changed after it was written; use a fresh copy"
DAMAGED = "/model.safetensors: damaged: its digest is not the one in model.json; use a fresh copy"


def test_what_is_no_bundle_is_told_apart_from_what_is_not_there(tmp_path: Path) -> None:
    do = "give a folder such as runs/1/model"
    assert refused(tmp_path) == f": not a bundle: it holds no model.json; {do}"
    assert refused(tmp_path / "none") == f": no such bundle; {do}"
    (tmp_path / "file").write_text("")
    assert refused(tmp_path / "file") == f": no such bundle; {do}"


@pytest.mark.parametrize("text", ["{}", '{"schema": 1}', '{"schema": "2"}', '{"seal": "", "a": NaN}', '{"a": 1e999}'])
def test_another_program_s_model_json_is_not_one_of_ours(bundle: Path, text: str) -> None:
    (bundle / "model.json").write_text(text)
    assert refused(bundle) == NOT_OURS


@pytest.mark.parametrize("text", ["", "[]", "{", "\x80"])
def test_a_model_json_that_is_no_json_object_is_named(bundle: Path, text: str) -> None:
    (bundle / "model.json").write_bytes(text.encode("latin-1"))
    assert refused(bundle).startswith(("/model.json: not valid JSON (", "/model.json: expected a JSON object"))


def test_truncated_tensors_are_refused(bundle: Path) -> None:
    path = bundle / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert refused(bundle) == DAMAGED


@pytest.mark.parametrize("place", [0, 8, 100, 5000, -1])
def test_one_byte_flipped_in_the_tensors_is_seen(bundle: Path, place: int) -> None:
    path = bundle / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert refused(bundle) == DAMAGED


def test_one_byte_flipped_in_model_json_is_seen_wherever_it_is(bundle: Path) -> None:
    path = bundle / "model.json"
    data = path.read_bytes()
    for place in range(0, len(data), 61):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert refused(bundle).startswith("/model.json: not "), data[place : place + 20]
    path.write_bytes(data)
    load_bundle(bundle)


def test_missing_tensors_are_named(bundle: Path) -> None:
    (bundle / "model.safetensors").unlink()
    assert refused(bundle) == "/model.safetensors: cannot read (No such file or directory)"


class Payload:
    """Unpickled, it makes the folder `payload-ran` where it is."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("payload-ran",)


@pytest.mark.parametrize("sealed", [False, True], ids=["as it is", "with digest and seal"])
def test_a_pickle_is_refused_and_its_payload_never_runs(
    bundle: Path, tmp_path: Path, sealed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(Payload())
    if sealed:
        rewrite(bundle, data)
        assert refused(bundle).startswith("/model.safetensors: not a safetensors file (")
    else:
        (bundle / "model.safetensors").write_bytes(data)
        assert refused(bundle) == DAMAGED
    assert not (tmp_path / "payload-ran").exists()
    pickle.loads(data)  # noqa: S301  (this very one: it would have run)
    assert (tmp_path / "payload-ran").exists()


STORED = "expected float32, float16, bfloat16"


def put(name: str, value: Tensor) -> Change:
    return lambda tensors: tensors.update({name: value})


def spoil(name: str, value: float) -> Change:
    return lambda tensors: tensors[name].view(-1)[3:4].fill_(value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("features.2.weight"), "tensor features.2.weight is missing"),
        (put("extra.bias", torch.zeros(3)), "tensor extra.bias is not part of this model"),
        (put("features.10.weight", torch.zeros(1)), "tensor features.10.weight is not part of this model"),
        (put("classifier.0.bias", torch.zeros(9)), "tensor classifier.0.bias is (9,), expected (8,)"),
        (put("classifier.3.bias", torch.zeros(10, 1)), "tensor classifier.3.bias is (10, 1), expected (10,)"),
        (
            put("classifier.3.bias", torch.zeros(10).long()),
            "tensor classifier.3.bias is int64, expected float32, float16, bfloat16",
        ),
        (
            put("classifier.3.bias", torch.zeros(10).double()),
            "tensor classifier.3.bias is float64, expected float32, float16, bfloat16",
        ),
        (spoil("features.0.bias", np.nan), "tensor features.0.bias holds NaN or infinity; use a fresh copy"),
        (spoil("classifier.0.weight", np.inf), "tensor classifier.0.weight holds NaN or infinity; use a fresh copy"),
    ],
)
def test_a_tensor_that_does_not_belong_is_named(bundle: Path, change: Change, said: str) -> None:
    rewrite(bundle, change)
    assert refused(bundle) == f": {said}"


def test_a_newer_schema_asks_for_an_update(bundle: Path) -> None:
    rewrite(bundle, schema=2)
    assert refused(bundle) == "/model.json: made by a newer Attire (schema 2, this one reads 1); update attire"


def test_another_preprocessing_is_refused(bundle: Path) -> None:
    rewrite(bundle, preprocess={"version": 99})
    said = "/model.json: its preprocessing is of another version than this Attire's; train it again"
    assert refused(bundle) == said


def test_a_class_list_of_another_length_does_not_fit_the_tensors(bundle: Path) -> None:
    rewrite(bundle, classes=list(FASHION_CLASSES[:9]))
    assert refused(bundle) == ": tensor classifier.3.bias is (10,), expected (9,)"


SHAPE = {"freeze_to": "block2", "image_size": 16, "pool": 0, "hidden": [8], "dropout": 0.5}


@pytest.mark.parametrize(
    "about",
    [
        {"classes": ["a", "a"]},
        {"classes": ["a"]},
        {"classes": list(range(10))},
        {"classes": None},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": "1"},
        {"temperature": None},
        {"metadata": []},
        {"sha256": None},
        {"preprocess": 1},
        {"preprocess": {}},
        {"architecture": {**SHAPE, "freeze_to": "block9"}},
        {"architecture": {**SHAPE, "freeze_to": None}},
        {"architecture": {**SHAPE, "image_size": 2}},
        {"architecture": {**SHAPE, "image_size": 10**9}},
        {"architecture": {**SHAPE, "image_size": "16"}},
        {"architecture": {**SHAPE, "hidden": [8, -1]}},
        {"architecture": {**SHAPE, "hidden": 8}},
        {"architecture": {**SHAPE, "pool": -1}},
        {"architecture": {**SHAPE, "depth": 3}},
        {"architecture": {**SHAPE, "tta": 99}},
        {"architecture": {"freeze_to": "block2"}},
        {"architecture": None},
    ],
    ids=str,
)
def test_values_that_no_bundle_can_hold_are_refused(bundle: Path, about: dict[str, Any]) -> None:
    rewrite(bundle, **about)
    said = refused(bundle)
    assert said.startswith(("/model.json: not what a bundle holds (", "/model.safetensors: damaged"))
    assert said.endswith("; use a fresh copy")


def test_an_architecture_is_valid_once_constructed() -> None:
    with pytest.raises(UsageError, match=r"--dropout: expected at least 0, below 1, found 1.0"):
        Architecture("block2", 16, 0, (8,), 1.0)


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_a_16_bit_bundle_is_half_as_large_and_computed_with_in_float32(
    dtype: str, bits: int, classifier: Classifier, tmp_path: Path
) -> None:
    classifier.save(tmp_path / "whole")
    classifier.save(tmp_path / "half", dtype)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.51 * sizes[0]
    loaded = load_bundle(tmp_path / "half", "cpu").model.state_dict()
    for name, value in classifier.model.state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.allclose(loaded[name], value, rtol=2.0**-bits, atol=1e-7)
        assert torch.equal(loaded[name], value.to(getattr(torch, dtype)).float())
    load_bundle(tmp_path / "half", "cpu").save(tmp_path / "again", dtype)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "half/model.safetensors").read_bytes()


def test_what_16_bits_cannot_hold_is_refused_and_nothing_is_written(classifier: Classifier, tmp_path: Path) -> None:
    with torch.no_grad():
        classifier.model.classifier[0].bias[0] = 70_000
    with pytest.raises(AttireError, match=r"classifier\.0\.bias: too large for float16; save it as float32 or bf"):
        classifier.save(tmp_path / "model", "float16")
    with pytest.raises(AttireError, match=f"dtype: {STORED}, found 'int8'"):
        classifier.save(tmp_path / "model", "int8")
    assert not (tmp_path / "model").exists()
    classifier.save(tmp_path / "model", "bfloat16")


def test_a_graph_does_not_outlive_the_bundle_it_was_made_of(classifier: Classifier, bundle: Path) -> None:
    (bundle / "network.onnx").write_bytes(b"old")
    classifier.save(bundle)
    assert not (bundle / "network.onnx").exists()
