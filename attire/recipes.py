"""Recipe: every choice that makes a run, with the named ones. Each field is also a flag of `attire train`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

from attire.blocks import BLOCK_ENDS, UNFROZEN, block_above, feature_shape
from attire.errors import UsageError

BACKENDS = ("torch", "openvino", "openvino-int8")
_MOST_SHIFTS = 8
_MOST_WIDTH = 2**20  # of a hidden layer
MOST_VIEWS = 2 * (1 + _MOST_SHIFTS)  # each shifted picture, and each of them mirrored


class _Rule(NamedTuple):
    """What a field's value must be, and how an error says it."""

    allows: Callable[[Any], bool]
    expected: str


def _whole(least: int) -> _Rule:
    return _Rule(lambda value: type(value) is int and value >= least, f"a whole number >= {least}")


def _at_most(most: int, unit: str = "") -> _Rule:
    return _Rule(lambda value: bool(value <= most), f"at most {most}{unit}")


def _widths(example: str) -> tuple[_Rule, _Rule]:
    positive = _Rule(lambda value: all(type(w) is int and w > 0 for w in value), f"widths > 0, such as {example}")
    return positive, _Rule(lambda value: max(value, default=0) <= _MOST_WIDTH, f"widths of at most {_MOST_WIDTH}")


def _one_of(choices: tuple[str, ...]) -> _Rule:
    return _Rule(lambda value: value in choices, f"{', '.join(choices[:-1])} or {choices[-1]}")


_POSITIVE = _Rule(lambda value: math.isfinite(value) and value > 0, "a number > 0")
_NOT_NEGATIVE = _Rule(lambda value: math.isfinite(value) and value >= 0, "a number >= 0")
_BELOW_ONE = _Rule(lambda value: 0 <= value < 1, "at least 0, below 1")
_ABOVE_ZERO = _Rule(lambda value: 0 < value <= 1, "above 0, at most 1")
_PROBABILITY = _Rule(lambda value: 0 <= value <= 1, "a probability")
_SEED_LIMIT = _at_most(2**32 - 1)


def _setting(default: Any, text: str, *rules: _Rule, choices: tuple[str, ...] = ()) -> Any:
    """A field of Recipe: its default, its help, the rules for its value, and the values that a shell completes."""
    return field(default=default, metadata={"help": text, "rules": rules, "choices": choices})


def _choice(default: str, text: str, choices: tuple[str, ...]) -> Any:
    return _setting(default, text, _one_of(choices), choices=choices)


@dataclass(frozen=True)
class Recipe:
    """How a run is made. Complete and valid once constructed; raises UsageError for a value that cannot be meant.

    Each field stands here alone: default, help, rules and choices. Only rules between fields are in `_check_fields`.
    """

    name: str = "fast"
    freeze_to: str = _setting(
        "block3",
        "Freeze boundary: VGG16 block up to which everything is frozen and cached, block1..block5; none: nothing is.",
        choices=tuple(BLOCK_ENDS),
    )
    image_size: int = _setting(32, "Side in px of the picture VGG16 sees.", _at_most(1024, " px"))
    pool: int = _setting(0, "Average the feature map to this side; 0 leaves it as it is.", _whole(0))
    flips: bool = _setting(True, "Augmentation: also cache mirrored pictures and train on either.")
    shifts: int = _setting(
        0, "Augmentation: also cache this many shifted copies (0 to 8).", _whole(0), _at_most(_MOST_SHIFTS)
    )
    synthetic_drawings: bool = _setting(False, "Augmentation: also cache each picture as a drawing.")
    outlier_exposure: bool = _setting(False, "Also train on shapes that are no garment, to doubt them.")
    # Two: 0.2 to 0.4 points on validation rows in each of six trials (docs/log.md), for twice the time of a prediction.
    tta: int = _setting(2, "Test-time augmentation: views averaged for an answer.", _whole(1), _at_most(MOST_VIEWS))
    standardise: bool = _setting(True, "Scale each feature to mean 0, deviation 1 over the training rows.")
    finetune_blocks: int = _setting(0, "VGG16 blocks above the boundary that are fine-tuned.", _whole(0))
    batch_norm: bool = _setting(False, "Batch normalisation in fine-tuned blocks; folded away in the bundle.")
    head_epochs: int = _setting(0, "First epochs that train the head alone, before blocks are fine-tuned.", _whole(0))
    layer_decay: float = _setting(1.0, "Factor on the learning rate for each block below the head.", _ABOVE_ZERO)
    conv: tuple[int, ...] = _setting((), "Widths of 3x3 convolutions, such as 256,512.", *_widths("256,512"))
    hidden: tuple[int, ...] = _setting((512,), "Widths of hidden layers, such as 1024,512.", *_widths("512,128"))
    dropout: float = _setting(0.5, "Fraction of hidden values dropped in training.", _BELOW_ONE)
    lr: float = _setting(1e-3, "Adam's learning rate.", _POSITIVE)
    schedule: str = _choice(
        "cosine", "Of the learning rate: cosine, after a warm-up, or constant.", ("cosine", "constant")
    )
    weight_decay: float = _setting(0.02, "Decoupled weight decay.", _NOT_NEGATIVE)
    label_smoothing: float = _setting(0.05, "Fraction of each label spread over all classes.", _BELOW_ONE)
    random_erasing: float = _setting(0.0, "Probability that a rectangle of a feature map is erased.", _PROBABILITY)
    cutmix: float = _setting(0.0, "Probability that a batch is mixed by CutMix.", _PROBABILITY)
    distill_weight: float = _setting(0.7, "With --teacher: weight of the distillation loss.", _ABOVE_ZERO)
    distill_temperature: float = _setting(2.0, "With --teacher: temperature in that loss.", _POSITIVE)
    ema: float = _setting(0.0, "Decay of the weights' moving average, which then ships; 0: none.", _BELOW_ONE)
    clip_grad: float = _setting(0.0, "Largest norm of the gradient; 0: any.", _NOT_NEGATIVE)
    batch_size: int = _setting(256, "Rows per step.", _whole(1))
    epochs: int = _setting(15, "Passes over the training rows.", _whole(1))
    val_size: int = _setting(5000, "Training rows held out for validation; 0: none.", _whole(0))
    stratify: bool = _setting(True, "Keep the proportions of the classes in every split.")
    precision: str = _choice(
        "auto", "Of backbone and training: auto (measured), fp32 or bf16.", ("auto", "fp32", "bf16")
    )
    backend: str = _choice("torch", "What runs the backbone in extraction; openvino is an extra.", BACKENDS)
    seed: int = _setting(0, "Seed of initialisation, order and dropout.", _whole(0), _SEED_LIMIT)
    split_seed: int = _setting(42, "Seed of the split into training, validation and test rows.", _whole(0), _SEED_LIMIT)

    def __post_init__(self) -> None:
        for name in ("hidden", "conv"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, setting in SETTINGS.items():
            for rule in setting.metadata["rules"]:
                self._check(name, rule.allows(getattr(self, name)), rule.expected)
        self._check_fields()

    def _check_fields(self) -> None:
        """The rules between fields."""
        feature_shape(block_above(self.freeze_to, self.finetune_blocks), self.image_size, self.pool)
        self._check("pool", self.pool <= self.image_size, "at most the side of the picture")
        mixes = self.outlier_exposure and self.cutmix
        self._check("outlier_exposure", not mixes, "no, as CutMix mixes rows (--no-outlier-exposure)")
        plain = not (self.finetune_blocks or self.conv)
        self._check("standardise", plain or not self.standardise, "no, as convolutions are trained (--no-standardise)")
        if self.freeze_to == UNFROZEN:
            self._check("finetune_blocks", self.finetune_blocks > 0, "at least 1, as nothing is frozen")
            self._check("backend", self.backend == "torch", "torch, as nothing is frozen")
        self._check("batch_norm", self.finetune_blocks > 0 or not self.batch_norm, "no, as no block is fine-tuned")
        most = self.epochs - 1 if self.finetune_blocks else 0
        self._check("head_epochs", self.head_epochs <= most, f"at most {most}")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise UsageError(f"--{name.replace('_', '-')}", f"expected {expected}, found {getattr(self, name)}")

    @property
    def training_views(self) -> int:
        """How many views of each picture training draws from; see `features.views.augmentation_views`."""
        return (1 + self.flips) * (1 + self.shifts + self.synthetic_drawings) + self.outlier_exposure

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the cache keeps of one picture: not yet pooled where blocks above it are fine-tuned."""
        return feature_shape(self.freeze_to, self.image_size, 0 if self.finetune_blocks else self.pool)

    def describe(self) -> str:
        """One line for people, as `attire train` prints it."""
        norm = " with batch normalisation" if self.batch_norm else ""
        widths = "-".join([*(f"conv{width}" for width in self.conv), *map(str, self.hidden)]) or "linear"
        parts = {
            "nothing frozen" if self.freeze_to == UNFROZEN else f"frozen to {self.freeze_to}": True,
            f"{self.image_size} px" + (f" averaged to {self.pool}x{self.pool}" if self.pool else ""): True,
            "mirrored views": self.flips,
            f"{self.shifts} shifted": self.shifts,
            "synthetic drawings": self.synthetic_drawings,
            "outlier exposure": self.outlier_exposure,
            f"fine-tuned to {block_above(self.freeze_to, self.finetune_blocks)}{norm}": self.finetune_blocks,
            f"head {widths}": True,
            f"Adam lr {self.lr:g} {self.schedule}": True,
            f"{self.epochs} epochs": True,
            "random erasing": self.random_erasing,
            "CutMix": self.cutmix,
            f"weights averaged {self.ema:g}": self.ema,
            f"test-time augmentation of {self.tta} views": self.tta > 1,
        }
        return f"{self.name}: {', '.join(part for part, applies in parts.items() if applies)}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "hidden": list(self.hidden), "conv": list(self.conv)}


# All fields but the name: what `metadata` holds is for the command line and the documentation.
SETTINGS = {setting.name: setting for setting in fields(Recipe) if setting.name != "name"}

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
# The most out of a VGG16 that stays frozen: a map of 8x8 and a small convolutional head. Shifts, CutMix, 96 px and
# fine-tuning block3 gained nothing (docs/log.md).
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
# block3 fine-tuned, block1-2 frozen. At equal epochs 48 px beat 32; 40 and 60 epochs read 0.1 points more than 24, ten
# read what leaving block3 frozen does; shifts cost 0.2 (docs/log.md). 100 s an epoch on two cores.
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
    known = {"name", *SETTINGS}
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
