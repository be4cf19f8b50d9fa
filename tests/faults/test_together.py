"""Several processes that want the same thing; `faults/together.py --times 20` makes figures of the same."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real,
    pytest.mark.skipif(sys.platform != "linux", reason="one clock for all processes, and SIGKILL"),
]


def together(way: str, tmp_path: Path) -> dict[str, Any]:
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "faults" / "together.py"), way, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_text())[way][0]
    return found


def test_of_eight_on_an_empty_cache_one_extracts_and_all_end_with_the_same(tmp_path: Path) -> None:
    found = together("cache", tmp_path)
    assert (found["extracted"], found["cached"], found["bundles"]) == (1, 7, 1)


def test_who_waits_for_one_that_is_killed_goes_on(tmp_path: Path) -> None:
    assert 0 < together("takeover", tmp_path)["seconds"] <= 2  # 0.1 s where nothing else runs: the lock is polled so


def test_a_second_training_into_a_folder_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    found = together("refusal", tmp_path)
    assert found["seconds"] <= 2  # 0.2 s are waited, should the other one just be leaving
    who = f"another attire (process {found['first']}) is training into it"
    assert found["line"].startswith("error: ")
    assert found["line"].endswith(who)
