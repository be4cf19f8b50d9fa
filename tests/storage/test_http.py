import socket
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest

from attire.errors import AttireError, AttireWarning
from attire.storage import http as module
from attire.storage.files import sha256_file
from attire.storage.http import MirrorError, describe_error, download, matches_digest, set_aside
from tests.mirror import Mirror, content, raw, serve

DATA = bytes(range(256)) * 8000  # 2 MB


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Mirror]:
    monkeypatch.setenv("ATTIRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module, "_STALL_SECONDS", 0.3)
    with serve() as started:
        yield started


def take(path: Path) -> bytes:
    data = path.read_bytes()
    if data != DATA:
        raise MirrorError("wrong bytes")
    return data


def parts(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache/downloads").iterdir())


def test_download_reports_progress_and_leaves_nothing(mirror: Mirror, tmp_path: Path) -> None:
    mirror.routes["/file"] = content(DATA)
    states: list[tuple[str, int, int]] = []
    assert download(mirror.url + "file", len(DATA), take, lambda *state: states.append(state)) == DATA
    assert states == sorted(states)
    assert states[-1] == ("file", len(DATA), len(DATA))
    assert parts(tmp_path) == []


def test_a_cut_connection_is_continued_at_once(mirror: Mirror) -> None:
    mirror.routes["/file"] = content(DATA, cut=1_100_000)
    assert download(mirror.url + "file", len(DATA), take) == DATA
    assert mirror.requests == [("/file", None), ("/file", "bytes=1100000-")]


def test_what_arrived_is_continued_by_the_next_call(mirror: Mirror, tmp_path: Path) -> None:
    mirror.routes["/file"] = content(DATA, cut=200_000)
    with pytest.raises(MirrorError, match=r"keeps breaking, 600\.0 kB arrived"):
        download(mirror.url + "file", len(DATA), take)
    assert [p.stat().st_size for p in parts(tmp_path)] == [600_000]
    mirror.routes["/file"] = content(DATA)
    assert download(mirror.url + "file", len(DATA), take) == DATA
    assert mirror.requests[-1] == ("/file", "bytes=600000-")


def test_ctrl_c_keeps_what_arrived(mirror: Mirror) -> None:
    mirror.routes["/file"] = content(DATA)

    def stop(name: str, done: int, total: int) -> None:
        if done > 500_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(mirror.url + "file", len(DATA), take, stop)
    assert download(mirror.url + "file", len(DATA), take) == DATA
    assert mirror.requests[-1][1] is not None


def test_a_complete_part_is_not_fetched_again(mirror: Mirror, tmp_path: Path) -> None:
    mirror.routes["/file"] = content(DATA)

    def fail(path: Path) -> None:
        raise AttireError("target", "cannot write")

    with pytest.raises(AttireError):
        download(mirror.url + "file", len(DATA), fail)
    sizes: list[int] = []
    assert download(mirror.url + "file", len(DATA), take, lambda name, done, total: sizes.append(done)) == DATA
    assert sizes == []
    assert parts(tmp_path) == []


@pytest.mark.parametrize("old", [b"<html>sign in</html>", b"x" * len(DATA), b"x" * (len(DATA) + 1)])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_part_with_other_bytes_is_fetched_afresh(mirror: Mirror, tmp_path: Path, old: bytes, ranges: bool) -> None:
    mirror.routes["/file"] = content(DATA, cut=1)
    with pytest.raises(MirrorError):
        download(mirror.url + "file", len(DATA), take)
    parts(tmp_path)[0].write_bytes(old)
    mirror.routes["/file"] = content(DATA, ranges=ranges)
    assert download(mirror.url + "file", len(DATA), take) == DATA


def test_wrong_bytes_are_refused_once(mirror: Mirror, tmp_path: Path) -> None:
    mirror.routes["/file"] = content(DATA[:-1] + b"!")
    with pytest.raises(MirrorError, match="wrong bytes"):
        download(mirror.url + "file", len(DATA), take)
    assert len(mirror.requests) == 1
    assert parts(tmp_path) == []


def test_more_than_declared_is_ignored(mirror: Mirror) -> None:
    mirror.routes["/file"] = raw(DATA + b"more", f"Content-Length: {len(DATA)}")
    assert download(mirror.url + "file", len(DATA), take) == DATA


def test_more_than_expected_is_refused(mirror: Mirror, tmp_path: Path) -> None:
    mirror.routes["/declared"] = content(DATA * 2)
    with pytest.raises(MirrorError, match=r"offers 4\.1 MB, at most 2\.0 MB expected"):
        download(mirror.url + "declared", len(DATA), take)
    mirror.routes["/endless"] = raw(DATA * 2)
    with pytest.raises(MirrorError, match=r"sends more than the 2\.0 MB expected"):
        download(mirror.url + "endless", len(DATA), take)
    assert parts(tmp_path) == []


def test_without_a_length_the_digest_decides(mirror: Mirror) -> None:
    mirror.routes["/file"] = raw(DATA)
    assert download(mirror.url + "file", len(DATA), take) == DATA
    mirror.routes["/file"] = raw(DATA[:-5])
    with pytest.raises(MirrorError, match="wrong bytes"):
        download(mirror.url + "file", len(DATA), take)


def test_chunks(mirror: Mirror) -> None:
    chunk = f"{len(DATA):x}\r\n".encode() + DATA + b"\r\n"
    mirror.routes["/file"] = raw(chunk + b"0\r\n\r\n", "Transfer-Encoding: chunked")
    assert download(mirror.url + "file", len(DATA), take) == DATA
    mirror.routes["/file"] = raw(chunk[:99], "Transfer-Encoding: chunked")
    with pytest.raises(MirrorError):
        download(mirror.url + "file", len(DATA), take)


def test_404_and_nonsense(mirror: Mirror) -> None:
    with pytest.raises(MirrorError, match="HTTP 404"):
        download(mirror.url + "absent", len(DATA), take)
    mirror.routes["/file"] = lambda request: request.wfile.write(b"SSH-2.0\r\n")
    with pytest.raises(MirrorError):
        download(mirror.url + "file", len(DATA), take)


def test_a_silent_server_is_left_soon(mirror: Mirror) -> None:
    over = Event()
    mirror.routes["/file"] = lambda request: over.wait(10)
    start = time.monotonic()
    with pytest.raises(MirrorError, match="no answer"):
        download(mirror.url + "file", len(DATA), take)
    assert time.monotonic() - start < 2
    over.set()


def test_a_dead_port_is_left_at_once(mirror: Mirror) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening
        start = time.monotonic()
        with pytest.raises(MirrorError, match="connection refused"):
            download(f"http://127.0.0.1:{taken.getsockname()[1]}/file", len(DATA), take)
    assert time.monotonic() - start < 1


def test_a_hanging_look_up_is_left_soon(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    over = Event()

    def hang(*_: object) -> None:
        over.wait(10)
        raise OSError

    monkeypatch.setattr(module, "_CONNECT_SECONDS", 0.05)
    monkeypatch.setattr(socket, "create_connection", hang)
    with pytest.raises(MirrorError, match=r"no answer in 0\.05 s"):
        download(mirror.url + "file", len(DATA), take)
    over.set()


def test_a_cache_that_cannot_be_written_is_no_fault_of_the_mirror(mirror: Mirror, tmp_path: Path) -> None:
    mirror.routes["/file"] = content(DATA, cut=1)
    with pytest.raises(MirrorError):
        download(mirror.url + "file", len(DATA), take)
    part = parts(tmp_path)[0]
    part.unlink()
    part.mkdir()
    with pytest.raises(AttireError, match="cannot write"):
        download(mirror.url + "file", 1 << 30, take)


def test_reason_is_a_few_words_on_one_line() -> None:
    assert describe_error(socket.gaierror(-2, "Name or service not known")) == "its name cannot be resolved"
    assert describe_error(OSError("two\nlines")) == "two\\nlines"
    assert describe_error(ValueError()) == "ValueError"


def test_a_cached_file_is_held_against_its_digest_and_a_damaged_one_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "file"
    set_aside(path)
    assert not matches_digest(path, "", sha256_file)
    path.write_bytes(DATA)
    assert matches_digest(path, sha256_file(path), sha256_file)
    assert matches_digest(path, "", lambda path: pytest.fail("read again"))
    path.write_bytes(DATA[:-1])
    assert not matches_digest(path, "", sha256_file)
    with pytest.warns(AttireWarning, match="damaged; set aside as file.damaged and fetched again"):
        set_aside(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file.damaged"]
