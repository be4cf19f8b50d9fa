from collections import Counter

import pytest

from attire.data.dataset import FASHION_CLASSES
from attire.data.loading import load_dataset
from attire.server import samples


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
