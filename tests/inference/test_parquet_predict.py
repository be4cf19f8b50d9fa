"""Parquet in, Parquet out: a row for each row, in order; killed anywhere, the rerun gives the very same file."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from attire.data.dataset import FASHION_CLASSES, ImageDataset
from attire.errors import AttireError, Stopped, UsageError
from attire.inference import parquet_predict
from attire.inference.parquet_parts import AnswerParts
from attire.inference.predict import BATCH
from attire.storage.stores import open_location
from tests.command import attire
from tests.inference.test_predict import Brightness, brightness  # noqa: F401  (a fixture)
from tests.stores import png, write_parquet

PART = 50


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parquet_predict, "_PART_ROWS", PART)
    monkeypatch.chdir(tmp_path)


def level(i: int) -> np.ndarray:
    return np.full((28, 28), i % 100, np.uint8)


def write(path: Path | str, rows: range, bad: tuple[int, ...] = (), **more: Any) -> Path:
    """Row i is a picture of grey i % 100, so that its answer tells which it was."""
    images = [b"no picture" if i in bad else png(level(i)) for i in rows]
    ids = pa.array([f"id-{i}" for i in rows])
    return write_parquet(Path(path), images, [i % 10 for i in rows], id=ids, **more)


def run(where: object, out: object, model: Any = None, **more: Any) -> parquet_predict._Summary:
    return parquet_predict.predict_parquet(str(where), str(out), model or Brightness(), "digest", top_k=1, **more)


def check(table: Any, rows: range, bad: tuple[int, ...] = ()) -> None:
    assert table.column_names == ["path", "label", "id", *parquet_predict._ANSWERS.names]
    assert table["id"].to_pylist() == [f"id-{i}" for i in rows]
    assert table["label"].to_pylist() == [i % 10 for i in rows]
    for i, row in zip(rows, table.to_pylist(), strict=True):
        if i in bad:
            assert row["predicted"] is row["probability"] is row["top_k"] is None
            assert row["error"] == (
                f"text, not a picture that can be read (row {i + 1}); expected a PNG, JPEG, WebP or BMP picture"
            )
        else:
            assert (row["predicted"], row["out_of_distribution"], row["error"]) == ("Bag", False, None)
            assert row["probability"] == pytest.approx(i % 100 / 255)
            assert row["top_k"] == [{"label": "Bag", "probability": pytest.approx(i % 100 / 255)}]


def test_each_row_has_its_answer_in_order() -> None:
    write("in.parquet", range(230))
    model, calls = Brightness(), list[tuple[int, int]]()
    done = run("in.parquet", "out.parquet", model, progress=lambda *rows: calls.append(rows))
    assert (done.rows, done.errors) == (230, 0)
    check(pq.read_table("out.parquet"), range(230))
    assert calls == [(0, 230), (50, 230), (100, 230), (150, 230), (200, 230), (230, 230)]
    assert max(model.batches) <= BATCH
    assert sorted(path.name for path in Path.cwd().iterdir() if path.suffix) == ["in.parquet", "out.parquet"]


def test_a_bad_picture_is_an_error_in_its_place() -> None:
    bad, lines = (0, 49, 50, 117), list[str]()
    write("in.parquet", range(120), bad)
    done = run("in.parquet", "out.parquet", warn=lines.append)
    assert (done.rows, done.errors, len(lines)) == (120, 4, 4)
    check(pq.read_table("out.parquet"), range(120), bad)
    assert lines[1].startswith(f"{Path('in.parquet')}: text, not a picture that can be read (row 50); ")
    assert run("in.parquet", "out.parquet").errors == 4  # told again when it is there already


def test_thousands_of_bad_rows_are_not_told_one_by_one() -> None:
    write("in.parquet", range(150), tuple(range(150)))
    lines = list[str]()
    assert run("in.parquet", "out.parquet", warn=lines.append).errors == 150
    assert len(lines) == parquet_predict._WARNINGS


def test_parts_of_several_files_need_not_agree_with_theirs(tmp_path: Path) -> None:
    for name, rows in (("a", range(70)), ("b", range(70, 75)), ("c", range(75, 180))):
        write(f"in/{name}.parquet", rows)
    run("in", "out")
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "MANIFEST.json",
        *(f"part-{i:06d}.parquet" for i in range(4)),
    ]
    check(pa.concat_tables(pq.read_table(path) for path in sorted(Path("out").glob("*.parquet"))), range(180))
    assert json.loads(Path("out/MANIFEST.json").read_text()) == {"rows": 180, "errors": 0, "parts": 4}
    run("in/*.parquet", "whole.parquet")
    check(pq.read_table("whole.parquet"), range(180))
    assert pq.ParquetFile("whole.parquet").num_row_groups == 4


def test_no_rows_give_no_rows() -> None:
    write("in.parquet", range(0))
    assert run("in.parquet", "out.parquet").rows == 0
    assert pq.read_table("out.parquet").column_names == ["path", "label", "id", *parquet_predict._ANSWERS.names]


def test_a_picture_of_null_is_an_error_too() -> None:
    write_parquet(Path("in.parquet"), [png(level(3)), None], [1, None])
    run("in.parquet", "out.parquet")
    first, second = pq.read_table("out.parquet").to_pylist()
    assert (first["path"], first["error"]) == ("0.png", None)
    assert (second["path"], second["label"]) == (None, None)
    assert second["error"].startswith("no picture bytes, expected")


# Stopping.


class Stopping(Brightness):
    """Ctrl-C at the n-th forward pass."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def predict(self, images: Any) -> Any:
        if len(self.batches) + 1 == self.at:
            raise KeyboardInterrupt
        return super().predict(images)


Stopping.__name__ = "Brightness"  # the kind of a model is part of what decides its answers


@pytest.mark.parametrize("at", [1, 2, 4, 5])
def test_what_was_stopped_goes_on_and_gives_the_very_same_file(at: int) -> None:
    write("in.parquet", range(230), (60,))
    run("in.parquet", "undisturbed.parquet")
    with pytest.raises(Stopped, match="finished parts are kept; the same command goes on"):
        run("in.parquet", "out.parquet", Stopping(at))
    rest = Brightness()
    assert run("in.parquet", "out.parquet", rest).errors == 1
    assert len(rest.batches) == 5 - (at - 1)
    assert Path("out.parquet").read_bytes() == Path("undisturbed.parquet").read_bytes()
    assert not Path("out.parquet.parts").exists()


def test_a_part_that_was_damaged_meanwhile_is_made_again() -> None:
    write("in.parquet", range(230))
    run("in.parquet", "undisturbed.parquet")
    with pytest.raises(Stopped):
        run("in.parquet", "out.parquet", Stopping(5))
    parts = sorted(Path("out.parquet.parts").glob("*.parquet"))
    data = bytearray(parts[1].read_bytes())
    data[200] ^= 1
    parts[1].write_bytes(data)
    parts[2].write_bytes(b"")
    rest = Brightness()
    run("in.parquet", "out.parquet", rest)
    assert len(rest.batches) == 3
    assert Path("out.parquet").read_bytes() == Path("undisturbed.parquet").read_bytes()


@pytest.mark.parametrize("changed", ["model", "input", "top_k"])
def test_parts_of_other_work_are_not_taken(changed: str) -> None:
    write("in.parquet", range(120))
    with pytest.raises(Stopped):
        run("in.parquet", "out.parquet", Stopping(3))
    digest, top_k, model = "digest", 1, Brightness()
    if changed == "model":
        digest = "another"
    elif changed == "top_k":
        top_k = 2
    else:
        write("in.parquet", range(1, 121))
        os.utime("in.parquet", (1, 1))
    parquet_predict.predict_parquet("in.parquet", "out.parquet", model, digest, top_k=top_k)
    assert len(model.batches) == 3


KILLED = """
import sys, time
from tests.inference.test_predict import Brightness
from attire.inference import parquet_predict
parquet_predict._PART_ROWS = 50

class Slow(Brightness):
    def predict(self, images):
        time.sleep(0.05)
        return super().predict(images)

Slow.__name__ = "Brightness"
parquet_predict.predict_parquet(sys.argv[1], sys.argv[2], Slow(), "digest", top_k=1)
"""


@pytest.mark.parametrize("parts", [1, 3])
def test_killed_in_the_middle_the_rerun_gives_the_very_same_file(parts: int) -> None:
    """SIGKILL: nothing runs any more, not even what would clean up."""
    write("in.parquet", range(600), (60,))
    run("in.parquet", "undisturbed.parquet")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen([sys.executable, "-c", KILLED, "in.parquet", "out.parquet"], env=environment)
    try:
        until = time.monotonic() + 60
        while len(list(Path("out.parquet.parts").glob("part-*.parquet"))) < parts:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < until
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait(10)
    assert not Path("out.parquet").exists()
    rest = Brightness()
    run("in.parquet", "out.parquet", rest)
    assert len(rest.batches) < 12
    check(pq.read_table("out.parquet"), range(600), (60,))
    assert Path("out.parquet").read_bytes() == Path("undisturbed.parquet").read_bytes()


def test_two_processes_do_not_write_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    write("in.parquet", range(60))
    parts = AnswerParts(open_location("out.parquet.parts"), "job", [], 1, PART)
    with parts.claim(), pytest.raises(AttireError, match="another process"):
        run("in.parquet", "out.parquet")


# What is in the way.


def test_another_s_file_is_not_overwritten() -> None:
    write("in.parquet", range(60))
    Path("out.parquet").write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"out\.parquet is there already, and holds other answers; name another"):
        run("in.parquet", "out.parquet")
    write("out2.parquet", range(3))
    with pytest.raises(UsageError, match="holds other answers"):
        run("in.parquet", "out2.parquet")
    assert Path("out.parquet").read_bytes() == b"precious"


def test_another_s_folder_is_not_mixed_with(tmp_path: Path) -> None:
    write("in.parquet", range(60))
    Path("out").mkdir()
    Path("out/notes.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"out/notes\.txt is no part of these answers; name a new folder"):
        run("in.parquet", "out")
    run("in.parquet", "mine")
    with pytest.raises(UsageError, match=r"mine/part-000000\.parquet is no part of these answers"):
        parquet_predict.predict_parquet("in.parquet", "mine", Brightness(), "another")
    again = Brightness()
    run("in.parquet", "mine", again)
    assert not again.batches


def test_an_input_that_cannot_be_answered_is_refused() -> None:
    write("in.parquet", range(3), error=pa.array(["a"] * 3))
    with pytest.raises(AttireError, match="has a column error, which is one of the answers'; rename it"):
        run("in.parquet", "out.parquet")
    write("d/a.parquet", range(3))
    write("d/b.parquet", range(3), more=pa.array([1] * 3))
    with pytest.raises(AttireError, match=r"b\.parquet: its columns are not those of .*a\.parquet"):
        run("d", "out.parquet")
    Path("empty").mkdir()
    with pytest.raises(AttireError, match=r"no \.parquet files there"):
        run("empty", "out.parquet")
    assert not list(Path.cwd().glob("out*"))


# In a store.


def test_from_a_store_to_a_store(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, rows in (("a", range(70)), ("b", range(70, 120))):
        path = write(f"{name}.parquet", rows, (3,))
        open_location(f"{bucket}/in").write(path.name, path.read_bytes())
    with pytest.raises(Stopped):
        run(f"{bucket}/in", f"{bucket}/out/answers.parquet", Stopping(3))
    assert len(open_location(f"{bucket}/out/answers.parquet.parts").sizes()) == 2
    rest = Brightness()
    run(f"{bucket}/in", f"{bucket}/out/answers.parquet", rest)
    assert len(rest.batches) == 1
    assert open_location(f"{bucket}/out/answers.parquet.parts").sizes() == {}
    with open_location(f"{bucket}/out").open("answers.parquet") as file:
        check(pq.read_table(file), range(120), (3,))
    run(f"{bucket}/in/*.parquet", f"{bucket}/parts")
    assert len(open_location(f"{bucket}/parts").sizes()) == 4


# The command.


def test_the_command_answers_and_says_what_is_missing(brightness: Brightness) -> None:  # noqa: F811
    write("in.parquet", range(60), (7,))
    done = attire("predict", "in.parquet", "--out", "out.parquet", "--json")
    assert done.status == 1
    summary = json.loads(done.out)
    assert (summary["out"], summary["rows"], summary["errors"]) == ("out.parquet", 60, 1)
    assert done.err.count("error: in.parquet: text, not a picture that can be read (row 8)") == 1
    write("sound.parquet", range(60))
    done = attire("predict", "sound.parquet", "--out", "sound", "--top-k", "2")
    assert done.status == 0
    assert done.out.startswith("sound   60 rows   ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("a.parquet", "b.parquet", "--out", "o.parquet"), "--out: 2 inputs, expected one"),
        (
            ("a.parquet", "--out", "o.parquet", "--format", "csv"),
            "--out: neither --format nor --save-inputs goes with it",
        ),
        (("s3://b/x.png",), "s3://b/x.png: a URL, expected a file; Parquet files may lie elsewhere, with --out"),
    ],
)
def test_what_does_not_go_together_is_told(
    arguments: tuple[str, ...],
    line: str,
    brightness: Brightness,  # noqa: F811
) -> None:
    assert attire("predict", *arguments).error.startswith(line)


def test_a_few_rows_may_be_answered_on_the_terminal(brightness: Brightness) -> None:  # noqa: F811
    write("in.parquet", range(20), (2,))
    done = attire("predict", "in.parquet", "--format", "csv")
    assert done.status == 1
    assert len(done.out.splitlines()) == 20
    assert done.out.splitlines()[1].startswith("in.parquet:1,Bag,0.000000")
    assert "error: in.parquet: text, not a picture that can be read (row 3)" in done.err


@pytest.mark.real
def test_the_shipped_model_answers_as_it_does_elsewhere(tmp_path: Path) -> None:
    from attire.data.loading import load_dataset
    from attire.inference.predict import open_model

    official: ImageDataset = load_dataset(part="test").subset(range(200))
    write_parquet(Path("in.parquet"), [png(image) for image in official.images], official.labels.tolist())
    done = attire("predict", "in.parquet", "--out", "out.parquet")
    assert done.status == 0, done
    answers = pq.read_table("out.parquet")
    expected = open_model(None, "cpu").predict(official.images)
    assert answers["predicted"].to_pylist() == [one.label for one in expected]
    assert np.allclose(answers["probability"].to_numpy(), [one.probability for one in expected], atol=1e-5)
    assert answers["out_of_distribution"].to_pylist() == [one.out_of_distribution for one in expected]
    right = [FASHION_CLASSES[label] for label in official.labels]
    assert np.mean([a == b for a, b in zip(answers["predicted"].to_pylist(), right, strict=True)]) > 0.85
