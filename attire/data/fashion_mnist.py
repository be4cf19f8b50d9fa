"""Fetch Fashion-MNIST: from the cache, else from this machine, else from a mirror.

Whichever place serves a file, its bytes must have one pinned SHA-256. The order: this machine, the publisher's server,
copies of it, the package manager.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from attire.errors import AttireError
from attire.storage.files import cache_dir, lock, sha256, sha256_file, write_bytes
from attire.storage.http import MirrorError, ProgressCallback, download, host_of, matches_digest, set_aside
from attire.storage.packages import apt_package, deb_files

# name: (bytes, SHA-256), decompressed: publishers compress differently
_DATA_FILES = {
    "train-images-idx3-ubyte": (47_040_016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    "train-labels-idx1-ubyte": (60_008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    "t10k-images-idx3-ubyte": (7_840_016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    "t10k-labels-idx1-ubyte": (10_008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
}
_SLACK = 100_000  # bytes that a container may add to its content
DATA_MIRRORS: tuple[str, ...] = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",  # Zalando's own; it serves no https
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
)
_DEBIAN_PACKAGE = "dataset-fashion-mnist"
_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_MIRRORS: tuple[str, ...] = (
    f"https://deb.debian.org/debian/pool/main/d/{_DEBIAN_PACKAGE}/{_DEBIAN_PACKAGE}_0.0~git20200523.55506a9-1_all.deb",
)
_DEBIAN_SHA256 = "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0"
_DEBIAN_BYTES = 30_900_652

_NamedBytes = Iterable[tuple[str, bytes]]


def official_data(source: Path | None = None, progress: ProgressCallback | None = None) -> Path:
    """Return the folder with Fashion-MNIST's four IDX files, decompressed, each with its pinned SHA-256.

    source: a folder with the four files, as published (.gz) or decompressed. Without it, files that the cache lacks
    are downloaded. Raises AttireError where `source` holds anything else or no place can be reached.
    """
    folder = cache_dir() / "data" / "fashion-mnist"
    if source is None and not missing_files(folder):
        return folder
    with lock(folder / ".lock"):
        for name in missing_files(folder):
            set_aside(folder / name)
        if source is not None:
            absent = missing_files(folder)
            for name, data in _from_source(source):
                if name in absent:
                    write_bytes(folder / name, data)
        elif missing_files(folder):
            _fetch_data(folder, progress)
    return folder


def missing_files(folder: Path) -> list[str]:
    """Name the official files that a folder lacks or holds damaged."""
    return [name for name, (_, digest) in _DATA_FILES.items() if not matches_digest(folder / name, digest, sha256_file)]


def _from_source(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and verified, decompressed bytes of the four files in a user's folder."""
    if not source.is_dir():
        raise AttireError(source, "expected a folder with the four IDX files of Fashion-MNIST")
    for name in _DATA_FILES:
        path = next((p for p in (source / name, source / f"{name}.gz") if p.is_file()), None)
        if path is None:
            raise AttireError(source, f"holds neither {name} nor {name}.gz", do="all four official files are needed")
        try:
            yield name, _read_idx(name, path)
        except MirrorError as error:
            do = "use --data for other data"
            raise AttireError(path, "not the official Fashion-MNIST", str(error), do) from error


def _read_idx(name: str, path: Path) -> bytes:
    """Return the decompressed bytes of one official file. Raises MirrorError where it holds any others."""
    try:
        if path.stat().st_size > _DATA_FILES[name][0] + _SLACK:
            raise MirrorError("too large")
        return _verified(name, path.read_bytes())
    except OSError as error:
        raise MirrorError(f"cannot be read: {error.strerror}") from error


def _verified(name: str, data: bytes) -> bytes:
    count, digest = _DATA_FILES[name]
    if data.startswith(b"\x1f\x8b"):
        data = _gunzip(data, count)
    if (actual := sha256(data)) != digest:
        raise MirrorError(f"SHA-256 {actual[:12]}..., expected {digest[:12]}...")
    return data


def _gunzip(data: bytes, count: int) -> bytes:
    """Decompress at most one byte more than expected, so that no small file can fill the memory."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            return file.read(count + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise MirrorError("its gzip stream is damaged or cut off") from error


def _fetch_data(folder: Path, progress: ProgressCallback | None) -> None:
    """Try the places in order until no file is missing. Files of a place that fails half-way are kept."""
    mirrors: list[tuple[str, Callable[[list[str]], _NamedBytes]]] = [(str(_DEBIAN_FOLDER), _from_installed)]
    mirrors += [(host_of(url), partial(_from_mirror, url, progress)) for url in DATA_MIRRORS]
    mirrors += [(host_of(url), partial(_from_deb, url, progress)) for url in DEBIAN_MIRRORS]
    mirrors += [("apt-get", _from_apt)]
    failures = []
    for mirror, serve in mirrors:
        try:
            for name, data in serve(missing_files(folder)):
                write_bytes(folder / name, data)
        except MirrorError as error:
            failures.append(f"{mirror}: {error}")
        if not missing_files(folder):
            return
    do = f"put {', '.join(f'{name}.gz' for name in _DATA_FILES)} into a folder and give it as --data-from"
    raise AttireError("Fashion-MNIST", "cannot be fetched from anywhere", "; ".join(failures), do)


def _from_installed(names: list[str]) -> _NamedBytes:
    if not _DEBIAN_FOLDER.is_dir():
        raise MirrorError("not installed")
    for name in names:
        yield name, _read_idx(name, _DEBIAN_FOLDER / f"{name}.gz")


def _from_mirror(url: str, progress: ProgressCallback | None, names: list[str]) -> _NamedBytes:
    for name in names:
        yield name, download(f"{url}{name}.gz", _DATA_FILES[name][0] + _SLACK, partial(_read_idx, name), progress)


def _from_deb(url: str, progress: ProgressCallback | None, names: list[str]) -> _NamedBytes:
    def read(path: Path) -> _NamedBytes:
        if sha256_file(path) != _DEBIAN_SHA256:
            raise MirrorError("its bytes are not Debian's")
        return _unpacked(path, names)

    return download(url, _DEBIAN_BYTES, read, progress)


def _from_apt(names: list[str]) -> _NamedBytes:
    with apt_package(_DEBIAN_PACKAGE) as path:
        return _unpacked(path, names)


def _unpacked(path: Path, names: list[str]) -> _NamedBytes:
    inside = {name: f"{_DEBIAN_FOLDER.relative_to('/')}/{name}.gz" for name in names}
    files = deb_files(path, {inside[name]: _DATA_FILES[name][0] + _SLACK for name in names})
    return [(name, _verified(name, files[inside[name]])) for name in names]
