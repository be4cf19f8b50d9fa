from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from attire.data.image_folder import read_class_folders
from attire.data.photos import prepare
from attire.errors import AttireError

SHOULD = "expected a PNG, JPEG, WebP or BMP picture"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, levels in {"shoe": (10, 20), "bag": (30,)}.items():
        (tmp_path / name).mkdir()
        for level in levels:
            Image.new("L", (28, 28), level).save(tmp_path / name / f"{level}.PNG")
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "bag" / ".DS_Store").write_text("x")
    return tmp_path


def read(folder: Path, classes: tuple[str, ...] | None = None) -> Any:
    return read_class_folders(folder, classes, lambda path: prepare(path).image)


def refusal(folder: Path, classes: tuple[str, ...] | None = None) -> str:
    with pytest.raises(AttireError) as caught:
        read(folder, classes)
    return str(caught.value).removeprefix(f"{folder}")


def test_folders_are_classes(folder: Path) -> None:
    images, labels, classes = read(folder)
    assert classes == ("bag", "shoe")
    assert labels.tolist() == [0, 1, 1]
    assert images[:, 0, 0].tolist() == [30, 10, 20]
    assert read(folder, ("shoe", "bag"))[1].tolist() == [0, 0, 1]


def test_a_slash_in_a_class_is_an_underscore_on_disk(folder: Path) -> None:
    (folder / "bag").rename(folder / "T-shirt_top")
    assert read(folder, ("T-shirt/top", "shoe"))[1].tolist() == [0, 1, 1]


def test_folders_that_are_refused(folder: Path) -> None:
    assert refusal(folder, ("shoe", "hat")) == ": no folder for the class hat; each class needs its folder"
    (folder / "hat").mkdir()
    assert refusal(folder) == f"/hat: no pictures in this class; {SHOULD} or more"
    assert refusal(folder, ("bag", "shoe")) == ": hat is none of the 2 classes"
    (folder / "hat" / "a.txt").write_text("x")
    assert refusal(folder) == f"/hat/a.txt: not a picture by its name; {SHOULD}"
    (folder / "hat" / "a.txt").rename(folder / "hat" / "a.png")
    assert refusal(folder) == f"/hat/a.png: text, not a picture that can be read; {SHOULD}"
    (folder / "hat" / "a.png").unlink()
    (folder / "hat" / "red").mkdir()
    assert refusal(folder).startswith("/hat/red: a folder inside a class folder; ")
    (folder / "notes.txt").write_text("x")
    assert refusal(folder) == "/notes.txt: lies outside the class folders; put it into the folder of its class"
    assert refusal(folder / "none") == ": no such folder"


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    assert refusal(tmp_path) == ": 0 class folders, expected at least two"
    (tmp_path / "bag").mkdir()
    assert refusal(tmp_path) == ": 1 class folder, expected at least two"
