"""One of several processes that train together: `python ranked.py FOLDER CASES [FAULT]`, started as torchrun does it.

Each case trains a small head on a table; the result is left in `FOLDER/<case>/rank-<n>.npz`.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attire.data.dataset import RowIndices
from attire.errors import AttireError, UsageError
from attire.model import distributed, heads
from attire.model.batch_norm import BatchNorm
from attire.progress import Epoch
from attire.recipes import FAST, Recipe
from attire.storage import files
from attire.training import guards, loop
from attire.training.checkpoints import TrainingState

SHAPE = (64, 4, 4)  # of block1 at 8 px
SIZE = 100
LABELS = np.arange(SIZE) % 10
TRAIN, VAL = np.arange(75), np.arange(80, 99)  # five steps of 16, the last of 11: no share of it is another's size
EachStep = Callable[[nn.Sequential, TrainingState], None]  # called after every training step
HANG_SECONDS = 240.0  # until a process of a test counts as hanging
GRACE_SECONDS = 45.0  # torchrun gives its processes 30

# Everything that could be divided wrongly, in small. Without dropout, so that one process computes the same.
PLAIN = replace(FAST, epochs=2, batch_size=16, hidden=(8,), lr=0.03, dropout=0.0, precision="fp32")
CONV = replace(PLAIN, standardise=False, hidden=(), conv=(6, 6), freeze_to="block1", image_size=8)
CASES: dict[str, Recipe] = {
    "plain": PLAIN,
    "dropout": replace(PLAIN, dropout=0.5, epochs=3),
    "few": replace(PLAIN, batch_size=1, epochs=1),
    "soft": replace(PLAIN, distill_weight=0.6),
    "conv": CONV,
    "mixed": replace(CONV, random_erasing=0.5, cutmix=1.0, ema=0.9, clip_grad=0.5),
    "pairs": replace(CONV, batch_size=2, epochs=1),
    "tuned": replace(CONV, conv=(), hidden=(8,), finetune_blocks=1, batch_norm=True, head_epochs=1, layer_decay=0.5),
    "bf16": replace(CONV, precision="bf16", random_erasing=0.5),
}


class Table:
    """Feature rows (100, 1024) that can be learnt; the mirrored view is nine tenths of each."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        width = int(np.prod(SHAPE))
        self.rows = torch.from_numpy(rng.random((10, width))[LABELS] / 2 + rng.random((SIZE, width)) / 2).float()
        self.rows_read: list[int] = []

    def batches(self, order: RowIndices, batch_size: int, views: np.ndarray | None) -> Iterator[Tensor]:
        for start in range(0, len(order), batch_size):
            part = slice(start, start + batch_size)
            self.rows_read += order[part].tolist()
            x = self.rows[order[part]].clone()
            if views is not None:
                x[torch.from_numpy(views[part].astype(bool))] *= 0.9
            yield x


def new_head(recipe: Recipe) -> nn.Sequential:
    """The recipe's head; a fine-tuned block is one convolution of its own, with batch normalisation."""
    torch.manual_seed(0)
    if not recipe.finetune_blocks:
        return heads.build_head(SHAPE, recipe.conv, recipe.hidden, 10, recipe.dropout)
    block = OrderedDict[str, nn.Module]()
    block["0"], block["norm0"], block["1"] = nn.Conv2d(64, 6, 3, padding=1), BatchNorm(6), nn.ReLU()
    block["2"] = nn.MaxPool2d(2)
    head = heads.build_head((6, 2, 2), (), recipe.hidden, 10, recipe.dropout)
    return heads.FineTunedHead(SHAPE, nn.Sequential(nn.Sequential(block)), 0, head)


def soft_targets(recipe: Recipe) -> np.ndarray | None:
    """A teacher's probabilities (2, 100, 10) where the case has one."""
    if recipe != CASES["soft"]:
        return None
    scores = np.random.default_rng(1).random((2, SIZE, 10)) + 3 * np.eye(10)[LABELS]
    return np.asarray(scores / scores.sum(2, keepdims=True), np.float32)


@dataclass
class Trained:
    """The result of a case in one process."""

    weights: dict[str, np.ndarray]
    history: list[Epoch]
    digests: list[str]  # of the weights, after each epoch
    rows_read: list[int]  # training and validation


def leave_alone(head: nn.Sequential, state: TrainingState) -> None:
    pass


def train(folder: Path, recipe: Recipe, each_step: EachStep = leave_alone) -> Trained:
    head, table, digests = new_head(recipe), Table(), list[str]()

    def report(state: TrainingState, done: int, total: int) -> None:
        if done:
            each_step(head, state)
        else:
            digests.append(files.sha256(guards.weights_digest(head)))

    data = loop.TrainingData(table, LABELS, TRAIN, VAL, soft_targets(recipe))
    history = loop.fit(head, data, recipe, folder / "checkpoints", report)
    return Trained({k: v.numpy() for k, v in head.state_dict().items()}, history, digests, table.rows_read)


def save(trained: Trained, path: Path) -> None:
    history = [epoch.__dict__ for epoch in trained.history]
    about = {"history": history, "digests": trained.digests, "rows_read": trained.rows_read}
    files.write_json(path.with_suffix(".json"), about)
    weights: Any = trained.weights
    with files.atomic_file(path) as file:
        np.savez(file, **weights)


def load(path: Path) -> Trained:
    about = files.read_json(path.with_suffix(".json"))
    with np.load(path) as stored:
        return Trained(dict(stored), [Epoch(**row) for row in about["history"]], about["digests"], about["rows_read"])


def fault_in_step(fault: str) -> EachStep:
    """`SIGKILL 1 7`: process 1 sends itself this signal in its 7th step; `change 1 7`: it changes a weight."""
    name, rank, step = fault.split()
    steps: list[None] = []

    def each_step(head: nn.Sequential, state: TrainingState) -> None:
        steps.append(None)
        if distributed.rank() != int(rank) or len(steps) != int(step):
            return
        if name == "change":
            with torch.no_grad():
                next(head.parameters()).view(-1)[0] += 1e-6
        else:
            os.kill(os.getpid(), signal.Signals[name])
            time.sleep(0.2)

    return each_step


def fault_at_start(fault: str) -> None:
    """`error 0 0`: the main process raises an error for all; `rows 1 0`: process 1 has other labels than the others."""
    name, rank, _ = fault.split()
    if name == "error":
        distributed.from_main_process(raise_usage_error)
    if name == "rows" and distributed.rank() == int(rank):
        LABELS[0] = 3


def raise_usage_error() -> None:
    raise UsageError("--out", "full", "here", "choose another")


def main() -> None:
    folder, names, fault = Path(sys.argv[1]), sys.argv[2].split(","), " ".join(sys.argv[3:])
    torch.set_num_threads(1)
    try:
        with distributed.process_group():
            if fault:
                fault_at_start(fault)
            for name in names:
                trained = train(folder / name, CASES[name], fault_in_step(fault) if fault else leave_alone)
                save(trained, folder / name / f"rank-{distributed.rank()}.npz")
    except AttireError as error:
        print(error, file=sys.stderr)
        sys.exit(error.status)


@dataclass(frozen=True)
class Finished:
    """Exit status and output of a process."""

    status: int
    out: str
    err: str


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun sets for each process; the addresses of this machine alone."""
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    fixed = {
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    return {**os.environ, **{name: str(value) for name, value in torchrun.items()}, **fixed}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def start(count: int, *arguments: object) -> list[Finished]:
    """`count` processes of this file, until all have ended; those that hang are killed, and that is an error."""
    port, command = free_port(), [sys.executable, __file__, *map(str, arguments)]
    pipes: Mapping[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env=environment(i, count, port), **pipes) for i in range(count)]
    return wait_for_all(started)


def stop(process: "subprocess.Popen[str]") -> None:
    """End a process that hangs: first by the signal on which torchrun ends the processes that it started."""
    for end in (process.terminate, process.kill):
        if process.poll() is None:
            end()
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=GRACE_SECONDS)


def wait_for_all(started: Sequence["subprocess.Popen[str]"]) -> list[Finished]:
    last = time.monotonic() + HANG_SECONDS
    try:
        finished = []
        for process in started:
            out, err = process.communicate(timeout=max(0.1, last - time.monotonic()))
            finished.append(Finished(process.returncode, out, err))
        return finished
    finally:
        for process in started:
            stop(process)


if __name__ == "__main__":
    main()
