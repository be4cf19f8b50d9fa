"""How good a trained head is: accuracy of each split, train/serve skew, and what a bundle holds besides the network."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from attire.blocks import CHANNELS
from attire.data.dataset import RowIndices
from attire.evaluation import calibration
from attire.evaluation.metrics import Evaluation, evaluate
from attire.features import cache
from attire.features.logits import distributed_logits, predict_logits
from attire.features.sources import FineTunedSource, GarmentDataset, OnTheFlySource
from attire.features.views import SYNTHETIC_DRAWING, flipped
from attire.inference.neighbours import Neighbours, choose_neighbour_rows
from attire.inference.out_of_distribution import OODDetector, fit_detector, split_calibration_rows
from attire.model import heads, vgg
from attire.progress import Progress
from attire.training.experiment import Experiment
from attire.training.extraction import HeadSource, SplitSources
from attire.training.skew import Skew, sample_rows

_SCORED_ROWS = 10_000  # of training, where blocks are fine-tuned: the interval is then 0.2 points wide at 99 %


@dataclass(frozen=True)
class Outcome:
    """The evaluation of a trained head on each split; test probabilities (n, K) are calibrated with `temperature`.

    ood_detector: None where there are too few rows for its threshold; ood: its figures on the test set; neighbours: the
    training images that go into the bundle.
    """

    temperature: float
    test: Evaluation
    train: Evaluation
    val: Evaluation | None
    probabilities: NDArray[np.float64]
    ood_detector: OODDetector | None = None
    ood: dict[str, Any] | None = None
    neighbours: Neighbours | None = None
    skew: Skew | None = None


@dataclass(frozen=True)
class _SplitLogits:
    """Logits (n, K) of a trained head for validation, training and test rows, not yet calibrated."""

    val: NDArray[np.float32] | None
    train: NDArray[np.float32]
    test: NDArray[np.float32]


class HeadEvaluator:
    """Evaluates a trained head: `split_logits` by all processes, then `evaluate` by the first alone."""

    def __init__(self, experiment: Experiment, head: nn.Sequential, sources: SplitSources) -> None:
        self.experiment, self.head, self.sources = experiment, head, sources

    def logits(self, source: HeadSource, rows: RowIndices) -> NDArray[np.float32]:
        """Logits (n, K), the mean over the views of test-time augmentation; each process computes its share."""
        views = [source.names.index(name) for name in self.experiment.architecture.views]
        return np.asarray(distributed_logits(self.head, source, rows, 1024, views).numpy())

    def temperature(self, val_logits: NDArray[np.float32] | None = None) -> float:
        """The temperature that calibrates the head on the validation rows; 1 where there are none."""
        val = self.experiment.val
        if not len(val):
            return 1.0
        logits = self.logits(self.sources.train, val) if val_logits is None else val_logits
        return calibration.fit_temperature(logits, self.experiment.splits.data.labels[val])

    def split_logits(self) -> _SplitLogits:
        """The test set is read here, once, by the weights that training ended with."""
        experiment, sources = self.experiment, self.sources
        return _SplitLogits(
            val=self.logits(sources.train, experiment.val) if len(experiment.val) else None,
            train=self.logits(sources.train, self._scored_train_rows()),
            test=self.logits(sources.test, experiment.splits.test_rows),
        )

    def evaluate(self, logits: _SplitLogits, progress: Progress) -> Outcome:
        """Every figure of these logits, and what a bundle holds besides the network.

        Raises AttireError, before anything is written, where a bundle would be worse than what was trained.
        """
        splits, val = self.experiment.splits, self.experiment.val
        labels, classes = splits.data.labels, splits.data.classes
        temperature = self.temperature(logits.val)

        def evaluation(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Evaluation:
            return evaluate(calibration.softmax(logits, temperature), labels, classes)

        probabilities = calibration.softmax(logits.test, temperature)
        skew = self._measure_skew(progress)
        detector = self._fit_ood_detector(temperature)
        test_source = self._pooled_source(self.sources.test)
        return Outcome(
            temperature,
            test=evaluate(probabilities, splits.test_data.labels[splits.test_rows], classes),
            train=evaluation(logits.train, labels[self._scored_train_rows()]),
            val=None if logits.val is None else evaluation(logits.val, labels[val]),
            probabilities=probabilities,
            ood_detector=detector,
            ood=detector.evaluate(test_source, splits.test_rows, probabilities) if detector else None,
            neighbours=self._choose_neighbours(),
            skew=skew,
        )

    def _scored_train_rows(self) -> RowIndices:
        """The rows of the training accuracy: all, or where fine-tuned blocks make every answer costly, some."""
        experiment = self.experiment
        if not experiment.recipe.finetune_blocks:
            return experiment.train
        order = np.random.default_rng(experiment.recipe.split_seed).permutation(experiment.train)
        return np.sort(order[:_SCORED_ROWS])

    def _measure_skew(self, progress: Progress) -> Skew | None:
        """What is lost where training's backbone is not the fp32 one that bundles predict with; None where it is."""
        experiment, source = self.experiment, self.sources.train
        if experiment.spec.precision == "fp32":
            return None
        data, recipe, val = experiment.splits.data, experiment.recipe, experiment.val
        rows = sample_rows(val if len(val) else experiment.train, recipe.image_size, recipe.split_seed)
        frozen = vgg.vgg16(experiment.weights, recipe.freeze_to, experiment.spec.pool, nn.Sequential())
        dataset = GarmentDataset(data.images, data.labels, recipe.image_size)
        backbone = vgg.Backbone(frozen, experiment.device, "fp32")
        served = OnTheFlySource(dataset, backbone, cache.forward_batch_size(recipe.image_size))
        served.standardise = source.standardise
        skew = Skew.measure(self.head, source, served, data.labels, rows)
        progress.note("Skew", skew.describe())
        skew.check(experiment.spec.backend)
        return skew

    def _choose_neighbours(self) -> Neighbours:
        """Some of the training rows, as the trained head sees them."""
        experiment, source = self.experiment, self.sources.train
        data, hidden = experiment.splits.data, heads.penultimate_layers(self.head.eval())
        rows = choose_neighbour_rows(experiment.train, data.labels, experiment.recipe.split_seed)
        with torch.inference_mode():
            batches = source.batches(rows, 1024, None)
            if len(hidden):
                parts = [hidden(x.to(experiment.device)).float().cpu() for x in batches]
            else:  # no hidden layer: what a bundle hands to its one Linear is not standardised
                parts = [source.standardise.undo(x) for x in batches]
        return Neighbours.fit(torch.cat(parts), data.images[rows], data.labels[rows])

    def _fit_ood_detector(self, temperature: float) -> OODDetector | None:
        """From training rows alone; its threshold from validation rows, or from a part of the training rows."""
        experiment, source = self.experiment, self.sources.train

        def probabilities(rows: RowIndices, view: int) -> NDArray[np.float32]:
            """Calibrated (n, K) of these rows in this view, averaged with the mirrored one as answers are."""
            mirrored = flipped(source.names[view])
            views = [view, *(i for i, name in enumerate(source.names) if name == mirrored)]
            logits = predict_logits(self.head, source, rows, 1024, views[: experiment.architecture.tta])
            return np.asarray(calibration.softmax(logits.numpy(), temperature), np.float32)

        fit_rows, calibration_rows = split_calibration_rows(
            experiment.train, experiment.val, experiment.recipe.split_seed
        )
        unflipped = ("plain", SYNTHETIC_DRAWING)
        names = [(i, name) for i, name in enumerate(experiment.augmentation_views)]
        return fit_detector(
            self._pooled_source(source),
            experiment.splits.data.labels,
            fit_rows,
            calibration_rows,
            channels=CHANNELS[experiment.architecture.end],
            fit_views=[i for i, name in names if name.removesuffix(" flip") in (*unflipped, "flip")],
            calibration_views=[i for i, name in names if name in unflipped],
            probabilities=probabilities if experiment.recipe.outlier_exposure else None,
        )

    def _pooled_source(self, source: HeadSource) -> HeadSource | FineTunedSource:
        """The features that the OOD detector pools: those behind the fine-tuned blocks, where there are any."""
        return FineTunedSource(source, self.head) if isinstance(self.head, heads.FineTunedHead) else source
