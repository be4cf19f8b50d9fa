"""`config.json` of a run: all that `train` was asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from attire import recipes
from attire.data.loading import DataChoice
from attire.model import devices
from attire.recipes import Recipe
from attire.training.distillation import Teacher

_Path = str | Path


class FoldOptions(TypedDict, total=False):
    """Keywords of `train` that `cross_validate` takes too; defaults are those of `DataChoice` and `RunConfig`."""

    test: _Path | None
    test_size: float | int
    classes: Sequence[str] | None
    device: str
    claimed: float


class TrainOptions(FoldOptions, total=False):
    """Further keywords of `train`."""

    cache: bool
    log: str | None
    teacher: Sequence[_Path] | Mapping[str, Any] | Teacher | None


@dataclass(frozen=True)
class RunConfig:
    """What a run was asked for. claimed: accuracy as a fraction; log: "tensorboard" or None."""

    recipe: Recipe
    data: DataChoice
    device: str = "auto"
    cache: bool = True
    claimed: float = 0.98
    log: str | None = None
    teacher: Teacher | None = None

    @classmethod
    def from_options(cls, data: _Path | None, recipe: Recipe, **options: Unpack[TrainOptions]) -> "RunConfig":
        """From the arguments of `train`. Raises UsageError or AttireError for what cannot be meant."""
        values: dict[str, Any] = {"data": data, **options}
        paths = {name: None if (path := values.pop(name, None)) is None else str(path) for name in ("data", "test")}
        classes = values.pop("classes", None)
        size = values.pop("test_size", DataChoice.test_size)
        choice = DataChoice(**paths, test_size=size, classes=None if classes is None else tuple(classes))
        devices.choose_device(values.get("device", cls.device))
        return cls(recipe, choice, teacher=Teacher.find(values.pop("teacher", None)), **values)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], path: Path) -> "RunConfig":
        """What `to_json` gave. Raises UsageError for a recipe, KeyError or TypeError for a run that cannot be meant."""
        recipe = recipes.from_json(values["recipe"], str(path))
        data = dict(values["data"])
        return cls(
            recipe,
            DataChoice(**{**data, "classes": tuple(data["classes"]) if data["classes"] else None}),
            device=values["device"],
            cache=values["cache"],
            claimed=values["claimed"],
            log=values.get("log"),
            teacher=Teacher.find(values.get("teacher")),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "recipe": self.recipe.to_json(),
            "data": asdict(self.data),
            "device": self.device,
            "cache": self.cache,
            "claimed": self.claimed,
            "log": self.log,
            "teacher": self.teacher.to_json() if self.teacher else None,
        }
