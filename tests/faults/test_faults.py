"""A part of `make faults`: processes killed, and calls failed, at some of their input and output."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the shim is for Linux"),
    pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler"),
]


def faults(*arguments: str, out: Path) -> tuple[int, dict[str, dict[str, object]], str]:
    command = [sys.executable, str(ROOT / "faults" / "runner.py"), *arguments, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    return done.returncode, json.loads(out.read_text()) if out.exists() else {}, done.stdout + done.stderr


@pytest.mark.real
@pytest.mark.parametrize(("scenario", "every"), [("train", 13), ("tune", 67), ("report", 1), ("export-onnx", 3)])
def test_whoever_is_killed_loses_nothing(scenario: str, every: int, tmp_path: Path) -> None:
    status, found, said = faults(scenario, "--every", str(every), "--only", "kill", out=tmp_path / "out.json")
    assert status == 0, said
    assert found[scenario]["failures"] == []
    assert found[scenario]["passed"]


@pytest.mark.real
def test_a_call_that_fails_is_one_line(tmp_path: Path) -> None:
    status, found, said = faults(
        "train", "--every", "97", "--only", "ENOSPC,EIO,EACCES,EMFILE", out=tmp_path / "out.json"
    )
    assert status == 0, said
    passed = found["train"]["passed"]
    assert isinstance(passed, dict)
    assert set(passed) == {"ENOSPC", "EIO", "EACCES", "EMFILE"}
