"""Recipe: every choice that makes a run, with the named ones. Each field is also a flag of `attire train`."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from attire.blocks import feature_shape
from attire.errors import UsageError

LEAST = {"epochs": 1, "batch_size": 1, "val_size": 0, "pool": 0, "seed": 0, "split_seed": 0}
BACKENDS = ("torch", "openvino-int8")


@dataclass(frozen=True)
class Recipe:
    """How a run is made. Complete and valid once constructed; raises UsageError for a value that cannot be meant."""

    name: str = "fast"
    freeze_to: str = "block3"  # boundary: VGG16 block up to which everything is frozen and cached
    image_size: int = 32  # px, side of the square picture that VGG16 sees
    pool: int = 0  # side the feature map is averaged to; 0: as it is
    flips: bool = True  # also cache mirrored pictures and train on either, drawn anew each epoch
    standardise: bool = True  # scale each feature to mean 0, deviation 1 (of the training rows)
    hidden: tuple[int, ...] = (512,)  # widths of the classifier's hidden layers
    dropout: float = 0.5
    lr: float = 1e-3
    schedule: str = "cosine"  # cosine: warm-up over a tenth of the steps, then down to 0; constant
    weight_decay: float = 0.02
    label_smoothing: float = 0.05
    batch_size: int = 256
    epochs: int = 15
    val_size: int = 5000  # rows cut from the training part; 0: none
    stratify: bool = True
    precision: str = "auto"  # of the frozen trunk
    backend: str = "torch"  # what runs the frozen trunk during extraction; openvino-int8: an optional extra
    seed: int = 0  # initialisation, order, dropout
    split_seed: int = 42  # which rows are validation (and test, when one file is split)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        feature_shape(self.freeze_to, self.image_size, self.pool)
        for field, least in LEAST.items():
            value = getattr(self, field)
            self._check(field, type(value) is int and value >= least, f"a whole number >= {least}")
        for field in ("seed", "split_seed"):
            self._check(field, getattr(self, field) < 2**32, "at most 4294967295")
        self._check("image_size", self.image_size <= 1024, "at most 1024 px")
        self._check("lr", math.isfinite(self.lr) and self.lr > 0, "a number > 0")
        self._check("weight_decay", math.isfinite(self.weight_decay) and self.weight_decay >= 0, "a number >= 0")
        self._check("dropout", 0 <= self.dropout < 1, "at least 0, below 1")
        self._check("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0, below 1")
        self._check("hidden", all(type(w) is int and w > 0 for w in self.hidden), "widths > 0, such as 512,128")
        self._check("schedule", self.schedule in ("cosine", "constant"), "cosine or constant")
        self._check("backend", self.backend in BACKENDS, " or ".join(BACKENDS))
        self._check("precision", self.precision in ("auto", "fp32", "bf16"), "auto, fp32 or bf16")

    def _check(self, field: str, good: bool, expected: str) -> None:
        if not good:
            raise UsageError(f"--{field.replace('_', '-')}", f"expected {expected}, found {getattr(self, field)}")

    def describe(self) -> str:
        """One line for people, as `attire train` prints it."""
        widths = "-".join(str(width) for width in self.hidden) or "linear"
        pool = f" averaged to {self.pool}x{self.pool}" if self.pool else ""
        flips = ", mirrored views" if self.flips else ""
        return (
            f"{self.name}: frozen to {self.freeze_to}, {self.image_size} px{pool}{flips}, "
            f"classifier {widths}, Adam lr {self.lr:g} {self.schedule}, {self.epochs} epochs"
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "hidden": list(self.hidden)}


# The protocol as it was asked for. No validation rows: nothing in it is chosen.
CLASSIC = Recipe(
    name="classic",
    freeze_to="block5",
    image_size=224,
    pool=7,
    flips=False,
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
RECIPES = {recipe.name: recipe for recipe in (FAST, CLASSIC)}


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
    if isinstance(changes.get("hidden"), list):
        changes["hidden"] = tuple(changes["hidden"])
    for key, value in changes.items():
        default = getattr(FAST, key)
        numeric = isinstance(default, float) and type(value) in (int, float)
        if type(value) is not type(default) and not numeric:
            raise UsageError(subject, f"{key}: expected {type(default).__name__}, found {value!r}")
    return replace(FAST, **changes)
