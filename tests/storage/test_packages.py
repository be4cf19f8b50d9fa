import importlib.util
import io
import os
import tarfile
from pathlib import Path

import pytest

from attire.storage import packages
from attire.storage.http import MirrorError
from attire.storage.packages import _call, apt_package, deb_files, pip_sdist

APT = """#!/bin/sh
echo "$@" >> "$LOG"
case "$*" in
  *update) exit 0 ;;
  *State::Lists*download*) touch here_1.deb ;;
  *) echo "W: beside the point" >&2; echo "E: Unable to locate package here" >&2; exit 100 ;;
esac
"""


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ATTIRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, script: str) -> Path:
    """Put a stand-in first on the PATH; it may write to the file returned."""
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def deb(files: dict[str, bytes], compression: str = "xz") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=f"w:{compression}") as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{compression}": packed.getvalue()}
    out = b"!<arch>\n"
    for name, data in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return out


@pytest.mark.parametrize("compression", ["xz", "gz"])
def test_files_out_of_a_deb(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "a.deb"
    path.write_bytes(deb({"usr/share/a": b"aaa", "usr/share/b": b"b"}, compression))
    assert deb_files(path, {"usr/share/b": 1}) == {"usr/share/b": b"b"}
    with pytest.raises(MirrorError, match="no file of at most 2 bytes"):
        deb_files(path, {"usr/share/a": 2})
    with pytest.raises(MirrorError, match="not the expected package"):
        deb_files(path, {"usr/share/c": 2})


@pytest.mark.parametrize("data", [b"", b"text", b"!<arch>\n", b"!<arch>\n" + b"x" * 60, deb({"a": b"a" * 99})[:-40]])
def test_a_damaged_deb(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.deb").write_bytes(data)
    with pytest.raises(MirrorError, match="not the expected package, or damaged"):
        deb_files(tmp_path / "a.deb", {"a": 99})


def test_zstd_is_left_to_dpkg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = deb({"usr/a": b"aaa"}, "gz")
    (tmp_path / "a.deb").write_bytes(whole.replace(b"data.tar.gz ", b"data.tar.zst"))
    with tarfile.open(tmp_path / "plain.tar", "w") as archive:
        member = tarfile.TarInfo("./usr/a")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"aaa"))
    program(monkeypatch, tmp_path, "dpkg-deb", f'#!/bin/sh\n[ "$1" = --fsys-tarfile ] && cat "{tmp_path}/plain.tar"\n')
    assert deb_files(tmp_path / "a.deb", {"usr/a": 3}) == {"usr/a": b"aaa"}


def test_call_tells_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MirrorError, match=r"^no no-such-program here$"):
        _call(["no-such-program"], tmp_path)
    with pytest.raises(MirrorError, match=r"^last words$"):
        _call(["sh", "-c", "echo first >&2; echo last words >&2; exit 3"], tmp_path)
    with pytest.raises(MirrorError, match=r"^it failed$"):
        _call(["false"], tmp_path)
    monkeypatch.setattr(packages, "_SECONDS", 0.05)
    with pytest.raises(MirrorError, match=r"not done after 0\.05 s"):
        _call(["sleep", "5"], tmp_path)


def test_apt_gets_lists_of_its_own_where_the_system_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    log = program(monkeypatch, tmp_path, "apt-get", APT)
    with apt_package("here") as path:
        assert path.name == "here_1.deb"
    assert [line.split()[-2:] for line in log.read_text().splitlines()][::2] == [["download", "here"]] * 2
    assert log.read_text().splitlines()[1].endswith("update")
    assert list((cache / "downloads").iterdir()) == []


def test_apt_fails_with_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, tmp_path, "apt-get", APT.replace("*State::Lists*download*", "never"))
    with pytest.raises(MirrorError, match=r"^E: Unable to locate package here$"), apt_package("here"):
        pass


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this environment has no pip")
def test_pip_refuses_other_bytes_before_it_runs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = tmp_path / "proof"
    files = {"setup.py": f"open({str(proof)!r}, 'w')", "PKG-INFO": "Name: some-thing\nVersion: 1.0\n"}
    (tmp_path / "index").mkdir()
    with tarfile.open(tmp_path / "index/some_thing-1.0.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"some_thing-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with (
        pytest.raises(MirrorError, match=r"THESE PACKAGES DO NOT MATCH THE HASHES"),
        pip_sdist("some_thing", "1.0", "0" * 64),
    ):
        pass
    assert not proof.exists()


def test_pip_is_asked_for_one_pinned_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(command: list[str], folder: Path) -> bytes:
        assert (folder / command[-1]).read_text() == "some_thing==1.0 --hash=sha256:abc\n"
        assert "--require-hashes" in command
        (folder / "some_thing-1.0.tar.gz").touch()
        return b""

    monkeypatch.setattr(packages, "_call", pretend)
    with pip_sdist("some_thing", "1.0", "abc") as path:
        assert path.exists()
    assert not path.exists()
