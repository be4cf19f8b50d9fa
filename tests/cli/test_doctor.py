"""What the doctor finds in a sound place and in broken ones."""

import json
import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from attire.cli import doctor
from attire.data import fashion_mnist
from attire.errors import AttireError
from attire.inference import predict as inference_predict
from attire.model import pretrained
from attire.model.weights import WEIGHTS_DIGEST
from attire.storage import http
from attire.storage.http import MirrorError
from tests.command import attire


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No mirror answers."""

    def dead(url: str) -> None:
        raise MirrorError("no answer in 3 s")

    monkeypatch.setattr(doctor, "check_reachable", dead)


@pytest.fixture
def cached(cache: Path, convolutions: Path) -> None:
    """The measurement of the convolutions is there, so that it is not made again."""
    cache.mkdir()
    shutil.copy(convolutions, cache)


@pytest.mark.usefixtures("nowhere", "cached")
def test_a_place_without_data_and_mirrors_can_still_predict(cache: Path) -> None:
    done = attire("doctor", "--json")
    answer = json.loads(done.out)
    states = {finding["name"]: finding["state"] for finding in answer["findings"]}
    assert states == {
        **dict.fromkeys(("Versions", "Device", "Cache", "Precision", "Model"), "ok"),
        **dict.fromkeys(("Data", "Weights", "Mirrors"), "note"),
    }
    assert (done.status, answer["sound"], done.err) == (0, True, "")
    details = {finding["name"]: finding["details"] for finding in answer["findings"]}
    assert details["Versions"]["packages"]["torch"] == metadata.version("torch")
    assert details["Cache"]["folder"] == str(cache)
    assert details["Cache"]["bytes"] == 0
    assert details["Model"]["samples"] > 0
    assert set(details["Mirrors"].values()) == {"no answer in 3 s"}
    assert sorted(path.name for path in cache.iterdir()) == ["convolutions.json"]


@pytest.mark.usefixtures("cached")
def test_lines_for_people_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "check_reachable", lambda url: pytest.fail("asked a mirror"))
    for columns in ("40", "100"):
        monkeypatch.setenv("COLUMNS", columns)
        done = attire("doctor", "--offline")
        lines = done.out.splitlines()
        assert done.status == 0
        assert [line.split()[0] for line in lines if line[0] != " "] == [
            "Versions", "Device", "Cache", "Precision", "Data", "Weights", "Model"
        ]  # fmt: skip
        assert all(len(line) <= int(columns) or " " not in line.strip() for line in lines)  # a path is never cut


def test_a_missing_package_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["click>=8", "flux-capacitor>=1.21", 'hoverboard>=2; extra == "toys"']
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    finding = doctor._versions()
    assert (finding.state, finding.message) == ("failed", "missing: flux-capacitor")
    assert finding.details["extras"] == {"toys": ["hoverboard"]}
    monkeypatch.setattr(metadata, "requires", lambda name: ["click>=8", wanted[2]])
    assert doctor._versions().message.endswith("; extras not installed: toys")


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_fails(cache: Path) -> None:
    cache.mkdir(mode=0o500)
    assert doctor._run_check("Cache", doctor._cache).state == "failed"


def test_a_cache_in_place_of_a_file_fails(cache: Path) -> None:
    cache.write_text("")
    finding = doctor._run_check("Cache", doctor._cache)
    assert finding.state == "failed"
    assert "cannot make the folder" in finding.message


def test_a_full_disk_is_noted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(cache.parent)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    (cache / "features").mkdir(parents=True)
    (cache / "features" / "x").write_bytes(bytes(1000))
    finding = doctor._cache()
    assert (finding.state, finding.do) == ("note", "attire cache --clear makes room")
    assert finding.details["parts"] == {"features": 1000}


def test_damaged_data_and_weights_are_noted_and_left_alone(cache: Path) -> None:
    for folder, name in (
        ("data/fashion-mnist", next(iter(fashion_mnist._DATA_FILES))),
        ("weights", weight_name(cache)),
    ):
        (cache / folder).mkdir(parents=True)
        (cache / folder / name).write_bytes(b"x")
    assert [doctor._data().state, doctor._weights().state] == ["note", "note"]
    assert len([path for path in cache.rglob("*") if path.is_file()]) == 2


def weight_name(cache: Path) -> str:
    return pretrained._cached_path(WEIGHTS_DIGEST).name


def test_a_damaged_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(path: Any, device: str) -> Any:
        raise AttireError(
            "model.safetensors", "damaged: its digest is not the one in model.json", do="use a fresh copy"
        )

    monkeypatch.setattr(inference_predict, "open_model", damaged)
    done = attire("doctor", "--offline", "--json")
    answer = json.loads(done.out)
    assert (done.status, answer["sound"]) == (1, False)
    failed = [finding for finding in answer["findings"] if finding["state"] == "failed"]
    assert [finding["name"] for finding in failed] == ["Model"]
    assert failed[0]["message"].startswith("model.safetensors: damaged")


def test_runtimes_that_disagree_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    real = inference_predict.open_model

    class Shifted:
        def predict(self, images: Any) -> Any:
            return real(None, "cpu").predict(images[::-1].copy())

    monkeypatch.setattr(inference_predict, "open_model", lambda path, device: Shifted())
    finding = doctor._run_check("Model", doctor._shipped_model)
    assert finding.state == "failed"
    assert "answer differently" in finding.message


def test_what_a_broken_library_raises_is_a_finding() -> None:
    def broken() -> doctor._Finding:
        raise ImportError("libfoo.so.1: cannot open shared object file\nand more")

    finding = doctor._run_check("Device", broken)
    assert (finding.state, finding.message) == ("failed", "ImportError: libfoo.so.1: cannot open shared object file")


def test_mirrors_are_asked_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(url: str) -> None:
        if "debian" not in url:
            raise MirrorError("connection refused")

    monkeypatch.setattr(doctor, "check_reachable", probe)
    finding = doctor._mirrors(False)
    hosts = {
        http.host_of(url)
        for url in (
            *fashion_mnist.DATA_MIRRORS,
            *fashion_mnist.DEBIAN_MIRRORS,
            *pretrained.TORCH_MIRRORS,
            *pretrained.SDIST_MIRRORS,
        )
    }
    assert set(finding.details) == hosts
    assert (finding.state, finding.message) == ("ok", f"1 of {len(hosts)} answer (deb.debian.org)")
    assert vars(doctor)["check_reachable"] is not http.check_reachable
