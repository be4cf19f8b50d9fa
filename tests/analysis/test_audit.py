"""The audit as a whole: lists, counts, accuracies with and without, the page, the command."""

import csv
import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from attire.analysis.audit import _Audit, _accuracies, _together, audit, write_audit
from attire.analysis.duplicates import NearPairs
from attire.data.dataset import ImageDataset
from attire.data.loading import write_csv
from attire.errors import AttireError
from tests.command import TINY, attire
from tests.conftest import blocks_and_noise

pytest.importorskip("cleanlab")


@pytest.fixture
def planted(weights: Path, tmp_path: Path) -> Path:
    """A folder with 60 training and 20 test rows: train 4 and 9 are one image, as are train 11 and test 2; test 5 is
    train 20 shifted by a pixel; train 30 is blank."""
    images, labels = (lambda d: (d.images, d.labels))(blocks_and_noise(80))
    images[:, [0, 1, -2, -1]] = images[:, :, [0, 1, -2, -1]] = 0
    images[9], images[62], images[65] = images[4], images[11], np.roll(images[20], 1, 1)
    images[30] = 0
    folder = tmp_path / "planted"
    folder.mkdir()
    classes = blocks_and_noise(10).classes
    write_csv(ImageDataset(images[:60], labels[:60], classes, "t"), folder / "x_train.csv")
    write_csv(ImageDataset(images[60:], labels[60:], classes, "t"), folder / "x_test.csv")
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def found(planted: Path) -> _Audit:
    return audit(planted)


def test_what_was_planted_is_counted(found: _Audit) -> None:
    counts = found.counts()
    assert counts["images"] == {"train": 60, "test": 20}
    assert counts["exact_duplicates"] == {"train": 1, "test": 0, "train and test": 1}
    assert counts["exact_duplicates_with_different_labels"] == 2
    assert counts["near_duplicates"] == {"train": 0, "test": 0, "train and test": 1}
    assert (counts["blank"], counts["inverted"]) == (1, 0)


def test_every_list_is_a_file(found: _Audit, tmp_path: Path) -> None:
    page = write_audit(found, tmp_path / "out")
    exact = [(r["group"], r["part"], r["row"]) for r in rows_of(tmp_path / "out/exact_duplicates.csv")]
    assert exact == [("0", "train", "4"), ("0", "train", "9"), ("1", "train", "11"), ("1", "test", "2")]
    near = rows_of(tmp_path / "out/near_duplicates.csv")
    assert [(r["part"], r["row"], r["part_2"], r["row_2"]) for r in near] == [("train", "20", "test", "5")]
    odd = rows_of(tmp_path / "out/odd.csv")
    assert ("blank", "train", "30") in [(r["kind"], r["part"], r["row"]) for r in odd]
    suspect = rows_of(tmp_path / "out/suspects.csv")
    assert len(suspect) == len(found.findings.suspects)
    assert all(r["label"] != r["more_likely"] for r in suspect)
    assert [r["train"] for r in rows_of(tmp_path / "out/classes.csv")] == ["6"] * 10
    assert json.loads((tmp_path / "out/audit.json").read_text()) == json.loads(json.dumps(found.to_json()))
    text = page.read_text()
    assert "train 20" in text
    assert 'src="http' not in text


def test_near_copies_share_a_fold() -> None:
    near = NearPairs(np.array([0, 3]), np.array([3, 5]), np.zeros(2))
    assert _together(np.array([0, 1, 1, 3, 4, 5, 5]), near).tolist() == [0, 1, 1, 0, 4, 0, 0]


def test_accuracy_with_and_without(found: _Audit) -> None:
    """Ten of twenty right, the exact copy and the near one among them."""
    right = np.zeros(20, np.bool_)
    right[:10] = True
    told = {name: (round(x.value * x.n), x.n) for name, x in _accuracies(found.findings, 60, right)}
    assert told["all"] == (10, 20)
    assert told["without exact copies"] == (9, 19)
    assert told["without exact and near copies"] == (8, 18)
    assert told["copies alone"] == (2, 2)
    doubted = [row - 60 for row in found.findings.suspects if row >= 60]
    if doubted:
        assert told["suspect labels alone"] == (sum(row < 10 for row in doubted), len(doubted))


def test_in_one_file_every_later_copy_counts(planted: Path) -> None:
    found = audit(planted / "x_train.csv")
    assert list(found.parts) == ["all"]
    assert found.counts()["exact_duplicates"] == {"all": 1}
    told = dict(found.accuracies)
    assert (told["all"].n, told["without exact copies"].n, told["copies alone"].n) == (60, 59, 1)


def test_a_run_s_accuracy_is_taken_apart(planted: Path, here: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        done = attire("train", "--data", planted, *TINY, "--out", "run")
    assert "1 of 20 test images also stand in the training set" in done.err
    metrics = json.loads(Path("run/evaluation/metrics.json").read_text())
    found = audit(planted, run="run")
    assert found.by == "run"
    assert dict(found.accuracies)["all"].value == metrics["test"]["accuracy"]
    with pytest.raises(AttireError, match=r"run: was not tested on x_train.csv"):
        audit(planted / "x_train.csv", run="run")


def test_the_command(planted: Path, here: Path) -> None:
    done = attire("audit", planted, "--out", "found")
    assert done.status == 0
    assert "1 in train, 0 in test, 1 in train and test" in done.out
    assert done.out.rstrip().endswith("found/audit.html")
    again = attire("audit", planted, "--out", "found")
    assert (again.status, again.error) == (1, "found: the folder is not empty; give --out another name")
    told = json.loads(attire("audit", planted / "x_train.csv", "--test", planted / "x_test.csv", "--json").out)
    assert told["blank"] == 1
    assert told["page"] == "audit/audit.html"
