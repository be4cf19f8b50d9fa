"""What fuzzing found stays mended: inputs of faults/corpus/ and sound ones through each target of faults/fuzz.py."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow  # fuzzers run by the minute

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "faults" / "fuzz.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module
    spec.loader.exec_module(module)
    return module


TARGETS = ("idx", "csv", "picture", "manifest", "bundle", "checkpoint", "export")


@pytest.mark.parametrize("name", TARGETS)
def test_every_input_ends_in_an_answer_or_one_line(name: str, fuzz: ModuleType, cache: Path) -> None:
    assert set(fuzz.TARGETS) == set(TARGETS)
    fuzz.again(name, [*fuzz.TARGETS[name].seeds(), *fuzz.kept(name), b"", b"\0", b"{}", b"[]", b"\xff\xff"])


@pytest.mark.parametrize("name", ["idx", "csv", "picture", "checkpoint"])
def test_a_seed_is_sound(name: str, fuzz: ModuleType, tmp_path: Path) -> None:
    """Else the fuzzer would begin where nothing is read."""
    for seed in fuzz.TARGETS[name].seeds()[:1]:
        assert fuzz.TARGETS[name].read(seed, tmp_path) is not None
