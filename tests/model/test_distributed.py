"""Several processes train what one does: each row once, one result, one checkpoint, and none waits for ever."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from attire.errors import AttireError, UsageError
from attire.evaluation.run_result import load_result
from attire.model import distributed
from attire.training import checkpoints
from tests import ranked
from tests.command import TINY
from tests.ranked import CASES, TRAIN, VAL, Finished, Trained

STEPS = 5  # of an epoch of most cases
LOST = "another process of this training ended, or does not answer"


# Which rows are whose.


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_own_rows_are_neighbours_that_together_are_every_row_once(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: count)
    for rows in (0, 1, 2, 3, 11, 16, 100):
        parts = []
        for rank in range(count):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            parts.append(range(rows)[distributed.own_rows(rows)])
        assert [row for part in parts for row in part] == list(range(rows))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("rows", "start", "size"), [(75, 0, 16), (75, 48, 16), (75, 75, 16), (7, 0, 1), (8, 0, 3)])
def test_of_each_step_every_row_is_trained_on_once(
    rows: int, start: int, size: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    trained_on: list[list[int]] = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        plan = distributed.plan_steps(rows, start, size, whole)
        read = [range(rows)[share.read] for share in plan]
        assert all(read), "a process that reads nothing knows of no shape"
        assert max([1, *map(len, read)]) == distributed.read_batch_size(plan)
        assert [share.rows for share in plan] == [min(size, rows - first) for first in range(start, rows, size)]
        trained_on += [list(part[share.own]) for part, share in zip(read, plan, strict=True)]
    assert Counter(row for part in trained_on for row in part) == Counter(range(start, rows))


def test_alone_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")  # of somebody else, who has not said how many there are
    with distributed.process_group():
        assert (distributed.world_size(), distributed.rank(), distributed.is_main_process()) == (1, 0, True)
        assert distributed.torchrun_prefix() == ""
    value = torch.rand(3, 2)
    assert distributed.gather_rows(value, 3) is value
    assert distributed.stack_processes(value) is value
    assert distributed.any_process(True, False) == [True, False]
    assert distributed.from_main_process(lambda: (1, "a")) == (1, "a")
    assert distributed.main_process_first(lambda: value) is value
    distributed.check_equal(b"", "anything", "")
    with pytest.raises(UsageError, match="--out: wrong"):
        distributed.from_main_process(lambda: (_ for _ in ()).throw(UsageError("--out", "wrong")))


def test_each_process_has_a_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = set()
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        seeds |= {distributed.process_seed(0), distributed.process_seed(1)}
        torch.manual_seed(distributed.process_seed(0))
    assert len(seeds) == 8


# Two processes, and three, that each train all cases.


@pytest.fixture(scope="module", params=[2, 3], ids=["two", "three"])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder of all cases, trained by so many processes."""
    folder = tmp_path_factory.mktemp("together")
    done = ranked.start(request.param, folder, ",".join(CASES))
    assert [process.status for process in done] == [0] * request.param, done
    return folder, request.param


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    folder, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    torch.set_num_threads(1)
    results = {name: ranked.train(folder / name, recipe) for name, recipe in CASES.items()}
    torch.set_num_threads(threads)
    return results


def each(together: tuple[Path, int], case: str) -> list[Trained]:
    return [ranked.load(together[0] / case / f"rank-{rank}.npz") for rank in range(together[1])]


@pytest.mark.parametrize("case", CASES)
def test_after_each_epoch_all_have_the_same_bits(together: tuple[Path, int], case: str) -> None:
    first, *others = each(together, case)
    assert len(set(first.digests)) == CASES[case].epochs
    for other in others:
        assert other.digests == first.digests
        assert all(np.array_equal(other.weights[name], value) for name, value in first.weights.items())
        assert [replace(epoch, seconds=0) for epoch in other.history] == [
            replace(epoch, seconds=0) for epoch in first.history
        ]


@pytest.mark.parametrize("case", sorted(set(CASES) - {"dropout", "bf16"}))
def test_all_together_compute_what_one_does(together: tuple[Path, int], alone: dict[str, Trained], case: str) -> None:
    """Dropout is drawn by each process for its own rows, and bf16 rounds the sum of each one's rows: not those two."""
    history, expected = each(together, case)[0].history, alone[case].history
    assert len(history) == len(expected) == CASES[case].epochs
    for epoch, other in zip(history, expected, strict=True):
        assert epoch.train_loss == pytest.approx(other.train_loss, rel=1e-5)
        assert epoch.val_loss == pytest.approx(other.val_loss, rel=1e-4)
        assert epoch.val_accuracy == other.val_accuracy


def test_batch_statistics_are_of_the_whole_batch(together: tuple[Path, int], alone: dict[str, Trained]) -> None:
    weights, expected = each(together, "conv")[0].weights, alone["conv"].weights
    names = [name for name in expected if "running" in name or "tracked" in name]
    assert len(names) == 9
    for name in names:
        assert weights[name] == pytest.approx(expected[name], rel=1e-4), name


def test_no_row_is_read_twice_and_each_is_validated_once(together: tuple[Path, int]) -> None:
    """But the 64 that are compared before the first step, and the views are the same for all."""
    times = Counter(row for process in each(together, "plain") for row in process.rows_read)
    epochs, sample = CASES["plain"].epochs, set(TRAIN[:64].tolist())
    assert all(times[row] == epochs + together[1] * (row in sample) for row in TRAIN.tolist())
    assert all(times[row] == epochs for row in VAL.tolist())


def test_each_process_drops_other_values(together: tuple[Path, int]) -> None:
    path = checkpoints._checkpoints(together[0] / "dropout" / "checkpoints")[0]
    state, tensors = checkpoints._read_checkpoint(path)
    assert state.world_size == together[1] == len(tensors["random.cpu"])
    assert len({row.numpy().tobytes() for row in tensors["random.cpu"]}) == together[1]


def test_the_main_process_alone_writes(together: tuple[Path, int]) -> None:
    folder = together[0] / "plain"
    lines = (folder / "history.csv").read_text().splitlines()
    assert [row["epoch"] for row in csv.DictReader(lines)] == ["1", "2"]
    assert len(checkpoints._checkpoints(folder / "checkpoints")) == 2


# What goes wrong in one of them.


def same_weights(trained: Trained, expected: Trained) -> bool:
    return all(np.array_equal(trained.weights[name], value) for name, value in expected.weights.items())


@pytest.fixture(scope="module")
def faultless(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("faultless")
    ranked.start(2, folder, "dropout")
    return ranked.load(folder / "dropout" / "rank-0.npz")


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_of_a_killed_process_the_other_says_so_and_the_run_goes_on_bit_for_bit(
    who: int, faultless: Trained, tmp_path: Path
) -> None:
    """In the middle of the second epoch; that nobody waits for ever is what `ranked.start` looks after."""
    done = ranked.start(2, tmp_path, "dropout", f"SIGKILL {who} {STEPS + 2}")
    assert (done[who].status, done[1 - who].status) == (-9, 1)
    line = next(line for line in done[1 - who].err.splitlines() if LOST in line)
    assert line.startswith(f"process {1 - who} of 2: {LOST} (")
    assert line.endswith("what ended first says why; then go on with --resume and as many processes")
    assert [path.name for path in checkpoints._checkpoints(tmp_path / "dropout/checkpoints")] == [
        "epoch-001-step-000000.ckpt"
    ]
    assert [process.status for process in ranked.start(2, tmp_path, "dropout")] == [0, 0]
    assert all(same_weights(ranked.load(tmp_path / f"dropout/rank-{rank}.npz"), faultless) for rank in (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("fault", [f"SIGTERM 1 {STEPS + 2}", "SIGINT 0 3"])
def test_one_that_is_asked_to_stop_stops_all_at_the_same_step(fault: str, faultless: Trained, tmp_path: Path) -> None:
    epoch, step = divmod(int(fault.split()[-1]), STEPS)
    done = ranked.start(2, tmp_path, "dropout", fault)
    line = f"{tmp_path / 'dropout'}: stopped in epoch {epoch + 1} after step {step} of {STEPS}"
    assert [(process.status, process.err.splitlines()[-1]) for process in done] == [(130, line)] * 2
    newest = checkpoints._checkpoints(tmp_path / "dropout/checkpoints")[0]
    assert newest.name == f"epoch-{epoch:03d}-step-{step:06d}.ckpt"
    assert [process.status for process in ranked.start(2, tmp_path, "dropout")] == [0, 0]
    assert same_weights(ranked.load(tmp_path / "dropout/rank-1.npz"), faultless)


def test_weights_that_differ_after_an_epoch_are_an_error_in_all(tmp_path: Path) -> None:
    done = ranked.start(2, tmp_path, "plain", "change 1 7")
    message = (
        "training: the weights after epoch 2 differ between processes (0 and 1 of 2); one of them computes otherwise"
    )
    assert [(process.status, message in process.err) for process in done] == [(1, True)] * 2
    names = [path.name for path in checkpoints._checkpoints(tmp_path / "plain/checkpoints")]
    assert names == ["epoch-001-step-000000.ckpt"], "weights that differ are not kept"


def test_other_rows_in_one_of_them_are_an_error_before_the_first_step(tmp_path: Path) -> None:
    done = ranked.start(2, tmp_path, "plain", "rows 1 0")
    message = (
        "training: features, rows, recipe or checkpoint differ between processes (0 and 1 of 2); give them one cache"
    )
    assert [(process.status, message in process.err) for process in done] == [(1, True)] * 2


def test_an_error_of_the_main_process_is_raised_in_all(tmp_path: Path) -> None:
    done = ranked.start(2, tmp_path, "plain", "error 0 0")
    assert [(process.status, process.err.splitlines()[-1]) for process in done] == [
        (2, "--out: full (here); choose another")
    ] * 2


def test_a_checkpoint_of_another_number_of_processes_is_refused(together: tuple[Path, int], tmp_path: Path) -> None:
    folder, count = together
    with pytest.raises(AttireError) as caught:
        ranked.train(folder / "plain", CASES["plain"])
    do = f"resume with as many: torchrun --nproc-per-node {count} -m attire train --resume RUN"
    assert str(caught.value).endswith(f".ckpt: a checkpoint of {count} processes, found 1; {do}")
    ranked.train(tmp_path / "plain", replace(CASES["plain"], epochs=1))
    done = ranked.start(2, tmp_path, "plain")
    line = "a checkpoint of 1 processes, found 2; resume without torchrun: attire train --resume RUN\n"
    assert [(process.status, process.err.endswith(line)) for process in done] == [(1, True)] * 2


# All of `attire train`, by torchrun.

# `attire` with other weights, whose process 1 is killed in its training step `last`; 0: none.
KILLED = """
import os, signal, sys
from pathlib import Path
from attire.model import pretrained
from attire.training import loop
weights, last = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
pretrained.vgg16_weights = lambda source=None, progress=None: weights
step, steps = loop._train_step, []
def train_step(*args, **options):
    steps.append(None)
    if len(steps) == last and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args, **options)
loop._train_step = train_step
from attire.cli.main import main
main()
"""
FLAGS = [*TINY, "--dropout", "0"]


def torchrun(arguments: Sequence[object], count: int = 2) -> Finished:
    """`torchrun --nproc-per-node 2 ...`, each process on one core."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", count, "--master-port"]
    argv = [str(value) for value in (*command, ranked.free_port(), *arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(argv, env=environment, text=True, **pipes)  # type: ignore[call-overload]
    return ranked.wait_for_all([process])[0]


def error_lines(done: Finished) -> list[str]:
    """The lines of Attire's errors, without what torchrun says of the same."""
    return [line for line in done.err.splitlines() if line.startswith("error: ")]


@pytest.fixture
def script(here: Path) -> Path:
    (here / "killed.py").write_text(KILLED)
    return here / "killed.py"


@pytest.mark.slow
def test_attire_train_by_torchrun_is_the_run_of_one_process(
    script: Path, here: Path, small_csv: Path, weights: Path
) -> None:
    done = torchrun([script, weights, 0, "train", "--data", small_csv, *FLAGS, "--out", "two", "--json"])
    assert done.status == 0, done
    assert json.loads(done.out)["run"] == "two", "one line, of the main process"
    one = torchrun([script, weights, 0, "train", "--data", small_csv, *FLAGS, "--out", "one"], count=1)
    assert one.status == 0, one
    two, expected = load_result(here / "two"), load_result(here / "one")
    for epoch, other in zip(two.history, expected.history, strict=True):
        assert epoch["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
    assert two.test.n == expected.test.n == 12
    assert two.predictions.probabilities == pytest.approx(expected.predictions.probabilities, abs=1e-4)
    assert (two.environment["processes"], expected.environment.get("processes")) == (2, None)
    written = [{path.relative_to(run) for path in run.rglob("*")} for run in (here / "two", here / "one")]
    assert written[0] == written[1]

    killed = torchrun([script, weights, 5, "train", "--data", small_csv, *FLAGS, "--out", "cut"])
    assert killed.status == 1
    assert LOST in error_lines(killed)[0]
    again = torchrun([script, weights, 0, "train", "--resume", "cut", "--json"])
    assert again.status == 0, again
    network = "model/model.safetensors"
    assert (here / "cut" / network).read_bytes() == (here / "two" / network).read_bytes()


@pytest.mark.slow
def test_seeds_and_folds_by_torchrun(script: Path, here: Path, small_csv: Path, weights: Path) -> None:
    for many, name in (("--seeds", "seeds.json"), ("--folds", "evaluation/metrics.json")):
        done = torchrun(
            [script, weights, 0, "train", "--data", small_csv, *FLAGS, many, "2", "--out", many[2:], "--json"]
        )
        assert done.status == 0, done
        assert json.loads(done.out)["run"] == many[2:]
        assert (here / many[2:] / name).exists()


def test_an_error_under_torchrun_is_one_line_a_process(here: Path) -> None:
    # It looks after 10 s, not after 0.1: else it may end the second process before it has come to its line.
    done = torchrun(["--monitor-interval", 10, "-m", "attire", "train", "--data", "none.csv"])
    assert done.status == 1
    assert error_lines(done) == ["error: none.csv: no such file"] * 2
    assert not list(here.iterdir())


def test_python_m_attire_is_attire() -> None:
    done = subprocess.run([sys.executable, "-m", "attire", "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("attire, version ")


def test_other_commands_join_no_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Within torchrun's environment, of which nobody else is there."""
    environment = ranked.environment(1, 2, ranked.free_port())
    command = [sys.executable, "-m", "attire", "evaluate", str(tmp_path / "none")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/none: ")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.real
def test_two_processes_train_on_two_devices(here: Path, small_csv: Path) -> None:
    done = torchrun(["-m", "attire", "train", "--data", small_csv, *FLAGS, "--device", "cuda", "--out", "two"])
    assert done.status == 0, done
    assert load_result(here / "two").environment["processes"] == 2
