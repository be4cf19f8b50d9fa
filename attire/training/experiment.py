"""The stages of a run, in memory: rows, features, fit, evaluation. What `runs` puts in order and on disk."""

import shlex
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from attire.blocks import BLOCK_ENDS, CHANNELS, WEIGHT_SHAPES
from attire.data.dataset import FASHION_MNIST, ImageDataset, RowIndices, Splits, split_indices
from attire.errors import one_line
from attire.evaluation import calibration, run_result
from attire.evaluation.metrics import evaluate
from attire.evaluation.model_card import write_model_card
from attire.evaluation.report import write_report
from attire.features import cache
from attire.features import views as features_views
from attire.features.cache import FeatureSpec
from attire.features.logits import distributed_logits, predict_logits
from attire.features.sources import (
    CachedSource,
    GarmentDataset,
    OnTheFlySource,
    Standardiser,
    WINDOW_BYTES,
    fit_standardiser,
)
from attire.features.views import SYNTHETIC_DRAWING, flipped
from attire.inference.classifier import Architecture, Classifier
from attire.inference.neighbours import Neighbours, choose_neighbour_rows
from attire.inference.out_of_distribution import OODDetector, fit_detector, split_calibration_rows
from attire.model import devices, distributed, heads, pretrained, vgg
from attire.model.heads import fold_standardisation
from attire.model.weights import read_weights, tensor_digest
from attire.progress import Epoch, Progress
from attire.recipes import Recipe
from attire.storage import files, memory, url_copies
from attire.training import loop
from attire.training import skew as training_skew
from attire.training.checkpoints import KEPT_CHECKPOINTS, State
from attire.training.skew import Skew, sample_rows

if TYPE_CHECKING:
    import torchvision
from attire.data.loading import DataChoice
from attire.features.backbones import MEASURED_CHOICES, choose_backbone, load_backbone
from attire.features.sources import FineTunedSource
from attire.training.outcome import Outcome, SCORED_ROWS, SplitLogits

_CALIBRATION_ROWS = 2048  # whose moments batch normalisation starts from
_BOUNDS = ("accuracy_low", "accuracy_high")
_BESIDE = 12 * 2**20  # bytes of a run besides checkpoints and weights: report, tables, neighbours


_Source = CachedSource | OnTheFlySource
_Answering = Callable[[RowIndices, int], NDArray[np.float32]]  # rows and a view's number to probabilities (n, K)
_Sources = tuple[_Source, _Source]  # of the training data and of the test data; one and the same after a split


class Experiment:
    """What the stages of one run share: recipe, rows, weights, device."""

    def __init__(
        self,
        recipe: Recipe,
        source: DataChoice,
        device: torch.device,
        progress: Progress,
        make: cache.ShardExtractor | None = None,
    ) -> None:
        self.recipe, self.device, self.progress, self.make = recipe, device, progress, make
        self.taught: dict[str, Any] | None = None  # the teacher of the run, for data.json
        distributed.main_process_first(lambda: url_copies.prefetch(source.data, source.test, progress=progress.advance))
        self.splits = distributed.main_process_first(lambda: source.load(recipe))
        progress.note("Data", _describe_data(self.splits))
        self.train, self.val = validation_rows(self.splits.data, self.splits.train_rows, recipe)
        self.weights = distributed.main_process_first(lambda: pretrained.vgg16_weights(progress=progress.advance))
        progress.note("Weights", "VGG16 ImageNet, 13 convolutions   verified")
        progress.note("Recipe", recipe.describe())
        self.architecture = Architecture(**{field.name: getattr(recipe, field.name) for field in fields(Architecture)})
        if (count := recipe.tta) > 1:
            progress.note(
                "Views", f"{count} of each picture averaged: an answer takes {count} times the forward passes"
            )
        widths = (recipe.freeze_to, recipe.image_size, 0 if recipe.finetune_blocks else recipe.pool)
        precision, backend = distributed.from_main_process(
            lambda: choose_backbone(recipe.freeze_to, recipe.backend, recipe.precision, device)
        )
        self.train_precision = distributed.from_main_process(
            lambda: devices.choose_train_precision(recipe.precision, device)
        )
        self.digest = tensor_digest(read_weights(self.weights))
        self.spec = FeatureSpec(*widths, self.digest, precision, backend=backend)

    def check(self, folder: Path, runs: int = 1) -> None:
        """Raise AttireError, before long work, where the disk or the limit on memory leaves too little for `runs` runs
        in this folder."""
        recipe, classes = self.recipe, len(self.splits.data.classes)
        weights = 4 * heads.parameter_count(recipe, classes)
        checkpoint = (4 if recipe.ema else 3) * weights
        held = sum(path.stat().st_size for path in folder.rglob("*.ckpt"))
        need = (runs * KEPT_CHECKPOINTS + 1) * checkpoint - held
        need += weights + _frozen_bytes(recipe.freeze_to) + _BESIDE
        files.check_room(folder, need, "checkpoints and bundle", "make room, or give --out a folder on another disk")
        one_picture = 2 * cache.FORWARD_BYTES_PER_PIXEL * recipe.image_size**2
        need = max(WINDOW_BYTES + heads.training_bytes(recipe, classes), one_picture)
        memory.reserve(need, f"recipe {recipe.name}")

    def describe_data(self) -> dict[str, Any]:
        rows = {"train": len(self.train), "val": len(self.val), "test": len(self.splits.test_rows)}
        name = self.splits.data.source
        told = {"name": "Fashion-MNIST" if name == FASHION_MNIST else name, "rows": rows, **self.splits.describe()}
        return {**told, "teacher": self.taught} if self.taught else told

    def environment(self) -> dict[str, Any]:
        told: dict[str, Any] = {"precision": self.spec.precision, "backend": self.spec.backend}
        told |= {"processes": distributed.world_size()} if distributed.world_size() > 1 else {}
        return {**devices.environment(self.device), **told, "train_precision": self.train_precision}

    def keep(self, begun: dict[str, Any]) -> None:
        """Precision and backend of the environment that a run began in, on the same kind of device: measured again, on
        another machine or beside other work, they may come out otherwise."""
        now = self.environment()
        if begun.get("device") == now["device"] and all(isinstance(begun.get(name), str) for name in MEASURED_CHOICES):
            self.spec = replace(self.spec, precision=begun["precision"], backend=begun["backend"])
            self.train_precision = begun["train_precision"]

    def model(self, classifier: nn.Sequential) -> "torchvision.models.VGG":
        return vgg.vgg16(self.weights, self.architecture.end, self.recipe.pool, classifier)

    @property
    def load_backbone(self) -> Callable[[], cache.FeatureExtractor]:
        """Opens the frozen part alone, on the device and in the precision of the run; it can be sent to a process."""
        return partial(load_backbone, self.weights, self.spec, self.device, len(self.splits.data))

    def extract(self, data: ImageDataset, view: str, what: str) -> cache.Features:
        def advance(done: int, total: int) -> None:
            self.progress.advance(f"Features  {what}", done, total)

        spec = replace(self.spec, view=view)
        told = (data.images, data.image_digest, spec, self.load_backbone, advance, self.make)
        return distributed.main_process_first(lambda: cache.extract(*told))

    def extract_all(self) -> list[cache.Features]:
        """Every cache entry that the run reads, and nothing of them in memory."""
        data, test = self.splits.data, self.splits.test_data
        found = [self.extract(data, *wanted) for wanted in self.wanted()]
        return found if test is data else [*found, *(self.extract(test, *wanted) for wanted in self.wanted_of_test())]

    def cached(self) -> _Sources:
        """Features of every row, extracted once; of the test data only the views that an answer averages."""
        trained = self.train_features()
        trained.standardise = self.measured(trained)
        if self.splits.test_data is self.splits.data:
            return trained, trained
        parts = [self.extract(self.splits.test_data, *wanted) for wanted in self.wanted_of_test()]
        tested = CachedSource(*parts, names=self.architecture.views)
        tested.standardise = trained.standardise
        return trained, tested

    def train_features(self) -> CachedSource:
        """Of the data that training rows are taken from, not standardised."""
        parts = [self.extract(self.splits.data, *wanted) for wanted in self.wanted()]
        return CachedSource(*parts, names=self.view_names())

    def wanted(self) -> list[tuple[str, str]]:
        """The views of the data that training rows are taken from, and what a person is told of each."""
        told = {"plain": "all" if self.splits.test_data is self.splits.data else "train", "flip": "train, mirrored"}
        return [(name, told.get(name, f"train, {name}")) for name in self.view_names()]

    def wanted_of_test(self) -> list[tuple[str, str]]:
        """The same of the test data, where those are others."""
        return [(name, f"test, {name}" if i else "test") for i, name in enumerate(self.architecture.views)]

    def training_views(self) -> tuple[str, ...]:
        """The views that training draws from, in the order of their numbers."""
        recipe = self.recipe
        return features_views.augmentation_views(
            recipe.flips, recipe.shifts, recipe.synthetic_drawings, recipe.outlier_exposure
        )

    def view_names(self) -> tuple[str, ...]:
        """Those, then what answers alone look at."""
        return tuple(dict.fromkeys((*self.training_views(), *self.architecture.views)))

    def measured(self, source: CachedSource) -> Standardiser:
        """What scales the training rows to mean 0 and deviation 1, where the recipe wants it."""
        if not self.recipe.standardise:
            return Standardiser()
        parts = np.array_split(self.train, _blocks_of(len(self.train)))
        return fit_standardiser(torch.from_numpy(source.views[0].gather(rows)) for rows in parts)

    def on_the_fly(self) -> _Sources:
        """No cache: every epoch sends every picture through the backbone again."""
        backbone, size = distributed.main_process_first(self.load_backbone), self.recipe.image_size

        def source(data: ImageDataset) -> OnTheFlySource:
            dataset = GarmentDataset(data.images, data.labels, size)
            return OnTheFlySource(dataset, backbone, cache.forward_batch_size(size), self.view_names())

        trained = source(self.splits.data)
        if self.recipe.standardise:
            trained.standardise = fit_standardiser(trained.batches(self.train, 2048, None))
        tested = trained if self.splits.test_data is self.splits.data else source(self.splits.test_data)
        tested.standardise = trained.standardise
        return trained, tested

    def fit(
        self, source: _Source, folder: Path, soft: NDArray[np.float32] | None = None
    ) -> tuple[nn.Sequential, list[Epoch]]:
        """A new classifier from the seed, trained; the global random state is left as it was. soft: see `training`."""
        labels = self.splits.data.labels
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if self.device.type == "cuda" else []):
            torch.manual_seed(self.recipe.seed)
            head = self.new_head(source)
            checkpoints = folder / "checkpoints"
            rows, recipe = (self.train, self.val), replace(self.recipe, precision=self.train_precision)
            history = loop.fit(head, source, labels, *rows, recipe, checkpoints, self.report_epoch, soft)
        return head, history

    def new_head(self, source: _Source) -> nn.Sequential:
        """The classifier, and in front of it the blocks that are trained, if any; from torch's random state."""
        head = self.architecture.build_head(len(self.splits.data.classes))
        if self.recipe.finetune_blocks:
            tuned = heads.FineTunedHead.from_imagenet(self.weights, self.recipe, head)
            if self.recipe.batch_norm:
                tuned.calibrate_batch_norm(source.batches(self.train[:_CALIBRATION_ROWS], 256, None))
            head = tuned
        return head.to(self.device).to(memory_format=torch.channels_last)

    def report_epoch(self, state: State, done: int, total: int) -> None:
        epochs = self.recipe.epochs
        text = f"epoch {min(state.epoch + 1, epochs)}/{epochs}"
        if state.history:
            last = state.history[-1]
            text += f"  loss {last.train_loss:.4f}"
            text += f"  val {100 * last.val_accuracy:.1f} %" if last.val_accuracy is not None else ""
        self.progress.advance("Training", state.epoch * total + done, epochs * total, text)
        if not done:
            self.progress.epoch(state.history[-1])

    def answers(self, head: nn.Sequential, sources: _Sources) -> SplitLogits:
        """The test set is read here, once, by the weights that training ended with; each process answers its share."""
        logits = partial(self.logits, head)
        return SplitLogits(
            val=logits(sources[0], self.val) if len(self.val) else None,
            train=logits(sources[0], self.scored_training_rows()),
            test=logits(sources[1], self.splits.test_rows),
        )

    def evaluate(self, head: nn.Sequential, sources: _Sources, answers: SplitLogits) -> Outcome:
        """Every figure of what the head answered, and what a bundle holds besides the network."""
        labels, classes = self.splits.data.labels, self.splits.data.classes
        temperature, val = 1.0, None
        if answers.val is not None:
            temperature = calibration.fit_temperature(answers.val, labels[self.val])
            val = evaluate(calibration.softmax(answers.val, temperature), labels[self.val], classes)
        seen = self.scored_training_rows()
        trained = calibration.softmax(answers.train, temperature)
        tested = calibration.softmax(answers.test, temperature)
        test_labels = self.splits.test_data.labels[self.splits.test_rows]
        skewed = self.skew(head, sources[0])
        behind = [FineTunedSource(s, head) if isinstance(head, heads.FineTunedHead) else s for s in sources]
        ood_detector = self.ood_detector(behind[0], partial(self.sure, head, sources[0], temperature))
        return Outcome(
            temperature,
            test=evaluate(tested, test_labels, classes),
            train=evaluate(trained, labels[seen], classes),
            val=val,
            probabilities=tested,
            ood_detector=ood_detector,
            ood=ood_detector.evaluate(behind[1], self.splits.test_rows, tested) if ood_detector else None,
            neighbours=self.neighbours(head, sources[0]),
            skew=skewed,
        )

    def scored_training_rows(self) -> RowIndices:
        """Those that the training accuracy is measured on: all, or with trained blocks, whose every answer costs a
        pass through them, some."""
        if not self.recipe.finetune_blocks:
            return self.train
        drawn = np.random.default_rng(self.recipe.split_seed).permutation(self.train)
        return np.sort(drawn[:SCORED_ROWS])

    def skew(self, head: nn.Sequential, source: _Source) -> Skew | None:
        """What is lost where the backbone is not the fp32 one that bundles predict with; None where it is.

        Raises AttireError where that is more than can be borne, before anything is written.
        """
        if self.spec.precision == "fp32":
            return None
        data, size = self.splits.data, self.recipe.image_size
        rows = sample_rows(self.val if len(self.val) else self.train, size, self.recipe.split_seed)
        frozen = vgg.vgg16(self.weights, self.recipe.freeze_to, self.spec.pool, nn.Sequential())
        backbone = vgg.Backbone(frozen, self.device, "fp32")
        served = OnTheFlySource(
            GarmentDataset(data.images, data.labels, size), backbone, cache.forward_batch_size(size)
        )
        served.standardise = source.standardise
        found = training_skew.measure_skew(head, source, served, data.labels, rows)
        self.progress.note("Skew", found.describe())
        found.check(self.spec.backend)
        return found

    def logits(self, head: nn.Module, source: _Source, rows: RowIndices) -> NDArray[np.float32]:
        """(n, K), the mean over the views that an answer averages: what the temperature is fitted to."""
        numbers = [source.names.index(name) for name in self.architecture.views]
        return np.asarray(distributed_logits(head, source, rows, 1024, numbers).numpy())

    def neighbours(self, head: nn.Sequential, source: _Source) -> Neighbours:
        """Some of the training rows, as the trained head sees them."""
        data, hidden = self.splits.data, heads.penultimate_layers(head.eval())
        rows = choose_neighbour_rows(self.train, data.labels, self.recipe.split_seed)
        with torch.inference_mode():
            found = source.batches(rows, 1024, None)
            if len(hidden):
                parts = [hidden(x.to(self.device)).float().cpu() for x in found]
            else:  # no hidden layer: what a bundle hands to its one Linear is not standardised
                parts = [source.standardise.undo(x) for x in found]
        return Neighbours.fit(torch.cat(parts), data.images[rows], data.labels[rows])

    def sure(
        self, head: nn.Module, source: _Source, temperature: float, rows: RowIndices, view: int
    ) -> NDArray[np.float32]:
        """Calibrated probabilities (n, K) of these rows in this view, averaged with the mirrored one as answers are."""
        names = source.names
        both = [view, *(i for i, name in enumerate(names) if name == flipped(names[view]))]
        found = predict_logits(head, source, rows, 1024, both[: self.architecture.tta])
        return np.asarray(calibration.softmax(found.numpy(), temperature), np.float32)

    def ood_detector(self, source: "_Source | FineTunedSource", answers: _Answering) -> OODDetector | None:
        """From training rows alone; its threshold from validation rows, or from a part of the training rows."""
        fit_rows, calibration_rows = split_calibration_rows(self.train, self.val, self.recipe.split_seed)
        names, held = self.training_views(), ("plain", SYNTHETIC_DRAWING)
        views = [i for i, name in enumerate(names) if name.removesuffix(" flip") in (*held, "flip")]
        plain = [i for i, name in enumerate(names) if name in held]
        return fit_detector(
            source,
            self.splits.data.labels,
            fit_rows,
            calibration_rows,
            channels=CHANNELS[self.architecture.end],
            fit_views=views,
            calibration_views=plain,
            probabilities=answers if self.recipe.outlier_exposure else None,
        )

    def result(
        self, folder: Path, found: Outcome, history: list[Epoch], seconds: dict[str, float], claimed: float
    ) -> run_result.RunResult:
        test = self.splits.test
        return run_result.RunResult(
            title=f"Attire {self.recipe.name} on {self.describe_data()['name']}",
            recipe=self.recipe.name,
            seed=self.recipe.seed,
            command=f"attire train --config {shlex.quote(str(folder / 'config.json'))}",
            test=found.test,
            train=found.train,
            val=found.val,
            ood=found.ood,
            predictions=run_result.predictions(test.labels, found.probabilities, test.images),
            history=[asdict(epoch) for epoch in history],
            seconds=seconds,
            config=files.read_json(folder / "config.json"),
            environment={**self.environment(), **({"skew": found.skew.to_json()} if found.skew else {})},
            data=self.describe_data(),
            claimed=claimed,
        )

    def assembled(self, head: nn.Sequential) -> "torchvision.models.VGG":
        """The network that ships: a plain VGG16 with the head's classifier, trained blocks put where they came from."""
        head.cpu()
        if not isinstance(head, heads.FineTunedHead):
            return self.model(head)
        model = self.model(head.head)
        model.load_state_dict({**model.state_dict(), **head.folded_convolutions()})
        return model

    def save(
        self, folder: Path, head: nn.Sequential, scaled: Standardiser, found: Outcome, result: run_result.RunResult
    ) -> None:
        """Report and bundle. The backbone that ships is read afresh from the verified weights: frozen means the same."""
        if scaled.mean is not None and scaled.scale is not None:
            fold_standardisation(head, scaled.mean, scaled.scale)
        facts = {
            "name": result.title,
            "recipe": self.recipe.to_json(),
            "test": {key: result.test.to_json()[key] for key in ("n", "correct", "accuracy", *_BOUNDS)},
            "test_digest": self.splits.test_data.image_digest,
            "backbone_digest": self.digest,
        }
        run_result.save_result(folder, result)
        write_report(folder, result)
        model, classes = self.assembled(head), self.splits.data.classes
        told = (model, self.architecture, classes, found.temperature, facts)
        whole = Classifier(*told, ood_detector=found.ood_detector, neighbours=found.neighbours)
        whole.save(folder / "model")
        write_model_card(folder / "model", result)


def validation_rows(data: ImageDataset, rows: RowIndices, recipe: Recipe) -> tuple[RowIndices, RowIndices]:
    """The rows that train, and those cut from them for validation: as many as the recipe says, at most a tenth.

    A tenth of a small set may be too few for a row of each class: then that many, where the split is stratified.
    """
    if not recipe.val_size:
        return rows, np.empty(0, np.int64)
    labels = data.labels[rows]
    least = len(np.unique(labels)) if recipe.stratify else 1
    count = min(recipe.val_size, max(least, len(labels) // 10))
    rest, part = split_indices(labels, count, recipe.split_seed, recipe.stratify, name=data.source)
    return rows[rest], rows[part]


def _describe_data(splits: Splits) -> str:
    name = splits.data.source
    name = "Fashion-MNIST" if name == FASHION_MNIST else one_line(name)
    return f"{name}, {len(splits.train_rows):,} + {len(splits.test_rows):,} images   verified"


def _frozen_bytes(freeze_to: str) -> int:
    """What the backbone takes in a bundle, in 32 bits."""
    end = BLOCK_ENDS[freeze_to]
    return 4 * sum(prod(shape) for name, shape in WEIGHT_SHAPES.items() if int(name.split(".")[1]) < end)


def _blocks_of(rows: int) -> int:
    return -(-rows // 2048)
