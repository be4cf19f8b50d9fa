"""What else could be made of frozen features: taps together, whitening, second-order pooling, closed-form heads.

    python research/frozen.py                     all of it, 32 px; a quarter of an hour
    python research/frozen.py "block3" "block3+block4"      these feature sets alone

10,000 training images fit, 5,000 others score (`attire sweep` draws them; the test set is not read). Each feature set
goes to a ridge classifier, the best of four penalties on the scored rows, and to the classifier of recipe `fast`
(512 hidden, 15 epochs, plain view).
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attire.analysis import sweep
from attire.analysis.ridge import _PENALTIES
from attire.analysis.taps import TapExtractor, _TapBackbone, _TapSpec
from attire.data import dataset
from attire.data.loading import load_dataset
from attire.evaluation.intervals import wilson
from attire.features import cache
from attire.model import devices, heads
from attire.progress import NoProgress
from attire.recipes import FAST
from attire.storage import files
from attire.training import loop

ROWS, VAL = 10_000, 5_000
TAPS = {32: (("block2", 4), ("block3", 4), ("block4", 2)), 64: (("block2", 8), ("block3", 8), ("block4", 4))}
COMPONENTS, CHANNELS = 1024, 64  # kept by whitening; to which channels are reduced before their products
HIDDEN = 8192  # random ReLU features


class Frozen:
    """Features of the drawn rows by tap, (n, C, H, W) float32; the first `fit` rows fit."""

    def __init__(self, size: int) -> None:
        data, self.fit = sweep._draw(load_dataset(), ROWS, VAL)
        self.labels = torch.from_numpy(data.labels)
        taps = TAPS[size]
        extractor = TapExtractor(data, [name for name, _ in taps], devices.choose_device("cpu"), NoProgress())
        spec = _TapSpec(
            "+".join(extractor.boundaries),
            size,
            0,
            extractor.weights,
            extractor.precision,
            backend=extractor.backend,
            taps=taps,
        )
        found = cache.extract(data.images, data.image_digest, spec, lambda: _TapBackbone(extractor.backbone, taps))
        self.entry = found.folder.name
        table = torch.from_numpy(np.concatenate(list(found.blocks())))
        self.maps = {name: table[:, part].float().unflatten(1, (-1, side, side)) for name, side, part in spec.columns()}


def standardised(x: Tensor, fit: int) -> Tensor:
    """As training standardises, by the rows that fit."""
    deviation, mean = torch.std_mean(x[:fit], 0)
    return (x - mean) / (deviation + 0.05 * deviation.mean() + 1e-6)


def whitened(x: Tensor, fit: int, count: int = COMPONENTS) -> Tensor:
    """The first principal components, each divided by its deviation plus a twentieth of the mean one."""
    x = standardised(x, fit)
    values, vectors = torch.linalg.eigh(x[:fit].T @ x[:fit] / fit)
    spread = values.flip(0)[:count].clamp_min(0).sqrt()
    return x @ vectors.flip(1)[:, :count] / (spread + 0.05 * spread.mean())


def second_order(maps: Tensor, fit: int) -> Tensor:
    """Signed roots of products of channels, averaged over places (Lin et al. 2015); PCA reduces the channels first."""
    places = maps.flatten(2).transpose(1, 2)  # (n, places, C)
    flat = places[:fit].reshape(-1, places.shape[2])
    mean = flat.mean(0)
    _, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
    z = (places - mean) @ vectors.flip(1)[:, :CHANNELS]
    products = torch.einsum("npi,npj->nij", z, z) / z.shape[1]
    upper = torch.triu_indices(CHANNELS, CHANNELS)
    found = products[:, upper[0], upper[1]]
    return found.sign() * found.abs().sqrt()


def random_relu(x: Tensor, fit: int) -> Tensor:
    """Random projections and ReLU (Huang et al. 2006, extreme learning machine): with ridge, a closed-form network."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(x.shape[1], HIDDEN, generator=generator) / x.shape[1] ** 0.5
    return (standardised(x, fit) @ weight + torch.randn(HIDDEN, generator=generator)).relu()


Make = Callable[[Frozen], Tensor]
SETS: dict[str, Make] = {
    "block2": lambda f: f.maps["block2"].flatten(1),
    "block3": lambda f: f.maps["block3"].flatten(1),
    "block4": lambda f: f.maps["block4"].flatten(1),
    "block3+block4": lambda f: together(f, "block3", "block4"),
    "block2+block3": lambda f: together(f, "block2", "block3"),
    "block2+block3+block4": lambda f: together(f, "block2", "block3", "block4"),
    "block3, roots": lambda f: f.maps["block3"].flatten(1).sqrt(),
    "block3, whitened": lambda f: whitened(f.maps["block3"].flatten(1), f.fit),
    "block3, second order": lambda f: second_order(f.maps["block3"], f.fit),
    "block3 + its second order": lambda f: torch.cat(
        [standardised(f.maps["block3"].flatten(1), f.fit), standardised(second_order(f.maps["block3"], f.fit), f.fit)],
        1,
    ),
    "block3, random ReLU": lambda f: random_relu(f.maps["block3"].flatten(1), f.fit),
}


def together(found: Frozen, *names: str) -> Tensor:
    return torch.cat([found.maps[name].flatten(1) for name in names], 1)


def ridge(x: Tensor, labels: Tensor, fit: int) -> tuple[int, float]:
    """(right answers of the scored rows, penalty): `attire.ridge`, in the primal where that is the smaller system."""
    x = standardised(x, fit)
    targets = torch.nn.functional.one_hot(labels[:fit], 10).float() - 0.1
    first, scored = x[:fit], x[fit:]
    dual = x.shape[1] > fit
    gram = first @ first.T if dual else first.T @ first
    # The same penalty for both forms: times the mean of the Gram matrix's diagonal over rows.
    level = float(first.square().sum()) / fit
    right = {}
    for penalty in _PENALTIES:
        factor = torch.linalg.cholesky(gram + penalty * level * torch.eye(len(gram)))
        if dual:
            scores = scored @ (first.T @ torch.cholesky_solve(targets, factor))
        else:
            scores = scored @ torch.cholesky_solve(first.T @ targets, factor)
        right[penalty] = int((scores.argmax(1) == labels[fit:]).sum())
    penalty = max(right, key=lambda p: right[p])
    return right[penalty], penalty


class Table:
    """Rows of a table for `training.fit`."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def batches(
        self, order: dataset.RowIndices, batch_size: int, views: dataset.ViewIndices | None
    ) -> Iterator[Tensor]:
        for start in range(0, len(order), batch_size):
            yield self.x[torch.from_numpy(order[start : start + batch_size])]


def trained(x: Tensor, labels: Tensor, fit: int) -> int:
    recipe, rows = replace(FAST, flips=False), np.arange(len(x))
    torch.manual_seed(recipe.seed)
    head = heads.build_head((x.shape[1], 1, 1), (), recipe.hidden, 10, recipe.dropout)
    with tempfile.TemporaryDirectory(dir=files.cache_dir()) as folder:
        table, where = Table(standardised(x, fit)), Path(folder) / "run" / "checkpoints"
        history = loop.fit(head, loop.TrainingData(table, labels.numpy(), rows[:fit], rows[fit:]), recipe, where)
    return round((history[-1].val_accuracy or 0) * (len(x) - fit))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", help=f"some of: {'; '.join(SETS)}")
    parser.add_argument("--size", type=int, default=32, choices=sorted(TAPS))
    given = parser.parse_args()
    if unknown := sorted(set(given.sets) - set(SETS)):
        raise SystemExit(f"error: no feature set {unknown[0]!r}; there are: {'; '.join(SETS)}")
    found = Frozen(given.size)
    count = len(found.labels) - found.fit
    print(f"{found.fit:,} rows fit, {count:,} score; {devices.processor_name()}, torch {torch.__version__}")
    for name in given.sets or SETS:
        began = time.perf_counter()
        x = SETS[name](found)
        right, penalty = ridge(x, found.labels, found.fit)
        by_hand = trained(x, found.labels, found.fit)
        told = [f"{100 * n / count:.2f} % ({wilson(n, count).span()})" for n in (right, by_hand)]
        took = time.perf_counter() - began
        print(
            f"{name:28} {x.shape[1]:6,} wide   ridge {told[0]} at {penalty:g}   trained {told[1]}   {took:.0f} s",
            flush=True,
        )
    if not given.sets:  # 430 MB at 32 px, of use to nothing else
        cache.delete_entry(found.entry)


if __name__ == "__main__":
    main()
