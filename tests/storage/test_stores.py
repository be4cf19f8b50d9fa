"""Places: folders and a real S3 server behind one face, files whole or not there, errors of one line."""

from pathlib import Path

import pytest

from attire.errors import AttireError, UsageError
from attire.storage.stores import StorageLocation, StoreError, _file_path, is_url, open_location, scheme_of


@pytest.fixture(params=["folder", "s3"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> StorageLocation:
    root = str(tmp_path / "shared") if request.param == "folder" else request.getfixturevalue("bucket")
    return open_location(f"{root}/some place")


def test_what_was_written_is_read_again(where: StorageLocation) -> None:
    assert where.sizes() == {}
    assert where.size("a") is None
    where.write("a", b"one")
    where.write("b/c", b"below")
    with where.open_output("a") as file:
        file.write(b"tw")
        file.write(b"os")
    assert where.sizes() == {"a": 4}
    assert (where.size("a"), where.read("a"), where.read("b/c")) == (4, b"twos", b"below")
    with where.open("a") as file:
        file.seek(1)
        assert file.read() == b"wos"
    where.remove("a")
    assert where.size("a") is None


def test_what_fails_half_way_is_not_there(where: StorageLocation) -> None:
    def stop() -> None:
        with where.open_output("a") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert where.sizes() == {}


def test_what_is_missing_is_named(where: StorageLocation) -> None:
    with pytest.raises(AttireError) as caught:
        where.read("none")
    assert str(caught.value).startswith(f"{where.url}/none: no such ")
    assert not isinstance(caught.value, StoreError)


def test_a_store_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"^s3://b/k/x: the store did not serve it \(NETWORK_CONNECTION: [^;]*\)$"):
        open_location("s3://b/k").size("x")


def test_urls_are_told_from_paths() -> None:
    assert is_url("s3://b/k.csv")
    assert is_url("HTTPS://host/x")
    assert not is_url("C:\\x.csv")
    assert not is_url(Path("s3/x"))
    assert _file_path("file:///a%20b/c.csv") == Path("/a b/c.csv")


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("ftp://host/x.csv", "ftp:// is not known; expected s3://, gs://, az://, http://, https://, file:// or a path"),
        ("s3://", "names no bucket; expected s3://bucket/key"),
        ("https://host/x/", "HTTP has no folders and takes no files; expected s3://, gs://, az:// or a path"),
        ("file://elsewhere/x", "names another machine; expected file:///elsewhere/x or a path"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused(url: str, line: str) -> None:
    with pytest.raises(UsageError) as caught:
        scheme_of(url), open_location(url)
    assert str(caught.value) == f"{url}: {line}"


def test_azure_wants_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT", raising=False)
    with pytest.raises(UsageError, match="AZURE_STORAGE_ACCOUNT"):
        open_location("az://box/key")


def test_the_other_stores_are_pyarrow_s_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of them: what these are given is all that can be shown without an account."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "me")
    monkeypatch.setenv("AZURE_STORAGE_KEY", "c2VjcmV0")
    azure, google = open_location("az://box/a/b"), open_location("gs://anonymous@bucket/a/b")
    assert (azure.filesystem.type_name, azure.path) == ("abfs", "box/a/b")
    assert (google.filesystem.type_name, google.path) == ("gcs", "bucket/a/b")
