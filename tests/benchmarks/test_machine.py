"""The limits: which there are, how they are summed up, what is left behind. No test looks at a time."""

import platform
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from attire.errors import AttireError
from benchmarks import machine
from benchmarks.machine import Limit, Machine

NAMES = {"fp32", "bf16", "int8", "memory read", "memory copy", "disk write", "disk read"}


def test_every_limit_is_measured_in_every_round_and_nothing_stays_on_the_disk(cache: Path) -> None:
    found = machine.measure(quick=True)
    assert {limit.name for limit in found.limits} >= NAMES - {"int8"}  # not every build multiplies int8
    assert {limit.name for limit in found.limits} <= NAMES
    for limit in found.limits:
        assert len(limit.rates) == machine.ROUNDS
        assert min(limit.rates) > 0
    assert not list(cache.iterdir())


def test_the_work_is_what_it_says() -> None:
    cpu = torch.device("cpu")
    works = {name: work for name, _, _, work in [*machine.matrix_trials((64,), cpu), *machine.memory_trials(4096, cpu)]}
    assert works["fp32"]() == works["bf16"]() == 2 * 64**3
    assert (works["memory read"](), works["memory copy"]()) == (4096, 8192)
    with machine.disk_trials(3 * 2**20) as trials:
        assert [work() for _, _, _, work in trials] == [3 * 2**20, 3 * 2**20]


def test_int8_kernels_multiply() -> None:
    x = torch.randint(0, 3, (64, 64), dtype=torch.int8)
    y = torch.eye(64, dtype=torch.int8)
    assert torch.equal(machine.plain_int8(x, y)(), x.int())
    if platform.machine() == "x86_64":
        assert torch.equal(machine.onednn_int8(x, y)(), x.to(torch.uint8))


def test_the_median_counts_and_the_best_way(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Limit("fp32", "GFLOP/s", "somehow", (3, 1, 2, 9, 8))
    assert (limit.rate, limit.to_json()["low"], limit.to_json()["high"], limit.to_json()["n"]) == (3, 1, 9, 5)
    assert Machine((limit,), {}).rate("fp32") == 3
    with pytest.raises(KeyError):
        Machine((limit,), {}).rate("int8")
    rates = iter([5.0, 1.0] * 2 + [0.0] * 99)
    monkeypatch.setattr(machine, "ROUNDS", 2)
    monkeypatch.setattr(machine, "matrix_trials", lambda *_: [("fp32", "", how, lambda: 1.0) for how in ("a", "b")])
    monkeypatch.setattr(machine, "memory_trials", lambda *_: [])
    monkeypatch.setattr(machine, "disk_trials", SimpleContext)
    monkeypatch.setattr(machine, "per_second", lambda *_: next(rates) * 1e9)
    assert [(x.how, x.rates) for x in machine.measure(quick=True).limits] == [("a", (5, 5))]


class SimpleContext:
    def __init__(self, size: int) -> None: ...

    def __enter__(self) -> list[object]:
        return []

    def __exit__(self, *_: object) -> None: ...


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(AttireError, match=r"less than 16\.8 MB free; make room"):
        machine.measure(quick=True)


def test_the_script_prints_a_line_for_each_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["machine.py", "--quick"])
    machine.main()
    printed = capsys.readouterr().out
    assert re.search(r"^fp32 .* n = \d+$", printed, re.M)
    assert "GB/s" in printed
