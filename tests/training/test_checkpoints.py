"""Checkpoints: exact resume from any of them, damage is passed over, and no pickle is ever opened."""

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from attire.errors import AttireError, AttireWarning, Stopped
from attire.model.heads import build_head
from attire.storage import files
from attire.training import checkpoints, loop
from attire.training.checkpoints import TrainingState
from tests.small_training import RECIPE, data, same, train


def test_at_an_epoch_s_edge_the_checkpoint_is_enough(tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    newest, edge = checkpoints._checkpoints(tmp_path / "cut/checkpoints")
    assert checkpoints._read_checkpoint(edge)[0].epoch == 2
    newest.unlink()
    assert same(whole, train(tmp_path / "cut")[0])


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_byte, cut, empty])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage: object, tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole")
    with pytest.raises(Stopped):
        train(tmp_path / "cut", stop_at=12)
    newest, before = checkpoints._checkpoints(tmp_path / "cut/checkpoints")
    assert (newest.name, before.name) == ("epoch-002-step-000002.ckpt", "epoch-002-step-000000.ckpt")
    damage(newest)  # type: ignore[operator]
    with pytest.warns(AttireWarning, match="its digest does not match; going on from the one before") as caught:
        again, _ = train(tmp_path / "cut")
    assert len(caught) == 1
    assert same(whole, again)


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    train(tmp_path, replace(RECIPE, epochs=5))
    names = [path.name for path in checkpoints._checkpoints(tmp_path / "checkpoints")]
    assert names == ["epoch-005-step-000000.ckpt", "epoch-004-step-000000.ckpt"]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "checkpoints").iterdir())


def test_a_long_epoch_is_saved_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, save = [], checkpoints.Checkpoints.save

    def noting(self: checkpoints.Checkpoints, state: TrainingState) -> None:
        saved.append((state.epoch, state.step))
        save(self, state)

    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(checkpoints.Checkpoints, "save", noting)
    train(tmp_path, replace(RECIPE, epochs=1))
    assert saved == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 0)]


def test_a_checkpoint_of_another_classifier_is_named(tmp_path: Path) -> None:
    train(tmp_path)
    wider = build_head((12, 1, 1), (), (9,), 10, 0.5)
    with pytest.raises(AttireError, match=r"head.0.weight does not fit the recipe's head; resume with"):
        loop.fit(wider, data(), RECIPE, tmp_path / "checkpoints")
    deeper = build_head((12, 1, 1), (), (8, 8), 10, 0.5)
    with pytest.raises(AttireError, match=r"does not fit|is missing"):
        loop.fit(deeper, data(), RECIPE, tmp_path / "checkpoints")


def test_a_checkpoint_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "epoch-001-step-000000.ckpt"
    with files.sealed_file(path) as file, zipfile.ZipFile(file, "w") as archive:  # type: ignore[call-overload]
        archive.writestr("about.json", json.dumps({"schema": 2}))
    with pytest.raises(AttireError, match="a checkpoint of another schema version than 1"):
        checkpoints._read_checkpoint(path)


def test_a_pickle_named_checkpoint_is_refused_and_never_run(tmp_path: Path) -> None:
    path = tmp_path / "epoch-001-step-000000.ckpt"
    payload = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    path.write_bytes(payload)
    with pytest.raises(AttireError, match="not a whole Attire checkpoint"):
        checkpoints._read_checkpoint(path)
    with files.sealed_file(path) as file:
        file.write(payload)
    with pytest.raises(AttireError, match="not an Attire checkpoint"):
        checkpoints._read_checkpoint(path)
    assert not (tmp_path / "ran").exists()
