"""The features of an experiment's images as sources of rows: from the cache, or on the fly."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from attire.data.dataset import ImageDataset
from attire.features import cache
from attire.features.sources import CachedSource, GarmentDataset, OnTheFlySource, Standardiser
from attire.model import distributed
from attire.progress import Progress
from attire.training.experiment import Experiment

_STANDARDISED_ROWS = 2048  # read at a time to measure mean and deviation

HeadSource = CachedSource | OnTheFlySource


class SplitSources(NamedTuple):
    """Sources of the rows of `splits.data` and of `splits.test_data`: one and the same where one file was split."""

    train: HeadSource
    test: HeadSource


class Extraction:
    """Extracts the features of an experiment. make: machines that make missing shards, None: this process."""

    def __init__(self, experiment: Experiment, progress: Progress, make: cache.ShardExtractor | None = None) -> None:
        self.experiment, self.progress, self.make = experiment, progress, make

    def extract(self, data: ImageDataset, view: str, label: str) -> cache.Features:
        """Features of all images in this view, from the cache where it has them; label: what the progress bar says."""
        spec, load_backbone = replace(self.experiment.spec, view=view), self.experiment.load_backbone

        def advance(done: int, total: int) -> None:
            self.progress.advance(f"Features  {label}", done, total)

        return distributed.main_process_first(
            lambda: cache.extract(data.images, data.image_digest, spec, load_backbone, advance, self.make)
        )

    def extract_all(self) -> list[cache.Features]:
        """Every cache entry that the run reads, without reading their rows."""
        return self._train_views() if self._is_one_file else [*self._train_views(), *self._test_views()]

    def train_source(self) -> CachedSource:
        """Rows of the data that training rows come from, not standardised."""
        return CachedSource(self._train_views(), names=self.experiment.views)

    def sources(self) -> SplitSources:
        """Cached features of every row, standardised; of separate test data only the test-time augmentation views."""
        train = self.train_source()
        train.standardise = self.fit_standardiser(train)
        if self._is_one_file:
            return SplitSources(train, train)
        test = CachedSource(self._test_views(), names=self.experiment.architecture.views)
        test.standardise = train.standardise
        return SplitSources(train, test)

    def on_the_fly_sources(self) -> SplitSources:
        """Without a cache: every epoch sends every picture through the backbone again."""
        experiment, splits = self.experiment, self.experiment.splits
        backbone, size = distributed.main_process_first(experiment.load_backbone), experiment.recipe.image_size

        def source(data: ImageDataset) -> OnTheFlySource:
            dataset = GarmentDataset(data.images, data.labels, size)
            return OnTheFlySource(dataset, backbone, cache.forward_batch_size(size), experiment.views)

        train = source(splits.data)
        if experiment.recipe.standardise:
            train.standardise = Standardiser.fit(train.batches(experiment.train, _STANDARDISED_ROWS, None))
        test = train if self._is_one_file else source(splits.test_data)
        test.standardise = train.standardise
        return SplitSources(train, test)

    def fit_standardiser(self, source: CachedSource) -> Standardiser:
        """Scales training rows to mean 0 and deviation 1; no change where the recipe does not standardise."""
        rows = self.experiment.train
        if not self.experiment.recipe.standardise:
            return Standardiser()
        parts = np.array_split(rows, -(-len(rows) // _STANDARDISED_ROWS))
        return Standardiser.fit(torch.from_numpy(source.views[0].gather(part)) for part in parts)

    @property
    def _is_one_file(self) -> bool:
        return self.experiment.splits.test_data is self.experiment.splits.data

    def _train_views(self) -> list[cache.Features]:
        labels = {"plain": "all" if self._is_one_file else "train", "flip": "train, mirrored"}
        data = self.experiment.splits.data
        return [self.extract(data, view, labels.get(view, f"train, {view}")) for view in self.experiment.views]

    def _test_views(self) -> list[cache.Features]:
        plain, *others = self.experiment.architecture.views
        data = self.experiment.splits.test_data
        return [self.extract(data, plain, "test"), *(self.extract(data, view, f"test, {view}") for view in others)]
