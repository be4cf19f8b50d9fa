"""A process of several that train as one: `python ranked.py FOLDER CASES [DISTURBANCE]`, started as torchrun does it.

Each case trains a small head on a table; what it became is left in `FOLDER/<case>/rank-<n>.npz`.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
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
from attire.training.checkpoints import State

SHAPE = (64, 4, 4)  # of block1 at 8 px
SIZE = 100
LABELS = np.arange(SIZE) % 10
TRAIN, VAL = np.arange(75), np.arange(80, 99)  # five steps of 16, the last of 11: no share of it is another's size
SECONDS = 240.0  # until a process of a test is taken for one that hangs
GRACE = 45.0  # torchrun gives its processes 30

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
        self.seen: list[int] = []

    def batches(self, order: RowIndices, batch_size: int, views: np.ndarray | None) -> Iterator[Tensor]:
        for start in range(0, len(order), batch_size):
            part = slice(start, start + batch_size)
            self.seen += order[part].tolist()
            x = self.rows[order[part]].clone()
            if views is not None:
                x[torch.from_numpy(views[part].astype(bool))] *= 0.9
            yield x


def new_head(recipe: Recipe) -> nn.Sequential:
    """By the recipe; a trained block is one convolution of its own, with batch normalisation."""
    torch.manual_seed(0)
    if not recipe.finetune_blocks:
        return heads.build_head(SHAPE, recipe.conv, recipe.hidden, 10, recipe.dropout)
    block = OrderedDict[str, nn.Module]()
    block["0"], block["norm0"], block["1"] = nn.Conv2d(64, 6, 3, padding=1), BatchNorm(6), nn.ReLU()
    block["2"] = nn.MaxPool2d(2)
    classifier = heads.build_head((6, 2, 2), (), recipe.hidden, 10, recipe.dropout)
    return heads.FineTunedHead(SHAPE, nn.Sequential(nn.Sequential(block)), 0, classifier)


def answers(recipe: Recipe) -> np.ndarray | None:
    """A teacher's, (2, 100, 10), where the case has one."""
    if recipe != CASES["soft"]:
        return None
    drawn = np.random.default_rng(1).random((2, SIZE, 10)) + 3 * np.eye(10)[LABELS]
    return np.asarray(drawn / drawn.sum(2, keepdims=True), np.float32)


@dataclass
class Trained:
    """What became of a case in one process."""

    weights: dict[str, np.ndarray]
    history: list[Epoch]
    digests: list[str]  # of the weights, after each epoch
    seen: list[int]  # the rows that were read, training and validation


def train(folder: Path, recipe: Recipe, each_step: Any = lambda head, state: None) -> Trained:
    head, table, digests = new_head(recipe), Table(), list[str]()

    def report(state: State, done: int, total: int) -> None:
        if done:
            each_step(head, state)
        else:
            digests.append(files.sha256(guards.weights_digest(head)))

    given = (LABELS, TRAIN, VAL, recipe, folder / "checkpoints", report, answers(recipe))
    history = loop.fit(head, table, *given)
    return Trained({k: v.numpy() for k, v in head.state_dict().items()}, history, digests, table.seen)


def save(found: Trained, path: Path) -> None:
    about = {"history": [epoch.__dict__ for epoch in found.history], "digests": found.digests, "seen": found.seen}
    files.write_json(path.with_suffix(".json"), about)
    weights: Any = found.weights
    with files.atomic_file(path) as file:
        np.savez(file, **weights)


def load(path: Path) -> Trained:
    about = files.read_json(path.with_suffix(".json"))
    with np.load(path) as stored:
        return Trained(dict(stored), [Epoch(**row) for row in about["history"]], about["digests"], about["seen"])


def disturbance(what: str) -> Any:
    """`SIGKILL 1 7`: process 1 does this to itself in its 7th step, a signal by its name or a weight changed."""
    name, who, when = what.split()
    steps: list[None] = []

    def disturb(head: nn.Sequential, state: State) -> None:
        steps.append(None)
        if distributed.rank() != int(who) or len(steps) != int(when):
            return
        if name == "change":
            with torch.no_grad():
                next(head.parameters()).view(-1)[0] += 1e-6
        else:
            os.kill(os.getpid(), signal.Signals[name])
            time.sleep(0.2)

    return disturb


def begin_otherwise(what: Sequence[str]) -> None:
    """`error 0 0`: the first process finds a fault for all; `rows 1 0`: process 1 has other rows than the others."""
    name, who, _ = what[0].split() if what else ("", "", "")
    if name == "error":
        distributed.from_main_process(fault)
    if name == "rows" and distributed.rank() == int(who):
        LABELS[0] = 3


def fault() -> None:
    raise UsageError("--out", "full", "here", "choose another")


def main() -> None:
    folder, names, what = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
    torch.set_num_threads(1)
    disturb = (disturbance(what[0]),) if what else ()
    try:
        with distributed.process_group():
            begin_otherwise(what)
            for name in names:
                found = train(folder / name, CASES[name], *disturb)
                save(found, folder / name / f"rank-{distributed.rank()}.npz")
    except AttireError as error:
        print(error, file=sys.stderr)
        sys.exit(error.status)


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun sets for each process; the addresses of this machine alone."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    here = {
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    return {**os.environ, **{name: str(value) for name, value in told.items()}, **here}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(count: int, *arguments: object) -> list[Ended]:
    """`count` processes of this file, until all have ended; those that hang are killed, and that is an error."""
    port, command = free_port(), [sys.executable, __file__, *map(str, arguments)]
    pipes: Mapping[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env=environment(i, count, port), **pipes) for i in range(count)]
    return ended(started)


def stop(process: "subprocess.Popen[str]") -> None:
    """One that hangs: first the signal on which torchrun ends the processes that it started."""
    for end in (process.terminate, process.kill):
        if process.poll() is None:
            end()
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=GRACE)


def ended(started: Sequence["subprocess.Popen[str]"]) -> list[Ended]:
    last = time.monotonic() + SECONDS
    try:
        found = []
        for process in started:
            out, err = process.communicate(timeout=max(0.1, last - time.monotonic()))
            found.append(Ended(process.returncode, out, err))
        return found
    finally:
        for process in started:
            stop(process)


if __name__ == "__main__":
    main()
