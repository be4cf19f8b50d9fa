"""`attire doctor`: whether all that Attire needs is here and sound. Looks only; each finding stands for itself."""

import os
import platform
import re
import shutil
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import attire
from attire.data import fashion_mnist
from attire.errors import AttireError, one_line
from attire.model import pretrained
from attire.storage import files, http
from attire.storage.http import MirrorError, check_reachable
from attire.storage.memory import total_memory

_State = Literal["ok", "note", "failed"]
_LEAST_FREE = 2 * 10**9  # bytes: features of `fast` take 1.1 GB, and an extraction writes beside what is there
_SHOWN = ("torch", "torchvision", "onnxruntime", "numpy")
_ALIKE = 1e-3  # of a probability, between runtimes: release.py allows less, but on the machine it runs on


@dataclass(frozen=True)
class _Finding:
    """One thing looked at. `failed` is what some command cannot do without; `note` costs time or a feature."""

    name: str
    state: _State
    told: str
    do: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(offline: bool = False) -> list[_Finding]:
    """Every finding, in the order in which one depends on the other."""
    checks: dict[str, Callable[[], _Finding]] = {
        "Versions": _versions,
        "Device": _device,
        "Cache": _cache,
        "Precision": _precision,
        "Data": _data,
        "Weights": _weights,
        "Model": _shipped,
    }
    found = [_guarded(name, check) for name, check in checks.items()]
    return found if offline else [*found, _guarded("Mirrors", lambda: _mirrors(_at_hand(found)))]


def failed(found: Sequence[_Finding]) -> bool:
    return any(finding.state == "failed" for finding in found)


def _guarded(name: str, check: Callable[[], _Finding]) -> _Finding:
    """What a check raises is its finding: broken installations raise anything, and a doctor does not faint."""
    try:
        return check()
    except AttireError as error:
        return _Finding(name, "failed", str(error))
    except Exception as error:
        text = one_line(str(error).partition("\n")[0])[:200]
        return _Finding(name, "failed", f"{type(error).__name__}: {text}", "pip install attire, anew")


def lines(found: Sequence[_Finding], columns: int) -> list[str]:
    """For people: a word, a state, and what was found, as wide as the terminal."""
    told = []
    for finding in found:
        text = f"{finding.told}; {finding.do}" if finding.do else finding.told
        width, begin = min(columns, 100), f"{finding.name:10}{finding.state:8}"
        indent = " " * (len(begin) if width >= 60 else 4)
        told += textwrap.wrap(
            begin + text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    return told


def _versions() -> _Finding:
    """Attire's own, Python's, and that every package is there which Attire declares."""
    there: dict[str, str] = {}
    missing: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in metadata.requires("attire") or []:
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        try:
            there[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            extras.setdefault(extra[1], []).append(name) if extra else missing.append(name)
    facts = {"attire": attire.__version__, "python": platform.python_version(), "packages": there, "extras": extras}
    if missing:
        told = f"missing: {', '.join(missing)}"
        return _Finding("Versions", "failed", told, "pip install attire, anew", facts)
    shown = ", ".join(f"{name} {there[name]}" for name in _SHOWN if name in there)
    absent = ", ".join(sorted(extra for extra in extras if extra != "dev"))
    told = f"attire {facts['attire']}, Python {facts['python']}, {shown}"
    return _Finding("Versions", "ok", told + (f"; extras not installed: {absent}" if absent else ""), facts=facts)


def _device() -> _Finding:
    import torch

    from attire.model import devices

    where = devices.choose_device()
    held = total_memory()
    facts = {"device": where.type, "processor": devices.processor_name(), "cores": os.cpu_count()}
    facts |= {"threads": torch.get_num_threads(), "memory": held, "system": platform.platform()}
    name = torch.cuda.get_device_name() if where.type == "cuda" else facts["processor"]
    size = f", {files.human_size(held)} of memory" if held else ""
    return _Finding("Device", "ok", f"{where.type}: {name}, {facts['cores']} cores{size}", facts=facts)


def _precision() -> _Finding:
    """What frozen layers would be computed in here, and what the processor has instructions for."""
    import torch

    from attire.model import devices

    where = devices.choose_device()
    chosen = devices.choose_precision("auto", where)
    backend = devices.choose_backend("torch", chosen, where)
    bf16 = torch.cuda.is_bf16_supported() if where.type == "cuda" else devices.has_bf16()
    vnni = bool(torch.cpu._is_vnni_supported())
    facts = {"chosen": chosen, "backend": backend, "bf16": bf16, "int8 dot products (VNNI)": vnni}
    told = f"{chosen} by {backend} is the fastest here; bf16 {'native' if bf16 else 'not native'}"
    return _Finding("Precision", "ok", f"{told}, int8 {'with' if vnni else 'without'} VNNI", facts=facts)


def _cache() -> _Finding:
    """Place, sizes, whether it can be written to, and the disk's room."""
    folder = files.cache_dir()
    trial = folder / f".doctor-{os.getpid()}"
    files.write_bytes(trial, b"")
    trial.unlink()
    parts = {path.name: _held(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    free, used = shutil.disk_usage(folder).free, sum(parts.values())
    facts = {"folder": str(folder), "bytes": used, "parts": parts, "free": free}
    told = f"{one_line(str(folder))}, {files.human_size(used)}, {files.human_size(free)} free on its disk"
    low = free < _LEAST_FREE
    return _Finding("Cache", "note" if low else "ok", told, "attire cache --clear makes room" if low else "", facts)


def _held(folder: Path) -> int:
    """Bytes in a folder and those below it; a file that goes meanwhile counts nothing."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _data() -> _Finding:
    folder = files.cache_dir() / "data" / "fashion-mnist"
    return _input_found("Data", "Fashion-MNIST", "damaged or not here" if fashion_mnist.missing_files(folder) else "")


def _weights() -> _Finding:
    return _input_found("Weights", "VGG16's, ImageNet", "" if pretrained.cached_weights() else "damaged or not here")


def _input_found(name: str, what: str, wrong: str) -> _Finding:
    if not wrong:
        return _Finding(name, "ok", f"{what}, verified", facts={"cached": True})
    do = "attire fetch gets it; prediction needs none of it"
    return _Finding(name, "note", f"{what}: {wrong}", do, {"cached": False})


def _shipped() -> _Finding:
    """The model in the package: its digests, and that both runtimes answer alike on its own samples."""
    import numpy as np

    from attire.inference.classifier import load_bundle
    from attire.inference.predict import open_model
    from attire.server.samples import read_samples

    images = np.stack([image for _, image in read_samples()])
    model = open_model(None, "cpu")
    began = time.perf_counter()
    answers = model.predict(images)
    seconds = time.perf_counter() - began
    ours = load_bundle(device="cpu").predict(images)
    apart = max(abs(a.probability - b.probability) for a, b in zip(answers, ours, strict=True))
    same = all(a.label == b.label for a, b in zip(answers, ours, strict=True))
    speed = len(images) / seconds
    facts = {"samples": len(images), "largest difference": apart, "pictures a second": speed}
    if not same or apart > _ALIKE:
        told = f"PyTorch and {type(model).__name__} answer differently on the samples that ship"
        return _Finding("Model", "failed", told, "pip install attire, anew", facts)
    told = f"the one that ships is sound; {len(images)} samples in {1000 * seconds:.0f} ms, both runtimes alike"
    return _Finding("Model", "ok", told, facts=facts)


def _at_hand(found: Sequence[_Finding]) -> bool:
    """Whether nothing need be fetched any more."""
    return all(finding.facts.get("cached", True) for finding in found)


def _mirrors(needless: bool) -> _Finding:
    """Which servers accept a connection; asked side by side, so that all dead ones together cost 3 s."""
    urls = [
        *fashion_mnist.DATA_MIRRORS,
        *fashion_mnist.DEBIAN_MIRRORS,
        *pretrained.TORCH_MIRRORS,
        *pretrained.SDIST_MIRRORS,
    ]
    hosts = {http.host_of(url): url for url in urls}
    with ThreadPoolExecutor(len(hosts), "attire-mirror") as pool:
        answers = dict(zip(hosts, pool.map(_reached, hosts.values()), strict=True))
    up = [host for host, wrong in answers.items() if not wrong]
    told = f"{len(up)} of {len(hosts)} answer" + (f" ({', '.join(up)})" if up else "")
    if needless:
        return _Finding("Mirrors", "ok", f"{told}; all that they serve is cached", facts=answers)
    do = "" if up else "attire fetch tries apt-get and pip too; or: --data-from, --weights-from"
    return _Finding("Mirrors", "ok" if up else "note", told, do, answers)


def _reached(url: str) -> str:
    """Empty where the host of `url` accepts a connection, else why not."""
    try:
        check_reachable(url)
    except MirrorError as error:
        return str(error)
    return ""
