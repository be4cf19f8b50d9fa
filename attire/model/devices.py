"""The device that computes and its precision, chosen by measurement and never at import."""

import ctypes
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from attire.errors import AttireError, UsageError
from attire.model import winograd
from attire.model.microbatches import Microbatching
from attire.storage import files

_Precision = Literal["fp32", "bf16"]
_DEVICES = ("auto", "cpu", "cuda", "mps")
_PRECISIONS = ("auto", "fp32", "bf16")
WINOGRAD = "torch-winograd"  # the backend of a cache entry whose convolutions are those of `winograd`
_MEASURED_SHARE = 60  # of the images to come one in so many is spent on each candidate: a twentieth of the work at most
_LEAST_SPEEDUP = 1.2  # over direct: the measured layer gains more than those before it, which have fewer channels
_IMAGES_PER_THREAD = 4  # that the measured layer is timed on


def choose_device(name: str = "auto") -> torch.device:
    """The device of this name; for `auto` CUDA where there is one, else MPS, else the CPU.

    Raises UsageError for an unknown name and for a device that this machine does not have.
    """
    if name not in _DEVICES:
        raise UsageError("--device", f"expected one of {', '.join(_DEVICES)}, found {name!r}")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available[name]:
        raise UsageError("--device", f"{name} was asked for, but PyTorch finds none here", do="try --device auto")
    return torch.device(name)


def choose_precision(name: str = "auto", device: torch.device | None = None) -> _Precision:
    """The precision of this name; for `auto` the faster of fp32 and bf16 for convolutions on this device.

    On a CPU the instruction set does not settle which is faster: of two kinds of processor with AVX512_BF16 one ran
    bf16 twice as fast as fp32 and the other half as fast. So it is measured. Raises UsageError for an unknown name.
    """
    if name in ("fp32", "bf16"):
        return cast(_Precision, name)
    if name != "auto":
        raise UsageError("--precision", f"expected one of {', '.join(_PRECISIONS)}, found {name!r}")
    device = device or choose_device()
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if device.type != "cpu" or not has_bf16():
        return "fp32"
    seconds = _measured_seconds(("direct", "winograd", "bf16"))
    return "bf16" if seconds["bf16"] < min(seconds["direct"], seconds["winograd"]) else "fp32"


def choose_train_precision(name: str, device: torch.device) -> _Precision:
    """The precision of training's products. On a CPU bf16 competes with the direct convolution alone, since Winograd's
    has no backward pass.

    A step of blocks 3 and 4 took half as long in bf16 (1.97 times the speed, AMD EPYC, family 25 model 17), one of the
    head of `fast` three fifths.
    """
    if name != "auto" or device.type != "cpu":
        return choose_precision(name, device) if device.type != "mps" else "fp32"
    if not has_bf16():
        return "fp32"
    seconds = _measured_seconds(("direct", "bf16"))
    return "bf16" if seconds["bf16"] < seconds["direct"] else "fp32"


def choose_backend(name: str, precision: str, device: torch.device) -> str:
    """The backend that makes a cache entry: `torch`, `torch-cuda` or `torch-mps`, whose bits differ, or on a CPU in
    fp32 Winograd's convolutions where they are clearly faster."""
    if name == "torch" and device.type != "cpu":
        return f"torch-{device.type}"
    if name != "torch" or precision != "fp32":
        return name
    seconds = _measured_seconds(("direct", "winograd"))
    return WINOGRAD if _LEAST_SPEEDUP * seconds["winograd"] < seconds["direct"] else name


def choose_microbatching(name: str, forward: Callable[[Tensor], Tensor], size: int, rows: int) -> Microbatching:
    """The fastest way to send images through a backbone on a CPU: measured once, then kept in the cache folder under
    the processor's name.

    name: of the backbone; forward: its pass over images (n, 3, size, size); rows: how many images are to come, since
    measuring does not pay for few. Small batches gained 1.3 to 1.7 times (AMD EPYC, direct convolutions, 32 to 224 px),
    because what lies between two layers stays in the processor's cache. Only a way that gives the very same bits as
    one whole batch is chosen.
    """
    path, key = files.cache_dir() / "microbatching.json", f"{name} at {size} px"
    measurements, machine = _read_measurements(path)
    own = measurements.get(machine)
    own = own if isinstance(own, dict) else {}
    candidates = _candidates(size)
    if own.get(key) in [list(candidate) for candidate in candidates]:
        return Microbatching(*own[key])
    images = max(8, torch.get_num_threads() * max(candidate.images for candidate in candidates))
    if rows < _MEASURED_SHARE * images * len(candidates):
        return Microbatching()
    x = torch.rand(images, 3, size, size, generator=torch.Generator().manual_seed(0))
    fastest = _fastest(forward, x.to(memory_format=torch.channels_last), candidates)
    files.write_json(path, {**measurements, machine: {**own, key: list(fastest)}})
    return fastest


def _candidates(size: int) -> list[Microbatching]:
    """The whole batch, or small batches whose middle layers take 1 to 16 MB."""
    counts = sorted({max(1, pixels // size**2) for pixels in (2**13, 2**14, 2**15, 2**16)})
    return [
        Microbatching(),
        Microbatching("sequential", counts[-1]),
        *(Microbatching("parallel", count) for count in counts),
    ]


def _fastest(forward: Callable[[Tensor], Tensor], x: Tensor, candidates: Sequence[Microbatching]) -> Microbatching:
    """By the better of two passes, after one that warms up and shows whether the bits are the same."""
    with torch.inference_mode():
        expected = forward(x)
        equal = [candidate for candidate in candidates if torch.equal(candidate.run(forward, x), expected)]
        times: dict[Microbatching, float] = dict.fromkeys(equal, math.inf)
        for candidate in 2 * equal:
            start = time.perf_counter()
            candidate.run(forward, x)
            times[candidate] = min(times[candidate], time.perf_counter() - start)
    return min(times, key=lambda candidate: times[candidate])


def has_bf16() -> bool:
    """Whether oneDNN has native bf16 kernels on this processor, not an emulation."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _measured_seconds(kinds: Sequence[str]) -> dict[str, float]:
    """Seconds that one VGG16 layer takes by each kind of convolution: measured once, then kept in the cache folder
    under the processor's name."""
    path = files.cache_dir() / "convolutions.json"
    if not set(kinds) <= set(seconds := _stored_seconds(path)[2]):
        with files.lock(path.with_suffix(".lock")):  # of several processes that begin together one decides for all
            measurements, machine, seconds = _stored_seconds(path)
            if missing := [kind for kind in kinds if kind not in seconds]:
                seconds |= {kind: _seconds_per_layer(kind) for kind in missing}
                files.write_json(path, {**measurements, machine: seconds})
    return seconds


def _stored_seconds(path: Path) -> tuple[dict[str, Any], str, dict[str, float]]:
    """What `_read_measurements` returns, and this machine's values of it that can be seconds."""
    measurements, machine = _read_measurements(path)
    own = measurements.get(machine)
    sound = {k: v for k, v in own.items() if isinstance(v, float) and v > 0} if isinstance(own, dict) else {}
    return measurements, machine, sound


def _read_measurements(path: Path) -> tuple[dict[str, Any], str]:
    """A file of measurements, and the key of this machine in it. An unreadable file counts as an empty one, since
    everything in it can be measured again."""
    measurements: dict[str, Any] = {}
    if path.exists():
        with suppress(AttireError):
            measurements = files.read_json(path)
    return measurements, f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _seconds_per_layer(kind: str) -> float:
    """The fastest of five passes of a 128-channel VGG16 layer and its ReLU over images of 56 px, four a thread.

    kind: direct or winograd, in fp32, or bf16.
    """
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    convolution = nn.Conv2d(128, 128, 3, padding=1).to(dtype).to(memory_format=torch.channels_last)
    layer: nn.Module = nn.Sequential(convolution, nn.ReLU(inplace=True))
    if kind == "winograd":
        layer = winograd.WinogradConv2d(convolution, pool=False)
    batching = Microbatching("parallel" if kind == "winograd" else "whole")
    x = torch.ones(_IMAGES_PER_THREAD * torch.get_num_threads(), 128, 56, 56, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    times = []
    with torch.inference_mode():
        for _ in range(6):
            start = time.perf_counter()
            batching.run(layer, x)
            times.append(time.perf_counter() - start)
    return min(times[1:])


def processor_name() -> str:
    """The processor's name as the system reports it, with family and model where Linux tells them."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}{_model_number(info)}"
    return platform.processor() or platform.machine()


def _model_number(info: Path) -> str:
    """Family and model, which tell processors apart whose name a cloud provider hides ("Xeon Processor")."""
    fields = dict(
        line.split(":", 1) for line in info.read_text(errors="replace").split("\n\n")[0].splitlines() if ":" in line
    )
    numbers = {key.strip(): value.strip() for key, value in fields.items()}
    family, model = numbers.get("cpu family"), numbers.get("model")
    return f" (family {family} model {model})" if family and model else ""


class _SignalStack(ctypes.Structure):
    """`stack_t` of Linux's signal.h."""

    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def preserve_signal_stack() -> Iterator[None]:
    """Restore this thread's alternate signal stack at the end; on Linux alone.

    OpenVINO's CPU plugin sets one when it compiles and frees it later. The next signal, such as Ctrl-C, then ended the
    process with a segmentation fault (seen with OpenVINO 2026.4.1 and Python 3.11).
    """
    if sys.platform != "linux":
        yield
        return
    change, before = ctypes.CDLL(None).sigaltstack, _SignalStack()
    known = change(None, ctypes.byref(before)) == 0
    try:
        yield
    finally:
        if known:
            change(ctypes.byref(before), None)


def environment(device: torch.device) -> dict[str, object]:
    """What a figure depends on besides the code: versions, processor, cores, device."""
    import numpy
    import sklearn
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "scikit-learn": sklearn.__version__,
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
    }
