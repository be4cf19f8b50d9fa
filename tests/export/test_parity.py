"""The parity check: an export that differs from its bundle, or loses too much, is not written."""

from pathlib import Path

import numpy as np
import pytest

from attire.data.dataset import ImageDataset
from attire.errors import AttireError
from attire.export.export import export
from attire.inference.classifier import load_bundle

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporters' own deprecations


def test_an_export_that_is_not_equal_is_not_written(
    bundle: Path, synthetic: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "attire.model.vgg.IMAGENET_MEAN", (0.5, 0.4, 0.4)
    )  # what a hand-written preprocessing would get wrong
    expected = load_bundle(bundle).predict_proba(synthetic.images)
    monkeypatch.undo()
    monkeypatch.setattr("attire.inference.classifier.Classifier.predict_proba", lambda self, images: expected)
    with pytest.raises(AttireError, match=r"m\.pt2: not written, since it is not equal to the bundle: same class on"):
        export(bundle, "torch-export", out=tmp_path / "m.pt2", data=synthetic)
    assert not list(tmp_path.glob("*.pt2*"))


def test_a_precision_that_loses_too_much_is_not_written(
    bundle: Path, synthetic: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = np.eye(10, dtype=np.float32)[synthetic.labels]
    monkeypatch.setattr("attire.inference.classifier.Classifier.predict_proba", lambda self, images: truth)
    turned = replace_labels(synthetic)
    turned_truth = np.eye(10, dtype=np.float32)[turned.labels]
    monkeypatch.setattr("attire.inference.classifier.Classifier.predict_proba", lambda self, images: turned_truth)
    with pytest.raises(AttireError, match=r"not written: bf16 loses \d+\.\d\d points, allowed 0\.3"):
        export(bundle, "torch-export", out=tmp_path / "m.pt2", precision="bf16", data=turned)
    assert not list(tmp_path.glob("*.pt2*"))


def replace_labels(data: ImageDataset) -> ImageDataset:
    """Labels that no classifier of these images gets right."""
    return ImageDataset(data.images, (data.labels + 5) % 10, data.classes, data.source)
