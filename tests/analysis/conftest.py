"""A data set with planted faults, and its audit."""

from pathlib import Path

import numpy as np
import pytest

from attire.analysis.audit import Audit, audit
from attire.data.dataset import ImageDataset
from attire.data.loading import write_csv
from tests.conftest import blocks_and_noise


@pytest.fixture
def planted(weights: Path, tmp_path: Path) -> Path:
    """A folder with 60 training and 20 test rows: train 4 and 9 are one image, as are train 11 and test 2; test 5 is
    train 20 shifted by a pixel; train 30 is blank."""
    data = blocks_and_noise(80)
    images, labels = data.images, data.labels
    images[:, [0, 1, -2, -1]] = images[:, :, [0, 1, -2, -1]] = 0
    images[9], images[62], images[65] = images[4], images[11], np.roll(images[20], 1, 1)
    images[30] = 0
    folder = tmp_path / "planted"
    folder.mkdir()
    write_csv(ImageDataset(images[:60], labels[:60], data.classes, "t"), folder / "x_train.csv")
    write_csv(ImageDataset(images[60:], labels[60:], data.classes, "t"), folder / "x_test.csv")
    return folder


@pytest.fixture
def planted_audit(planted: Path) -> Audit:
    return audit(planted)
