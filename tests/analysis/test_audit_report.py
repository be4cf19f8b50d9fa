"""The audit on disk: every list in full, the figures, the page."""

import csv
import json
from pathlib import Path

import pytest

from attire.analysis.audit import Audit
from attire.analysis.audit_report import write_audit

pytest.importorskip("cleanlab")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_list_is_a_file(planted_audit: Audit, tmp_path: Path) -> None:
    page = write_audit(planted_audit, tmp_path / "out")
    exact = [(r["group"], r["part"], r["row"]) for r in rows_of(tmp_path / "out/exact_duplicates.csv")]
    assert exact == [("0", "train", "4"), ("0", "train", "9"), ("1", "train", "11"), ("1", "test", "2")]
    near = rows_of(tmp_path / "out/near_duplicates.csv")
    assert [(r["part"], r["row"], r["part_2"], r["row_2"]) for r in near] == [("train", "20", "test", "5")]
    odd = rows_of(tmp_path / "out/odd.csv")
    assert ("blank", "train", "30") in [(r["kind"], r["part"], r["row"]) for r in odd]
    suspect = rows_of(tmp_path / "out/suspect_labels.csv")
    assert len(suspect) == len(planted_audit.findings.suspect_labels)
    assert all(r["label"] != r["more_likely"] for r in suspect)
    assert [r["train"] for r in rows_of(tmp_path / "out/classes.csv")] == ["6"] * 10
    assert json.loads((tmp_path / "out/audit.json").read_text()) == json.loads(json.dumps(planted_audit.to_json()))
    text = page.read_text()
    assert "train 20" in text
    assert 'src="http' not in text
