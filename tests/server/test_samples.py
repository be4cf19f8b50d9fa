import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from attire.data.dataset import FASHION_CLASSES
from attire.data.loading import load_dataset
from attire.server import samples


def test_a_sheet_is_read_as_it_was_made(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    images = np.random.default_rng(0).integers(0, 256, (13, 28, 28), np.uint8)
    data = samples._sheet_png([f"name {i}" for i in range(13)], images)
    with Image.open(io.BytesIO(data)) as sheet:
        assert (sheet.size, sheet.mode) == ((280, 56), "L")
        assert (samples._cells(np.asarray(sheet))[:13] == images).all()


@pytest.mark.parametrize("shape", [(28, 28), (1, 1), (3, 200)])
def test_a_written_png_is_what_pillow_reads(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with Image.open(io.BytesIO(samples.grey_png(image))) as found:
        found.verify()
    with Image.open(io.BytesIO(samples.grey_png(image))) as found:
        assert (np.asarray(found) == image).all()
    assert samples.data_uri(b"a") == "data:image/png;base64,YQ=="


def test_the_shipped_samples_are_two_of_each_class() -> None:
    found = samples.read_samples()
    assert Counter(name.partition(" (")[0] for name, _ in found) == dict.fromkeys(FASHION_CLASSES, 2)
    assert all(image.shape == (28, 28) and image.max() > 100 for _, image in found)


@pytest.mark.real
def test_the_shipped_samples_are_official_test_images() -> None:
    official = load_dataset(None, part="test")
    for name, image in samples.read_samples():
        label, _, row = name.removesuffix(")").partition(" (test image ")
        assert (official.images[int(row)] == image).all()
        assert official.classes[official.labels[int(row)]] == label
