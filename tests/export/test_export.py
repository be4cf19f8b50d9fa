"""Exports answer as their bundle does, are refused when they do not, and say no to what is not theirs."""

import functools
import http.server
import queue
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attire.data.dataset import ImageDataset
from attire.data.loading import load_dataset, write_csv
from attire.errors import AttireError, UsageError
from attire.export.export import export
from attire.export.export_format import ExportFormat
from attire.inference import scoring
from attire.inference.classifier import load_bundle
from attire.inference.runtimes import (
    SUFFIXES,
    ExportedModel,
    load_export,
)
from attire.recipes import Recipe
from attire.training import run

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporters' own deprecations


def needs(kind: str) -> None:
    for name in {"onnx": ("onnx", "onnxruntime", "onnxscript"), "openvino": ("openvino", "nncf")}.get(kind, ()):
        pytest.importorskip(name)


@pytest.fixture
def calibrated(synthetic: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 is calibrated on the synthetic images: the official ones are not needed here."""
    monkeypatch.setattr(ExportFormat, "_calibration_images", lambda self: synthetic.images)


@pytest.mark.parametrize("kind", list(SUFFIXES))
def test_an_export_answers_as_its_bundle_for_any_number_of_images(
    kind: str, bundle: Path, synthetic: ImageDataset, tmp_path: Path
) -> None:
    needs(kind)
    suffix = SUFFIXES[kind]
    made = export(bundle, kind, out=tmp_path / f"m{suffix}", data=synthetic)
    classifier = load_bundle(bundle)
    for rows in (1, 2, 7, 60):
        probabilities = load_export(made.path).predict_proba(synthetic.images[:rows])
        expected = classifier.predict_proba(synthetic.images[:rows])
        assert probabilities.shape == (rows, 10)
        assert np.abs(probabilities - expected).max() < 1e-4
    assert made.classes == classifier.classes
    assert made.metadata["parity"]["n"] == 60
    assert made.metadata["parity"]["agreement"]["value"] == 1
    assert made.predict(synthetic.images[:1])[0].label == classifier.predict(synthetic.images[0]).label
    assert made.predict_proba(synthetic.images[:0]).shape == (0, 10)


@pytest.mark.parametrize("kind", ["onnx", "openvino", "torch-export"])
def test_an_export_averages_the_views_that_its_bundle_averages(
    kind: str, bundle: Path, synthetic: ImageDataset, tmp_path: Path
) -> None:
    needs(kind)
    classifier = load_bundle(bundle)
    classifier.architecture = replace(classifier.architecture, tta=4)
    classifier.save(bundle)
    made = export(bundle, kind, out=tmp_path / f"m{SUFFIXES[kind]}", data=synthetic)
    for rows in (1, 3):
        expected = classifier.predict_proba(synthetic.images[:rows])
        assert np.abs(made.predict_proba(synthetic.images[:rows]) - expected).max() < 1e-4
    csv = tmp_path / "all.csv"
    write_csv(synthetic, csv)
    with pytest.raises(UsageError, match="--tta: an exported file holds its own; measure the bundle it was made of"):
        scoring.evaluate_bundle(made.path, csv, tta=2)


@pytest.mark.parametrize(("kind", "precision"), [("onnx", "int8"), ("openvino", "int8"), ("torch-export", "bf16")])
def test_smaller_precisions_are_measured_and_smaller(
    kind: str, precision: str, bundle: Path, synthetic: ImageDataset, calibrated: None, tmp_path: Path
) -> None:
    needs(kind)
    suffix = SUFFIXES[kind]
    exact = export(bundle, kind, out=tmp_path / f"exact{suffix}", data=synthetic)
    small = export(bundle, kind, out=tmp_path / f"small{suffix}", precision=precision, max_drop=1, data=synthetic)
    assert size(small.path) < 0.6 * size(exact.path)
    assert small.metadata["parity"]["max_difference"] > exact.metadata["parity"]["max_difference"]
    assert 0.5 < small.metadata["parity"]["agreement"]["value"] <= 1


def size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.iterdir()) if path.is_dir() else path.stat().st_size


def test_evaluate_accepts_an_export_as_it_accepts_a_bundle(
    bundle: Path, synthetic: ImageDataset, tmp_path: Path
) -> None:
    made = export(bundle, "torch-export", out=tmp_path / "m.pt2", data=synthetic)
    csv = tmp_path / "all.csv"
    write_csv(synthetic, csv)
    by_export, by_bundle = (scoring.evaluate_bundle(what, csv) for what in (made.path, bundle))
    assert by_export.test.correct == by_bundle.test.correct
    assert by_export.config["backend"] == "torch-export"


def damage_onnx(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_pt2(path: Path) -> None:
    """Another temperature in the graph, the zip's own checksums in order: only the seal can tell."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in records if name.endswith("model.json"))
    records[name] = records[name].replace(b"0", b"1", 1)
    with zipfile.ZipFile(path, "w") as archive:
        for key, value in records.items():
            archive.writestr(key, value)


def damage_openvino(path: Path) -> None:
    damage_onnx(path / "network.bin")


@pytest.mark.parametrize(
    ("kind", "damage"),
    [("onnx", damage_onnx), ("torch-export", damage_pt2), ("openvino", damage_openvino)],
)
def test_tampered_and_truncated_files_are_refused(
    kind: str, damage: Callable[[Path], None], bundle: Path, synthetic: ImageDataset, tmp_path: Path
) -> None:
    needs(kind)
    suffix = SUFFIXES[kind]
    path = export(bundle, kind, out=tmp_path / f"m{suffix}", data=synthetic).path
    damage(path)
    with pytest.raises(AttireError, match="damaged"):
        load_export(path)
    whole = path / "network.bin" if path.is_dir() else path
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(AttireError, match="damaged"):
        load_export(path)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.onnx", b"hello", "not an ONNX file that `attire export` wrote, or damaged"),
        ("a.onnx", b"", "not an ONNX file that `attire export` wrote, or damaged"),
        ("a.pt2", b"PK\x03\x04 no", "not a torch.export file that `attire export` wrote, or damaged"),
        ("a.bin", b"hello", "not an exported file by its name; expected .onnx, .openvino, .pt2"),
    ],
)
def test_foreign_files_are_refused_in_one_line(name: str, content: bytes, line: str, tmp_path: Path) -> None:
    needs("onnx")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AttireError, match=line.replace(".", r"\.")):
        load_export(tmp_path / name)
    with pytest.raises(AttireError, match="no such file"):
        load_export(tmp_path / "none.onnx")
    (tmp_path / "b.openvino").mkdir()
    with pytest.raises(AttireError, match="not a folder that `attire export` wrote"):
        load_export(tmp_path / "b.openvino")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"kind": "tflite"}, "--format: expected one of onnx, openvino, torch-export, found 'tflite'"),
        ({"kind": "onnx", "precision": "bf16"}, "--precision: onnx has fp32 and int8, found 'bf16'"),
        ({"max_drop": -0.1}, "--max-drop: expected 0 to 100 points, found -10"),
        ({"kind": "torch-export", "out": "m.onnx"}, "--out: expected a name that ends in .pt2, found 'm.onnx'"),
    ],
)
def test_what_cannot_be_exported_is_one_clear_line(change: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=line):
        export(tmp_path / "no-bundle", **change)


def test_a_file_that_is_there_is_left_alone(bundle: Path, synthetic: ImageDataset, tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_text("mine")
    (tmp_path / ".attire.m.pt2.killed.part").mkdir()  # by one that was killed after its file had its name
    with pytest.raises(AttireError, match="it exists already; give --out another name, or remove it first"):
        export(bundle, "torch-export", out=tmp_path / "m.pt2", data=synthetic)
    assert (tmp_path / "m.pt2").read_text() == "mine"
    assert not list(tmp_path.glob(".attire.*"))


def test_the_classes_of_the_gate_s_images_must_be_the_bundle_s(
    bundle: Path, synthetic: ImageDataset, tmp_path: Path
) -> None:
    other = ImageDataset(synthetic.images, synthetic.labels, tuple("abcdefghij"), "other")
    with pytest.raises(AttireError, match="its classes are not the bundle's"):
        export(bundle, "torch-export", out=tmp_path / "m.pt2", data=other)


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("kind", list(SUFFIXES))
def test_the_example_consumers_answer_as_the_bundle_does_without_attire(
    kind: str, bundle: Path, synthetic: ImageDataset, tmp_path: Path
) -> None:
    needs(kind)
    suffix = SUFFIXES[kind]
    path = export(bundle, kind, out=tmp_path / f"m{suffix}", data=synthetic).path
    pictures = [tmp_path / f"{i}.png" for i in range(3)]
    for picture, image in zip(pictures, synthetic.images, strict=False):
        Image.fromarray(image).save(picture)
    places = [tmp_path / "left.png", tmp_path / "right.png"]  # of one dark garment on a white wall
    for place, x in zip(places, (10, 120), strict=True):
        wall = Image.new("L", (200, 90), 250)
        wall.paste(Image.linear_gradient("L").resize((40, 60)).point(lambda value: value // 2), (x, 20))
        wall.save(place)
    script = EXAMPLES / f"{kind.replace('-', '_')}_classify.py"
    process = subprocess.run(
        [sys.executable, "-X", "importtime", script, path, *pictures, *places],
        capture_output=True,
        text=True,
        check=True,
    )
    expected = load_bundle(bundle).predict(synthetic.images[:3])
    lines = [f"{picture} {answer}" for picture, answer in zip(pictures, expected, strict=True)]
    answers = process.stdout.splitlines()
    assert answers[:3] == lines
    assert len({answer.split(maxsplit=1)[1] for answer in answers[3:]}) == 1  # wherever it hangs
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert not {"attire", "torchvision"} & imported
    assert kind == "torch-export" or "torch" not in imported


@pytest.mark.real
def test_the_official_images_are_the_gate(tmp_path: Path) -> None:
    """A head of a few steps on real features, proved equal over 2,000 official test images."""
    needs("onnx")
    recipe = Recipe(freeze_to="block2", image_size=32, pool=2, hidden=(16,), epochs=1, flips=False, val_size=100)
    from attire.data.loading import load_dataset

    csv = tmp_path / "some.csv"
    write_csv(load_dataset().subset(range(400)), csv)
    bundle = run.train(csv, recipe, run_dir=tmp_path / "run").bundle
    made: ExportedModel = export(bundle, "onnx", out=tmp_path / "m.onnx")
    assert made.metadata["parity"]["n"] == 2000
    assert made.metadata["parity"]["agreement"]["value"] == 1


TELL = """<script>const told = document.getElementById("answer");
new MutationObserver(() => fetch("told", { method: "POST", body: told.innerHTML })).observe(told, { childList: true });
</script>"""


@pytest.mark.real
@pytest.mark.slow
def test_the_page_classifies_in_a_real_browser(tmp_path: Path) -> None:
    """examples/browser over a local server, in Chromium: its answer is the exported file's own."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    npm = shutil.which("npm")
    if not chromium or not npm:
        pytest.skip("needs npm and Chromium")
    needs("onnx")
    folder = tmp_path / "browser"
    shutil.copytree(EXAMPLES / "browser", folder, ignore=shutil.ignore_patterns("node_modules"))
    install = subprocess.run(
        [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder, capture_output=True
    )
    if install.returncode:
        pytest.skip("npm could not fetch onnxruntime-web")
    image = load_dataset(part="test").images[0]
    Image.fromarray(image).save(folder / "picture.png")
    page = folder / "index.html"
    page.write_text(page.read_text() + TELL)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Told, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/index.html?picture=picture.png"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
        with subprocess.Popen([chromium, *flags, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as it:
            try:
                html = Told.answers.get(timeout=120)
            finally:
                it.terminate()
                server.shutdown()
    answers = re.findall(r"<li>([^<]+)<meter[^>]*></meter>([\d.]+)</li>", html)
    assert len(answers) == 3, html
    model = load_export(folder / "small.onnx")
    expected = model.predict(image[None])[0].ranking[:3]
    assert [name for name, _ in answers] == [name for name, _ in expected]
    assert float(answers[0][1]) == pytest.approx(expected[0][1], abs=0.01)  # WebAssembly rounds int8 sums otherwise
    assert (EXAMPLES / "browser" / "small.onnx").stat().st_size <= 3e6


class Told(http.server.SimpleHTTPRequestHandler):
    """Serves the folder, and takes what the page says when it has answered."""

    answers: queue.Queue[str] = queue.Queue()

    def do_POST(self) -> None:
        self.answers.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_response(204)
        self.end_headers()

    def log_message(self, *given: object) -> None: ...
