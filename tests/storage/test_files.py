import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from attire.errors import AttireError
from attire.storage import files

HOLDER = """
import sys, time
from collections.abc import Iterator
from pathlib import Path
from attire.storage.files import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_bytes_text_and_json_arrive_whole_in_folders_made_for_them(tmp_path: Path) -> None:
    files.write_bytes(tmp_path / "a" / "b" / "bytes", memoryview(b"\x00\xff"))
    files.write_text(tmp_path / "text", "Größe\n")
    files.write_json(tmp_path / "json", {"b": [1, 2.5, None], "a": "ü"})
    assert (tmp_path / "a" / "b" / "bytes").read_bytes() == b"\x00\xff"
    assert (tmp_path / "text").read_bytes() == "Größe\n".encode()
    assert (tmp_path / "json").read_text().endswith("}\n")
    assert files.read_json(tmp_path / "json") == {"b": [1, 2.5, None], "a": "ü"}


def test_an_exception_inside_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_text("old")

    def fail_half_way() -> None:
        with files.atomic_file(path) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
    assert path.read_text() == "old"


def test_the_new_name_appears_only_when_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "new"
    with files.atomic_file(path) as file:
        file.write(b"all of it")
        assert not path.exists()
    assert path.read_bytes() == b"all of it"
    assert [entry.name for entry in tmp_path.iterdir()] == ["new"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AttireError) as caught:
        files.write_bytes(path, b"new")
    line = f"{path}: cannot write (No space left on device); make room: "
    assert re.fullmatch(re.escape(line) + r"\d[\d.]* \w+ are free there", str(caught.value))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
    assert path.read_text() == "old"


WRITER = """
import sys, time
from collections.abc import Iterator
from pathlib import Path
from attire.storage.files import atomic_file
with atomic_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_writers_in_one_folder_do_not_sweep_each_other(tmp_path: Path) -> None:
    """Eight at a time: each new one removes what nobody holds, and must find nothing of the other seven."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: files.write_bytes(tmp_path / str(i), b"x" * 10_000), range(400)))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, range(400)))


def test_what_a_killed_writer_left_is_removed_by_the_next_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    def writer(name: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", WRITER, str(tmp_path / name)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        assert process.stdout.readline() == "writing\n"
        return process

    mine = tmp_path / ".attire.of-somebody-else"
    mine.touch()
    with writer("killed") as killed, writer("alive") as alive:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert len(list(tmp_path.glob("*.part"))) == 2
        files.write_text(tmp_path / "next", "")
        (left,) = tmp_path.glob("*.part")
        assert left.name.startswith(".attire.alive.")
        alive.kill()
    files.write_text(tmp_path / "next", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".attire.of-somebody-else", "next"]


def test_a_temporary_file_swept_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, names = tempfile.mkstemp, list[str]()

    def swept(**given: Any) -> tuple[int, str]:
        handle, name = make(**given)
        names.append(name)
        if len(names) == 1:
            Path(name).unlink()
        return handle, name

    monkeypatch.setattr("attire.storage.files.tempfile.mkstemp", swept)
    files.write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    assert len(names) == 2


def test_room_is_looked_for_before_it_is_needed(tmp_path: Path) -> None:
    files.check_room(tmp_path / "not" / "there" / "yet", 1, "a byte")
    line = re.escape(f"{tmp_path}: not enough room for the features (") + r"1\d{9}\.\d GB needed, .* free\); make room"
    with pytest.raises(AttireError, match=line):
        files.check_room(tmp_path, 10**18 + 1, "the features")


def test_a_file_where_the_folder_should_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AttireError, match=r"file: cannot make the folder \("):
        files.write_text(tmp_path / "file" / "inside", "text")


def test_a_folder_in_place_of_the_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(AttireError, match=r"taken: cannot write \("):
        files.write_text(tmp_path / "taken", "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def test_a_read_only_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:  # what a read-only folder does to everyone but root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("attire.storage.files.tempfile.mkstemp", refuse)
    with pytest.raises(AttireError, match=r"a\.json: cannot write \(Permission denied\)"):
        files.write_json(tmp_path / "a.json", {})


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        files.write_text(tmp_path / "file", "text")
        assert files._umask() == mask
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_long_name_still_has_room_for_its_temporary_one(tmp_path: Path) -> None:
    name = "n" * 250
    files.write_text(tmp_path / name, "text")
    assert (tmp_path / name).read_text() == "text"


def test_nan_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "json", {"accuracy": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_held_lock_is_refused_in_time_and_freed_when_its_holder_dies(tmp_path: Path) -> None:
    path = tmp_path / "deep" / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            began = time.monotonic()
            with pytest.raises(TimeoutError, match="held by another process"), files.lock(path, wait=0.3):
                pytest.fail("two processes held one lock")
            assert 0.2 < time.monotonic() - began < 10
        finally:
            holder.kill()
    with files.lock(path, wait=10):
        assert path.exists()


def test_a_timeout_inside_the_lock_is_not_mistaken_for_its_own(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="mine"), files.lock(tmp_path / ".lock"):
        raise TimeoutError("mine")
    with files.lock(tmp_path / ".lock", wait=0):
        pass


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON (Expecting value: line 1 column 1 (char 0)); the file may be damaged"),
        (b'{"a": 1', "not valid JSON (Expecting ',' delimiter: line 1 column 8 (char 7)); the file may be damaged"),
        (b"\xff\xfe", "not valid JSON ("),
        (b"[" * 100_000, "not valid JSON ("),
        (b"[1]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
    ],
)
def test_what_is_not_a_json_object_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(AttireError) as caught:
        files.read_json(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert str(caught.value).isprintable()


def test_json_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(AttireError, match=r"absent\.json: cannot read \(No such file or directory\)"):
        files.read_json(tmp_path / "absent.json")
    with pytest.raises(AttireError, match=r": cannot read \(Is a directory\)"):
        files.read_json(tmp_path)


def test_the_cache_is_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTIRE_CACHE", str(tmp_path / "mine"))
    assert files.cache_dir() == tmp_path / "mine"
    assert (tmp_path / "mine").is_dir()


def test_the_cache_variable_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ATTIRE_CACHE", "~/here")
    assert files.cache_dir() == tmp_path / "here"


@pytest.mark.parametrize("value", [None, ""])
def test_the_cache_is_the_user_s_own_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.setattr(
        "attire.storage.files.platformdirs.user_cache_dir", lambda name, appauthor: str(tmp_path / name)
    )
    if value is None:
        monkeypatch.delenv("ATTIRE_CACHE", raising=False)
    else:
        monkeypatch.setenv("ATTIRE_CACHE", value)
    assert files.cache_dir() == tmp_path / "attire"


def test_a_relative_cache_stays_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATTIRE_CACHE", "near")
    assert files.cache_dir() == tmp_path / "near"


def test_a_file_in_the_cache_s_place_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTIRE_CACHE", str(tmp_path / "file"))
    with pytest.raises(AttireError, match="file: cannot make the folder"):
        files.cache_dir()


def test_digests_are_sha256(tmp_path: Path) -> None:
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (tmp_path / "empty").touch()
    assert files.sha256(b"") == files.sha256_file(tmp_path / "empty") == empty


def test_equal_values_have_one_canonical_form() -> None:
    assert files.canonical_json({"b": 1, "a": [1.5, "ü"]}) == b'{"a":[1.5,"\\u00fc"],"b":1}'
    assert files.canonical_json({"a": 1, "b": 2}) == files.canonical_json({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.canonical_json(float("inf"))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (58_866_625, "58.9 MB"),
        (3_500_000_000, "3.5 GB"),
        (5_000_000_000_000, "5000.0 GB"),
    ],
)
def test_sizes_as_people_say_them(count: int, text: str) -> None:
    assert files.human_size(count) == text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs Linux, and the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_on_a_disk_that_is_really_full_the_old_file_stays_and_nothing_else_does(small_disk: Path) -> None:
    files.write_bytes(small_disk / "model", b"old" * 100_000)
    line = rf"{small_disk}/model: cannot write \(No space left on device\); make room: \d+\.\d kB are free there"
    with pytest.raises(AttireError, match=line):
        files.write_bytes(small_disk / "model", b"new" * 300_000)
    assert [path.name for path in small_disk.iterdir()] == ["model"]
    assert (small_disk / "model").read_bytes() == b"old" * 100_000
    with pytest.raises(AttireError, match=r"not enough room for the features \(2\.0 MB needed, \d+\.\d kB free\)"):
        files.check_room(small_disk, 2_000_000, "the features")
    files.write_bytes(small_disk / "other", b"new" * 100_000)  # what the failed write took is free again


def test_a_cache_that_cannot_be_made_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATTIRE_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(
        AttireError, match=r"cannot make the folder \(.*\); name a folder for the cache in ATTIRE_CACHE$"
    ):
        files.cache_dir()


def test_without_a_home_the_cache_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> str:  # as platformdirs does where neither HOME nor the user is known
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv("ATTIRE_CACHE")
    monkeypatch.setattr("attire.storage.files.platformdirs.user_cache_dir", unknown)
    with pytest.raises(AttireError, match="cache folder: nothing says where your home is; name a folder"):
        files.cache_dir()


@pytest.mark.parametrize("place", ["a/b/c", ".", "new"])
def test_a_folder_is_tried_without_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    files.check_writable(Path(place))
    assert not list(tmp_path.iterdir())


def test_who_writes_beside_it_does_not_sweep_a_file_that_is_about_to_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by killing workers of a cluster, which all write into one folder."""
    replace = Path.replace

    def swept_first(part: Path, path: Path) -> Path:
        files.remove_leftovers(part.parent)
        return replace(part, path)

    monkeypatch.setattr(Path, "replace", swept_first)
    files.write_text(tmp_path / "one", "whole")
    assert (tmp_path / "one").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_folder_gets_its_name_when_all_of_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "deep/new", "empty"):
        with files.atomic_folder(tmp_path / name) as part:
            files.write_text(part / "text", "whole")
            assert not (tmp_path / name / "text").exists()
            files.write_text(tmp_path / "other", "")  # whoever writes beside it does not sweep it
        assert (tmp_path / name / "text").read_text() == "whole"
    with pytest.raises(AttireError, match="half"), files.atomic_folder(tmp_path / "stopped") as part:
        files.read_json(part / "half")
    with pytest.raises(AttireError, match="other: cannot write"), files.atomic_folder(tmp_path / "other") as part:
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "empty", "new", "other"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_text(tmp_path / "bundle" / "old", "")
    with files.atomic_folder(tmp_path / "bundle", replace=True) as part:
        files.write_text(part / "new", "")
    assert [path.name for path in (tmp_path / "bundle").iterdir()] == ["new"]

    def refuse(part: Path, path: Path) -> Path:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(AttireError, match="bundle: cannot write"), files.atomic_folder(tmp_path / "bundle", True):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["bundle", "new"]


def test_a_folder_that_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    code = f"""import os, pathlib
from attire.storage import files
with files.atomic_folder(pathlib.Path({str(tmp_path / "new")!r})) as part:
    files.write_text(part / "text", "half")
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    files.write_text(tmp_path / "other", "")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
