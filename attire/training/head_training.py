"""A new head, trained: initialised from the seed and fitted on an experiment's training rows."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from attire.model import heads
from attire.progress import Epoch, Progress
from attire.training import loop
from attire.training.checkpoints import TrainingState
from attire.training.experiment import Experiment
from attire.training.extraction import HeadSource

_BATCH_NORM_ROWS = 2048  # training rows whose moments batch normalisation starts from


def train_head(
    experiment: Experiment,
    source: HeadSource,
    folder: Path,
    progress: Progress,
    soft_targets: NDArray[np.float32] | None = None,
) -> tuple[nn.Sequential, list[Epoch]]:
    """A new head from the seed, trained, and its history; the global random state is left as it was.

    Checkpoints go into `folder`/checkpoints. soft_targets: a teacher's, see `loop.TrainingData`.
    """
    recipe, device = experiment.recipe, experiment.device
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        head = _new_head(experiment, source)
        data = loop.TrainingData(
            source, experiment.splits.data.labels, experiment.train, experiment.val, soft_targets=soft_targets
        )
        report = partial(_report, progress, recipe.epochs)
        recipe = replace(recipe, precision=experiment.train_precision)
        history = loop.fit(head, data, recipe, folder / "checkpoints", report)
    return head, history


def _new_head(experiment: Experiment, source: HeadSource) -> nn.Sequential:
    """The head, and in front of it the blocks that are fine-tuned, if any; initialised from torch's random state."""
    head, recipe = experiment.architecture.build_head(len(experiment.splits.data.classes)), experiment.recipe
    if recipe.finetune_blocks:
        head = fine_tuned = heads.FineTunedHead.from_imagenet(experiment.weights, recipe, head)
        if recipe.batch_norm:
            fine_tuned.calibrate_batch_norm(source.batches(experiment.train[:_BATCH_NORM_ROWS], 256, None))
    return head.to(experiment.device).to(memory_format=torch.channels_last)


def _report(progress: Progress, epochs: int, state: TrainingState, done: int, total: int) -> None:
    text = f"epoch {min(state.epoch + 1, epochs)}/{epochs}"
    if state.history:
        last = state.history[-1]
        text += f"  loss {last.train_loss:.4f}"
        text += f"  val {100 * last.val_accuracy:.1f} %" if last.val_accuracy is not None else ""
    progress.advance("Training", state.epoch * total + done, epochs * total, text)
    if not done:
        progress.epoch(state.history[-1])
