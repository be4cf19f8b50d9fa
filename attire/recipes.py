"""Recipe: every choice that makes a run, with the named ones. Each field is also a flag of `attire train`."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from attire.blocks import NOTHING, above, feature_shape
from attire.errors import UsageError

_LEAST = {
    "epochs": 1,
    "tta": 1,
    "finetune_blocks": 0,
    "head_epochs": 0,
    "shifts": 0,
    "batch_size": 1,
    "val_size": 0,
    "pool": 0,
    "seed": 0,
    "split_seed": 0,
}
BACKENDS = ("torch", "openvino", "openvino-int8")
_MOST_SHIFTS = 8
_MOST_WIDTH = 2**20  # of a hidden layer
MOST_VIEWS = 2 * (1 + _MOST_SHIFTS)  # each shifted picture, and each of them mirrored


@dataclass(frozen=True)
class Recipe:
    """How a run is made. Complete and valid once constructed; raises UsageError for a value that cannot be meant."""

    name: str = "fast"
    freeze_to: str = "block3"  # boundary: VGG16 block up to which everything is frozen and cached; none: nothing is
    image_size: int = 32  # px, side of the square picture that VGG16 sees
    pool: int = 0  # side the feature map is averaged to; 0: as it is
    flips: bool = True  # also cache mirrored pictures and train on either, drawn anew each epoch
    shifts: int = 0  # also cache this many shifted pictures of each, 1 or 2 of 28 px
    synthetic_drawings: bool = (
        False  # also cache each picture as a drawing or a rough cut-out would show it, see drawings.py
    )
    outlier_exposure: bool = (
        False  # also cache shapes that are no garment, and train to answer each class alike for them
    )
    # So many views of a picture are averaged for an answer: plain, mirrored, then shifted. Two: 0.2 to 0.4 points on
    # validation rows in each of six trials (docs/log.md), for twice the time of a prediction.
    tta: int = 2
    standardise: bool = True  # scale each feature to mean 0, deviation 1 (of the training rows)
    finetune_blocks: int = 0  # VGG16 blocks above the boundary that are trained on from ImageNet
    batch_norm: bool = False  # in trained blocks; folded away in the bundle
    head_epochs: int = 0  # of the epochs, those in which trained blocks wait for the classifier
    layer_decay: float = 1.0  # factor on the learning rate for each block below the classifier
    conv: tuple[int, ...] = ()  # widths of 3x3 convolutions in front of the hidden layers
    hidden: tuple[int, ...] = (512,)  # widths of the classifier's hidden layers
    dropout: float = 0.5
    lr: float = 1e-3
    schedule: str = "cosine"  # cosine: warm-up over a tenth of the steps, then down to 0; constant
    weight_decay: float = 0.02
    label_smoothing: float = 0.05
    jitter: float = 0.0  # probability that a feature map is moved by one place, see augment.py; cost 0.2 points
    random_erasing: float = 0.0  # probability that a rectangle of a feature map is erased
    cutmix: float = 0.0  # probability that a batch is mixed by CutMix
    distill_weight: float = 0.7  # with a teacher: share of the loss that its answers make up
    distill_temperature: float = 2.0  # with a teacher: temperature of both answers in that share
    ema: float = 0.0  # decay of the weights' moving average, which is then what ships; 0: none
    clip_grad: float = 0.0  # largest norm of the gradient; 0: any
    batch_size: int = 256
    epochs: int = 15
    val_size: int = 5000  # rows cut from the training part; 0: none
    stratify: bool = True
    precision: str = "auto"  # of the frozen backbone, and of the products of training; weights and answers are fp32
    backend: str = "torch"  # what runs the frozen backbone during extraction; openvino: an optional extra
    seed: int = 0  # initialisation, order, dropout
    split_seed: int = 42  # which rows are validation (and test, when one file is split)

    def __post_init__(self) -> None:
        for field in ("hidden", "conv"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for field, least in _LEAST.items():
            value = getattr(self, field)
            self._check(field, type(value) is int and value >= least, f"a whole number >= {least}")
        for field in ("seed", "split_seed"):
            self._check(field, getattr(self, field) < 2**32, "at most 4294967295")
        feature_shape(above(self.freeze_to, self.finetune_blocks), self.image_size, self.pool)
        self._check("shifts", self.shifts <= _MOST_SHIFTS, f"at most {_MOST_SHIFTS}")
        self._check("tta", self.tta <= MOST_VIEWS, f"at most {MOST_VIEWS}")
        self._check("image_size", self.image_size <= 1024, "at most 1024 px")
        self._check("pool", self.pool <= self.image_size, "at most the side of the picture")
        self._check("lr", math.isfinite(self.lr) and self.lr > 0, "a number > 0")
        self._check("weight_decay", math.isfinite(self.weight_decay) and self.weight_decay >= 0, "a number >= 0")
        self._check("dropout", 0 <= self.dropout < 1, "at least 0, below 1")
        self._check("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0, below 1")
        self._check("hidden", all(type(w) is int and w > 0 for w in self.hidden), "widths > 0, such as 512,128")
        self._check("conv", all(type(w) is int and w > 0 for w in self.conv), "widths > 0, such as 256,512")
        for field in ("hidden", "conv"):
            self._check(field, max(getattr(self, field), default=0) <= _MOST_WIDTH, f"widths of at most {_MOST_WIDTH}")
        self._check("layer_decay", 0 < self.layer_decay <= 1, "above 0, at most 1")
        self._check("ema", 0 <= self.ema < 1, "at least 0, below 1")
        self._check("clip_grad", math.isfinite(self.clip_grad) and self.clip_grad >= 0, "a number >= 0")
        self._check("distill_weight", 0 < self.distill_weight <= 1, "above 0, at most 1")
        self._check(
            "distill_temperature",
            math.isfinite(self.distill_temperature) and self.distill_temperature > 0,
            "a number > 0",
        )
        self._check("jitter", 0 <= self.jitter <= 1, "a probability")
        self._check("random_erasing", 0 <= self.random_erasing <= 1, "a probability")
        self._check("cutmix", 0 <= self.cutmix <= 1, "a probability")
        plain = not (self.finetune_blocks or self.conv)
        self._check(
            "outlier_exposure",
            not (self.outlier_exposure and self.cutmix),
            "no, as CutMix mixes rows (--no-outlier-exposure)",
        )
        self._check("standardise", plain or not self.standardise, "no, as convolutions are trained (--no-standardise)")
        if self.freeze_to == NOTHING:
            self._check("finetune_blocks", self.finetune_blocks > 0, "at least 1, as nothing is frozen")
            self._check("backend", self.backend == "torch", "torch, as nothing is frozen")
        self._check("batch_norm", self.finetune_blocks > 0 or not self.batch_norm, "no, as no block is trained")
        most = self.epochs - 1 if self.finetune_blocks else 0
        self._check("head_epochs", self.head_epochs <= most, f"at most {most}")
        self._check("schedule", self.schedule in ("cosine", "constant"), "cosine or constant")
        self._check("backend", self.backend in BACKENDS, "torch, openvino or openvino-int8")
        self._check("precision", self.precision in ("auto", "fp32", "bf16"), "auto, fp32 or bf16")

    def _check(self, field: str, good: bool, expected: str) -> None:
        if not good:
            raise UsageError(f"--{field.replace('_', '-')}", f"expected {expected}, found {getattr(self, field)}")

    @property
    def training_views(self) -> int:
        """How many views of each picture training draws from; see `features.view_names`."""
        return (1 + self.flips) * (1 + self.shifts + self.synthetic_drawings) + self.outlier_exposure

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the cache keeps of one picture: not yet pooled where blocks are trained behind it."""
        return feature_shape(self.freeze_to, self.image_size, 0 if self.finetune_blocks else self.pool)

    def describe(self) -> str:
        """One line for people, as `attire train` prints it."""
        widths = "-".join([*(f"conv{width}" for width in self.conv), *map(str, self.hidden)]) or "linear"
        last = above(self.freeze_to, self.finetune_blocks)
        norm = " with batch normalisation" if self.batch_norm else ""
        trained = f", trained to {last}{norm}" if self.finetune_blocks else ""
        pool = f" averaged to {self.pool}x{self.pool}" if self.pool else ""
        views = ", mirrored views" if self.flips else ""
        views += f", {self.shifts} shifted" if self.shifts else ""
        views += ", drawn" if self.synthetic_drawings else ""
        views += ", strange shapes" if self.outlier_exposure else ""
        frozen = "nothing frozen" if self.freeze_to == NOTHING else f"frozen to {self.freeze_to}"
        frozen = f"{self.name}: {frozen}, {self.image_size} px{pool}{views}{trained}"
        mixed = [name for name in ("jitter", "random_erasing", "cutmix") if getattr(self, name)]
        more = f", {' and '.join(mixed)}" if mixed else ""
        more += f", weights averaged {self.ema:g}" if self.ema else ""
        more += f", {self.tta} views averaged for an answer" if self.tta > 1 else ""
        rate = f"Adam lr {self.lr:g} {self.schedule}"
        return f"{frozen}, classifier {widths}, {rate}, {self.epochs} epochs{more}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "hidden": list(self.hidden), "conv": list(self.conv)}


# The protocol as it was asked for. No validation rows: nothing in it is chosen.
_CLASSIC = Recipe(
    name="classic",
    freeze_to="block5",
    image_size=224,
    pool=7,
    flips=False,
    tta=1,
    standardise=False,
    hidden=(1024, 512),
    dropout=0.5,
    lr=1e-4,
    schedule="constant",
    weight_decay=0.0,
    label_smoothing=0.0,
    batch_size=32,
    epochs=10,
    val_size=0,
    stratify=False,
    split_seed=42,
)
FAST = Recipe()
# The most out of what VGG16 knows, none of it trained: a map of 8x8 and a classifier that convolves it. Shifts, CutMix,
# 96 px and training block3 on gained nothing (docs/log.md).
_FROZEN_BEST = Recipe(
    name="frozen-best",
    image_size=64,
    standardise=False,
    conv=(256, 512),
    hidden=(),
    dropout=0.2,
    lr=2e-3,
    random_erasing=0.5,
    ema=0.999,
    epochs=16,
)
# block3 trained on from ImageNet, above a cached block2. By the epoch 48 px beat 32; 40 and 60 epochs read 0.1 points
# more than 24, ten read what leaving block3 frozen does; shifts cost 0.2 (docs/log.md). 100 s an epoch on two cores.
_BEST = Recipe(
    name="best",
    freeze_to="block2",
    image_size=48,
    standardise=False,
    finetune_blocks=1,
    batch_norm=True,
    head_epochs=2,
    layer_decay=0.5,
    conv=(512,),
    hidden=(),
    dropout=0.2,
    lr=2e-3,
    random_erasing=0.5,
    cutmix=0.5,
    ema=0.999,
    clip_grad=1.0,
    epochs=60,
)
RECIPES = {recipe.name: recipe for recipe in (FAST, _CLASSIC, _FROZEN_BEST, _BEST)}


def named(name: str) -> Recipe:
    if name not in RECIPES:
        raise UsageError("--recipe", f"expected one of {', '.join(RECIPES)}, found {name!r}")
    return RECIPES[name]


def from_json(values: Mapping[str, Any], subject: str = "config") -> Recipe:
    """The recipe that `to_json` gave. Raises UsageError for an unknown or missing field, or a wrong type."""
    known = {field.name for field in fields(Recipe)}
    if unknown := sorted(set(values) - known):
        do = f"the fields are {', '.join(sorted(known))}"
        raise UsageError(subject, f"unknown recipe field {unknown[0]!r}", do=do)
    changes = dict(values)
    for key in ("hidden", "conv"):
        if isinstance(changes.get(key), list):
            changes[key] = tuple(changes[key])
    for key, value in changes.items():
        default = getattr(FAST, key)
        numeric = isinstance(default, float) and type(value) in (int, float)
        if type(value) is not type(default) and not numeric:
            raise UsageError(subject, f"{key}: expected {type(default).__name__}, found {value!r}")
    return replace(FAST, **changes)
