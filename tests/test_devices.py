"""The device is taken at its word or found; the precision is measured once and remembered."""

import json
from pathlib import Path

import pytest
import torch

from attire import devices
from attire.errors import UsageError

CPU = torch.device("cpu")


def test_the_first_device_that_is_there_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.choose_device("auto").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.choose_device("auto").type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices.choose_device() == CPU == devices.choose_device("cpu")


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--device: cuda was asked for, but PyTorch finds none here"):
        devices.choose_device("cuda")
    with pytest.raises(UsageError, match="--device: expected one of auto, cpu, cuda, mps, found 'tpu'"):
        devices.choose_device("tpu")


def test_a_precision_that_is_asked_for_is_taken() -> None:
    assert devices.choose_precision("bf16", CPU) == "bf16"
    assert devices.choose_precision("fp32", CPU) == "fp32"
    with pytest.raises(UsageError, match="--precision: expected one of auto, fp32, bf16, found 'int4'"):
        devices.choose_precision("int4", CPU)


def test_a_processor_without_bf16_is_not_measured(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(devices, "has_bf16", lambda: False)
    assert devices.choose_precision("auto", CPU) == "fp32"
    assert not (cache / "precision.json").exists()


@pytest.mark.parametrize(("bf16", "answer"), [(1.0, "bf16"), (3.0, "fp32")])
def test_the_faster_precision_is_measured_once(
    bf16: float, answer: str, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    timed = []

    def seconds(dtype: torch.dtype) -> float:
        timed.append(dtype)
        return bf16 if dtype == torch.bfloat16 else 2.0

    monkeypatch.setattr(devices, "has_bf16", lambda: True)
    monkeypatch.setattr(devices, "seconds_per_layer", seconds)
    assert [devices.choose_precision("auto", CPU) for _ in range(3)] == [answer] * 3
    assert len(timed) == 2
    assert list(json.loads((cache / "precision.json").read_text()).values()) == [answer]


def test_a_damaged_note_of_the_measurement_is_made_again(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(devices, "has_bf16", lambda: True)
    monkeypatch.setattr(devices, "seconds_per_layer", lambda dtype: 1.0 if dtype == torch.bfloat16 else 2.0)
    cache.mkdir(exist_ok=True)
    for damaged in ("{", '{"x": 1}', json.dumps({f"{devices.processor()}, torch {torch.__version__}": "fp7"})):
        (cache / "precision.json").write_text(damaged)
        assert devices.choose_precision("auto", CPU) == "bf16"


def test_a_layer_takes_time() -> None:
    assert devices.seconds_per_layer(torch.float32) > 0


def test_the_environment_says_what_a_figure_depends_on() -> None:
    found = devices.environment(CPU)
    assert found["torch"] == torch.__version__
    assert found["device"] == "cpu"
    assert {"python", "torchvision", "numpy", "scikit-learn", "system", "processor", "cores", "threads"} <= set(found)
    assert devices.processor() in str(found["processor"])


def test_processors_without_a_name_are_told_by_family_and_model(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\ncpu family\t: 6\nmodel\t\t: 207\nmodel name\t: Some Processor\n\nprocessor\t: 1\n")
    assert devices.model_number(info) == " (family 6 model 207)"
    info.write_text("processor\t: 0\n")
    assert devices.model_number(info) == ""


def test_keeping_freed_memory_is_safe_to_ask_for_twice() -> None:
    devices.keep_freed_memory()
    devices.keep_freed_memory()
    assert torch.ones(3).sum() == 3
