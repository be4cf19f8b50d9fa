"""A bundle's graph for ONNX Runtime: the bundle's answers from the bundle's weights, without torch."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attire.data.dataset import FASHION_CLASSES, ImageDataset
from attire.errors import AttireError
from attire.export.bundle_graph import write_graph
from attire.export.export import export
from attire.inference.classifier import Architecture, Classifier, load_bundle
from attire.inference.out_of_distribution import OODDetector, _fit_classes, mahalanobis_distance, pool_features
from attire.inference.runtimes import load_export
from attire.model import vgg

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own deprecations
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


@pytest.fixture
def detecting(classifier: Classifier, synthetic: ImageDataset) -> Classifier:
    """Rejects about a half of the synthetic images."""
    x = torch.cat([pool_features(part, 128) for part in classifier._features(synthetic.images)])
    centre, whiten, means = _fit_classes(x, torch.from_numpy(synthetic.labels), shrinkage=0.9)  # 60 rows, 128 channels
    far = mahalanobis_distance(x, centre, whiten, means).sort().values
    classifier.ood_detector = OODDetector(centre, whiten, means, float(far[29] + far[30]) / 2, 60)
    return classifier


@pytest.fixture(params=["float32", "float16"])
def graphed(request: pytest.FixtureRequest, detecting: Classifier, synthetic: ImageDataset, tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    detecting.save(folder, request.param)
    write_graph(folder, synthetic)
    return folder


def test_the_graph_answers_as_the_bundle_and_holds_no_weights(graphed: Path, synthetic: ImageDataset) -> None:
    bundle, graph = load_bundle(graphed, "cpu"), load_export(graphed / "network.onnx")
    expected, answers = bundle.predict(synthetic.images), graph.predict(synthetic.images)
    assert [x.label for x in answers] == [x.label for x in expected]
    assert [x.out_of_distribution for x in answers] == [x.out_of_distribution for x in expected]
    assert {True, False} == {x.out_of_distribution for x in answers}
    assert np.allclose([x.probability for x in answers], [x.probability for x in expected], atol=1e-4)
    assert np.allclose([x.distance or 0 for x in answers], [x.distance or 0 for x in expected], rtol=1e-3)
    assert (graphed / "network.onnx").stat().st_size < 0.2 * (graphed / "model.safetensors").stat().st_size
    assert graph.predict(synthetic.images[:0]) == []


def test_a_convolutional_classifier_has_a_graph_of_the_bundles_own_weights(
    weights: Path, synthetic: ImageDataset, tmp_path: Path
) -> None:
    """The exporter folds batch normalisation into the convolution before it, where it finds one."""
    torch.manual_seed(0)
    architecture = Architecture("block2", 16, 0, (), 0.0, conv=(16, 16))
    head = architecture.build_head(10)
    for name, value in head.state_dict().items():
        if value.ndim == 1:
            torch.nn.init.uniform_(value, 0.5, 1.5)  # moments and weights of batch normalisation that are not its first
        elif name.endswith("weight"):
            torch.nn.init.normal_(value, std=0.1)  # answers that differ
    classifier = Classifier(vgg.vgg16(weights, "block2", 0, head), architecture, FASHION_CLASSES)
    classifier.save(tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle", "cpu")
    write_graph(tmp_path / "bundle", synthetic)
    expected = bundle.predict_proba(synthetic.images)
    assert np.ptp(expected, axis=0).max() > 0.01
    assert np.allclose(
        load_export(tmp_path / "bundle" / "network.onnx").predict_proba(synthetic.images), expected, atol=1e-4
    )


def test_doubt_counts_in_the_graph_as_in_the_bundle(
    detecting: Classifier, synthetic: ImageDataset, tmp_path: Path
) -> None:
    assert detecting.ood_detector is not None
    plain = detecting.distances(synthetic.images)
    detecting.ood_detector = replace(detecting.ood_detector, confidence_weight=5.0)
    far = detecting.distances(synthetic.images)
    detecting.ood_detector = replace(detecting.ood_detector, threshold=float(np.sort(far)[29:31].mean()))
    detecting.save(tmp_path)
    write_graph(tmp_path, synthetic)
    answers = load_export(tmp_path / "network.onnx").predict(synthetic.images)
    assert np.allclose([x.distance or 0 for x in answers], far, rtol=1e-3)
    assert not np.allclose(far, plain, rtol=1e-3)
    assert sum(bool(x.out_of_distribution) for x in answers) == 30


def test_a_graph_holds_the_views_that_its_bundle_averages(
    detecting: Classifier, synthetic: ImageDataset, tmp_path: Path
) -> None:
    detecting.architecture = replace(detecting.architecture, tta=6)
    detecting.save(tmp_path)
    parity = write_graph(tmp_path, synthetic)
    assert parity.max_difference < 1e-5
    bundle, graph = load_bundle(tmp_path, "cpu"), load_export(tmp_path / "network.onnx")
    for rows in (1, 7):
        expected, answers = bundle.predict(synthetic.images[:rows]), graph.predict(synthetic.images[:rows])
        assert np.allclose([x.probability for x in answers], [x.probability for x in expected], atol=1e-5)
        assert np.allclose([x.distance or 0 for x in answers], [x.distance or 0 for x in expected], rtol=1e-3)


def test_any_reader_of_onnx_can_open_it(graphed: Path, synthetic: ImageDataset) -> None:
    """The weights are plain external data: no knowledge of ours is needed."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graphed / "network.onnx"), providers=["CPUExecutionProvider"])
    (probabilities,) = session.run(["probabilities"], {"images": synthetic.images[:5]})
    assert np.allclose(
        probabilities, load_export(graphed / "network.onnx").predict_proba(synthetic.images[:5]), atol=1e-5
    )


def test_a_graph_without_a_verdict_where_the_bundle_has_none(
    classifier: Classifier, synthetic: ImageDataset, tmp_path: Path
) -> None:
    classifier.save(tmp_path)
    write_graph(tmp_path, synthetic)
    assert load_export(tmp_path / "network.onnx").predict(synthetic.images[:1])[0].out_of_distribution is None


def test_an_onnx_export_gives_verdicts_too(detecting: Classifier, synthetic: ImageDataset, tmp_path: Path) -> None:
    detecting.save(tmp_path / "bundle")
    made = export(tmp_path / "bundle", "onnx", out=tmp_path / "m.onnx", data=synthetic)
    expected = [answer.out_of_distribution for answer in detecting.predict(synthetic.images)]
    assert [answer.out_of_distribution for answer in made.predict(synthetic.images)] == expected
    parity = made.metadata["parity"]
    assert (parity["changed_verdicts"], parity["max_distance_difference"] < 1e-3) == (0, True)


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["network.onnx", "model.safetensors", "model.json"])
@pytest.mark.parametrize("at", [0.1, 0.5, 0.99])
def test_one_flipped_bit_is_refused(
    name: str, at: float, detecting: Classifier, synthetic: ImageDataset, tmp_path: Path
) -> None:
    detecting.save(tmp_path)
    write_graph(tmp_path, synthetic)
    flip(tmp_path / name, at)
    with pytest.raises(AttireError, match="damaged"):
        load_export(tmp_path / "network.onnx")


def test_another_bundle_s_graph_is_refused(graphed: Path, classifier: Classifier, tmp_path: Path) -> None:
    classifier.temperature = 2
    classifier.save(tmp_path / "other")
    shutil.copy(graphed / "network.onnx", tmp_path / "other")
    with pytest.raises(AttireError, match=r"model\.safetensors or model\.json beside it is damaged or another's"):
        load_export(tmp_path / "other" / "network.onnx")
    (tmp_path / "other/model.safetensors").unlink()
    with pytest.raises(AttireError, match="cannot read"):
        load_export(tmp_path / "other/network.onnx")


def test_a_graph_that_answers_otherwise_is_not_written(
    detecting: Classifier, synthetic: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detecting.save(tmp_path)
    far = detecting.distances(synthetic.images) * 1.01
    monkeypatch.setattr(Classifier, "distances", lambda self, images: far)
    with pytest.raises(AttireError, match=r"network\.onnx: not written, since it is not equal .* distances"):
        write_graph(tmp_path, synthetic)
    assert not (tmp_path / "network.onnx").exists()


def test_predict_needs_no_torch(graphed: Path, synthetic: ImageDataset, tmp_path: Path) -> None:
    Image.fromarray(synthetic.images[0]).save(tmp_path / "a.png")
    run = (
        "import sys\nfrom attire.cli.main import main\n"
        f"sys.argv[1:] = ['predict', '--json', '--model', {str(graphed)!r}, {str(tmp_path / 'a.png')!r}]\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 0\n"
        "imported = [name for name in ('torch', 'pandas', 'pyarrow', 'scipy', 'rich', 'onnx') if name in sys.modules]\n"
        "assert not imported, imported\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", run], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["label"] == load_bundle(graphed, "cpu").predict(tmp_path / "a.png").label
