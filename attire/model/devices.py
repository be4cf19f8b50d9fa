"""Which device computes, and in which precision: chosen by measurement, never at import."""

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
from attire.model import microbatches, winograd
from attire.storage import files

_Precision = Literal["fp32", "bf16"]
_DEVICES = ("auto", "cpu", "cuda", "mps")
_PRECISIONS = ("auto", "fp32", "bf16")
WINOGRAD = "torch-winograd"  # the backend of a cache entry whose convolutions are `winograd`'s
_WORTH_MEASURING = 60  # pictures to come for each one that a pass of each layout takes: a twentieth of the work at most
_WORTH = 1.2  # times as fast as direct: that layer gains more than those before it, which have fewer channels


def choose_device(name: str = "auto") -> torch.device:
    """CUDA where there is one, else MPS, else the CPU; a name other than `auto` is taken at its word.

    Raises UsageError for a device that this machine does not have.
    """
    if name not in _DEVICES:
        raise UsageError("--device", f"expected one of {', '.join(_DEVICES)}, found {name!r}")
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in found.items() if there))
    if not found[name]:
        raise UsageError("--device", f"{name} was asked for, but PyTorch finds none here", do="try --device auto")
    return torch.device(name)


def choose_precision(name: str = "auto", device: torch.device | None = None) -> _Precision:
    """The faster of fp32 and bf16 for convolutions on this device.

    On a CPU the instruction set does not settle it: processors with AVX512_BF16 were measured to run bf16 twice as
    fast as fp32 (one kind) and half as fast (another). So it is measured.
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
    """Of the products of training. On a CPU the direct convolution alone has a backward pass to compare bf16 with.

    A step of blocks 3 and 4 took half as long in bf16 (1.97 times the speed, AMD EPYC, family 25 model 17), one of the
    classifier of `fast` three fifths.
    """
    if name != "auto" or device.type != "cpu":
        return choose_precision(name, device) if device.type != "mps" else "fp32"
    if not has_bf16():
        return "fp32"
    seconds = _measured_seconds(("direct", "bf16"))
    return "bf16" if seconds["bf16"] < seconds["direct"] else "fp32"


def choose_backend(name: str, precision: str, device: torch.device) -> str:
    """What a cache entry is made by: `torch`, `torch-cuda` or `torch-mps`, whose bits differ, or on a CPU in fp32
    Winograd's convolutions where they pay."""
    if name == "torch" and device.type != "cpu":
        return f"torch-{device.type}"
    if name != "torch" or precision != "fp32":
        return name
    seconds = _measured_seconds(("direct", "winograd"))
    return WINOGRAD if _WORTH * seconds["winograd"] < seconds["direct"] else name


def choose_layout(name: str, forward: Callable[[Tensor], Tensor], size: int, rows: int) -> microbatches.Layout:
    """How a CPU gets through a backbone fastest: measured once, then kept in the cache folder under the processor's name.

    name: of the backbone; forward: its pass over pictures (n, 3, size, size); rows: how many pictures are to come: for
    few of them it is not measured. Small batches gained 1.3 to 1.7 times (AMD EPYC, direct convolutions, 32 to 224 px),
    since what lies between two layers stays in the processor's cache. A layout is taken only if it gives the very same
    bits as all pictures at once.
    """
    path, key = files.cache_dir() / "layouts.json", f"{name} at {size} px"
    known, here = _read_measurements(path)
    kept = known.get(here)
    kept = kept if isinstance(kept, dict) else {}
    candidates = _layouts(size)
    if kept.get(key) in [list(layout) for layout in candidates]:
        return microbatches.Layout(*kept[key])
    pictures = max(8, torch.get_num_threads() * max(layout.pictures for layout in candidates))
    if rows < _WORTH_MEASURING * pictures * len(candidates):
        return microbatches.Layout()
    x = torch.rand(pictures, 3, size, size, generator=torch.Generator().manual_seed(0))
    x = x.to(memory_format=torch.channels_last)
    found = _fastest(forward, x, candidates)
    files.write_json(path, {**known, here: {**kept, key: list(found)}})
    return found


def _layouts(size: int) -> list[microbatches.Layout]:
    """All at once, or small batches whose middle layers take 1 to 16 MB."""
    sizes = sorted({max(1, pixels // size**2) for pixels in (2**13, 2**14, 2**15, 2**16)})
    return [
        microbatches.Layout(),
        microbatches.Layout("in turn", sizes[-1]),
        *(microbatches.Layout("side by side", n) for n in sizes),
    ]


def _fastest(
    forward: Callable[[Tensor], Tensor], x: Tensor, candidates: Sequence[microbatches.Layout]
) -> microbatches.Layout:
    """By the better of two passes, after one that warms up and shows whether the bits are the same."""
    with torch.inference_mode():
        expected = forward(x)
        same = [layout for layout in candidates if torch.equal(microbatches.spread(forward, x, layout), expected)]
        times: dict[microbatches.Layout, float] = dict.fromkeys(same, math.inf)
        for layout in 2 * same:
            start = time.perf_counter()
            microbatches.spread(forward, x, layout)
            times[layout] = min(times[layout], time.perf_counter() - start)
    return min(times, key=lambda layout: times[layout])


def has_bf16() -> bool:
    """Whether oneDNN has native bf16 kernels on this processor, not an emulation."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _measured_seconds(kinds: Sequence[str]) -> dict[str, float]:
    """What one VGG16 layer takes by each kind of convolution: measured once, then kept in the cache folder under the
    processor's name."""
    path = files.cache_dir() / "convolutions.json"
    if not set(kinds) <= set(found := _kept_seconds(path)[2]):
        with files.lock(path.with_suffix(".lock")):  # of several processes that begin together one decides for all
            known, here, found = _kept_seconds(path)
            if missing := [kind for kind in kinds if kind not in found]:
                found |= {kind: _seconds_per_layer(kind) for kind in missing}
                files.write_json(path, {**known, here: found})
    return found


def _kept_seconds(path: Path) -> tuple[dict[str, Any], str, dict[str, float]]:
    """As `read_measurements`, and of what stands there for this machine what can be seconds."""
    known, here = _read_measurements(path)
    kept = known.get(here)
    sound = {k: v for k, v in kept.items() if isinstance(v, float) and v > 0} if isinstance(kept, dict) else {}
    return known, here, sound


def _read_measurements(path: Path) -> tuple[dict[str, Any], str]:
    """What stands in a file of measurements, nothing where it cannot be read: they are only made again; and the name
    under which this machine's stand there."""
    known: dict[str, Any] = {}
    if path.exists():
        with suppress(AttireError):
            known = files.read_json(path)
    return known, f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _seconds_per_layer(kind: str) -> float:
    """The fastest of five passes of a 128-channel VGG16 layer and its ReLU over pictures of 56 px, four a core.

    kind: direct or winograd, in fp32, or bf16.
    """
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    convolution = nn.Conv2d(128, 128, 3, padding=1).to(dtype).to(memory_format=torch.channels_last)
    layer: nn.Module = nn.Sequential(convolution, nn.ReLU(inplace=True))
    if kind == "winograd":
        layer = winograd.Convolution(convolution, pool=False)
    count = microbatches.LEAST * torch.get_num_threads()
    x = torch.ones(count, 128, 56, 56, dtype=dtype).contiguous(memory_format=torch.channels_last)
    times = []
    with torch.inference_mode():
        for _ in range(6):
            start = time.perf_counter()
            microbatches.side_by_side(layer, x) if kind == "winograd" else layer(x)
            times.append(time.perf_counter() - start)
    return min(times[1:])


def processor() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}{_model_number(info)}"
    return platform.processor() or platform.machine()


def _model_number(info: Path) -> str:
    """Cloud machines hide the name ("Xeon Processor"); family and model tell the kinds apart."""
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
def signal_stack_kept() -> Iterator[None]:
    """Put this thread's alternate signal stack back afterwards; nothing is done elsewhere than on Linux.

    OpenVINO's processor plugin sets one when it compiles and frees it later: the next signal, be it Ctrl-C, then ended
    the process with a segmentation fault (measured with OpenVINO 2026.4.1 and Python 3.11).
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
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
    }
