"""What arguments name, in which order, and how little of it waits in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attire.data.dataset import FASHION_CLASSES
from attire.errors import AttireError
from attire.inference import inputs
from attire.inference.inputs import PictureInput, expand_paths, read_inputs

pytestmark = pytest.mark.usefixtures("here")


def picture(path: Path | str, level: int = 0) -> str:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((28, 28), level, np.uint8)).save(path)
    return str(path)


def listed(*arguments: str) -> list[str]:
    return [str(item) for item in expand_paths(arguments)]


def test_folders_are_searched_to_the_bottom_in_the_order_of_names() -> None:
    for name in ("f/b.png", "f/a/z.JPG", "f/c/d/x.webp", "f/.hidden.png", "f/.git/a.png"):
        picture(name)
    Path("f/notes.txt").write_text("not a picture")
    assert listed("f") == ["f/b.png", "f/a/z.JPG", "f/c/d/x.webp"]
    Path("empty").mkdir()
    assert listed("empty") == ["empty: no pictures in this folder; expected a PNG, JPEG, WebP or BMP picture"]


def test_patterns_are_understood_where_no_shell_expands_them() -> None:
    for name in ("a1.png", "a2.png", "b.png", "sub/a3.png", "[x].png"):
        picture(name)
    assert listed("a?.png") == ["a1.png", "a2.png"]
    assert listed("**/a*.png") == ["a1.png", "a2.png", "sub/a3.png"]
    assert listed("s*") == ["sub/a3.png"]
    assert listed("[x].png") == ["[x].png"]  # a file of that name is no pattern
    assert listed("z*.png") == ["z*.png: no file matches the pattern"]
    assert listed("none.png", "-", "a\0*") == ["none.png", "-", "a\\x00*: no file matches the pattern"]


def test_order_is_kept_and_errors_stand_in_their_places() -> None:
    paths = [picture(f"{i}.png", i) for i in range(40)]
    Path("5.png").write_text("spoilt")
    items = list(read_inputs(iter(paths), FASHION_CLASSES))
    assert isinstance(items[5], AttireError)
    assert [item.image[0, 0] for item in items if isinstance(item, PictureInput)] == [i for i in range(40) if i != 5]


def test_few_pictures_wait_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_AHEAD", 4)
    one, taken = picture("a.png"), 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield one

    asked = read_inputs(endless(), FASHION_CLASSES)
    for _ in range(10):
        next(asked)
    assert taken <= 10 + 4
    asked.close()
