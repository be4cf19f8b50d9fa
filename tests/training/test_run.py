"""A run from a CSV to a bundle: what it leaves on disk, that it resumes, and that the cache changes nothing."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attire import load, recipes
from attire.data.dataset import FASHION_CLASSES, ImageDataset
from attire.data.loading import load_dataset, write_csv
from attire.errors import AttireError
from attire.evaluation.run_result import load_result
from attire.features import cache
from attire.inference.classifier import load_bundle
from attire.storage import run_folder
from attire.training import head_training
from attire.training import run as training_run
from attire.training.checkpoints import _read_checkpoint
from attire.training.guards import _STOP_SIGNALS
from tests.command import TINY as FLAGS
from tests.command import Done, attire

TINY = replace(recipes.FAST, epochs=2, batch_size=32, hidden=(16,), flips=False)


@pytest.fixture
def real_csv(tmp_path: Path) -> Path:
    """300 official training images as a CSV."""
    path = tmp_path / "some.csv"
    write_csv(load_dataset().subset(range(300)), path)
    return path


@pytest.mark.real
def test_a_run_leaves_everything_and_its_bundle_predicts(real_csv: Path, tmp_path: Path) -> None:
    run = training_run.train(real_csv, TINY, run_dir=tmp_path / "run")
    for name in ("config.json", "data.json", "history.csv", "model/model.json", "evaluation/confusion.png"):
        assert (run.folder / name).exists(), name
    metrics = json.loads((run.folder / "evaluation/metrics.json").read_text())
    assert {"n", "correct", "accuracy", "accuracy_low", "accuracy_high"} <= set(metrics["test"])
    assert {"extract", "fit", "total"} <= set(metrics["seconds"])
    assert metrics["test"]["n"] == 60
    assert metrics["claim"]["claimed"] == 0.98
    assert load_result(run.folder).test.correct == metrics["test"]["correct"]
    images = load_dataset(real_csv).images
    probabilities = load(run.bundle).predict_proba(images)
    assert probabilities.shape == (300, 10)
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)


@pytest.mark.real
def test_cached_and_uncached_training_give_the_same_losses(real_csv: Path, tmp_path: Path) -> None:
    cached = training_run.train(real_csv, TINY, run_dir=tmp_path / "cached").result.history
    fresh = training_run.train(real_csv, TINY, run_dir=tmp_path / "fresh", cache=False).result.history
    losses = [np.array([row["train_loss"] for row in history]) for history in (cached, fresh)]
    assert np.allclose(losses[0], losses[1], rtol=1e-3)  # features are rounded to 16 bits either way


@pytest.mark.real
def test_a_run_resumed_at_an_epoch_s_edge_ends_with_the_same_weights(real_csv: Path, tmp_path: Path) -> None:
    whole = training_run.train(real_csv, TINY, run_dir=tmp_path / "whole")
    again = training_run.train(real_csv, TINY, run_dir=tmp_path / "again")
    newest, edge = sorted((again.folder / "checkpoints").glob("*.ckpt"), reverse=True)
    newest.unlink()
    assert _read_checkpoint(edge)[0].epoch == 1
    resumed = training_run.resume(again.folder)
    first, second = (run.bundle / "model.safetensors" for run in (whole, resumed))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("more", [[], ["--finetune-blocks", "1", "--batch-norm", "--no-standardise", "--ema", "0.9"]])
def test_on_cuda_a_run_is_made_and_its_bundle_answers_alike_on_the_cpu(
    more: list[str], here: Path, small_csv: Path, synthetic: ImageDataset, weights: Path
) -> None:
    done = attire("train", "--data", small_csv, *FLAGS, *more, "--device", "cuda", "--out", "run")
    assert done.status == 0, done
    told = load_result(here / "run").environment
    assert told["device"] == torch.cuda.get_device_name()
    assert told["backend"] == "torch-cuda"
    on_cuda, on_cpu = (
        load_bundle(here / "run/model", name).predict_proba(synthetic.images) for name in ("cuda", "cpu")
    )
    assert np.allclose(on_cuda, on_cpu, atol=0.02)  # cuDNN's convolutions are TF32


@pytest.mark.real
def test_only_the_classifier_is_trained(real_csv: Path, tmp_path: Path) -> None:
    model = training_run.train(real_csv, TINY, run_dir=tmp_path / "run").load().model
    assert not any(parameter.requires_grad for parameter in model.features.parameters())
    assert all(parameter.requires_grad for parameter in model.classifier.parameters())


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(AttireError, match="the folder is not empty"):
        training_run.train(tmp_path / "none.csv", TINY, run_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_recipe_survives_its_json() -> None:
    for recipe in recipes.RECIPES.values():
        assert recipes.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_a_finished_run_is_resumed_to_itself(finished: tuple[Path, Done], weights: Path, tmp_path: Path) -> None:
    run = tmp_path / "again"
    shutil.copytree(finished[0], run)
    before = {name: (run / name).read_bytes() for name in ("model/model.safetensors", "history.csv")}
    found = training_run.resume(run)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert found.accuracy == load_result(finished[0]).test.accuracy
    assert found.load().classes == FASHION_CLASSES


def test_the_time_of_a_run_counts_its_earlier_starts(
    finished: tuple[Path, Done], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*given: Any) -> Any:
        head, history = train_head(*given)
        return head, [replace(epoch, seconds=1000.0) for epoch in history]

    train_head = head_training.train_head
    monkeypatch.setattr(training_run, "train_head", slow)
    shutil.copytree(finished[0], tmp_path / "again")
    seconds = training_run.resume(tmp_path / "again").result.seconds
    assert seconds["total"] >= seconds["extract"] + seconds["fit"] > 1000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "not the config of a run ('recipe')"),
        ('{"recipe": {}, "data": {"path": 1}}', "not the config of a run ("),
        ('{"recipe": {"epochs": "3"}}', "epochs: expected int, found '3'"),
        ("[]", "expected a JSON object, found list"),
    ],
)
def test_a_config_that_is_no_run_s_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(AttireError) as caught:
        training_run.resume(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: {said}")


# Where a run may be written, and what a failed start leaves.


def tree(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("file", "file: expected a folder, found a file; give --out another name"),
        ("full", "full: the folder is not empty; give --out another name"),
        ("file/below", "file: cannot write into it (Not a directory)"),
    ],
)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_an_output_folder_that_cannot_be_is_refused(
    small_csv: Path, here: Path, bundle: Path, weights: Path, command: str, out: str, said: str
) -> None:
    (here / "full").mkdir()
    for name in ("file", "full/kept.txt"):
        (here / name).write_text("mine")
    before = tree(here)
    given = FLAGS if command == "train" else [str(bundle)]
    done = attire(command, *given, "--data", small_csv, "--out", out)
    assert done.status == 1
    assert said in done.last
    assert tree(here) == before
    assert (here / "full/kept.txt").read_text() == "mine"


def test_a_folder_where_a_run_stands_points_to_its_resumption(finished: tuple[Path, Done]) -> None:
    again = f"give --out another name, or go on with: attire train --resume {shlex.quote(str(finished[0]))}"
    assert attire("train", "--out", finished[0]).error.endswith(f": the folder is not empty; {again}")


@pytest.mark.parametrize("more", [[], ["--seeds", "2"], ["--folds", "2"], ["--out", "new/deep/run"], ["--no-cache"]])
def test_a_start_that_fails_leaves_no_folder(here: Path, more: list[str]) -> None:
    done = attire("train", "--data", "none.csv", *more)
    assert done.status == 1
    assert done.err.endswith("error: none.csv: no such file\n")
    assert not tree(here)


def test_a_start_that_fails_later_leaves_no_folder_and_the_next_one_its_number(
    here: Path, small_csv: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device", "shard")

    (here / "runs" / "7").mkdir(parents=True)
    (here / "mine").mkdir()
    monkeypatch.setattr(cache, "_commit_shard", full)
    for out in ([], ["--out", "mine"]):
        done = attire("train", "--data", small_csv, *FLAGS, *out)
        assert done.status == 1
        assert done.last.startswith("error: shard: No space left on device; make room: ")
    assert tree(here) == [here / "mine", here / "runs", here / "runs" / "7"]
    assert run_folder.find_free_folder(None) == Path("runs/8")


# Stopping.

# `attire`, that gets the signal `number` in the training step `last`.
SIGNALLED = """
import os, signal, sys
from pathlib import Path
from attire.model import pretrained
from attire.training import loop
weights, number, last = Path(sys.argv.pop(1)), int(sys.argv.pop(1)), int(sys.argv.pop(1))
pretrained.vgg16_weights = lambda source=None, progress=None: weights
step, steps = loop._train_step, []
def stepping(*given):
    steps.append(None)
    if len(steps) == last:
        os.kill(os.getpid(), number)
    return step(*given)
loop._train_step = stepping
from attire.cli.main import main
main()
"""


@pytest.mark.parametrize("number", _STOP_SIGNALS)
def test_a_signal_ends_training_with_a_checkpoint_and_the_line_that_goes_on(
    finished: tuple[Path, Done], weights: Path, number: int, here: Path
) -> None:
    run, csv = finished[0], finished[0].parent / "small.csv"
    command = ["train", "--data", csv, *FLAGS, "--out", "it's mine"]
    given = [str(value) for value in (weights, int(number), 5, *command)]
    done = subprocess.run([sys.executable, "-c", SIGNALLED, *given], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    last = done.stderr.splitlines()[-1]
    assert last == (
        "it's mine: stopped in epoch 2 after step 2 of 3; go on with: attire train --resume 'it'\"'\"'s mine'"
    )
    newest = max((here / "it's mine/checkpoints").iterdir())
    assert (_read_checkpoint(newest)[0].epoch, _read_checkpoint(newest)[0].step) == (1, 2)
    if number == signal.SIGINT:  # the other way ends no differently
        name = "model/model.safetensors"
        assert attire(*shlex.split(last.partition("attire ")[2])).status == 0
        assert (here / "it's mine" / name).read_bytes() == (run / name).read_bytes()


def test_ctrl_c_before_training_names_the_line_that_goes_on(
    here: Path, small_csv: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "compute_shard", stop)
    again = "go on with: attire train --resume runs"
    done = attire("train", "--data", small_csv, *FLAGS)
    assert done.status == 130
    assert done.last == f"runs/1: stopped, what was finished is kept; {again}/1"
    for kind in ("--seeds", "--folds"):
        done = attire("train", "--data", small_csv, *FLAGS, kind, "2", "--out", f"runs/{kind[2:]}")
        line = f"runs/{kind[2:]}: stopped, what was finished is kept; {again}/{kind[2:]}"
        assert (done.status, done.last) == (130, line)
        assert attire(*shlex.split(line.partition("attire ")[2])).last == line
    assert attire("train", "--resume", "runs/1").last == f"runs/1: stopped, what was finished is kept; {again}/1"
