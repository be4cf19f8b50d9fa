"""Copies of objects: made once, found again, verified, renewed, gone on with; and data sets that URLs name."""

import functools
import json
import os
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attire.data.dataset import ImageDataset
from attire.data.loading import load_dataset, load_splits, write_csv
from attire.errors import AttireError, AttireWarning, UsageError
from attire.storage import url_copies
from attire.storage.http import ProgressCallback
from attire.storage.stores import StorageLocation, StoreError, open_location
from attire.storage.url_copies import local_copy
from tests.command import TINY, attire
from tests.mirror import Mirror, content, serve


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was copied, in order."""
    urls: list[str] = []
    real = url_copies._StoredObject.copy

    def copy(self: url_copies._StoredObject, target: Path, part: Path, progress: ProgressCallback) -> Any:
        urls.append(self.url)
        return real(self, target, part, progress)

    monkeypatch.setattr(url_copies._StoredObject, "copy", copy)
    return urls


def test_a_path_is_itself(tmp_path: Path) -> None:
    assert local_copy(tmp_path / "a.csv") == tmp_path / "a.csv"
    assert local_copy("a.csv") == Path("a.csv")
    assert local_copy(f"file://{tmp_path}/a.csv") == tmp_path / "a.csv"


def test_an_object_is_copied_once_and_again_when_it_changes(bucket: str, counted: list[str]) -> None:
    open_location(bucket).write("data/mine.csv", b"one")
    for _ in range(2):
        copy = local_copy(f"{bucket}/data/mine.csv")
        assert (copy.name, copy.read_bytes()) == ("mine.csv", b"one")
    assert counted == [f"{bucket}/data/mine.csv"]
    open_location(bucket).write("data/mine.csv", b"two")
    assert local_copy(f"{bucket}/data/mine.csv").read_bytes() == b"two"
    assert len(counted) == 2


def test_the_record_holds_size_etag_and_digest(bucket: str) -> None:
    open_location(bucket).write("a.csv", b"hello")
    folder = local_copy(f"{bucket}/a.csv").parent
    record = json.loads((folder / url_copies._RECORD).read_text())
    assert record["url"] == f"{bucket}/a.csv"
    entry = record["objects"][""]
    assert (entry["size"], len(entry["etag"]) > 30) == (5, True)
    assert entry["sha256"] == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert sorted(path.name for path in folder.iterdir()) == ["OBJECTS.json", "a.csv"]


def test_a_damaged_copy_is_made_again(bucket: str, counted: list[str]) -> None:
    open_location(bucket).write("a.csv", b"hello")
    local_copy(f"{bucket}/a.csv").write_bytes(b"hallo")
    with pytest.warns(AttireWarning, match="damaged and made again"):
        assert local_copy(f"{bucket}/a.csv").read_bytes() == b"hello"
    assert len(counted) == 2


def test_a_copy_goes_on_where_it_stopped(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_copies, "_BLOCK", 10)
    body = bytes(range(100))
    open_location(bucket).write("a.bin", body)
    seen: list[int] = []

    def stop(what: str, done: int, total: int) -> None:
        seen.append(done)
        if done == 50 and seen.count(10) == 1 and len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local_copy(f"{bucket}/a.bin", stop)
    assert local_copy(f"{bucket}/a.bin", stop).read_bytes() == body
    assert seen == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]


def test_a_prefix_becomes_a_folder_that_follows_the_store(bucket: str, counted: list[str]) -> None:
    at = open_location(f"{bucket}/photos")
    for name in ("coat/1.png", "coat/2.png", "hat/1.png"):
        at.write(name, name.encode())
    folder = local_copy(f"{bucket}/photos/")
    assert folder.name == "photos"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png")) == [
        "coat/1.png",
        "coat/2.png",
        "hat/1.png",
    ]
    at.remove("coat/2.png")
    at.write("hat/2.png", b"new")
    local_copy(f"{bucket}/photos/")
    assert [path.name for path in (folder / "coat").iterdir()] == ["1.png"]
    assert (folder / "hat" / "2.png").read_bytes() == b"new"
    assert len(counted) == 4


def test_a_pattern_takes_what_it_matches(bucket: str) -> None:
    for name in ("a-1.parquet", "a-2.parquet", "b-1.parquet", "deep/a-3.parquet"):
        open_location(bucket).write(f"data/{name}", b"x")
    folder = local_copy(f"{bucket}/data/a-*.parquet")
    assert sorted(path.name for path in folder.iterdir()) == ["a-1.parquet", "a-2.parquet"]
    with pytest.raises(UsageError, match="only the last part"):
        local_copy(f"{bucket}/*/a.parquet")


def test_without_the_store_a_sound_copy_is_used(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_location(bucket).write("a.csv", b"hello")
    copy = local_copy(f"{bucket}/a.csv")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.warns(AttireWarning, match="did not serve it .*; the copy that was made before is used"):
        assert local_copy(f"{bucket}/a.csv") == copy
    copy.write_bytes(b"hallo")
    with pytest.raises(StoreError, match="did not serve it"):
        local_copy(f"{bucket}/a.csv")


def test_what_is_not_there_is_told(bucket: str) -> None:
    for url in (f"{bucket}/none.csv", f"{bucket}/none/", "s3://no-such-bucket/x.csv"):
        with pytest.raises(AttireError, match=f"^{url}: no such object$"):
            local_copy(url)


@pytest.mark.parametrize("name", ["../x", "a//b", "a/./b", "a\\b"])
def test_a_key_cannot_lie_outside_the_copy(name: str, tmp_path: Path) -> None:
    with pytest.raises(AttireError, match="cannot be a file's"):
        url_copies._path_below(tmp_path, name)


def test_a_copy_that_ends_early_is_no_copy(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"short")
    one = url_copies._StoredObject(open_location(tmp_path / "a"), 9, "v")
    with pytest.raises(StoreError, match="5 bytes came, 9 expected"):
        one.copy(tmp_path / "copy", tmp_path / "part", lambda *_: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


# Over HTTP.


@pytest.fixture
def web() -> Any:
    with serve() as mirror:
        yield mirror


def test_a_file_over_http_is_copied_and_renewed(web: Mirror) -> None:
    web.routes["/d/mine.csv"] = content(b"one")
    url = f"{web.url}d/mine.csv"
    for _ in range(2):
        assert local_copy(url).read_bytes() == b"one"
    assert [path for path, _ in web.requests] == ["/d/mine.csv"]  # HEAD it does not know
    with pytest.raises(StoreError, match="HTTP 404"):
        local_copy(f"{web.url}none.csv")


def test_a_newer_file_over_http_is_fetched_again(tmp_path: Path) -> None:
    """By what the server says to HEAD: here its size and date."""
    handler = functools.partial(Quiet, directory=str(tmp_path))
    (tmp_path / "a.csv").write_bytes(b"one")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/a.csv"
            assert local_copy(url).read_bytes() == b"one"
            (tmp_path / "a.csv").write_bytes(b"two")
            os.utime(tmp_path / "a.csv", (1, 1))
            assert local_copy(url).read_bytes() == b"two"
            with pytest.raises(AttireError, match="HTTP 404: no such file"):
                local_copy(f"{url}x")
        finally:
            server.shutdown()
            thread.join()
    with pytest.warns(AttireWarning, match="cannot be reached .*the copy that was made before is used"):
        assert local_copy(url).read_bytes() == b"two"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


# Data sets.


def same(dataset: ImageDataset, expected: ImageDataset) -> bool:
    return bool(np.array_equal(dataset.images, expected.images) and np.array_equal(dataset.labels, expected.labels))


def upload(at: StorageLocation, path: Path, name: str) -> None:
    at.write(name, path.read_bytes())


def test_a_csv_file_in_a_store_is_a_data_set(bucket: str, small_csv: Path, synthetic: ImageDataset) -> None:
    upload(open_location(bucket), small_csv, "in/mine.csv")
    dataset = load_dataset(f"{bucket}/in/mine.csv")
    assert same(dataset, synthetic)
    assert dataset.source == "mine.csv"


def test_an_error_names_the_object_not_the_copy(bucket: str) -> None:
    open_location(bucket).write("in/mine.csv", b"label,pixel1\n1,2\n")
    with pytest.raises(AttireError) as caught:
        load_dataset(f"{bucket}/in/mine.csv")
    assert str(caught.value).startswith(f"{bucket}/in/mine.csv: ")


def test_a_prefix_of_class_folders_is_a_data_set(bucket: str, synthetic: ImageDataset, tmp_path: Path) -> None:
    for i in range(4):
        Image.fromarray(synthetic.images[i]).save(tmp_path / "x.png")
        upload(open_location(f"{bucket}/photos"), tmp_path / "x.png", f"{('coat', 'hat')[i % 2]}/{i}.png")
    dataset = load_dataset(f"{bucket}/photos")
    assert (dataset.classes, dataset.labels.tolist()) == (("coat", "hat"), [0, 0, 1, 1])
    open_location(f"{bucket}/photos").write("hat/5.png", b"no picture")
    with pytest.raises(AttireError, match=f"^{bucket}/photos/hat/5.png: "):
        load_dataset(f"{bucket}/photos")


def test_training_and_test_files_may_lie_in_different_places(
    bucket: str, small_csv: Path, synthetic: ImageDataset, tmp_path: Path
) -> None:
    upload(open_location(bucket), small_csv, "train.csv")
    write_csv(synthetic.subset(range(10)), tmp_path / "test.csv")
    with pytest.warns(AttireWarning, match="10 of 10 test images"):
        dataset = load_splits(f"{bucket}/train.csv", test=f"file://{tmp_path}/test.csv")
    assert (len(dataset.train), len(dataset.test)) == (60, 10)


@pytest.mark.usefixtures("weights", "here")
def test_a_run_trains_from_a_store_and_remembers_where_it_was(bucket: str, small_csv: Path) -> None:
    upload(open_location(bucket), small_csv, "in/small.csv")
    url = f"{bucket}/in/small.csv"
    done = attire("train", "--data", url, *TINY, "--out", "run", "--json")
    assert done.status == 0, done
    assert json.loads(Path("run/config.json").read_text())["data"]["data"] == url
    listed = attire("cache").out
    assert f"a copy of {url}" in listed
    freed = attire("cache", "--clear", "--json")
    assert json.loads(freed.out)["objects"] == {}
    assert not list(url_copies._copies_folder().iterdir())
