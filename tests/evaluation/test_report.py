"""The files of a run, the page made from them, and the model card."""

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attire.errors import AttireError
from attire.evaluation import figures
from attire.evaluation.metrics import evaluate
from attire.evaluation.model_card import model_card, write_model_card
from attire.evaluation.report import (
    _times,
    describe_training,
    flatten_settings,
    format_duration,
    report_page,
    write_report,
)
from attire.evaluation.run_result import (
    Predictions,
    _choose_galleries,
    _write_digests,
    load_result,
    save_result,
)
from tests.results import CLASSES, HISTORY, NASTY, make_result


class Page(HTMLParser):
    """What a browser would load or run, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "data", "srcset", "action"):
                self.loads.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.words += data


def test_a_run_reads_back_from_its_folder_and_gives_the_same_page(tmp_path: Path) -> None:
    result = make_result()
    save_result(tmp_path, result)
    first = write_report(tmp_path, result).read_bytes()
    again = load_result(tmp_path)
    assert write_report(tmp_path, again).read_bytes() == first
    assert again.history == HISTORY
    assert (again.predictions.probabilities == result.predictions.probabilities).all()
    assert (again.predictions.labels == result.predictions.labels).all()
    assert model_card(again) == model_card(result)
    save_result(tmp_path / "copy", again)
    for file in (tmp_path / "evaluation").iterdir():
        assert (tmp_path / "copy/evaluation" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_files_say_what_they_should(tmp_path: Path) -> None:
    result = make_result()
    save_result(tmp_path, result)
    folder = tmp_path / "evaluation"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test"]["n"] == 120
    assert metrics["test"]["accuracy"] == result.test.correct / 120
    assert metrics["test"]["accuracy_low"] < metrics["test"]["accuracy"] < metrics["test"]["accuracy_high"]
    assert metrics["train"]["n"] == 120
    assert metrics["val"] is None
    assert (metrics["recipe"], metrics["seed"]) == ("fast", 3)
    assert metrics["seconds"] == {"extract": 3.0, "fit": 1.0, "total": 5.0}
    assert metrics["claim"]["verdict"] == "not confirmed"
    rows = list(csv.DictReader((folder / "predictions.csv").read_text().splitlines()))
    assert sum(row["label"] == row["predicted"] for row in rows) == result.test.correct
    assert list(rows[0])[-1] == "p_Bag, large"
    table = list(csv.reader((folder / "confusion.csv").read_text().splitlines()))
    assert [[int(x) for x in row[1:]] for row in table[1:]] == result.test.confusion.tolist()
    assert len((folder / "per_class.csv").read_text().splitlines()) == 4
    for name in ("confusion", "reliability", "loss", "accuracy"):
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.size[0] > 400
        assert "<dc:date>" not in (folder / f"{name}.svg").read_text()


def test_the_page_stands_alone() -> None:
    text = report_page(make_result())
    html = Page(text)
    assert not {"script", "iframe", "object", "embed", "base", "form"} & set(html.tags)
    assert all(load.startswith(("data:", "#")) for load in html.loads)
    assert len(html.ids) == len(set(html.ids))
    assert "default-src 'none'" in text
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", text)
    assert html.tags.count("svg") == 3
    assert html.tags.count("img") == sum(len(rows) for rows in make_result().galleries.values())


def test_the_page_tells_the_story() -> None:
    result = make_result()
    words = " ".join(Page(report_page(result)).words.split())
    for expected in (
        "Claim check: not confirmed. 98.0 % was claimed",
        "Hardest class:",
        "The test set was scored once, after training had ended",
        "Loss by epoch",
        "Most confident errors",
        "Least certain",
        "A random sample",
        "head.hidden",
        "the rest",
        "attire train --recipe fast --seed 3",
        f"One-vs-rest mean accuracy: {100 * result.test.one_vs_rest_accuracy:.1f} %",
    ):
        assert expected in words
    assert "scored once, after training had ended" in report_page(replace(result, val=result.test))


def test_names_are_text_wherever_they_appear(tmp_path: Path) -> None:
    result = make_result(NASTY, title="<b>run</b>", data={"name": '": {x'}, command="attire train '<i>'")
    html = Page(report_page(result))
    assert not {"script", "b", "i"} & set(html.tags) - {"b"}
    assert html.tags.count("b") == 1  # the headline's own
    assert NASTY[0] in html.words
    save_result(tmp_path, result)
    assert load_result(tmp_path).classes == NASTY
    card = write_model_card(tmp_path / "model", result).read_text()
    assert "<script>" not in card
    assert 'name: "\\": {x"' in card


def test_a_faultless_run_without_epochs_or_errors_has_a_page_too(tmp_path: Path) -> None:
    result = make_result(signal=50, history=(), train=None, seconds={}, config={}, environment={}, data={}, claimed=1.0)
    save_result(tmp_path, result)
    assert report_page(load_result(tmp_path)) == report_page(result)
    words = Page(report_page(result)).words
    assert "No test image was misclassified." in words
    assert "not trained in epochs" in words
    assert "Hardest class: T-shirt/top 100.0 %." in words
    assert "undecided" in words
    assert "nan" not in words.lower().split()
    assert "Most frequent mistakes" not in model_card(result)


def test_a_class_that_never_occurs_is_shown_as_undefined(tmp_path: Path) -> None:
    labels = np.zeros(30, dtype=np.int64)
    labels[15:] = 1
    p = np.eye(3)[labels]
    evaluation = evaluate(p, labels, CLASSES, resamples=20)
    result = make_result(
        test=evaluation, train=None, predictions=Predictions.of_test_set(labels, p, np.zeros((30, 28, 28), np.uint8))
    )
    save_result(tmp_path, result)
    assert report_page(load_result(tmp_path)) == report_page(result)
    assert "nan" not in (tmp_path / "evaluation/per_class.csv").read_text()
    assert "undefined" in model_card(result)


def test_class_names_in_any_script_survive(tmp_path: Path) -> None:
    result = make_result(("ドレス", "コート", "ערב"))
    save_result(tmp_path, result)
    assert load_result(tmp_path).classes == ("ドレス", "コート", "ערב")
    assert "ドレス" in Page(report_page(result)).words
    assert "ドレス" in (tmp_path / "evaluation/confusion.svg").read_text(encoding="utf-8")


def test_galleries_choose_what_they_are_named_for() -> None:
    p = np.array([[0.99, 0.01], [0.6, 0.4], [0.51, 0.49], [0.2, 0.8]])
    chosen = _choose_galleries(Predictions.of_test_set(np.array([1, 1, 0, 1]), p, np.zeros((4, 28, 28), np.uint8)))
    assert chosen["Most confident errors"] == [0, 1]
    assert chosen["Least certain"] == [2, 1, 3, 0]
    assert chosen["A random sample"] == [0, 1, 2, 3]


def test_drawings_are_the_same_every_time() -> None:
    result = make_result()
    first, second = (figures._svg(figures.confusion_matrix(result.test.confusion, CLASSES)) for _ in range(2))
    assert first == second
    assert b"T-shirt/top" in first


def test_wrong_images_are_refused() -> None:
    with pytest.raises(AttireError, match=r"test images: expected \(2, 28, 28\) uint8, found \(2, 32, 32\) uint8"):
        Predictions.of_test_set(np.zeros(2), np.zeros((2, 3)), np.zeros((2, 32, 32), np.uint8))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("evaluation/metrics.json", "{}", "metrics.json: not what a finished run writes: KeyError 'test'"),
        ("evaluation/metrics.json", "{", "metrics.json: not valid JSON"),
        (
            "evaluation/predictions.csv",
            "row,label\n0,Coat\n",
            "predictions.csv: not what a finished run writes: KeyError",
        ),
        ("evaluation/gallery.csv", "gallery,row\nx,y\n", "gallery.csv: not what a finished run writes"),
        ("evaluation/gallery.png", "no picture", "gallery.png: not what a finished run writes"),
        ("history.csv", "epoch\nx\n", "history.csv: not what a finished run writes"),
        ("config.json", "[]", "config.json: expected a JSON object"),
    ],
)
def test_a_damaged_run_is_refused_by_file(tmp_path: Path, name: str, text: str, message: str) -> None:
    save_result(tmp_path, make_result())
    (tmp_path / name).write_text(text)
    _write_digests(tmp_path)  # written so, not damaged
    with pytest.raises(AttireError, match=re.escape(message)):
        load_result(tmp_path)


@pytest.mark.parametrize("name", ["evaluation/metrics.json", "evaluation/gallery.png", "history.csv", "data.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    save_result(tmp_path, make_result())
    (tmp_path / name).unlink()
    with pytest.raises(AttireError, match=re.escape(f"{name}: cannot read (No such file")):
        load_result(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.35, "0.3 s"), (42, "42 s"), (59.7, "1 min 0 s"), (127.3, "2 min 7 s"), (3840, "1 h 4 min")],
)
def test_durations_read_the_way_people_say_them(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_times_account_for_the_whole() -> None:
    assert [line[0] for line in _times({"extract": 3, "total": 4})] == ["computing features", "the rest", "everything"]
    assert _times({"extract": 3, "total": 4})[1] == ("the rest", "1.0 s", 25)
    assert _times({})[-1] == ("everything", "0.0 s", 0)


def test_rows_per_class_take_one_line() -> None:
    even, uneven = {"rows_per_class": {"Coat": 6000, "Bag": 6000}}, {"rows_per_class": {"Coat": 1200, "Bag": 7}}
    assert flatten_settings({"train": even}) == [("train.rows_per_class", "6,000 each")]
    assert flatten_settings({"test": uneven}) == [("test.rows_per_class", "Coat 1,200, Bag 7")]


def test_the_training_is_described_in_the_words_of_the_field() -> None:
    recipe = {"freeze_to": "block2", "finetune_blocks": 1, "flips": True, "shifts": 0, "cutmix": 0.5}
    text = describe_training({"recipe": recipe, "teacher": {"bundles": ["a"]}})
    assert text.startswith("VGG16 is frozen up to block2; the next block is fine-tuned. Augmentation: mirrored")
    assert "CutMix. Distillation:" in text
    result = make_result(config={"recipe": {**recipe, "freeze_to": "none", "finetune_blocks": 0, "tta": 2}})
    for words in (Page(report_page(result)).words, model_card(result)):
        assert "No block of VGG16 is frozen; only the head is trained." in words
        assert "Augmentation: mirrored pictures, CutMix." in words
    assert "Test-time augmentation: each answer averages 2 views" in report_page(result)
    assert describe_training({"bundle": "runs/1/model"}) == ""
