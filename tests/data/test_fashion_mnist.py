import gzip
import hashlib
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from attire.data import fashion_mnist
from attire.data.fashion_mnist import official_data
from attire.errors import AttireError, AttireWarning
from attire.storage.http import MirrorError
from tests.mirror import Mirror, content, serve

FILES = {name: name.encode() * 50 for name in fashion_mnist._DATA_FILES}


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Mirror]:
    """An empty cache, small official files, and no place to get them but one server that serves them well."""
    monkeypatch.setenv("ATTIRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    digests = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in FILES.items()}
    monkeypatch.setattr(fashion_mnist, "_DATA_FILES", digests)
    monkeypatch.setattr(fashion_mnist, "_DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(fashion_mnist, "DEBIAN_MIRRORS", ())
    monkeypatch.setattr(fashion_mnist, "_from_apt", unavailable)
    with serve() as started:
        monkeypatch.setattr(fashion_mnist, "DATA_MIRRORS", (started.url,))
        started.routes |= {f"/{name}.gz": content(gzip.compress(data)) for name, data in FILES.items()}
        yield started


def unavailable(*_: object) -> None:
    raise MirrorError("switched off")


def fill(folder: Path, compressed: bool) -> Path:
    folder.mkdir()
    for name, data in FILES.items():
        path = folder / (f"{name}.gz" if compressed else name)
        path.write_bytes(gzip.compress(data) if compressed else data)
    return folder


def test_data_is_fetched_once(mirror: Mirror) -> None:
    states: list[tuple[str, int, int]] = []
    folder = official_data(progress=lambda *state: states.append(state))
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert [state[0] for state in states] == [f"{name}.gz" for name in FILES]
    assert official_data() == folder
    assert len(mirror.requests) == 4


def test_two_at_once_fetch_once(mirror: Mirror) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert len({task.result() for task in [pool.submit(official_data) for _ in range(4)]}) == 1
    assert len(mirror.requests) == 4


def test_what_debian_installed_comes_first(mirror: Mirror, tmp_path: Path) -> None:
    fill(tmp_path / "debian", compressed=True)
    official_data()
    assert mirror.requests == []


def test_each_fault_leads_to_the_next_place(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file from a good mirror after: dead port, 404, wrong bytes, a cut gzip stream. Nothing is fetched twice."""
    first, second, third, fourth = FILES
    whole = gzip.compress(FILES[first])
    mirror.routes |= {f"/wrong/{name}.gz": content(gzip.compress(data)) for name, data in FILES.items()}
    mirror.routes[f"/wrong/{third}.gz"] = content(b"<html>sign in</html>")
    mirror.routes[f"/cut/{third}.gz"] = content(gzip.compress(FILES[third])[:-9])
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))
        places = [f"http://127.0.0.1:{dead.getsockname()[1]}/", *(mirror.url + p for p in ("gone/", "wrong/", "cut/"))]
        monkeypatch.setattr(fashion_mnist, "DATA_MIRRORS", (*places, mirror.url))
        start = time.monotonic()
        folder = official_data()
    assert time.monotonic() - start < 5
    assert (folder / first).read_bytes() == gzip.decompress(whole)
    asked = [path for path, _ in mirror.requests]
    assert asked == [
        f"/gone/{first}.gz",
        *(f"/wrong/{name}.gz" for name in (first, second, third)),
        f"/cut/{third}.gz",
        *(f"/{name}.gz" for name in (third, fourth)),
    ]


def test_no_place_at_all(mirror: Mirror) -> None:
    mirror.routes.clear()
    with pytest.raises(AttireError) as caught:
        official_data()
    line = str(caught.value)
    assert "\n" not in line
    for said in ("debian: not installed", ": HTTP 404", "apt-get: switched off", "--data-from"):
        assert said in line


def test_a_damaged_file_is_set_aside_and_fetched_again(mirror: Mirror) -> None:
    folder = official_data()
    path = folder / "t10k-labels-idx1-ubyte"
    path.write_bytes(b"!" + path.read_bytes()[1:])
    os.utime(path, (1, 1))
    with pytest.warns(AttireWarning, match="damaged; set aside") as caught:
        official_data()
    assert len(caught) == 1
    assert path.read_bytes() == FILES[path.name]
    assert path.with_name(f"{path.name}.damaged").read_bytes()[:1] == b"!"
    assert len(mirror.requests) == 5


@pytest.mark.parametrize("compressed", [True, False])
def test_data_from_a_folder(mirror: Mirror, tmp_path: Path, compressed: bool) -> None:
    source = fill(tmp_path / "mine", compressed)
    folder = official_data(source)
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert mirror.requests == []


def test_other_data_from_a_folder_is_refused(mirror: Mirror, tmp_path: Path) -> None:
    official_data()
    source = fill(tmp_path / "mine", compressed=False)
    name = "train-labels-idx1-ubyte"
    for data, what in [
        (b"other", "SHA-256"),
        (gzip.compress(FILES[name])[:-1], "cut off"),
        (bytes(200_000), "too large"),
    ]:
        (source / name).write_bytes(data)
        with pytest.raises(AttireError, match=f"not the official Fashion-MNIST .*{what}.*; use --data for other data"):
            official_data(source)
    (source / name).unlink()
    with pytest.raises(AttireError, match=f"holds neither {name} nor"):
        official_data(source)
    with pytest.raises(AttireError, match="expected a folder"):
        official_data(tmp_path / "absent")


def test_a_gzip_bomb_stops_at_the_expected_size() -> None:
    assert len(fashion_mnist._gunzip(gzip.compress(bytes(10_000_000)), 100)) == 101


@pytest.mark.real
def test_the_real_files() -> None:
    folder = official_data()
    for name, (size, _) in fashion_mnist._DATA_FILES.items():
        assert (folder / name).stat().st_size == size
