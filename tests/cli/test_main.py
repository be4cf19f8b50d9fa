"""The command line, driven through its one entry: statuses, single lines, what is answered and what is written."""

import json
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from attire.analysis import sweep
from attire.cli import main
from attire.data import fashion_mnist, loading, table_cache
from attire.data.dataset import FASHION_CLASSES, ImageDataset
from attire.data.loading import load_dataset
from attire.errors import AttireWarning
from attire.evaluation.run_result import load_result
from attire.features import cache as feature_cache
from attire.model import pretrained
from attire.recipes import SETTINGS
from attire.training import seeds_and_folds
from attire.version import __version__
from tests.command import TINY, Done, attire

COMMANDS = sorted(main.cli.commands)

pytestmark = pytest.mark.usefixtures("here")


def taken(calls: list[Any], answer: Any = None) -> Callable[..., Any]:
    """A function that keeps what it is called with."""

    def call(*given: Any, **named: Any) -> Any:
        calls.append((given, named))
        return answer

    return call


# Help, and what cannot be meant.


@pytest.mark.parametrize("command", [[], *[[name] for name in COMMANDS]], ids=lambda names: "".join(names) or "attire")
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_has_help(command: list[str], flag: str) -> None:
    done = attire(*command, flag)
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith(" ".join(["Usage: attire", *command]))
    assert max(len(line) for line in done.out.splitlines()) <= 100


def test_help_lists_every_command_and_every_field_of_a_recipe() -> None:
    assert all(re.search(rf"^  {name} +\w", attire("--help").out, re.M) for name in COMMANDS)
    told = attire("train", "--help").out
    assert all(f"--{name.replace('_', '-')} " in told or f"--{name}/" in told for name in SETTINGS)
    assert attire("--version").out == f"attire, version {__version__}\n"


def test_no_help_waits_for_torch() -> None:
    run = f"""import sys
from attire.cli.main import main
for name in {COMMANDS}:
    sys.argv[1:] = [name, "--help"]
    try: main()
    except SystemExit as end: assert end.code == 0, name
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", run], stdout=subprocess.DEVNULL).returncode == 0


NO_BUNDLE = "none: no such bundle; give a folder such as runs/1/model"
NO_RUN = "none: no such run; give a run's folder such as runs/1"
TAKEN = "mine: the folder is not empty; give --out another name"


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("train --recipe fastest", "--recipe: expected one of fast, classic, frozen-best, best, found 'fastest'"),
        *((f"{command} none.csv", "none.csv: no such file") for command in ("train --data", "audit", "sweep --data")),
        *(
            (f"{command} none", NO_BUNDLE)
            for command in ("evaluate", "ensemble", "export", "bench", "serve", "explain a --model")
        ),
        *((f"{command} none", NO_RUN) for command in ("report", "compare", "audit --run", "release")),
        ("evaluate none.onnx", "none.onnx: no such file"),
        *((f"{command} --out mine", TAKEN) for command in ("train", "evaluate .", "ensemble . .", "audit", "bench .")),
    ],
)
def test_what_is_mistyped_does_not_wait_for_torch(here: Path, command: str, told: str) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "notes.txt").touch()
    code = "import sys; sys.modules['torch'] = None; from attire.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2 if told.startswith("--") else 1, f"error: {told}\n")


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("trian", "did you mean: attire train"),
        ("predcit", "did you mean: attire predict"),
        ("export_csv", "did you mean: attire export-csv"),
        ("xyz", "see: attire --help"),
    ],
)
def test_an_unknown_command_suggests_the_near_one(typed: str, hint: str) -> None:
    done = attire(typed)
    assert (done.status, done.error) == (2, f"attire {typed}: no such command; {hint}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--epochs 0", "--epochs: expected a whole number >= 1, found 0"),
        ("--epochs -1", "--epochs: expected a whole number >= 1, found -1"),
        ("--epochs 1.5", "attire train: Invalid value for '--epochs': '1.5' is not a valid integer; see: "),
        ("--epochs abc", "attire train: Invalid value for '--epochs': 'abc' is not a valid integer; see: "),
        ("--lr nan", "--lr: expected a number > 0, found nan"),
        ("--lr 0", "--lr: expected a number > 0, found 0.0"),
        ("--lr -1", "--lr: expected a number > 0, found -1.0"),
        ("--batch-size 0", "--batch-size: expected a whole number >= 1, found 0"),
        ("--seed -1", "--seed: expected a whole number >= 0, found -1"),
        ("--seed 4294967296", "--seed: expected at most 4294967295, found 4294967296"),
        ("--hidden abc", "--hidden: expected whole numbers such as 64,32, found 'abc'"),
        ("--hidden 9999999", "--hidden: expected widths of at most 1048576, found (9999999,)"),
        ("--pool 33", "--pool: expected at most the side of the picture, found 33"),
        ("--hidden 8,0", "--hidden: expected widths > 0, such as 512,128, found (8, 0)"),
        ("--image-size 4", "--image-size: 4 px leaves no feature at block3; use 8 px or more"),
        (
            "--freeze-to block9",
            "--freeze-to: expected one of none, block1, block2, block3, block4, block5, found 'block9'",
        ),
        ("--claim 0", "--claim: expected a percentage above 0, at most 100, found 0.0"),
        ("--claim 101", "--claim: expected a percentage above 0, at most 100, found 101.0"),
        ("--claim nan", "--claim: expected a percentage above 0, at most 100, found nan"),
        ("--test-size 0", "--test-size: found 0, expected a fraction between 0 and 1, or a count"),
        ("--test-size -1", "--test-size: found -1.0, expected a fraction between 0 and 1, or a count"),
        ("--test-size 1.0", "--test-size: found 1.0, expected a fraction between 0 and 1, or a count"),
        ("--test-size nan", "--test-size: found nan, expected a fraction between 0 and 1, or a count"),
        ("--test-size 999999", "--test-size: found 999,999, expected fewer than the 60 rows of small.csv"),
        ("--test-size abc", "--test-size: expected a fraction such as 0.2 or a number, found 'abc'"),
        ("--recipe slow", "--recipe: expected one of fast, classic, frozen-best, best, found 'slow'"),
        ("--device gpu", "--device: expected one of auto, cpu, cuda, mps, found 'gpu'"),
        ("--device cuda", "--device: cuda was asked for, but PyTorch finds none here; try --device auto"),
        ("--device cuda --seeds 2", "--device: cuda was asked for, but PyTorch finds none here; try --device auto"),
        ("--seeds 1", "attire train: Invalid value for '--seeds': 1 is not in the range x>=2; see: "),
        ("--seeds 2 --folds 2", "--folds: given together with --seeds; give one of them"),
        ("--folds 2 --no-cache", "--folds: needs cached features; leave --no-cache out"),
        ("--classes Shirt", "classes: expected at least two names, found ('Shirt',)"),
        ("--lerning-rate 1", "attire train: No such option '--lerning-rate'"),
        ("--resume there --epochs 3", "--resume: goes on with the run's own settings; leave the other options out"),
        ("--resume there --no-cache", "--resume: goes on with the run's own settings; leave the other options out"),
        ("--resume there --seeds 2", "--resume: goes on with the run's own settings; leave the other options out"),
        ("surplus", "attire train: Got unexpected extra argument (surplus); see: attire train --help"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_writes_nothing(
    small_csv: Path, here: Path, options: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    given = [] if "--resume" in options else ["--data", str(small_csv)]
    done = attire("train", *given, *options.split())
    assert done.error.startswith(said)
    assert (done.status, done.out) == (2, "")
    assert not list(here.iterdir())


def test_a_config_and_a_recipe_s_name_do_not_go_together(finished: tuple[Path, Done], here: Path) -> None:
    done = attire("train", "--config", finished[0] / "config.json", "--recipe", "fast")
    assert (done.status, done.error) == (2, "--recipe: given together with --config; give one of them")
    (here / "config.json").write_text('{"recipe": {"epoch": 3}}')
    assert attire("train", "--config", "config.json").error.startswith("config.json: unknown recipe field 'epoch'")


# Training.


def test_missing_inputs_are_data_errors(here: Path, bundle: Path) -> None:
    no_run = "no run to resume: it holds no config.json; start one with: attire train"
    for arguments, said in (
        (("evaluate", bundle, "--data", "none.csv", "--out", "new"), "none.csv: no such file"),
        (("evaluate", "none"), "none: no such bundle; give a folder such as runs/1/model"),
        (("predict", "--model", "none", "a.png"), "none: no such bundle; give a folder such as runs/1/model"),
        (("report", "none"), "none: no such run; give a run's folder such as runs/1"),
        (("compare", "none", "neither"), "none: no such run; give a run's folder such as runs/1"),
        (("ensemble", "none", "neither"), "none: no such bundle; give a folder such as runs/1/model"),
        (("train", "--config", "none.json"), "none.json: cannot read (No such file or directory)"),
        (("train", "--resume", "none"), f"none: {no_run}"),
        (("train", "--resume", ""), f".: {no_run}"),
        (("cache", "--delete", "a"), "cache: no entries begin with 'a'; see: attire cache"),
    ):
        done = attire(*arguments)
        assert (done.status, done.error, done.out) == (1, said, "")
    assert not list(here.iterdir())


def test_train_prints_one_json_object(finished: tuple[Path, Done]) -> None:
    run, done = finished
    assert (done.status, done.err) == (0, "")
    told = json.loads(done.out)
    assert told["run"] == str(run)
    assert told["test"] == json.loads((run / "evaluation/metrics.json").read_text())["test"]
    assert told["test"]["n"] == 12


def test_train_shows_its_stages_and_what_comes_next(
    here: Path, small_csv: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "cache_folder", lambda: here / "features")
    done = attire("train", "--data", small_csv, *TINY, "--claim", "5", "--test-size", "10")
    assert done.status == 0
    lines = done.err.splitlines()
    assert lines[0] == "Data      small.csv, 50 + 10 images   verified"
    assert "Features  all                60 to do" in lines
    assert [line[:9] for line in lines[-3:]] == ["epoch   1", "epoch   2", "epoch   3"]
    assert "Test accuracy" in done.out
    assert "5.0 % was claimed" in done.out
    assert "attire predict --model runs/1/model picture.png" in done.out
    again = next(line for line in done.out.splitlines() if "--config" in line).split("   (")[0].split("attire ")[1]
    assert (here / shlex.split(again)[2]).exists()
    assert "\x1b" not in done.out + done.err


def test_a_config_gives_the_same_run_again(finished: tuple[Path, Done], here: Path, weights: Path) -> None:
    run, done = finished
    again = attire("train", "--config", run / "config.json", "--json")
    assert json.loads(again.out)["test"] == json.loads(done.out)["test"]
    name = "model/model.safetensors"
    assert (here / "runs/1" / name).read_bytes() == (run / name).read_bytes()


def test_local_sources_are_taken_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(fashion_mnist, "official_data", taken(calls))
    monkeypatch.setattr(pretrained, "vgg16_weights", taken(calls))
    Path("empty.csv").touch()
    attire("train", "--data-from", "idx", "--weights-from", "vgg.pth", "--data", "empty.csv")
    assert [given for given, _ in calls] == [(Path("idx"),), (Path("vgg.pth"),)]


def test_seeds_and_folds_show_their_results(finished: tuple[Path, Done], monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = finished[0], list[Any]()
    result = load_result(run)
    monkeypatch.setattr(
        seeds_and_folds, "train_seeds", taken(calls, seeds_and_folds.Seeds(run, (run, run), (result, result)))
    )
    monkeypatch.setattr(seeds_and_folds, "cross_validate", taken(calls, seeds_and_folds.Folds(run, result)))
    assert "(mean and standard deviation of 2 seeds, n = 12 each)" in attire("train", "--seeds", "2").out
    assert json.loads(attire("train", "--seeds", "3", "--json").out)["deviation"] == 0
    assert f"Probabilities   {run}/evaluation/predictions.csv" in attire("train", "--folds", "5").out
    assert [given for given, _ in calls] == [(2,), (3,), (5,)]
    assert calls[2][1]["recipe"].name == "fast"
    assert "cache" not in calls[2][1]


# Stopped readers, stopped commands.


def test_ctrl_c_elsewhere_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(feature_cache, "cache_entries", stop)
    done = attire("cache")
    assert (done.status, done.out, done.err.strip()) == (130, "", "stopped; what was finished is kept")


PLAIN = [sys.executable, "-c", "from attire.cli.main import main; main()"]


@pytest.mark.parametrize("argument", ["cache", "--help"])
def test_a_reader_that_has_gone_is_no_error(argument: str) -> None:
    with subprocess.Popen([*PLAIN, argument], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
        assert done.stdout is not None
        assert done.stderr is not None
        done.stdout.close()
        assert (done.stderr.read(), done.wait()) == (b"", 0)


def test_stdout_may_be_closed() -> None:
    done = subprocess.run(["sh", "-c", f"{shlex.join(PLAIN)} --help >&-"], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


# Answers.


def picture(path: Path, image: Any) -> Path:
    Image.fromarray(image).save(path)
    return path


def errors(done: Done) -> list[str]:
    return [line for line in done.err.splitlines() if line.startswith("error: ")]


def test_predict_names_each_file_whatever_it_is_called(bundle: Path, here: Path, synthetic: ImageDataset) -> None:
    names = ["a b.png", "two\nlines.png", "-dash.png", "größe.png"]
    for name, image in zip(names, synthetic.images, strict=False):
        picture(here / name, image)
    done = attire("predict", bundle, "--top-k", "1", "--", *names)
    assert (done.status, errors(done)) == (0, [])
    lines = done.out.splitlines()
    assert [line[:24].strip() for line in lines] == ["a b.png", r"two\nlines.png", "-dash.png", "größe.png"]
    assert all(re.fullmatch(r"\S.{23} (.{12}) 0\.\d{3}", line) or re.search(r"none of the", line) for line in lines)


def test_predict_answers_the_others_when_files_are_bad(bundle: Path, here: Path, synthetic: ImageDataset) -> None:
    picture(here / "good.png", synthetic.images[0])
    (here / "text.png").write_text("hello")
    done = attire("predict", bundle, "none.png", "text.png", "good.png", "none.csv")
    assert done.status == 1
    assert errors(done) == [
        "error: none.png: no such file",
        "error: text.png: text, not a picture that can be read; expected a PNG, JPEG, WebP or BMP picture",
        "error: none.csv: no such file",
    ]
    assert [line.split()[0] for line in done.out.splitlines()] == ["good.png"]


def test_predict_answers_rows_with_and_without_labels_alike(
    bundle: Path, here: Path, small_csv: Path, classifier: Any
) -> None:
    rows = [line.partition(",")[2] for line in small_csv.read_text().splitlines()]
    (here / "bare.csv").write_text("\n".join(rows))
    labelled, bare = (attire("predict", "--json", bundle, path) for path in (small_csv, "bare.csv"))
    told = [json.loads(line) for line in labelled.out.splitlines()]
    assert [line["file"] for line in told] == [f"{small_csv}:{row}" for row in range(2, 62)]
    expected = classifier.predict_proba(load_dataset(small_csv).images)
    for line, p in zip(told, expected, strict=True):
        assert line["label"] == FASHION_CLASSES[p.argmax()]
        assert list(line["probabilities"].values()) == sorted(p.tolist(), reverse=True)[:3]
    assert bare.out.replace("bare.csv", str(small_csv)) == labelled.out
    assert errors(bare) == []


def test_predict_refuses_a_row_that_is_no_image(bundle: Path, here: Path, small_csv: Path) -> None:
    rows = [line.partition(",")[2] for line in small_csv.read_text().splitlines()]
    (here / "bare.csv").write_text("\n".join([*rows, "1,2"]))
    assert attire("predict", bundle, "bare.csv").err.splitlines()[-1] == (
        "error: bare.csv: 2 values, expected 784 (line 62); the file may be cut off there"
    )


def test_evaluate_measures_a_bundle(bundle: Path, small_csv: Path, here: Path) -> None:
    plain = attire("evaluate", bundle, "--data", small_csv)
    assert plain.out.startswith("Accuracy")
    assert all(name in plain.out for name in FASHION_CLASSES)
    done = attire("evaluate", bundle, "--data", small_csv, "--out", "measured", "--json")
    assert (done.status, done.err) == (0, "")
    told = json.loads(done.out)
    assert told == json.loads((here / "measured/evaluation/metrics.json").read_text())
    answers = [json.loads(line)["label"] for line in attire("predict", bundle, small_csv, "--json").out.splitlines()]
    right = load_dataset(small_csv).labels == [FASHION_CLASSES.index(label) for label in answers]
    assert told["test"]["correct"] == right.sum()
    assert (here / "measured/report.html").exists()


def test_evaluate_refuses_other_classes_and_backends(bundle: Path, small_csv: Path) -> None:
    names = ",".join(f"class {i}" for i in range(10))
    done = attire("evaluate", bundle, "--data", small_csv, "--classes", names)
    assert done.status == 1
    assert done.error.startswith("small.csv: its classes are not the bundle's (T-shirt/top, Trouser,")
    done = attire("evaluate", bundle, "--data", small_csv, "--backend", "gpu")
    assert (done.status, done.error) == (2, "--backend: expected torch, openvino or openvino-int8, found 'gpu'")


# The other commands.


def test_report_writes_the_same_page_again(finished: tuple[Path, Done]) -> None:
    page = finished[0] / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert attire("report", finished[0]).out == f"{page}\n"
    assert page.read_bytes() == before


def test_compare_prints_pairs_or_one_json_object(finished: tuple[Path, Done], here: Path) -> None:
    run = finished[0]
    done = attire("compare", run, run, "--out", "page.html")
    assert "cannot be told apart" in done.out
    assert "page.html" in done.out
    told = json.loads(attire("compare", run, run, "--out", "page.html", "--json").out)
    assert (told["page"], told["pairs"][0]["p_value"]) == ("page.html", 1)
    assert (here / "page.html").read_text().startswith("<!")


def test_sweep_prints_its_proposal_or_one_json_object(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"block3": 9.0, "block4": 5.0}
    two = [sweep._Cell(name, 32, 0, "black", 100, 0.1, 900, 1000, speed) for name, speed in speeds.items()]
    calls: list[Any] = []
    monkeypatch.setattr(sweep, "sweep", taken(calls, sweep.Sweep(Path("there"), tuple(two), 30, 1000)))
    command = "attire train --freeze-to block3 --image-size 32 --pool 0"
    told = json.loads(attire("sweep", "--sizes", "16,32", "--boundaries", "block3", "--json").out)
    assert (told["command"], len(told["cells"])) == (command, 2)
    given = calls[0][1]
    assert (given["grid"].sizes, given["grid"].boundaries, given["rows"]) == ((16, 32), ["block3"], 4000)
    assert f"Proposed        {command}   " in attire("sweep").out
    assert attire("sweep", "--sizes", "16,x").error == "--sizes: expected whole numbers such as 64,32, found '16,x'"


def test_cache_lists_and_deletes(bundle: Path, small_csv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attire("evaluate", bundle, "--data", small_csv)
    told = json.loads(attire("cache", "--json").out)
    (entry,) = told["entries"]
    assert (entry["rows"], entry["finished"], entry["manifest"]["freeze_to"]) == (60, True, "block2")
    assert attire("cache").out.splitlines()[0].startswith(entry["key"][:12])
    assert attire("cache").out.splitlines()[-1].startswith("1 entries, ")
    assert json.loads(attire("cache", "--delete", entry["key"][:6], "--json").out) == {
        "freed": entry["bytes"],
        "entries": [],
        "tables": {},
        "objects": {},
    }
    attire("evaluate", bundle, "--data", small_csv)
    monkeypatch.setattr(table_cache, "_MIN_BYTES", 0)
    loading._read_csv(small_csv)
    assert re.search(r"^\w{12} +47\.6 kB  a CSV file or Parquet files, parsed$", attire("cache").out, re.M)
    assert re.match(r"freed \d+\.\d kB\n0 entries, 0 bytes in ", attire("cache", "--clear").out)
    assert not [path for name in ("features", "tables") for path in (cache / name).iterdir()]


def test_export_writes_what_train_reads(synthetic: ImageDataset, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_dataset", lambda source, part: synthetic)
    done = attire("export-csv", "new/folder")
    paths = [Path("new/folder") / f"fashion-mnist_{part}.csv" for part in ("train", "test")]
    assert done.out == "".join(f"{path}   60 rows\n" for path in paths)
    monkeypatch.undo()
    for path in paths:
        assert load_dataset(here / path).digest == synthetic.digest


def test_fetch_says_where_things_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "official_data", lambda source, progress: source or Path("data"))
    monkeypatch.setattr(pretrained, "vgg16_weights", lambda source, progress: source or Path("weights"))
    assert attire("fetch").out == "Data      data   verified\nWeights   weights   verified\n"
    told = json.loads(attire("fetch", "--json", "--weights-from", "mine.pth").out)
    assert told == {"data": "data", "weights": "mine.pth"}


# Errors and warnings.


def test_debug_shows_the_traceback_before_the_line() -> None:
    done = attire("--debug", "train", "--data", "none.csv")
    assert done.err.startswith("Traceback (most recent call last):\n")
    assert done.err.endswith("\nerror: none.csv: no such file\n")
    assert done.status == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory; try a smaller --image-size or --batch-size"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "out of memory; try a smaller --image-size or --batch-size",
        ),
        (RuntimeError("CUDA out of memory."), "out of memory; try a smaller --image-size or --batch-size"),
        (OSError(13, "Permission denied", "a\nb"), r"a\nb: Permission denied"),
        (OSError("strange"), "attire: strange"),
    ],
    ids=repr,
)
def test_what_the_system_refuses_is_one_line(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(feature_cache, "cache_entries", fail)
    done = attire("cache")
    assert (done.status, done.error) == (1, said)


def test_a_full_disk_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device", "a")

    monkeypatch.setattr(feature_cache, "cache_entries", fail)
    done = attire("cache")
    assert done.status == 1
    assert re.fullmatch(r"a: No space left on device; make room: \d[\d.]* \w+ are free there", done.error)


def test_a_fault_of_the_program_itself_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(feature_cache, "cache_entries", fail)
    monkeypatch.setattr(sys, "argv", ["attire", "cache"])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with pytest.raises(RuntimeError, match="a bug"):
        main.main()


def test_warnings_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    main._show_warning(AttireWarning("a file: 3 things\x1b"), AttireWarning)
    main._show_warning("old\nwill go", DeprecationWarning, "file.py", 3)
    assert capsys.readouterr().err == "warning: a file: 3 things\\x1b\nwarning: DeprecationWarning: old\n"
