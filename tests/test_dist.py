"""The release: source distribution and wheel are built, installed into an empty environment, and work.

The environment is new and holds no Attire, but it sees this one's packages through a path file, so that nothing (torch
least of all) is downloaded again: what is proved is what the two files themselves hold.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

import attire
from attire.server.samples import read_samples

pytestmark = pytest.mark.slow  # builds and installs

ROOT = Path(__file__).parent.parent


def run(*command: object, folder: Path, **more: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more
    done = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done
    return done.stdout + done.stderr


def tracked() -> list[str]:
    """What a clean clone holds."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", folder=ROOT).splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source distribution, wheel): the one of the checkout, the other of the one."""
    pytest.importorskip("build", reason="needs the extra `dev`")
    clone, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes((ROOT / name).read_bytes())
    said = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, folder=clone)
    assert not re.search(r"deprecat|absent from the `packages`", said, re.I), said
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def test_the_version_stands_in_one_place(built: tuple[Path, Path]) -> None:
    assert [path.name for path in built] == [
        f"attire-{attire.__version__}.tar.gz",
        f"attire-{attire.__version__}-py3-none-any.whl",
    ]
    for name in ("pyproject.toml", "CITATION.cff", "mkdocs.yml"):
        assert f"version: {attire.__version__}" not in (ROOT / name).read_text()
        assert f'version = "{attire.__version__}"' not in (ROOT / name).read_text()


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
    package = {name for name in tracked() if name.startswith("attire/")}
    about = f"attire-{attire.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(about)} == package
    assert {f"{about}licenses/LICENSE", f"{about}licenses/NOTICE"} <= names


def test_the_source_distribution_holds_what_the_checkout_does(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(tracked()) - names <= {".ci/run"}


@pytest.mark.parametrize("which", [0, 1], ids=["sdist", "wheel"])
def test_it_works_in_an_empty_environment(built: tuple[Path, Path], which: int, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", folder=tmp_path)
    scripts = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    paths = {"base": str(tmp_path / "env"), "platbase": str(tmp_path / "env")}
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--quiet", "--no-index"]
    options = ["--no-deps", "--no-build-isolation", "--ignore-installed", "--disable-pip-version-check"]
    run(*pip, *options, built[which], folder=tmp_path)
    program, cache = scripts / "attire", str(tmp_path / "cache")
    where = run(scripts / "python", "-c", "import attire; print(attire.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(packages)
    assert run(program, "--version", folder=tmp_path) == f"attire, version {attire.__version__}\n"
    name, image = read_samples()[0]
    Image.fromarray(image).save(tmp_path / "sample.png")
    assert name.partition(" (")[0] in run(program, "predict", "sample.png", folder=tmp_path, ATTIRE_CACHE=cache)
    if which:
        assert "Model     ok" in run(program, "doctor", "--offline", folder=tmp_path, ATTIRE_CACHE=cache)


def test_the_citation_can_be_read() -> None:
    told = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert told["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license"} <= set(told)
    assert all({"type", "title", "authors", "year", "url"} <= set(reference) for reference in told["references"])


def test_the_notice_names_what_is_passed_on() -> None:
    text = (ROOT / "NOTICE").read_text()
    for part in ("attire/shipped", "neighbours.safetensors", "samples", "examples/browser/small.onnx", "docs/pictures"):
        assert part in text
    for owner in ("Copyright (c) 2017 Zalando SE", "Copyright (c) Soumith Chintala 2016"):
        assert owner in text


def test_the_changelog_begins_with_what_is_not_released() -> None:
    heads = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heads[0] == "Unreleased"


def pinned(name: str) -> dict[str, str]:
    """Versions by normalised name, of lines such as `torch==2.14.1 ; sys_platform == 'linux' \\`."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", (ROOT / name).read_text(), re.M)
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in found}


def test_the_lock_names_the_tested_versions_and_a_digest_for_each() -> None:
    locked, tested = pinned("locked.txt"), pinned("constraints.txt")
    assert {name: locked[name] for name in tested if name in locked} == {
        name: version for name, version in tested.items() if name in locked
    }
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    wanted = {re.split(r"[<>=\[]", one)[0] for one in project["dependencies"] + project["optional-dependencies"]["dev"]}
    assert {name for name in wanted if name != "attire"} <= set(locked)
    entries = re.split(r"^(?=[A-Za-z0-9])", (ROOT / "locked.txt").read_text(), flags=re.M)[1:]
    assert len(entries) == len(locked)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
