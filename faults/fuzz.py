"""Coverage-guided fuzzing of whatever reads a file that is not trusted. What ends otherwise than in an answer or in one
AttireError of one line is a fault. Mended, its input becomes a line of faults/corpus/, and part of tests/test_fuzz.py.

    pip install --group fuzz                    atheris, for Linux; nothing else needs it
    python faults/fuzz.py                       the targets: idx, csv, picture, manifest, bundle, checkpoint, export
    python faults/fuzz.py picture --seconds 300
    python faults/fuzz.py idx FILE              these inputs once, without atheris

Where a format is sealed by a digest, the digest is set right behind the fuzzer's back: else nothing behind the seal
would ever be reached, and a seal tells damage, not malice.
"""

import argparse
import base64
import gzip
import io
import json
import os
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent / "corpus"
PIXELS = bytes(i * 7 % 256 for i in range(784))
MOST = {"picture": 8192, "csv": 16384, "checkpoint": 16384}  # bytes of an input, else 4096


@dataclass(frozen=True)
class Target:
    """read: gives the bytes to one reader; seeds: sound inputs to begin with."""

    read: Callable[[bytes, Path], object]
    seeds: Callable[[], list[bytes]]


def written(data: bytes, path: Path) -> Path:
    path.write_bytes(data)
    return path


def read_idx(data: bytes, folder: Path) -> object:
    from attire.data import idx

    return idx._read_idx(written(data, folder / "x-idx3-ubyte"))


def idx_seeds() -> list[bytes]:
    images = struct.pack(">HBB3I", 0, 8, 3, 2, 28, 28) + 2 * PIXELS
    labels = struct.pack(">HBBI", 0, 8, 1, 5) + bytes(range(5))
    return [images, labels, gzip.compress(images), gzip.compress(labels)]


def read_csv(data: bytes, folder: Path) -> object:
    """An odd first byte stands for the header, which no fuzzer would find."""
    from attire.data import csv_table

    whole = csv_table._HEADER + b"\n" + data[1:] if data[:1] and data[0] % 2 else data[1:]
    path = written(whole, folder / "x.csv")
    with path.open("rb") as file:
        return csv_table.Table.concatenate(csv_table.read_parts(path, file))


def csv_seeds() -> list[bytes]:
    row = b",".join(str(value).encode() for value in (7, *PIXELS))
    return [b"\x01" + row + b"\n", b"\x01" + row + b"\r\n" + row, b"\x00label,pixel1\n1,2\n", b"\x00PK\x03\x04"]


def read_picture(data: bytes, folder: Path) -> object:
    from attire.data import photos, pictures

    assert pictures.decode_colour(data).mode in ("L", "RGB", "RGBA")
    return photos.prepare(data)


def picture_seeds() -> list[bytes]:
    from PIL import Image

    seeds = []
    grey = Image.frombytes("L", (28, 28), PIXELS)
    for kind, mode in (("PNG", "L"), ("PNG", "P"), ("PNG", "RGBA"), ("JPEG", "RGB"), ("WEBP", "RGB"), ("BMP", "L")):
        out = io.BytesIO()
        grey.convert(mode).resize((12, 10)).save(out, kind)
        seeds.append(out.getvalue())
    return seeds


def read_manifest(data: bytes, folder: Path) -> object:
    """Of the feature cache, of an ensemble, of a run, of a sweep; a recipe's fields."""
    from attire import recipes
    from attire.evaluation import run_result
    from attire.features import cache
    from attire.inference import ensemble
    from attire.storage import files

    entry = folder / "cache" / "features" / "0123"
    entry.mkdir(parents=True, exist_ok=True)
    written(data, entry / "MANIFEST.json")
    os.environ["ATTIRE_CACHE"] = str(folder / "cache")
    line = cache._read_record(entry, 0)
    assert line is None or isinstance(line["rows"], int)
    told = [one.describe() + json.dumps(one.to_json()) for one in cache.cache_entries()]
    for read in (
        lambda: ensemble._read_members(written(data, folder / "ensemble.json")),
        lambda: run_result._check_digests(with_digests(folder, data)),
        lambda: recipes.from_json(files.read_json(folder / "ensemble.json"), "config.json"),
    ):
        refused(read)
    return told


def with_digests(folder: Path, data: bytes) -> Path:
    (folder / "run" / "evaluation").mkdir(parents=True, exist_ok=True)
    written(data, folder / "run" / "evaluation" / "digests.json")
    return folder / "run"


def refused(read: Callable[[], object]) -> None:
    from attire.errors import AttireError

    said = ""
    try:
        read()
    except AttireError as error:
        said = str(error)
    assert said.isprintable(), said


def manifest_seeds() -> list[bytes]:
    from attire import recipes

    line = {"rows": 16, "sha256": 64 * "0"}
    made = {"images": "a", "rows": 16, "width": 8, "freeze_to": "block1", "image_size": 16, "pool": 0, "view": "plain"}
    values: list[Any] = [
        {"schema": 1, **made, "precision": "fp32", "backend": "torch", "shards": [line]},
        {"schema": 1, "kind": "ensemble", "members": [{"bundle": "a/model", "sha256": 64 * "0"}]},
        {"schema": 1, "sha256": {"config.json": "0", "environment.json": "0", "data.json": "0", "history.csv": "0"}},
        recipes.FAST.to_json(),
    ]
    return [json.dumps(value).encode() for value in values]


def resealed(data: bytes) -> bytes:
    """JSON with the seal that belongs to it; what is no JSON object as it is."""
    from attire.storage import files

    try:
        value = json.loads(data)
        body = {key: item for key, item in value.items() if key != "seal"}
        return json.dumps({**body, "seal": files.sha256(files.canonical_json(body))}).encode()
    except (ValueError, AttributeError, RecursionError):
        return data


def read_bundle(data: bytes, folder: Path) -> object:
    """Up to the first zero byte the description, behind it the weights, with the digest that belongs to them."""
    from attire.inference import bundle_files, classifier
    from attire.storage import files

    about, _, weights = data.partition(b"\0")
    try:
        value = json.loads(about)
        value["sha256"] = files.sha256(weights)
        about = json.dumps(value).encode()
    except (ValueError, TypeError, RecursionError):
        pass
    (folder / "model").mkdir(exist_ok=True)
    written(resealed(about), folder / "model" / bundle_files.MODEL_JSON)
    written(weights, folder / "model" / bundle_files.WEIGHTS)
    return classifier.load_bundle(folder / "model", "cpu")


def bundle_seeds() -> list[bytes]:
    import torch
    from safetensors.torch import save

    from attire.model import vgg

    about = {
        "schema": 1,
        "architecture": {"freeze_to": "block1", "image_size": 4, "pool": 1, "hidden": [], "dropout": 0.0},
        "classes": ["a", "b"],
        "preprocess": {"version": vgg.PREPROCESS_VERSION},
        "temperature": 1.0,
        "ood": None,
        "neighbours": None,
        "sha256": "",
        "metadata": {},
    }
    tensors = save({"classifier.0.weight": torch.zeros(2, 64), "classifier.0.bias": torch.zeros(2)})
    return [json.dumps(about).encode() + b"\0" + tensors, json.dumps(about | {"schema": 2}).encode()]


def read_checkpoint(data: bytes, folder: Path) -> object:
    from hashlib import sha256

    from attire.training import checkpoints

    return checkpoints._read_checkpoint(written(data + sha256(data).digest(), folder / "epoch-001-step-000000.ckpt"))


def checkpoint_seeds() -> list[bytes]:
    import torch

    from attire.recipes import FAST
    from attire.training import checkpoints, optimiser

    head = torch.nn.Sequential(torch.nn.Linear(3, 2))
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.Checkpoints(head, optimiser.make_optimiser(head, FAST), Path(folder)).save(
            checkpoints.TrainingState(epoch=1)
        )
        return [path.read_bytes()[:-32] for path in Path(folder).glob("*.ckpt")]


def read_export(data: bytes, folder: Path) -> object:
    """The first byte chooses the format."""
    from attire.inference import runtimes

    kinds = list(runtimes.SUFFIXES)
    kind, body = kinds[data[0] % len(kinds) if data else 0], data[1:]
    path = folder / f"x{runtimes.SUFFIXES[kind]}"
    if kind == "openvino":
        path.mkdir(exist_ok=True)
        written(resealed(body), path / runtimes.METADATA_FILE)
    else:
        written(runtimes.seal_bytes(body) if body.count(runtimes.NO_SEAL.encode()) == 1 else body, path)
    return runtimes.load_export(path)


def export_seeds() -> list[bytes]:
    from attire.inference import runtimes

    facts = {"format": "onnx", "schema": 1, "classes": ["a", "b"], "seal": runtimes.NO_SEAL}
    text = json.dumps(facts).encode()
    onnx = runtimes._METADATA_PREFIX + bytes([0x80 | len(text) & 0x7F, len(text) >> 7]) + text
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(
            "network/extra/attire.json", json.dumps({**facts, "format": "torch-export", "records_digest": ""})
        )
    folder = json.dumps({**facts, "format": "openvino", "sha256": {"network.xml": ""}}).encode()
    return [b"\0" + onnx, b"\1" + folder, b"\2" + out.getvalue()]


TARGETS = {
    "idx": Target(read_idx, idx_seeds),
    "csv": Target(read_csv, csv_seeds),
    "picture": Target(read_picture, picture_seeds),
    "manifest": Target(read_manifest, manifest_seeds),
    "bundle": Target(read_bundle, bundle_seeds),
    "checkpoint": Target(read_checkpoint, checkpoint_seeds),
    "export": Target(read_export, export_seeds),
}


def kept(name: str) -> list[bytes]:
    """Inputs that were faults once: a line of base64 each."""
    path = CORPUS / f"{name}.txt"
    return [base64.b64decode(line) for line in path.read_text().splitlines()] if path.exists() else []


def fuzz(name: str, seconds: int, options: Sequence[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["attire"]):
        import attire.inference.classifier  # with all that it imports
        import attire.inference.ensemble  # noqa: F401
    target = TARGETS[name]
    with tempfile.TemporaryDirectory(prefix="attire-fuzz-", dir=shared_memory()) as scratch:
        folder, corpus = Path(scratch) / "files", Path(scratch) / "corpus"
        folder.mkdir(), corpus.mkdir()
        for i, seed in enumerate([*target.seeds(), *kept(name)]):
            written(seed, corpus / f"seed-{i}")
        limits = [f"-max_total_time={seconds}", f"-max_len={MOST.get(name, 4096)}", "-timeout=20", "-rss_limit_mb=4096"]
        given = [sys.argv[0], str(corpus), *limits, "-print_final_stats=1", f"-artifact_prefix={name}-", *options]
        atheris.Setup(given, lambda data: refused(lambda: target.read(data, folder)))
        atheris.Fuzz()


def shared_memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def again(name: str, inputs: Sequence[bytes]) -> None:
    """Each input once; raises what the reader raises."""
    with tempfile.TemporaryDirectory(prefix="attire-fuzz-") as folder:
        for data in inputs:
            refused(lambda data=data: TARGETS[name].read(data, Path(folder)))  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", choices=list(TARGETS), help="which reader")
    parser.add_argument("inputs", nargs="*", type=Path, help="files to read once")
    parser.add_argument("--seconds", type=int, default=60)
    given, options = parser.parse_known_args()
    if given.target is None:
        print("\n".join(TARGETS))
    elif given.inputs:
        again(given.target, [path.read_bytes() for path in given.inputs])
    else:
        fuzz(given.target, given.seconds, options)


if __name__ == "__main__":
    main()
