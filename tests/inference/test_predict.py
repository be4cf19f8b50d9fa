"""`attire predict`: what it finds, reads, answers and tells, from small pictures and a bundle of random weights."""

import csv
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attire.data.dataset import FASHION_CLASSES, ImageDataset
from attire.data.loading import write_csv
from attire.errors import UsageError
from attire.inference import bundle_files
from attire.inference import predict as inference_predict
from attire.inference.inputs import PictureInput
from attire.inference.predict import _speed, split_model
from attire.inference.prediction import Prediction
from tests.command import Done, attire

pytestmark = pytest.mark.usefixtures("here")


class Brightness:
    """A model whose answer is the picture's mean: quick, and every picture has another."""

    classes = FASHION_CLASSES
    ood_detector = object()

    def __init__(self) -> None:
        self.batches: list[int] = []

    def predict(self, images: Any) -> list[Prediction]:
        self.batches.append(len(images))
        return [Prediction("Bag", float(x.mean()) / 255, (("Bag", float(x.mean()) / 255),), 1.0, False) for x in images]


@pytest.fixture
def brightness(monkeypatch: pytest.MonkeyPatch) -> Brightness:
    """Stands where the shipped model would answer."""
    model = Brightness()
    monkeypatch.setattr(inference_predict, "open_model", lambda path, device: model)
    return model


def picture(path: Path | str, level: int = 0) -> str:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((28, 28), level, np.uint8)).save(path)
    return str(path)


def answers(done: Done) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.out.splitlines()]


class Wide(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [40, 72])
def test_a_narrow_terminal_gets_a_line_for_each_class(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    image, out = np.zeros((28, 28), np.uint8), Wide()
    asked = PictureInput("a-picture-with-a-long-name.png", image, None)
    ranking = (("Ankle boot", 0.9), ("Sneaker", 0.08), ("Sandal", 0.02))
    answer = Prediction("Ankle boot", 0.9, ranking, 1.0, False)
    monkeypatch.setattr(inference_predict, "read_inputs", lambda paths, classes: (item for item in [asked]))
    inference_predict.print_answers(
        [], SimpleNamespace(classes=FASHION_CLASSES, predict=lambda images: [answer]), out=out, top_k=2
    )
    narrow = "a-picture-with-a-long-name.png\n  Ankle boot   0.900\n  Sneaker      0.080\n"
    wide = "a-picture-with-a-long-name.png Ankle boot   0.900   Sneaker 0.080\n"
    assert out.getvalue() == (narrow if columns == 40 else wide)


def test_the_first_argument_may_be_the_model(bundle: Path) -> None:
    picture("a.png")
    assert split_model([str(bundle), "a.png"], None) == (bundle, ["a.png"])
    assert split_model([str(bundle.parent), "a.png"], None) == (bundle.parent, ["a.png"])
    assert split_model(["m.onnx", "a.png"], None) == (Path("m.onnx"), ["a.png"])
    assert split_model(["a.png"], None) == (None, ["a.png"])
    assert split_model([str(bundle)], Path("m.onnx")) == (Path("m.onnx"), [str(bundle)])
    for arguments in ([], [str(bundle)]):
        with pytest.raises(UsageError, match="attire predict: no picture was named"):
            split_model(arguments, None)


# Answers.


def test_all_pictures_of_all_sources_are_answered_in_batches(
    brightness: Brightness, synthetic: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference_predict, "BATCH", 16)
    for i in range(50):
        picture(f"folder/{i:02}.png", i)
    write_csv(synthetic, Path("rows.csv"))
    done = attire("predict", "folder", "--json", "rows.csv", picture("last.png", 255))
    lines = answers(done)
    names = [f"folder/{i:02}.png" for i in range(50)] + [f"rows.csv:{i}" for i in range(2, 62)] + ["last.png"]
    assert (done.status, done.err, [line["file"] for line in lines]) == (0, "", names)
    assert [round(255 * line["probabilities"]["Bag"]) for line in lines[:50]] == list(range(50))
    assert (max(brightness.batches), sum(brightness.batches)) == (16, 111)


def test_bad_files_are_lines_and_the_status_is_1(brightness: Brightness) -> None:
    Path("text.png").write_text("hello")
    done = attire("predict", "none.png", picture("a.png"), "text.png", "no*.jpg", picture("b.png"))
    assert done.status == 1
    assert [line.split(":")[1].strip() for line in done.err.splitlines()] == ["none.png", "text.png", "no*.jpg"]
    assert [line.split()[0] for line in done.out.splitlines()] == ["a.png", "b.png"]


def test_csv_has_a_header_and_as_many_columns_as_classes_are_shown(bundle: Path) -> None:
    picture("a,b.png"), picture("two\nlines.png")
    done = attire("predict", bundle, "a,b.png", "two\nlines.png", "--format", "csv", "--top-k", "2")
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert list(rows[0]) == [
        "file",
        "label",
        "probability",
        "out_of_distribution",
        "distance",
        "label_2",
        "probability_2",
    ]
    assert [row["file"] for row in rows] == ["a,b.png", "two\nlines.png"]
    assert float(rows[0]["probability"]) >= float(rows[0]["probability_2"]) > 0


def test_json_is_the_name_of_jsonl(brightness: Brightness) -> None:
    one = picture("a.png", 51)
    assert attire("predict", one, "--json").out == attire("predict", one, "--format", "jsonl").out
    done = attire("predict", one, "--json", "--format", "csv")
    assert (done.status, done.error) == (2, "--json: given together with --format csv; give one of them")


def test_names_need_not_be_utf_8(brightness: Brightness) -> None:
    name = "gr\udcf6sse.png"
    try:
        picture(name)
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system wants UTF-8")
    for form in inference_predict._FORMS:
        attire("predict", name, "--format", form).out.encode()


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda data: monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


def test_standard_input_is_a_picture_or_a_table(brightness: Brightness, synthetic: ImageDataset, stdin: Any) -> None:
    stdin(Path(picture("a.png", 51)).read_bytes())
    (line,) = answers(attire("predict", "-", "--json"))
    assert (line["file"], round(255 * line["probabilities"]["Bag"])) == ("-", 51)
    write_csv(synthetic, Path("rows.csv"))
    stdin(Path("rows.csv").read_bytes())
    assert [line["file"] for line in answers(attire("predict", "-", "--json"))] == [f"-:{i}" for i in range(2, 62)]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "standard input: empty file; expected a PNG, JPEG, WebP or BMP picture"),
        (b"%PDF-1.4", "standard input: a PDF document, not a picture that can be read; expected a PNG,"),
        (b"hello", "standard input: "),
        (b"\x89PNG\r\n\x1a\n rest", "standard input: a PNG picture, damaged or cut off; get the file again"),
    ],
)
def test_bad_standard_input_is_one_line(brightness: Brightness, data: bytes, said: str, stdin: Any) -> None:
    stdin(data)
    done = attire("predict", "-")
    assert (done.status, done.out) == (1, "")
    assert done.error.startswith(said)
    assert "/" not in done.error  # where it was kept meanwhile is nobody's business


def test_a_reader_that_has_gone_is_no_error(bundle: Path) -> None:
    for i in range(300):
        picture(f"many/{i}.png")
    line = (
        f"{shlex.quote(sys.executable)} -c 'from attire.cli.main import main; main()' predict {bundle} many | head -n 1"
    )
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert done.stdout.startswith("many/0.png")
    assert "Traceback" not in done.stderr
    assert "error" not in done.stderr


def test_the_speed_is_told_to_a_terminal_alone(brightness: Brightness, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _speed(1204, 3.1) == "1,204 pictures in 3.1 s, 388/s"
    assert _speed(1, 0.5) == "1 picture in 0.5 s, 2/s"
    assert attire("predict", picture("a.png")).err == ""

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", screen := Screen())
    out = io.StringIO()
    for i in range(200):
        picture(f"f/{i}.png")
    assert inference_predict.print_answers(["f"], brightness, out=out) == 0
    assert "200 pictures in " in screen.getvalue().splitlines()[-1]
    assert len(out.getvalue().splitlines()) == 200  # the bar did not take the answers


def test_save_inputs_writes_a_strip_a_picture(brightness: Brightness, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for `photos`: what is tested is which files get which strip."""
    fake = SimpleNamespace(prepare=lambda source, name: source, comparison_strip=lambda photo: str(photo).encode())
    monkeypatch.setitem(sys.modules, "attire.data.photos", fake)
    monkeypatch.setattr("attire.data.photos", fake, raising=False)
    for name in ("a.png", "x/a.png", "b.jpg"):
        picture(name)
    assert attire("predict", "a.png", "x/a.png", "b.jpg", "--save-inputs", "seen").status == 0
    assert {path.name: path.read_text() for path in Path("seen").iterdir()} == {
        "a.png": "a.png",
        "a-2.png": "x/a.png",
        "b.png": "b.jpg",
    }
    assert attire("predict", "b.jpg", "--save-inputs", "one.PNG").status == 0
    assert Path("one.PNG").read_text() == "b.jpg"
    done = attire("predict", "a.png", "b.jpg", "--save-inputs", "two.png")
    assert (done.status, done.error) == (2, "--save-inputs: one file for several pictures; name a folder")


# Which model answers.


def test_a_bundle_without_a_graph_is_answered_by_torch(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_files, "_SHIPPED", bundle)
    picture("a.png", 7)
    assert attire("predict", "a.png", "--json").out == attire("predict", bundle, "a.png", "--json").out
    assert attire("predict", "--device", "gpu", "a.png").status == 2
