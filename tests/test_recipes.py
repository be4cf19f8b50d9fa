"""What a recipe accepts, that classic is what was asked for, and that it survives its own JSON."""

import json
from dataclasses import replace
from typing import Any

import pytest

from attire import recipes
from attire.errors import UsageError
from attire.recipes import _CLASSIC, FAST, RECIPES, Recipe


def test_classic_is_the_protocol_that_was_asked_for() -> None:
    asked = {
        **{"freeze_to": "block5", "image_size": 224, "hidden": (1024, 512), "dropout": 0.5, "lr": 1e-4},
        **{"batch_size": 32, "epochs": 10, "val_size": 0, "stratify": False, "split_seed": 42},
        **{"schedule": "constant", "weight_decay": 0, "label_smoothing": 0, "flips": False, "standardise": False},
    }
    assert {name: getattr(_CLASSIC, name) for name in asked} == asked


def test_the_default_is_fast() -> None:
    assert Recipe() == FAST == recipes.named("fast")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"epochs": 0}, "--epochs: expected a whole number >= 1, found 0"),
        ({"epochs": -1}, "--epochs: expected a whole number >= 1, found -1"),
        ({"epochs": 1.5}, "--epochs: expected a whole number >= 1, found 1.5"),
        ({"epochs": True}, "--epochs: expected a whole number >= 1, found True"),
        ({"lr": float("nan")}, "--lr: expected a number > 0, found nan"),
        ({"lr": 0.0}, "--lr: expected a number > 0, found 0.0"),
        ({"lr": -1.0}, "--lr: expected a number > 0, found -1.0"),
        ({"lr": float("inf")}, "--lr: expected a number > 0, found inf"),
        ({"batch_size": 0}, "--batch-size: expected a whole number >= 1, found 0"),
        ({"weight_decay": -0.1}, "--weight-decay: expected a number >= 0, found -0.1"),
        ({"dropout": 1.0}, "--dropout: expected at least 0, below 1, found 1.0"),
        ({"label_smoothing": 1.0}, "--label-smoothing: expected at least 0, below 1, found 1.0"),
        ({"hidden": (0,)}, r"--hidden: expected widths > 0, such as 512,128, found \(0,\)"),
        ({"schedule": "step"}, "--schedule: expected cosine or constant, found step"),
        ({"precision": "fp8"}, "--precision: expected auto, fp32 or bf16, found fp8"),
        ({"backend": "tpu"}, "--backend: expected torch, openvino or openvino-int8, found tpu"),
        ({"freeze_to": "block6"}, "--freeze-to: expected one of none, block1"),
        ({"image_size": 4}, "--image-size: 4 px leaves no feature at block3; use 8 px or more"),
        ({"image_size": 2000}, "--image-size: expected at most 1024 px, found 2000"),
        ({"val_size": -1}, "--val-size: expected a whole number >= 0, found -1"),
        ({"tta": 0}, "--tta: expected a whole number >= 1, found 0"),
        ({"tta": 19}, "--tta: expected at most 18, found 19"),
        ({"distill_weight": 0.0}, "--distill-weight: expected above 0, at most 1, found 0.0"),
        ({"distill_temperature": 0.0}, "--distill-temperature: expected a number > 0, found 0.0"),
        ({"seed": -1}, "--seed: expected a whole number >= 0, found -1"),
        ({"seed": 2**32}, "--seed: expected at most 4294967295"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_flag(change: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        replace(FAST, **change)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_its_json(name: str) -> None:
    assert recipes.from_json(json.loads(json.dumps(RECIPES[name].to_json()))) == RECIPES[name]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"epoch": 3}, "c.json: unknown recipe field 'epoch'; the fields are backend, batch_norm"),
        ({"epochs": "3"}, "c.json: epochs: expected int, found '3'"),
        ({"flips": 1}, "c.json: flips: expected bool, found 1"),
        ({"epochs": True}, "c.json: epochs: expected int, found True"),
        ({"hidden": 512}, "c.json: hidden: expected tuple, found 512"),
    ],
)
def test_a_stored_recipe_is_checked(values: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        recipes.from_json(values, "c.json")


def test_whole_numbers_do_for_fractions() -> None:
    assert recipes.from_json({"weight_decay": 0, "lr": 1}).lr == 1


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="--recipe: expected one of fast, classic, frozen-best, best, found 'slow'"):
        recipes.named("slow")


def test_a_recipe_is_one_line_for_people() -> None:
    assert _CLASSIC.describe() == (
        "classic: frozen to block5, 224 px averaged to 7x7, head 1024-512, Adam lr 0.0001 constant, 10 epochs"
    )
    assert "mirrored views" in FAST.describe()
    assert recipes.named("best").describe() == (
        "best: frozen to block2, 48 px, mirrored views, fine-tuned to block3 with batch normalisation, "
        "head conv512, Adam lr 0.002 cosine, 60 epochs, random erasing, CutMix, weights averaged 0.999, "
        "test-time augmentation of 2 views"
    )
    assert "head conv256-conv512," in recipes.named("frozen-best").describe()
    assert "head linear" in replace(FAST, hidden=()).describe()
