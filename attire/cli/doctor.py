"""What `attire doctor` checks: whether all that Attire needs is here and sound. No check changes anything."""

import os
import platform
import re
import shutil
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from attire.data import fashion_mnist
from attire.errors import AttireError, one_line
from attire.model import pretrained
from attire.storage import files, http
from attire.storage.http import MirrorError, check_reachable
from attire.storage.memory import total_memory
from attire.version import __version__

_State = Literal["ok", "note", "failed"]
_LEAST_FREE = 2 * 10**9  # bytes: features of `fast` take 1.1 GB, and an extraction writes beside what is there
_SHOWN = ("torch", "torchvision", "onnxruntime", "numpy")
_TOLERANCE = 1e-3  # of a probability, between runtimes; `attire release` allows less, but on its own machine
_REINSTALL = "pip install attire, anew"


@dataclass(frozen=True)
class _Finding:
    """The result of one check. `failed`: some command cannot work; `note`: something costs time or a feature.

    do: what the user may do about it; details: for programs.
    """

    name: str
    state: _State
    message: str
    do: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def run_checks(offline: bool = False) -> list[_Finding]:
    """The result of every check, in the order in which one depends on the other. offline: ask no mirror."""
    checks: dict[str, Callable[[], _Finding]] = {
        "Versions": _versions,
        "Device": _device,
        "Cache": _cache,
        "Precision": _precision,
        "Data": _data,
        "Weights": _weights,
        "Model": _shipped_model,
    }
    findings = [_run_check(name, check) for name, check in checks.items()]
    if offline:
        return findings
    all_cached = all(finding.details.get("cached", True) for finding in findings)
    return [*findings, _run_check("Mirrors", lambda: _mirrors(all_cached))]


def _run_check(name: str, check: Callable[[], _Finding]) -> _Finding:
    """The check's finding. An exception is one too, since a broken installation may raise anything."""
    try:
        return check()
    except AttireError as error:
        return _Finding(name, "failed", str(error))
    except Exception as error:
        text = one_line(str(error).partition("\n")[0])[:200]
        return _Finding(name, "failed", f"{type(error).__name__}: {text}", _REINSTALL)


def format_findings(findings: Sequence[_Finding], columns: int) -> str:
    """Name, state and message of each finding, for a terminal of so many columns."""
    width, lines = min(columns, 100), list[str]()
    for finding in findings:
        text = f"{finding.message}; {finding.do}" if finding.do else finding.message
        begin = f"{finding.name:10}{finding.state:8}"
        indent = " " * (len(begin) if width >= 60 else 4)
        lines += textwrap.wrap(
            begin + text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    return "\n".join(lines)


def _versions() -> _Finding:
    """The versions of Attire, Python and every package that Attire declares. A missing one fails."""
    installed: dict[str, str] = {}
    missing: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in metadata.requires("attire") or []:
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            extras.setdefault(extra[1], []).append(name) if extra else missing.append(name)
    python = platform.python_version()
    details = {"attire": __version__, "python": python, "packages": installed, "extras": extras}
    if missing:
        return _Finding("Versions", "failed", f"missing: {', '.join(missing)}", _REINSTALL, details)
    shown = {name: installed[name] for name in _SHOWN if name in installed}
    versions = {"attire": __version__, "Python": python, **shown}
    message = ", ".join(f"{name} {version}" for name, version in versions.items())
    if absent := ", ".join(sorted(extra for extra in extras if extra != "dev")):
        message += f"; extras not installed: {absent}"
    return _Finding("Versions", "ok", message, details=details)


def _device() -> _Finding:
    import torch

    from attire.model import devices

    device, processor, cores, memory = devices.choose_device(), devices.processor_name(), os.cpu_count(), total_memory()
    details = {"device": device.type, "processor": processor, "cores": cores, "threads": torch.get_num_threads()}
    details |= {"memory": memory, "system": platform.platform()}
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor
    size = f", {files.human_size(memory)} of memory" if memory else ""
    return _Finding("Device", "ok", f"{device.type}: {name}, {cores} cores{size}", details=details)


def _precision() -> _Finding:
    """The precision that frozen layers would be computed in, and what the processor has instructions for."""
    import torch

    from attire.model import devices

    device = devices.choose_device()
    chosen = devices.choose_precision("auto", device)
    backend = devices.choose_backend("torch", chosen, device)
    bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else devices.has_bf16()
    vnni = bool(torch.cpu._is_vnni_supported())
    details = {"chosen": chosen, "backend": backend, "bf16": bf16, "int8 dot products (VNNI)": vnni}
    message = f"{chosen} by {backend} is the fastest here; bf16 {'native' if bf16 else 'not native'}"
    return _Finding("Precision", "ok", f"{message}, int8 {'with' if vnni else 'without'} VNNI", details=details)


def _cache() -> _Finding:
    """Where the cache is, its size, and the room on its disk. Raises AttireError where it cannot be written to."""
    folder = files.cache_dir()
    trial = folder / f".doctor-{os.getpid()}"
    files.write_bytes(trial, b"")
    trial.unlink()
    parts = {path.name: _folder_size(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    free, used = shutil.disk_usage(folder).free, sum(parts.values())
    details = {"folder": str(folder), "bytes": used, "parts": parts, "free": free}
    message = f"{one_line(str(folder))}, {files.human_size(used)}, {files.human_size(free)} free on its disk"
    if free < _LEAST_FREE:
        return _Finding("Cache", "note", message, "attire cache --clear makes room", details)
    return _Finding("Cache", "ok", message, details=details)


def _folder_size(folder: Path) -> int:
    """Bytes of all files in a folder and below it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _data() -> _Finding:
    folder = files.cache_dir() / "data" / "fashion-mnist"
    return _download_finding("Data", "Fashion-MNIST", sound=not fashion_mnist.missing_files(folder))


def _weights() -> _Finding:
    return _download_finding("Weights", "VGG16's, ImageNet", sound=pretrained.cached_weights() is not None)


def _download_finding(name: str, what: str, sound: bool) -> _Finding:
    if sound:
        return _Finding(name, "ok", f"{what}, verified", details={"cached": True})
    do = "attire fetch gets it; prediction needs none of it"
    return _Finding(name, "note", f"{what}: damaged or not here", do, {"cached": False})


def _shipped_model() -> _Finding:
    """The model in the package: whether it is undamaged and both runtimes agree on the samples that ship."""
    import numpy as np

    from attire.inference.classifier import load_bundle
    from attire.inference.predict import open_model
    from attire.server.samples import read_samples

    images = np.stack([image for _, image in read_samples()])
    model = open_model(None, "cpu")
    start = time.perf_counter()
    predictions = model.predict(images)
    seconds = time.perf_counter() - start
    pairs = list(zip(predictions, load_bundle(device="cpu").predict(images), strict=True))
    difference = max(abs(answer.probability - reference.probability) for answer, reference in pairs)
    speed = len(images) / seconds
    details = {"samples": len(images), "largest difference": difference, "pictures a second": speed}
    if any(answer.label != reference.label for answer, reference in pairs) or difference > _TOLERANCE:
        message = f"PyTorch and {type(model).__name__} answer differently on the samples that ship"
        return _Finding("Model", "failed", message, _REINSTALL, details)
    message = f"the one that ships is sound; {len(images)} samples in {1000 * seconds:.0f} ms, both runtimes alike"
    return _Finding("Model", "ok", message, details=details)


def _mirrors(all_cached: bool) -> _Finding:
    """Which servers accept a connection. They are asked at the same time, so that all dead ones together cost 3 s.

    all_cached: no mirror is needed any more.
    """
    urls = [
        *fashion_mnist.DATA_MIRRORS,
        *fashion_mnist.DEBIAN_MIRRORS,
        *pretrained.TORCH_MIRRORS,
        *pretrained.SDIST_MIRRORS,
    ]
    hosts = {http.host_of(url): url for url in urls}
    with ThreadPoolExecutor(len(hosts), "attire-mirror") as pool:
        problems = dict(zip(hosts, pool.map(_connection_problem, hosts.values()), strict=True))
    up = [host for host, problem in problems.items() if not problem]
    message = f"{len(up)} of {len(hosts)} answer" + (f" ({', '.join(up)})" if up else "")
    if all_cached:
        return _Finding("Mirrors", "ok", f"{message}; all that they serve is cached", details=problems)
    do = "" if up else "attire fetch tries apt-get and pip too; or: --data-from, --weights-from"
    return _Finding("Mirrors", "ok" if up else "note", message, do, problems)


def _connection_problem(url: str) -> str:
    """Empty where the host of `url` accepts a connection, else why not."""
    try:
        check_reachable(url)
    except MirrorError as error:
        return str(error)
    return ""
