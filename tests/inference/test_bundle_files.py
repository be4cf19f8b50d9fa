"""Where a bundle is found, and what is taken for one."""

from pathlib import Path

import pytest

from attire.errors import AttireError
from attire.inference import bundle_files
from attire.inference.bundle_files import find_bundle, is_bundle


def test_a_bundle_is_found_by_its_folder_its_run_or_its_model_json(bundle: Path) -> None:
    assert {find_bundle(path) for path in (bundle, str(bundle), bundle.parent, bundle / "model.json")} == {bundle}
    assert all(is_bundle(path) for path in (bundle, bundle.parent, bundle / "model.json"))


def test_none_is_the_bundle_that_ships(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_files, "_SHIPPED", bundle)
    assert find_bundle() == bundle


def test_anything_else_is_none(tmp_path: Path) -> None:
    assert not any(is_bundle(path) for path in (tmp_path, tmp_path / "none", tmp_path / "model.json", Path("a\0b")))
    with pytest.raises(AttireError, match=r"not a bundle: it holds no model\.json; give a folder such as runs/1/model"):
        find_bundle(tmp_path)
    with pytest.raises(AttireError, match="no such bundle"):
        find_bundle(tmp_path / "none")
