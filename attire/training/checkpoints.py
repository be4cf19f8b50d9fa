"""Checkpoints of a training: written, verified, resumed from."""

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

CHECKPOINT_SECONDS = 300.0  # inside a long epoch; every epoch ends with one anyway
_SCHEMA = 1
_WRONG_VALUES = (ValueError, KeyError, TypeError, AttributeError)  # of JSON that is not what was written
KEPT_CHECKPOINTS = 2  # the newest, and the one to fall back on


@dataclass
class State:
    """All that a checkpoint restores besides the tensors: where the run stands."""

    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the next epoch
    loss_sum: float = 0.0  # over the rows of those steps
    seconds: float = 0.0  # spent on those steps
    history: list[Epoch] = field(default_factory=list)
    resumed: bool = False  # whether it came from a checkpoint
    ranks: int = 1  # processes that train together


def digests(classifier: nn.Module) -> dict[str, str]:
    """A digest of each parameter: to see that it changed takes no second copy of 100 MB."""
    return {
        name: files.sha256(parameter.detach().cpu().numpy().tobytes())
        for name, parameter in classifier.named_parameters()
        if parameter.requires_grad
    }


def save_checkpoint(
    classifier: nn.Module,
    optimiser: torch.optim.Adam,
    state: State,
    folder: Path,
    average: AveragedModel | None = None,
) -> None:
    """One .npz: weights, Adam's moments, the random state of each process, the rest as JSON; then the SHA-256 of all.

    Array by array, so that 315 MB of `classic` are never copied whole.
    """
    arrays = {f"classifier.{name}": value for name, value in classifier.state_dict().items()}
    if average is not None:
        arrays |= {f"average.{name}": value for name, value in average.state_dict().items()}
    for i, moments in optimiser.state_dict()["state"].items():
        arrays |= {f"adam.{i}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    arrays["random.cpu"] = distributed.stacked(torch.get_rng_state())
    if next(classifier.parameters()).is_cuda:
        arrays["random.cuda"] = distributed.stacked(torch.cuda.get_rng_state())
    if not distributed.leads():
        return
    told = {name: value for name, value in asdict(state).items() if name != "resumed"}
    about = files.canonical_json({**told, "schema": _SCHEMA})
    path = folder / f"epoch-{state.epoch:03d}-step-{state.step:06d}.ckpt"
    with files.sealed(path) as file, zipfile.ZipFile(cast(IO[bytes], file), "w") as archive:
        archive.writestr(zipfile.ZipInfo("about.json"), about)  # which has no time stamp: equal states, equal bytes
        for name, value in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, value.detach().cpu().numpy(), allow_pickle=False)
    forget_old(folder)


def forget_old(folder: Path) -> None:
    """Remove all checkpoints but those that are kept."""
    for old in _checkpoints(folder)[KEPT_CHECKPOINTS:]:
        old.unlink()


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first, by the epoch and step in the name."""
    return sorted((p for p in folder.glob("*.ckpt") if re.fullmatch(r"epoch-\d+-step-\d+\.ckpt", p.name)), reverse=True)


def resume(
    classifier: nn.Module, optimiser: torch.optim.Adam, folder: Path, average: AveragedModel | None = None
) -> State:
    """Restore the newest sound checkpoint; a damaged one is passed over with a warning. A fresh state without any."""
    for path in _checkpoints(folder):
        try:
            state, tensors = _read_checkpoint(path)
        except AttireError as error:
            warnings.warn(f"{error}; going on from the one before", AttireWarning, stacklevel=3)
            continue
        if state.ranks != distributed.count():
            do = f"resume with as many: torchrun --nproc-per-node {state.ranks} -m attire train --resume RUN"
            do = do if state.ranks > 1 else "resume without torchrun: attire train --resume RUN"
            raise AttireError(path, f"a checkpoint of {state.ranks} processes, found {distributed.count()}", do=do)
        _restore(classifier, optimiser, tensors, path, average)
        return state
    return State(ranks=distributed.count())


def _read_checkpoint(path: Path) -> tuple[State, dict[str, Tensor]]:
    """The parts of a checkpoint. Raises AttireError where a byte is not what was written."""
    try:
        if not files.is_sound(path):
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
        return State(**{**values, "resumed": True}), tensors
    except OSError as error:
        raise files.cannot("read", path, error) from error
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, TokenError, *_WRONG_VALUES) as error:
        raise AttireError(path, "not an Attire checkpoint", str(error)[:80]) from error


def _restore(
    classifier: nn.Module,
    optimiser: torch.optim.Adam,
    tensors: dict[str, Tensor],
    path: Path,
    average: AveragedModel | None,
) -> None:
    """Put weights, moments and the random state back. Raises AttireError where one does not fit the classifier."""
    wanted = {f"classifier.{name}": value for name, value in classifier.state_dict().items()}
    if average is not None:
        wanted |= {f"average.{name}": value for name, value in average.state_dict().items()}
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind in ("classifier", "average") and (name not in wanted or wanted[name].shape != value.shape):
            raise AttireError(
                path, f"{name} does not fit the recipe's classifier", do="resume with the run's own recipe"
            )
        if kind == "adam":
            index, _, moment = rest.partition(".")
            moments.setdefault(int(index), {})[moment] = _laid_out(value, parameters[int(index)])
    if missing := sorted(set(wanted) - set(tensors)):
        raise AttireError(path, f"{missing[0]} is missing", do="resume with the run's own recipe")
    for kind, module in (("classifier.", classifier), ("average.", average)):
        if module is not None:
            own = {name.removeprefix(kind): tensors[name] for name in wanted if name.startswith(kind)}
            module.load_state_dict(own)
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
    random = {name: _own_state(value) for name, value in tensors.items() if name.startswith("random.")}
    torch.set_rng_state(random["random.cpu"])
    if "random.cuda" in random:
        torch.cuda.set_rng_state(random["random.cuda"])


def _own_state(value: Tensor) -> Tensor:
    """Of random states, one a process, this process's."""
    return value[distributed.rank()].clone() if value.ndim > 1 else value


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """A moment with its channels where the parameter has them: fused Adam goes through both as they lie in memory."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value


def write_history(path: Path, history: list[Epoch]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Epoch.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(epoch) for epoch in history)
    files.write_text(path, text.getvalue())
