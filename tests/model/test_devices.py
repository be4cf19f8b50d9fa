"""Devices are chosen by name or found; precision and microbatching are measured once and kept."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from attire.errors import UsageError
from attire.model import devices
from attire.model.microbatches import Microbatching

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
    assert not (cache / "convolutions.json").exists()


Timed = Callable[..., list[str]]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Timed:
    """A processor with bf16 on which layers take these seconds; the list tells which were measured."""

    def pretend(**seconds: float) -> list[str]:
        calls: list[str] = []

        def measure(kind: str) -> float:
            calls.append(kind)
            return seconds[kind]

        monkeypatch.setattr(devices, "has_bf16", lambda: True)
        monkeypatch.setattr(devices, "_seconds_per_layer", measure)
        return calls

    return pretend


@pytest.mark.parametrize(
    ("direct", "quick", "bf16", "precision", "backend"),
    [
        (2.0, 1.0, 3.0, "fp32", "torch-winograd"),
        (2.0, 1.0, 0.9, "bf16", "torch-winograd"),
        (2.0, 1.0, 1.5, "fp32", "torch-winograd"),  # faster than direct fp32, not than Winograd's
        (2.0, 1.9, 3.0, "fp32", "torch"),  # not worth it
    ],
)
def test_the_fastest_convolution_is_measured_once(
    direct: float, quick: float, bf16: float, precision: str, backend: str, timed: Timed, cache: Path
) -> None:
    calls = timed(direct=direct, winograd=quick, bf16=bf16)
    assert [devices.choose_precision("auto", CPU) for _ in range(3)] == [precision] * 3
    assert [devices.choose_backend("torch", "fp32", CPU) for _ in range(3)] == [backend] * 3
    assert calls == ["direct", "winograd", "bf16"]
    kept = json.loads((cache / "convolutions.json").read_text())
    assert list(kept.values()) == [{"direct": direct, "winograd": quick, "bf16": bf16}]


def test_training_is_in_bf16_where_that_beats_the_direct_convolution(
    timed: Timed, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(direct=2.0, winograd=1.0, bf16=1.5)
    assert devices.choose_precision("auto", CPU) == "fp32"  # Winograd's convolution, which has no backward pass
    assert devices.choose_train_precision("auto", CPU) == "bf16"
    assert devices.choose_train_precision("fp32", CPU) == "fp32"
    assert devices.choose_train_precision("auto", torch.device("mps")) == "fp32"
    monkeypatch.setattr(devices, "has_bf16", lambda: False)
    assert devices.choose_train_precision("auto", CPU) == "fp32"
    assert devices.choose_train_precision("bf16", CPU) == "bf16"


def test_of_several_that_begin_together_one_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each might choose otherwise, and cache features of its own."""
    measured: list[str] = []

    def measure(kind: str) -> float:
        time.sleep(0.05)
        measured.append(kind)
        return float(len(measured))

    monkeypatch.setattr(devices, "_seconds_per_layer", measure)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: devices._measured_seconds(("direct", "winograd")), range(4)))
    assert measured == ["direct", "winograd"]
    assert results == 4 * [{"direct": 1.0, "winograd": 2.0}]


def test_only_fp32_on_a_cpu_has_another_convolution(timed: Timed) -> None:
    calls = timed()
    assert devices.choose_backend("openvino-int8", "int8", CPU) == "openvino-int8"
    assert devices.choose_backend("torch", "bf16", CPU) == "torch"
    assert devices.choose_backend("torch", "fp32", torch.device("cuda")) == "torch-cuda"
    assert not calls


def test_a_damaged_note_of_the_measurement_is_made_again(timed: Timed, cache: Path) -> None:
    timed(direct=2.0, winograd=1.5, bf16=1.0)
    cache.mkdir(exist_ok=True)
    here = f"{devices.processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    for damaged in ("{", '{"x": 1}', json.dumps({here: "fp7"}), json.dumps({here: {"bf16": -1.0, "direct": None}})):
        (cache / "convolutions.json").write_text(damaged)
        assert devices.choose_precision("auto", CPU) == "bf16"


@pytest.mark.parametrize("kind", ["direct", "winograd"])
def test_a_layer_takes_time(kind: str) -> None:
    assert devices._seconds_per_layer(kind) > 0


def test_the_environment_says_what_a_figure_depends_on() -> None:
    environment = devices.environment(CPU)
    assert environment["torch"] == torch.__version__
    assert environment["device"] == "cpu"
    names = {"python", "torchvision", "numpy", "scikit-learn", "system", "processor", "cores", "threads"}
    assert names <= set(environment)
    assert devices.processor_name() in str(environment["processor"])


def test_processors_without_a_name_are_told_by_family_and_model(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\ncpu family\t: 6\nmodel\t\t: 207\nmodel name\t: Some Processor\n\nprocessor\t: 1\n")
    assert devices._model_number(info) == " (family 6 model 207)"
    info.write_text("processor\t: 0\n")
    assert devices._model_number(info) == ""


def test_microbatching_is_measured_once_and_only_where_there_is_work(cache: Path) -> None:
    calls: list[int] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return x.flatten(1).sum(1, keepdim=True)

    assert devices.choose_microbatching("block1 fp32", forward, 224, 400) == Microbatching()
    assert not calls
    assert not (cache / "microbatching.json").exists()
    chosen = devices.choose_microbatching("block1 fp32", forward, 224, 10_000)
    assert chosen in devices._candidates(224)
    assert calls
    calls.clear()
    assert devices.choose_microbatching("block1 fp32", forward, 224, 1) == chosen
    assert not calls
    kept = json.loads((cache / "microbatching.json").read_text())
    (here,) = kept
    (cache / "microbatching.json").write_text(json.dumps({here: {"block1 fp32 at 224 px": ["sideways", -1]}}))
    assert devices.choose_microbatching("block1 fp32", forward, 224, 10_000) in devices._candidates(224)
    assert calls


def test_microbatching_that_gives_other_bits_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) + len(x)  # what a kernel does that adds in another order for small batches

    x = torch.zeros(16, 3, 4, 4)
    assert devices._fastest(forward, x, devices._candidates(224)) == Microbatching()
