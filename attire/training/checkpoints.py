"""Checkpoints of a training: written, verified, resumed from. And `history.csv` beside them."""

import csv
import io
import json
import re
import warnings
import zipfile
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tokenize import TokenError
from typing import IO, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from attire.errors import AttireError, AttireWarning
from attire.model import distributed
from attire.progress import Epoch
from attire.storage import files

CHECKPOINT_SECONDS = 300.0  # between checkpoints within a long epoch; every epoch ends with one anyway
_SCHEMA = 1
KEPT_CHECKPOINTS = 2  # the newest, and the one to fall back on
_UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, TokenError),  # not a zip of arrays
    *(ValueError, KeyError, TypeError, AttributeError),  # JSON or arrays that are not what was written
)


@dataclass
class TrainingState:
    """All that a checkpoint restores besides the tensors: where the training stands."""

    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the next epoch
    loss_sum: float = 0.0  # over the rows of those steps
    seconds: float = 0.0  # spent on those steps
    history: list[Epoch] = field(default_factory=list)
    resumed: bool = False  # whether it came from a checkpoint
    world_size: int = 1  # processes that train together


class Checkpoints:
    """The checkpoints in `folder`: save and restore one training's head, optimiser and moving average."""

    def __init__(
        self, head: nn.Module, optimiser: torch.optim.Adam, folder: Path, average: AveragedModel | None = None
    ) -> None:
        self.head, self.optimiser, self.folder, self.average = head, optimiser, folder, average

    def save(self, state: TrainingState) -> None:
        """Write one zip of .npy files: weights, Adam's moments, random states, the rest as JSON; its SHA-256 after it.

        Array by array, so that 315 MB of `classic` are never copied whole. All processes call it, the first one writes.
        """
        arrays = self._module_tensors()
        for i, moments in self.optimiser.state_dict()["state"].items():
            arrays |= {f"adam.{i}.{name}": torch.as_tensor(value) for name, value in moments.items()}
        arrays["random.cpu"] = distributed.stack_processes(torch.get_rng_state())
        if next(self.head.parameters()).is_cuda:
            arrays["random.cuda"] = distributed.stack_processes(torch.cuda.get_rng_state())
        if not distributed.is_main_process():
            return
        values = {name: value for name, value in asdict(state).items() if name != "resumed"}
        about = files.canonical_json({**values, "schema": _SCHEMA})
        path = self.folder / f"epoch-{state.epoch:03d}-step-{state.step:06d}.ckpt"
        with files.sealed_file(path) as file, zipfile.ZipFile(cast(IO[bytes], file), "w") as archive:
            archive.writestr(zipfile.ZipInfo("about.json"), about)  # which has no time stamp: equal states, equal bytes
            for name, value in arrays.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, value.detach().cpu().numpy(), allow_pickle=False)
        self.remove_old()

    def remove_old(self) -> None:
        """Remove all checkpoints but the newest `KEPT_CHECKPOINTS`."""
        for path in _checkpoints(self.folder)[KEPT_CHECKPOINTS:]:
            path.unlink()

    def restore(self) -> TrainingState:
        """Restore the newest sound checkpoint; warn of a damaged one and take the one before. Without any, a new state.

        Raises AttireError where a checkpoint belongs to another head or to another number of processes.
        """
        for path in _checkpoints(self.folder):
            try:
                state, tensors = _read_checkpoint(path)
            except AttireError as error:
                warnings.warn(f"{error}; going on from the one before", AttireWarning, stacklevel=4)
                continue
            if state.world_size != distributed.world_size():
                do = f"resume with as many: torchrun --nproc-per-node {state.world_size} -m attire train --resume RUN"
                do = do if state.world_size > 1 else "resume without torchrun: attire train --resume RUN"
                what = f"a checkpoint of {state.world_size} processes, found {distributed.world_size()}"
                raise AttireError(path, what, do=do)
            self._restore_modules(tensors, path)
            self._restore_optimiser(tensors)
            _restore_random_states(tensors)
            return state
        return TrainingState(world_size=distributed.world_size())

    def _module_tensors(self) -> dict[str, Tensor]:
        """Weights and buffers by their names in a checkpoint: `head.*`, and `average.*` where there is one."""
        tensors = {f"head.{name}": value for name, value in self.head.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        return tensors

    def _restore_modules(self, tensors: dict[str, Tensor], path: Path) -> None:
        """Raises AttireError where the checkpoint's tensors are not those of this head."""
        expected = self._module_tensors()
        for name, value in tensors.items():
            if name.startswith(("head.", "average.")) and (name not in expected or expected[name].shape != value.shape):
                raise AttireError(path, f"{name} does not fit the recipe's head", do="resume with the run's own recipe")
        if missing := sorted(set(expected) - set(tensors)):
            raise AttireError(path, f"{missing[0]} is missing", do="resume with the run's own recipe")
        self.head.load_state_dict({name: tensors[f"head.{name}"] for name in self.head.state_dict()})
        if self.average is not None:
            self.average.load_state_dict({name: tensors[f"average.{name}"] for name in self.average.state_dict()})

    def _restore_optimiser(self, tensors: dict[str, Tensor]) -> None:
        parameters = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, index, moment = name.split(".", 2)
                moments.setdefault(int(index), {})[moment] = _with_layout_of(parameters[int(index)], value)
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first, by the epoch and step in the name."""
    return sorted((p for p in folder.glob("*.ckpt") if re.fullmatch(r"epoch-\d+-step-\d+\.ckpt", p.name)), reverse=True)


def _read_checkpoint(path: Path) -> tuple[TrainingState, dict[str, Tensor]]:
    """The parts of a checkpoint. Raises AttireError where a byte is not what was written."""
    try:
        if not files.has_valid_seal(path):
            raise AttireError(path, "not a whole Attire checkpoint: its digest does not match")
        with zipfile.ZipFile(path) as archive:
            values = json.loads(archive.read("about.json"))
            if values.pop("schema") != _SCHEMA:
                raise AttireError(path, f"a checkpoint of another schema version than {_SCHEMA}")
            tensors = {}
            for name in archive.namelist()[1:]:
                with archive.open(name) as member:
                    array = np.lib.format.read_array(member, allow_pickle=False)
                tensors[name.removesuffix(".npy")] = torch.from_numpy(array)
        values["history"] = [Epoch(**line) for line in values["history"]]
        return TrainingState(**{**values, "resumed": True}), tensors
    except OSError as error:
        raise files.io_error("read", path, error) from error
    except _UNREADABLE as error:
        raise AttireError(path, "not an Attire checkpoint", str(error)[:80]) from error


def _with_layout_of(parameter: Tensor, moment: Tensor) -> Tensor:
    """A moment with its channels where the parameter has them: fused Adam goes through both as they lie in memory."""
    return torch.empty_like(parameter).copy_(moment) if moment.shape == parameter.shape else moment


def _restore_random_states(tensors: dict[str, Tensor]) -> None:
    """A checkpoint of several processes holds a row for each."""
    states = {
        name: value[distributed.rank()].clone() if value.ndim > 1 else value
        for name, value in tensors.items()
        if name.startswith("random.")
    }
    torch.set_rng_state(states["random.cpu"])
    if "random.cuda" in states:
        torch.cuda.set_rng_state(states["random.cuda"])


def write_history(path: Path, history: list[Epoch]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Epoch.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(epoch) for epoch in history)
    files.write_text(path, text.getvalue())
