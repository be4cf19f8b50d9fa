"""The notebook and the other data set: what is stored belongs to what is written, and both work on the real thing."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attire.data.loading import load_dataset
from attire.evaluation.intervals import wilson
from tests.command import attire

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "story.ipynb"
STORY: dict[str, Any] = json.loads(NOTEBOOK.read_text("utf-8"))
MAKE = runpy.run_path(str(ROOT / "docs" / "make" / "notebook.py"))
PAGE = (ROOT / "docs" / "other-data.md").read_text()


# The notebook.


def code_cells(book: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def test_the_stored_outputs_belong_to_the_cells() -> None:
    assert STORY["metadata"]["attire"]["sources"] == MAKE["digest"](STORY), "run: python docs/make/notebook.py"
    assert [cell["execution_count"] for cell in code_cells(STORY)] == list(range(1, len(code_cells(STORY)) + 1))
    assert NOTEBOOK.stat().st_size < 300_000


def test_a_changed_cell_is_noticed() -> None:
    changed = json.loads(json.dumps(STORY))
    changed["cells"][3]["source"] += "# and more"
    assert MAKE["digest"](changed) != MAKE["digest"](STORY)


def test_the_stored_outputs_tell_nothing_of_a_machine() -> None:
    stored = json.dumps([cell["outputs"] for cell in code_cells(STORY)])
    assert not re.search(r"/tmp/|/home/|/root/|/work/|\berror\b|Traceback", stored)
    assert STORY["metadata"]["kernelspec"]["name"] == "python3"


def test_the_story_has_every_part_of_the_method() -> None:
    code = "\n".join("".join(cell["source"]) for cell in code_cells(STORY))
    for part in (
        "pd.read_csv", "train_test_split", "class Garments(Dataset)", "Resize((224, 224)", "Normalize(",
        "torchvision.models.vgg16", "requires_grad = False", "vgg.classifier = nn.Sequential(",
        "Adam(vgg.classifier.parameters()", "CrossEntropyLoss()", "average loss", "test accuracy", "check_claim(",
        "attire.train(", "compare(", "attire.load()", "explain(", "VGGClassifier(",
    ):  # fmt: skip
        assert part in code, part


@pytest.mark.slow
@pytest.mark.real
def test_the_notebook_runs_from_nothing(tmp_path: Path) -> None:
    """In an empty folder, on the subset it names; each cell prints what it printed, figures aside."""
    pytest.importorskip("nbclient", reason="needs the extra `dev`")
    (empty := tmp_path / "empty").mkdir()  # the cache of the tests may lie beside it
    made = MAKE["run"](NOTEBOOK, empty)
    assert not list(empty.iterdir())
    for now, then in zip(code_cells(made), code_cells(STORY), strict=True):
        assert [kind(output) for output in now["outputs"]] == [kind(output) for output in then["outputs"]]
        assert shapes(now) == shapes(then)


def kind(output: dict[str, Any]) -> tuple[str, ...]:
    return (output["output_type"], *sorted(output.get("data", {})))


def shapes(cell: dict[str, Any]) -> list[str]:
    """The words that were printed; figures and what depends on them left out."""
    text = "".join("".join(output.get("text", "")) for output in cell["outputs"])
    return re.findall(r"\b(?:epoch|average loss|frozen|trained|test accuracy|claimed|measured|folds|images)\b", text)


# Other data.


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    subprocess.run([sys.executable, ROOT / "examples/digits.py", "digits"], cwd=folder, check=True)
    return folder


def test_every_form_of_the_digits_holds_the_same_images(digits: Path) -> None:
    names = tuple("0123456789")
    table = load_dataset(digits / "digits/digits.csv", classes=names)
    idx = load_dataset(digits / "digits/digits-labels-idx1-ubyte", classes=names)
    assert table.digest == idx.digest
    assert len(table) == 1797
    assert table.images.max() == 255
    pictures = sorted((digits / "digits/photos").rglob("*.png"))
    assert len(pictures) == 1797
    assert {path.parent.name for path in pictures} == {f"digit {name}" for name in names}


def stated_interval(command: str) -> tuple[float, float, int]:
    """Of the page's table: the bounds in percent that stand in the command's row, and n."""
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{command}`"))
    bounds, n = re.search(r"% \(([\d.]+)-([\d.]+)\) \|", row), re.search(r"n = (\d+)", PAGE)
    assert bounds, row
    assert n, PAGE
    return float(bounds[1]), float(bounds[2]), int(n[1])


COMMANDS = [line for line in PAGE.splitlines() if line.startswith("attire train")]


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("command", COMMANDS, ids=["csv", "idx", "photos"])
def test_the_page_s_commands_reach_what_it_says(command: str, digits: Path, here: Path) -> None:
    """The accuracy of today lies within the 95 % confidence interval of the page."""
    (here / "digits").symlink_to(digits / "digits")
    done = attire(*command.split()[1:], "--json")
    assert done.status == 0, done
    measured = json.loads(done.out)["test"]
    form = command.split()[3].removeprefix("digits/")
    low, high, n = stated_interval(form)
    assert measured["n"] == n
    assert low <= 100 * measured["accuracy"] <= high
    assert wilson(measured["correct"], n).low > 0.9
