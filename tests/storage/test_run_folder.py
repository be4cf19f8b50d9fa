"""Who may write into a folder, and when that is said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from attire.errors import AttireError, Stopped
from attire.storage import run_folder

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from attire.cli.main import main; main()"


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    refusal = rf"another attire \(process {os.getpid()}\) is training into it"
    with run_folder.claim_folder(tmp_path):
        with pytest.raises(AttireError, match=refusal), run_folder.claim_folder(tmp_path):
            pytest.fail("two held one folder")
        assert (tmp_path / ".pid").read_text() == f"{os.getpid()}\n"
    with run_folder.claim_folder(tmp_path):
        (tmp_path / ".pid").unlink()
        with pytest.raises(AttireError, match=r"another attire \(process unknown\)"), run_folder.claim_folder(tmp_path):
            pytest.fail("two held one folder")


def test_what_times_out_inside_is_not_taken_for_another_process(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="mine"), run_folder.claim_folder(tmp_path):
        raise TimeoutError("mine")
    assert not (tmp_path / ".pid").exists()


def test_of_a_series_that_is_stopped_in_a_run_the_series_goes_on(tmp_path: Path) -> None:
    inner = tmp_path / "seed-0"
    with pytest.raises(Stopped) as caught, run_folder.claim_folder(tmp_path), run_folder.claim_folder(inner):
        raise Stopped(inner / "checkpoints", "stopped in epoch 1")
    assert (caught.value.subject, caught.value.what) == (str(tmp_path), "stopped in epoch 1")


def fail_after(folder: Path, name: str) -> None:
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / name).touch()
    raise AttireError("disk", "full")


def test_a_new_folder_keeps_what_training_began(tmp_path: Path) -> None:
    for name in ("half.part", "epoch-001-step-000000.ckpt"):
        assert not list(tmp_path.iterdir())
        with pytest.raises(AttireError), run_folder.new_run_folder(tmp_path / "deep" / "run") as folder:
            fail_after(folder, name)
    assert (tmp_path / "deep/run/checkpoints/epoch-001-step-000000.ckpt").exists()


def test_a_second_training_is_told_of_the_first_before_pytorch_is_loaded(tmp_path: Path) -> None:
    with run_folder.new_run_folder(tmp_path / "run"):
        (tmp_path / "run" / "config.json").touch()
        arguments = ["train", "--out", str(tmp_path / "run")]
        done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True)
    said = f"error: {tmp_path}/run: another attire (process {os.getpid()}) is training into it\n"
    assert (done.returncode, done.stderr) == (1, said)
