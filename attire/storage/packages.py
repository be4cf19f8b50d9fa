"""Download packages by apt-get and pip, where the public mirrors are out of reach."""

import io
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from attire.errors import one_line
from attire.storage.files import cache_dir, temporary_folder
from attire.storage.http import MirrorError

_SECONDS = 900.0  # 64 MB at 70 kB/s


@contextmanager
def apt_package(name: str) -> Iterator[Path]:
    """Download a Debian package by `apt-get download`, which needs no root; the .deb exists inside the block only.

    Where the system has no package lists (as in container images), they are downloaded first. Raises MirrorError.
    """
    with temporary_folder(cache_dir() / "downloads" / name) as folder:
        for sub in ("lists/partial", "cache/archives/partial"):
            (folder / sub).mkdir(parents=True)
        quick = ["apt-get", "-q", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=10"]
        own = [*quick, "-o", f"Dir::State::Lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache"]
        try:
            _call([*quick, "download", name], folder)
        except MirrorError:
            _call([*own, "update"], folder)
            _call([*own, "download", name], folder)
        yield _only(folder, "*.deb")


@contextmanager
def pip_sdist(name: str, version: str, digest: str) -> Iterator[Path]:
    """Download a source archive from pip's configured index; it exists inside the block only.

    pip runs the archive's `setup.py` for its metadata. It is therefore given the SHA-256 `digest`, and refuses any
    other archive before it looks inside. Raises MirrorError.
    """
    with temporary_folder(cache_dir() / "downloads" / name) as folder:
        (folder / "pinned.txt").write_text(f"{name}=={version} --hash=sha256:{digest}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--no-binary", name, "--require-hashes", "--retries", "1", "--timeout", "10"]
        _call([*command, "--dest", str(folder), "--requirement", "pinned.txt"], folder)
        yield _only(folder, "*.tar.gz")


def _only(folder: Path, pattern: str) -> Path:
    paths = list(folder.glob(pattern))
    if len(paths) != 1:
        raise MirrorError(f"delivered {len(paths)} files, expected 1")
    return paths[0]


def _call(command: list[str], folder: Path) -> bytes:
    """Run a program in `folder` and return its output. Raises MirrorError with the program's own words."""
    if shutil.which(command[0]) is None:
        raise MirrorError(f"no {Path(command[0]).name} here")
    environment = os.environ | {"LC_ALL": "C", "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise MirrorError(f"not done after {_SECONDS:g} s") from error
    except OSError as error:
        raise MirrorError(f"cannot run {command[0]}: {error.strerror}") from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.decode(errors="replace").split("\n") if line.strip()]
        errors = [line for line in lines if line.startswith(("ERROR", "E:"))] or lines or ["it failed"]
        raise MirrorError(one_line(errors[-1])[:120])
    return done.stdout


def deb_files(path: Path, limits: Mapping[str, int]) -> dict[str, bytes]:
    """Read files of a .deb, see deb(5). limits: the most bytes that each may have, by its name.

    Raises MirrorError where the archive is damaged or lacks one.
    """
    contents = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(_data_tar(path))) as archive:
            for name, limit in limits.items():
                member = archive.getmember(f"./{name}")
                content = archive.extractfile(member)
                if content is None or member.size > limit:
                    raise MirrorError(f"its {name} is no file of at most {limit} bytes")
                contents[name] = content.read()
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, KeyError, ValueError, OSError) as error:
        raise MirrorError("not the expected package, or damaged") from error
    return contents


def _data_tar(path: Path) -> bytes:
    """Return the archive of a .deb's files: the `data.tar.*` member of an `ar` archive."""
    with path.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise ValueError("not an ar archive")
        while len(header := file.read(60)) == 60:  # name 16, time 12, owner 6, group 6, mode 8, size 10, end 2
            length = int(header[48:58])
            if header.startswith(b"data.tar.zst"):  # Ubuntu's; Python reads zstd from 3.14 on
                return _call(["dpkg-deb", "--fsys-tarfile", str(path)], path.parent)
            if header.startswith(b"data.tar"):
                data = file.read(length)
                if len(data) < length:
                    raise ValueError("cut off")
                return data
            file.seek(length + length % 2, os.SEEK_CUR)
    raise ValueError("no data.tar")
