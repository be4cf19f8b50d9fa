"""The peers: each trains on the race's images and tells how far it is. Each is run in a process of its own."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import ROUNDS, seconds, spread
from numpy.typing import NDArray
from race import OverError, Pictures, Race, tell, vgg_features, vgg_tensors
from torch import Tensor, nn

SHARE = 0.85  # of the cap that a peer plans with

# Attire.


def attire_fast(race: Race) -> None:
    """Recipe `fast` from an empty cache, as `attire train` goes about it."""
    from attire.data import csv_table
    from attire.data.loading import DataChoice
    from attire.features.logits import predict_logits
    from attire.features.sources import CachedSource
    from attire.model import devices
    from attire.progress import NoProgress
    from attire.recipes import FAST
    from attire.storage import files, memory
    from attire.training.checkpoints import TrainingState
    from attire.training.experiment import Experiment
    from attire.training.extraction import Extraction
    from attire.training.loop import TrainingData, fit

    choice, recipe = DataChoice(), FAST
    if race.quick:
        for name, part in (("train", race.train), ("test", race.test)):
            csv_table.write_table(race.scratch / f"{name}.csv", part.images, part.labels)
        choice, recipe = DataChoice(*(str(race.scratch / f"{name}.csv") for name in ("train", "test"))), FAST
    race.start()
    memory.keep_freed_memory()
    experiment = Experiment.prepare(recipe, choice, devices.choose_device("cpu"), NoProgress())
    extraction = Extraction(experiment, NoProgress())
    trained = extraction.train_source()
    trained.standardise = extraction.fit_standardiser(trained)
    tell("note", text="features of the training images", seconds=race.seconds)
    with race.paused():
        views, test = experiment.architecture.views, experiment.splits.test_data
        parts: list[Any] = []
        took = seconds(lambda: parts.extend(extraction.extract(test, view, "test") for view in views))
        tell("note", text="features of the test images, not counted", seconds=took)
        tested = CachedSource(parts, names=views)
        tested.standardise = trained.standardise
        numbers = range(len(views))
    torch.manual_seed(recipe.seed)
    head = experiment.architecture.build_head(10)
    quarters = {len(experiment.train) * i // 4 // recipe.batch_size for i in (1, 2, 3)}

    def report(state: TrainingState, done: int, total: int) -> None:
        if done and (state.epoch or state.step not in quarters):
            return
        images = state.epoch * total + done
        rows = experiment.splits.test_rows
        race.point_from(images, lambda: predict_logits(head, tested, rows, 1024, numbers).argmax(1).numpy())
        head.train()

    folder = files.make_dir(race.scratch / "run" / "checkpoints")
    recipe = replace(recipe, precision=experiment.train_precision)
    data = TrainingData(trained, experiment.splits.data.labels, experiment.train, experiment.val)
    fit(head, data, recipe, folder, report)


def classic_rows(race: Race) -> tuple[Any, Any, NDArray[np.int64]] | None:
    """Cached features of recipe `classic` (training set, test set) and its 48,000 rows of the 60,000; None without."""
    from attire.data.dataset import split_indices
    from attire.features import cache
    from attire.features.cache import Features, FeatureSpec
    from attire.model import pretrained as model_pretrained
    from attire.model.weights import read_weights, tensor_digest
    from attire.recipes import _CLASSIC

    digest = tensor_digest(read_weights(model_pretrained.vgg16_weights()))
    exact = FeatureSpec(_CLASSIC.freeze_to, _CLASSIC.image_size, _CLASSIC.pool, digest, "fp32")
    specs = exact, replace(exact, precision="int8", backend="openvino-int8"), replace(exact, precision="bf16")
    found = []
    if race.quick:
        found = [made_up(race.scratch / str(i), len(part), exact) for i, part in enumerate((race.train, race.test))]
    for spec in () if found else specs:
        folders = [race.classic_cache / "features" / spec.key(part.image_digest) for part in (race.train, race.test)]
        if all((folder / "MANIFEST.json").exists() for folder in folders):
            for folder, part in zip(folders, (race.train, race.test), strict=True):
                if len(cache.verify_shards(folder, len(part), spec)) < -(-len(part) // spec.shard_rows):
                    raise SystemExit(f"error: {folder}: a shard is damaged")
                found.append(Features(folder, len(part), spec.width, spec.shard_rows))
            tell("note", text=f"features of `classic` by {spec.backend} in {spec.precision}")
            break
    if not found:
        text = "no cached features of `classic`; make them with: attire train --recipe classic --data "
        tell("note", text=f"{text}fashion-mnist_train.csv, then attire evaluate of that bundle, --backend as there")
        return None
    rest, _ = split_indices(race.train.labels, 0.2, _CLASSIC.split_seed, _CLASSIC.stratify)
    return found[0], found[1], rest


def made_up(folder: Path, rows: int, spec: Any) -> Any:
    from attire.features.cache import Features, _shard_path
    from attire.storage import files

    files.make_dir(folder)
    for i, start in enumerate(range(0, rows, spec.shard_rows)):
        some = np.random.default_rng(i).random((min(spec.shard_rows, rows - start), spec.width), np.float32)
        np.save(_shard_path(folder, i), some.astype(np.float16))
    return Features(folder, rows, spec.width, spec.shard_rows)


def attire_classic(race: Race) -> None:
    """The classifier of `classic` on cached features: accuracy after each epoch, for all who train that protocol."""
    from attire.features.logits import predict_logits
    from attire.features.sources import CachedSource
    from attire.model.heads import build_head
    from attire.recipes import _CLASSIC
    from attire.storage import files, memory
    from attire.training.checkpoints import TrainingState
    from attire.training.loop import TrainingData, fit

    found = classic_rows(race)
    if found is None:
        return
    memory.keep_freed_memory()
    recipe = replace(_CLASSIC, epochs=2) if race.quick else _CLASSIC
    trained, tested = CachedSource([found[0]]), CachedSource([found[1]])
    torch.manual_seed(recipe.seed)
    head = build_head((25088, 1, 1), (), recipe.hidden, 10, recipe.dropout)

    def report(state: TrainingState, done: int, total: int) -> None:
        if not done:
            rows = np.arange(len(race.test))
            answers: Callable[[], Any] = lambda: predict_logits(head, tested, rows).argmax(1).numpy()  # noqa: E731
            race.point_from(state.epoch * total, answers, "head", epoch=state.epoch)

    folder = files.make_dir(race.scratch / "run" / "checkpoints")
    race.cap *= 4  # its accuracies are wanted to the last epoch
    race.start()
    fit(head, TrainingData(trained, race.train.labels, found[2], found[2][:0]), recipe, folder, report)


# fastai.


def fastai_learner(race: Race, size: int, rows: NDArray[np.int64], batch_size: int) -> Any:
    """`vision_learner` with a frozen VGG16 that carries the same weights; no augmentation, as nobody else has any."""
    import fastai.callback.progress
    import fastai.callback.schedule  # noqa: F401  (they add methods to Learner)
    from fastai.data.core import DataLoaders
    from fastai.losses import CrossEntropyLossFlat
    from fastai.vision.learner import vision_learner

    def vgg16(pretrained: bool = True) -> nn.Module:
        model = nn.Module()
        model.features = vgg_features()
        model.avgpool = nn.AdaptiveAvgPool2d(7)
        return model

    parts = (Pictures(race.train, size, rows), Pictures(race.test, size, np.arange(2)))
    loaders = DataLoaders.from_dsets(*parts, bs=batch_size, num_workers=0, device=torch.device("cpu"))
    return vision_learner(loaders, vgg16, n_out=10, normalize=False, loss_func=CrossEntropyLossFlat())


def progress(race: Race, answers: Callable[[], Any], marks: int, kind: str = "point") -> Any:
    """A fastai callback: no validation, and the test images scored `marks` times an epoch, or never."""
    from fastai.callback.core import Callback, CancelFitException, CancelValidException

    class Watch(Callback):
        trained = 0

        def before_validate(self) -> None:
            raise CancelValidException

        def after_batch(self) -> None:
            if not self.training:
                return
            self.trained += len(self.xb[0])
            each = max(1, self.n_iter // max(1, marks))
            due = (self.iter + 1) % each == 0 and self.iter + 1 <= each * marks
            if marks and (due or race.seconds > race.cap):
                self.point()

        def point(self) -> None:
            self.model.eval()
            try:
                race.point_from(self.trained, answers, kind, epoch=self.epoch + 1)
            except OverError:
                raise CancelFitException from None
            self.model.train()

    return Watch()


def fastai_64(race: Race) -> None:
    size = 64
    order = np.random.default_rng(0).permutation(len(race.train))
    trial = fastai_learner(race, size, order[:64], 64)
    race.start()
    with trial.no_bar(), trial.no_logging():
        rate = 64 / seconds(lambda: trial.fit(1, cbs=progress(race, lambda: 0, 0)))
    epochs = max(1, int(SHARE * race.cap * rate / len(order)))
    rows = order[: int(min(len(order), SHARE * race.cap * rate / epochs))]
    tell("note", text=f"planned: {epochs} x {len(rows):,} images, at {rate:.0f} images/s")
    learner = fastai_learner(race, size, rows, 64)

    def answers() -> NDArray[Any]:
        return in_batches(learner.model, Pictures(race.test, size))

    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(epochs, 1e-3, cbs=progress(race, answers, 2))


def in_batches(model: nn.Module, pictures: Pictures, rows: int = 250) -> NDArray[Any]:
    model.eval()
    images = pictures.dataset.images
    with torch.inference_mode():
        parts = [model(pictures.prepared(images[i : i + rows])).argmax(1) for i in range(0, len(images), rows)]
    return torch.cat(parts).numpy()


def pooled(features: Any, rows: NDArray[np.int64], both: bool) -> Tensor:
    """(n, 1024) maxima and means of the 7x7 maps, or (n, 512) means alone: all that those heads see of them."""
    parts = []
    for some in np.array_split(rows, -(-len(rows) // 1024)):
        maps = torch.from_numpy(features.gather(some)).float().view(len(some), 512, 49)
        parts.append(torch.cat([maps.amax(2), maps.mean(2)], 1) if both else maps.mean(2))
    return torch.cat(parts)


def fastai_224_head(race: Race) -> None:
    """fastai's own head on the cached 7x7 maps of the frozen VGG16: what `vision_learner` sees, epoch by epoch."""
    import fastai.callback.progress
    import fastai.callback.schedule  # noqa: F401  (they add methods to Learner)
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    from fastai.vision.learner import create_head

    found = classic_rows(race)
    if found is None:
        return
    x, xt = pooled(found[0], found[2], True), pooled(found[1], np.arange(len(race.test)), True)
    y = torch.from_numpy(race.train.labels[found[2]])
    dataset = torch.utils.data.TensorDataset(x, y)
    loaders = DataLoaders.from_dsets(dataset, dataset, bs=64, num_workers=0, device=torch.device("cpu"))
    head = create_head(1024, 10, pool=False, concat_pool=False)  # behind its two poolings
    learner = Learner(loaders, head, loss_func=CrossEntropyLossFlat())

    def answers() -> NDArray[Any]:
        head.eval()
        with torch.inference_mode():
            return np.asarray(head(xt).argmax(1).numpy())

    race.start()
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(1 if race.quick else 10, 1e-3, cbs=progress(race, answers, 1, "head"))


# Keras.


def keras_vgg16(size: int) -> Any:
    """Keras' own VGG16 without its top, carrying the same weights."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    model = keras.applications.VGG16(weights=None, include_top=False, pooling="avg", input_shape=(size, size, 3))
    by_place = sorted(vgg_tensors().items(), key=lambda item: (int(item[0].split(".")[0]), "bias" in item[0]))
    tensors = iter([value for _, value in by_place])
    for layer in model.layers:
        if layer.weights:
            kernel, bias = next(tensors), next(tensors)
            layer.set_weights([kernel.permute(2, 3, 1, 0).numpy(), bias.numpy()])
    model.trainable = False
    return model


def channels_last(pictures: Pictures, rows: slice) -> NDArray[np.float32]:
    return np.asarray(pictures.prepared(pictures.dataset.images[rows]).permute(0, 2, 3, 1).numpy())


def keras_head(race: Race, x: Tensor, y: NDArray[np.int64], xt: Callable[[], Any], kind: str, before: int = 0) -> None:
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    head = keras.Sequential([layers.Dense(256, "relu"), layers.Dropout(0.5), layers.Dense(10, "softmax")])
    head.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy")
    inputs = x.numpy()
    for epoch in range(1, 3 if race.quick else 16):
        head.fit(inputs, y, batch_size=256, epochs=1, verbose=0)

        def answers() -> NDArray[Any]:
            return np.asarray(head.predict(xt(), batch_size=1000, verbose=0).argmax(1))

        race.point_from(before + epoch * len(y), answers, kind, epoch=epoch)


def keras_64(race: Race) -> None:
    """Feature extraction as Keras' guide has it: VGG16 without its top, averaged, once; then two dense layers."""
    size, step = 64, 256
    model, pictures, parts = keras_vgg16(size), Pictures(race.train, 64), []
    order = np.random.default_rng(0).permutation(len(race.train))
    shuffled = Pictures(race.train.subset(order), size)
    race.start()
    for start in range(0, len(order), step):
        batch = channels_last(shuffled, slice(start, start + step))
        parts.append(torch.from_numpy(np.array(model.predict(batch, batch_size=64, verbose=0))))
        if race.seconds > SHARE * race.cap:
            break
    x = torch.cat(parts)
    tell("note", text=f"{len(x):,} of {len(pictures):,} images went through VGG16", seconds=race.seconds)
    cached: list[Any] = []

    def tested() -> Any:
        if not cached:
            seen = Pictures(race.test, size)
            blocks = [slice(i, i + step) for i in range(0, len(race.test), step)]
            made = [model.predict(channels_last(seen, block), batch_size=64, verbose=0) for block in blocks]
            cached.append(np.concatenate(made))
        return cached[0]

    keras_head(race, x, race.train.labels[order[: len(x)]], tested, "point")


def keras_224_head(race: Race) -> None:
    """The same head on the means of the cached 7x7 maps at 224 px."""
    found = classic_rows(race)
    if found is None:
        return
    x, xt = pooled(found[0], found[2], False), pooled(found[1], np.arange(len(race.test)), False).numpy()
    race.start()
    keras_head(race, x, race.train.labels[found[2]], lambda: xt, "head")


# Without VGG16.


def hog_svm(race: Race) -> None:
    """Histograms of gradients (scikit-image) and a linear SVM (scikit-learn), on a tenth and on all of the images.

    Each line's seconds are those of its own images and fit alone, as if the other had not been.
    """
    from skimage.feature import hog
    from sklearn.svm import LinearSVC

    def described(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        shape: dict[str, Any] = {"orientations": 9, "pixels_per_cell": (4, 4), "cells_per_block": (2, 2)}
        return np.stack([hog(image, **shape) for image in images]).astype(np.float32)

    with race.paused():
        xt = described(race.test.images)
    order = np.random.default_rng(0).permutation(len(race.train))
    for rows in (order[: len(order) // 10], order):
        race.start()
        x = described(race.train.images[rows])
        svm = LinearSVC(C=0.1, random_state=0).fit(x, race.train.labels[rows])
        race.point_from(len(rows), lambda svm=svm: svm.predict(xt))  # type: ignore[misc]


def small_cnn(race: Race) -> None:
    """Four convolutions and two linear layers from scratch, AdamW, one cycle; as many epochs as the cap allows."""
    torch.manual_seed(0)

    def block(a: int, b: int) -> Iterator[nn.Module]:
        yield from (nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))

    convolutions = (*block(1, 32), *block(32, 32), nn.MaxPool2d(2), *block(32, 64), *block(64, 64), nn.MaxPool2d(2))
    linear = (nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 49, 256), nn.ReLU(), nn.Dropout(0.3), nn.Linear(256, 10))
    model = nn.Sequential(*convolutions, *linear).to(memory_format=torch.channels_last)
    x, xt = (torch.tensor(part.images)[:, None].float() / 255 - 0.286 for part in (race.train, race.test))
    y, batch = torch.tensor(race.train.labels), 128

    def answers() -> NDArray[Any]:
        model.eval()
        with torch.inference_mode():
            found = torch.cat([model(part).argmax(1) for part in xt.split(1000)]).numpy()
        model.train()
        return np.asarray(found)

    def step(rows: Tensor, optimiser: torch.optim.Optimizer) -> None:
        pictures = x[rows] if torch.rand(()) < 0.5 else x[rows].flip(-1)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(nn.functional.cross_entropy(model(pictures), y[rows]))
        optimiser.step()

    race.start()
    trial = torch.optim.AdamW(model.parameters(), lr=1e-5)
    rate = 10 * batch / seconds(lambda: [step(torch.arange(batch), trial) for _ in range(10)])
    epochs = min(15, max(1, int(SHARE * race.cap * rate / len(x))))
    tell("note", text=f"planned: {epochs} x {len(x):,} images, at {rate:.0f} images/s")
    steps = -(-len(x) // batch)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=epochs * steps)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x)).split(batch):
            step(rows, optimiser)
            schedule.step()
        race.point_from((epoch + 1) * len(x), answers, epoch=epoch + 1)


# How fast each runs VGG16 at 224 px, in turn, in one process.


def rates(race: Race) -> None:
    """Images/s of those that cannot finish, five rounds in turn; ratios to the plain script round by round."""
    count = 4 if race.quick else 32
    works = {
        "plain script, a training epoch": plain_work(race, count),
        "fastai, a training epoch": fastai_work(race, count),
        "Keras, extraction": keras_work(race, count),
        **attire_works(race, count),
    }
    found: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(2 if race.quick else ROUNDS):
        for name, work in works.items():
            found[name].append(count / seconds(work))
    base = next(iter(found.values()))
    for name, speeds in found.items():
        ratio = spread([mine / plain for mine, plain in zip(speeds, base, strict=True)])
        tell("rate", what=name, images=count * len(speeds), rate=spread(speeds), ratio=ratio)


def plain_work(race: Race, count: int) -> Callable[[], object]:
    import pandas as pd
    import plain_script

    rows = np.column_stack([race.train.labels[:count], race.train.images[:count].reshape(count, -1)])
    frame = pd.DataFrame(rows.astype(np.int64))
    loader = torch.utils.data.DataLoader(plain_script.FashionDataset(frame), batch_size=32, shuffle=True)
    model = plain_script.make_model({f"features.{name}": value for name, value in vgg_tensors().items()})
    optimizer = torch.optim.Adam(model.classifier.parameters(), lr=1e-4)
    device = torch.device("cpu")
    return lambda: plain_script.train_epoch(model, loader, nn.CrossEntropyLoss(), optimizer, device)


def fastai_work(race: Race, count: int) -> Callable[[], object]:
    learner = fastai_learner(race, 224, np.arange(count), 32 if count >= 32 else count)
    watch = progress(race, lambda: 0, 0)
    race.cap = float("inf")

    def work() -> None:
        with learner.no_bar(), learner.no_logging():
            learner.fit(1, 1e-3, cbs=watch)

    return work


def keras_work(race: Race, count: int) -> Callable[[], object]:
    model, pictures = keras_vgg16(224), Pictures(race.train, 224)

    def work() -> None:
        for start in range(0, count, 32):
            model.predict(channels_last(pictures, slice(start, min(start + 32, count))), batch_size=32, verbose=0)

    return work


def attire_works(race: Race, count: int) -> dict[str, Callable[[], object]]:
    """`classic`'s extraction with every backend that is installed here."""
    from importlib.util import find_spec

    from attire.features import cache
    from attire.features.backbones import choose_backbone, make_backbone
    from attire.features.cache import FeatureSpec
    from attire.model import pretrained as model_pretrained
    from attire.model import vgg
    from attire.model.weights import read_weights, tensor_digest
    from attire.recipes import _CLASSIC, BACKENDS

    digest = tensor_digest(read_weights(model_pretrained.vgg16_weights()))
    works: dict[str, Callable[[], object]] = {}
    for backend in BACKENDS:
        if "openvino" in backend and (race.quick or not (find_spec("openvino") and find_spec("nncf"))):
            continue
        precision, named = choose_backbone(
            _CLASSIC.freeze_to, backend, "fp32" if backend == "torch" else "auto", torch.device("cpu")
        )
        spec = FeatureSpec(_CLASSIC.freeze_to, _CLASSIC.image_size, _CLASSIC.pool, digest, precision, backend=named)
        model = vgg.vgg16(model_pretrained.vgg16_weights(), spec.freeze_to, spec.pool, nn.Sequential())
        backbone = make_backbone(model, spec, torch.device("cpu"), 0 if race.quick else len(race.train))

        def work(spec: FeatureSpec = spec, backbone: Any = backbone) -> None:
            step = cache.forward_batch_size(spec.image_size)
            for start in range(0, count, step):
                cache.compute_features(race.train.images[start : min(start + step, count)], spec, backbone)

        works[f"Attire, extraction, {backend}"] = work
    return works


RACERS: dict[str, Callable[[Race], None]] = {
    "rates": rates,
    "attire-fast": attire_fast,
    "attire-classic": attire_classic,
    "fastai-224": fastai_224_head,
    "fastai-64": fastai_64,
    "keras-224": keras_224_head,
    "keras-64": keras_64,
    "hog-svm": hog_svm,
    "small-cnn": small_cnn,
}
