"""Bundles made fit to ship; and the one that ships scores what its card says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from attire.data.dataset import ImageDataset
from attire.data.loading import load_dataset
from attire.errors import AttireError
from attire.export import release
from attire.export.release import _check_release
from attire.inference import bundle_files, predict
from attire.inference.classifier import load_bundle
from attire.inference.runtimes import load_export
from attire.storage import files
from tests.command import attire

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own deprecations


@pytest.fixture
def run(finished: tuple[Path, object]) -> Path:
    return finished[0]


@pytest.fixture
def onnx() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")


def test_a_released_bundle_is_complete_and_says_what_is_true(
    run: Path, synthetic: ImageDataset, tmp_path: Path, onnx: None
) -> None:
    out = tmp_path / "out"
    measured = release.release(run, out, data=synthetic)
    names = {
        "MODEL_CARD.md",
        "model.json",
        "model.safetensors",
        "network.onnx",
        "report.html",
        "neighbours.safetensors",
    }
    assert {path.name for path in out.iterdir()} == names
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    classifier = load_bundle(out, "cpu")
    right = int((classifier.predict_proba(synthetic.images).argmax(1) == synthetic.labels).sum())
    assert (measured["correct"], measured["n"], measured["subset"]) == (right, 60, {"n": 60, "correct": right})
    assert f"| all | {right} | 60 |" in (out / "MODEL_CARD.md").read_text()
    assert str(run.parent) not in (out / "MODEL_CARD.md").read_text().partition("| Setting |")[0]
    assert classifier.metadata["release"]["file_digests"]["report.html"] == files.sha256_file(out / "report.html")
    assert measured["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert _check_release(out, synthetic) == []
    (out / "report.html").write_text("another")
    assert _check_release(out, ImageDataset(synthetic.images, 9 - synthetic.labels, synthetic.classes, "x")) != []


def test_where_teachers_lay_is_nobody_elses_business() -> None:
    data = {"rows": 3, "teacher": {"bundles": ["/home/ann/runs/seed-0/model", "/mnt/b"], "digests": ["1", "2"]}}
    assert release._without_teacher_folders(data) == {
        "rows": 3,
        "teacher": {"bundles": ["seed-0", "b"], "digests": ["1", "2"]},
    }
    assert release._without_teacher_folders({"teacher": None, "rows": 3}) == {"teacher": None, "rows": 3}


def test_what_is_replaced_is_a_bundle_and_samples_stay(
    run: Path, synthetic: ImageDataset, tmp_path: Path, onnx: None
) -> None:
    out = tmp_path / "out"
    release.release(run, out, data=synthetic)
    (out / "samples.png").write_bytes(b"tiles")
    (out / "stale.bin").write_bytes(b"old")
    before = (out / "model.safetensors").read_bytes()
    release.release(run, out, data=synthetic)
    assert (out / "samples.png").read_bytes() == b"tiles"
    assert not (out / "stale.bin").exists()
    assert (out / "model.safetensors").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("mine")
    with pytest.raises(AttireError, match="mine: holds something else than a bundle; give --out another name"):
        release.release(run, tmp_path / "mine", data=synthetic)
    assert (tmp_path / "mine/letter.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("_MAX_DIFFERENCE", 0.0, "not written: float16 keeps the class of 60 of 60 images, probabilities within"),
        ("_MAX_BYTES", 1000, r"bytes altogether, allowed 1,000; release a smaller recipe"),
    ],
)
def test_what_does_not_pass_leaves_the_old_one(
    name: str,
    value: float,
    said: str,
    run: Path,
    synthetic: ImageDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("onnxscript")
    out = tmp_path / "out"
    load_bundle(run, "cpu").save(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(release, name, value)
    with pytest.raises(AttireError, match=said):
        release.release(run, out, data=synthetic)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_command_prints_where_or_one_json_object(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "release", lambda run, out, watch: {"correct": 3})
    assert attire("release", run, "--out", "there").out == "there\n"
    assert json.loads(attire("release", run, "--json").out) == {"bundle": "release", "correct": 3}


# What ships.

SHIPPED = bundle_files._SHIPPED


def test_what_ships_is_whole_and_small_enough() -> None:
    classifier = load_bundle(device="cpu")
    claimed = classifier.metadata["release"]
    assert all(files.sha256_file(SHIPPED / name) == digest for name, digest in claimed["file_digests"].items())
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 16_000_000
    assert classifier.ood_detector is not None
    graph = load_export(SHIPPED / bundle_files.GRAPH)
    assert (graph.classes, graph.threshold) == (classifier.classes, classifier.ood_detector.threshold)
    subset = claimed["subset"]
    card = (SHIPPED / "MODEL_CARD.md").read_text()
    assert (
        f"| all | {claimed['correct']:,} | {claimed['n']:,} |\n| the first 2,000 | {subset['correct']:,} | 2,000 |"
        in card
    )


def test_predict_answers_right_after_install_without_torch(tmp_path: Path, synthetic: ImageDataset) -> None:
    from PIL import Image

    Image.fromarray(synthetic.images[0]).save(tmp_path / "a.png")
    run = (
        "import sys\nfrom attire.cli.main import main\nsys.argv[1:] = ['predict', '--json', 'a.png']\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 0\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", run], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    expected = load_bundle(device="cpu").predict(tmp_path / "a.png")
    answer = json.loads(done.stdout)
    assert (answer["label"], answer["out_of_distribution"]) == (expected.label, expected.out_of_distribution)
    assert answer["distance"] == pytest.approx(expected.distance, rel=1e-4)


def test_torch_answers_where_a_device_is_named_or_onnx_runtime_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(predict.open_model(None, "cpu")).__name__ == "ExportedModel"
    monkeypatch.setattr(predict, "find_spec", lambda name: None)
    assert type(predict.open_model(None, "cpu")).__name__ == "Classifier"


@pytest.mark.slow
@pytest.mark.real
def test_what_ships_scores_what_its_card_says_on_2_000_official_test_images() -> None:
    """By torch and by ONNX Runtime, exactly."""
    assert _check_release(SHIPPED, load_dataset(part="test")) == []
