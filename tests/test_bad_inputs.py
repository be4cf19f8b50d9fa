"""Inputs that get one clear line and lose nothing: each through the command line, its status, and what it leaves alone.

What the command line says of a missing file, a near command, an option out of its range or a reader that has gone is
in test_cli.py, test_shell.py, test_answers.py and test_runs.py; what HTTP says in test_server.py and test_listener.py.
"""

import errno
import gzip
import io
import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attire.data.csv_table import _COLUMNS, _HEADER
from attire.data.dataset import FASHION_CLASSES, ImageDataset
from attire.data.loading import write_csv
from attire.evaluation.run_result import load_result
from attire.inference import runtimes
from attire.server import listener
from attire.storage import files
from tests.command import TINY, Done, attire
from tests.data.test_csv_table import ROW, header, with_cell
from tests.data.test_idx import image_bytes, label_bytes
from tests.data.test_pictures import encode, png_header
from tests.inference.test_classifier import Payload, put, rewrite, spoil

pytestmark = pytest.mark.usefixtures("here")
WARNED = pytest.mark.filterwarnings("always::attire.errors.AttireWarning")  # shown as to a user, not raised


def tree() -> dict[Path, tuple[int, int] | None]:
    """Everything below the working folder, and beside it the cache and the runs: size and time of each file."""
    stats = {path: path.stat() for path in Path.cwd().parent.rglob("*")}
    return {path: None if path.is_dir() else (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def refused(*arguments: object, status: int = 1) -> str:
    """What a command says on stderr that ends with this status, answers nothing and writes nothing."""
    before = tree()
    done = attire(*arguments)
    assert (done.status, done.out) == (status, "")
    assert tree() == before
    return done.err


@pytest.fixture
def model(finished: tuple[Path, Done], here: Path) -> str:
    """A bundle that may be spoilt, in the working folder."""
    shutil.copytree(finished[0] / "model", here / "m")
    return "m"


CANNOT_REJECT = (
    "warning: m: this bundle cannot tell what is none of its classes; train it again, with 200 images or more"
)


# CSV.

EXPECTED = "expected label,pixel1,...,pixel784"
A_ROW = "a row is one label and 784 pixels"
CUT = "the file may be cut off there"
NEVER_FILLED = "put the true value there, or take the row out; gaps are never filled"
TABLE = _HEADER + b"\n" + ROW.encode() + b"\n"


def table(*lines: str) -> bytes:
    return "\n".join([_HEADER.decode(), *lines]).encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", f"empty file; expected a CSV file with the header {EXPECTED.split()[1]}"),
        (table(), f"only a header, no rows; {CUT}"),
        (f"{ROW}\n{ROW}".encode(), f"no header (line 1); {EXPECTED} above the rows"),
        (
            f"{header((1, 'pixel2'), (2, 'pixel1'))}\n{ROW}".encode(),
            f"columns in another order: pixel2 where pixel1 belongs (line 1, column 2); {EXPECTED}",
        ),
        (
            f"{header((2, 'pixel1'))}\n{ROW}".encode(),
            f"column pixel1 stands twice (line 1, column 3); {EXPECTED}",
        ),
        (table(ROW.rpartition(",")[0], ROW), f"784 values, expected 785 (line 2); {A_ROW}"),
        (table(ROW, ROW + ",0"), f"786 values, expected 785 (line 3); {A_ROW}"),
        (table(ROW, ROW[:1000]), f"289 values, expected 785 (line 3); {CUT}"),
        (
            table(ROW, ROW.rpartition(",")[0] + ","),
            f"pixel784 is empty, expected a whole number from 0 to 255 (line 3); {CUT}",
        ),
        (
            table(ROW, with_cell(5, "")),
            f"pixel5 is empty, expected a whole number from 0 to 255 (line 3); {NEVER_FILLED}",
        ),
        (
            table(with_cell(0, "10")),
            "label is 10, expected a whole number from 0 to 9 (line 2); "
            "name the classes with --classes when they are not these",
        ),
        (table(with_cell(0, "-1")), "label is -1, expected a whole number from 0 to 9 (line 2)"),
        (table(with_cell(0, "Sneaker")), "label is Sneaker, expected a whole number from 0 to 9 (line 2)"),
        (TABLE.decode().encode("utf-16"), "UTF-16 text, expected CSV text; save it as UTF-8"),
        (TABLE.replace(b",", b";"), "values separated by semicolons, expected commas (line 1)"),
        (TABLE.replace(b",", b"\t"), "values separated by tabs, expected commas (line 1)"),
        (gzip.compress(TABLE, mtime=0), "gzip-compressed data, expected CSV text; unpack it first"),
        (b"PK\x03\x04" + bytes(30), "a zip archive, expected CSV text; unpack it first"),
        (
            b"PK\x03\x04" + bytes(26) + b"[Content_Types].xml",
            "an Excel workbook, expected CSV text; export the sheet as CSV",
        ),
        *[
            (table(ROW, with_cell(5, cell)), f"pixel5 is {cell}, expected a whole number from 0 to 255 (line 3)")
            for cell in ("256", "-1", "12.0", "1e2", "nan", "NULL")
        ],
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_csv_file_that_is_not_as_it_must_be(content: bytes, said: str) -> None:
    Path("mine.csv").write_bytes(content)
    assert refused("train", "--data", "mine.csv") == f"error: mine.csv: {said}\n"


def test_a_folder_named_csv() -> None:
    Path("mine.csv").mkdir()
    assert refused("train", "--data", "mine.csv") == "error: mine.csv: 0 class folders, expected at least two\n"


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may read what is called secret, not even root."""
    opened = io.open

    def refuse(file: Any, *rest: Any, **named: Any) -> Any:
        if not isinstance(file, int) and Path(file).name.startswith("secret"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return opened(file, *rest, **named)

    monkeypatch.setattr(io, "open", refuse)
    monkeypatch.setattr(os, "access", lambda path, *rest, **named: not Path(path).name.startswith("secret"))


@pytest.mark.usefixtures("secret")
@pytest.mark.parametrize("command", ["train --data", "evaluate m --data", "audit", "train --config"])
def test_a_file_that_may_not_be_read_is_no_wrong_usage(command: str, model: str) -> None:
    Path("secret.csv").touch()
    said = "error: secret.csv: cannot read (Permission denied)\n"
    assert refused(*command.split(), "secret.csv") == said


@pytest.mark.usefixtures("secret")
def test_the_others_are_answered_when_one_picture_may_not_be_read(model: str, synthetic: ImageDataset) -> None:
    for name in ("good.png", "secret.png"):
        Path(name).touch()
    Image.fromarray(synthetic.images[0]).save("good.png")
    done = attire("predict", "--model", model, "secret.png", "good.png")
    assert done.err == f"{CANNOT_REJECT}\nerror: secret.png: cannot read (Permission denied)\n"
    assert (done.status, done.out.split()[0]) == (1, "good.png")


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbf" + TABLE, TABLE.replace(b"\n", b"\r\n"), TABLE.rstrip(), TABLE + b"\n\n"],
    ids=["BOM", "CRLF", "no final newline", "trailing blank lines"],
)
def test_harmless_variations_of_a_csv_file_are_answered_alike(content: bytes, model: str) -> None:
    answers = []
    for body in (TABLE, content):
        Path("mine.csv").write_bytes(body)
        done = attire("predict", "--model", model, "--json", "mine.csv")
        assert (done.status, done.err) == (0, f"{CANNOT_REJECT}\n")
        answers.append(done.out)
    assert answers[0] == answers[1]
    assert answers[0].count("\n") == 1


@WARNED
@pytest.mark.usefixtures("weights")
def test_rows_that_test_and_train_are_a_warning_with_the_count(synthetic: ImageDataset, small_csv: Path) -> None:
    write_csv(synthetic.subset([7, 3, 3, *range(20, 40)]), "test.csv")
    done = attire("train", "--data", small_csv, "--test", "test.csv", *TINY, "--epochs", "1", "--json")
    said = "23 of 23 test images also stand in the training set; the measured accuracy will be too high"
    assert (done.status, done.err) == (0, f"warning: test.csv: {said}\n")
    assert load_result(Path("runs/1")).data["test_images_in_train"] == 23


# IDX.

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
MOST = 2**32 - 1


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (image_bytes()[:12], None, f"{IMAGES}: 12 bytes, too short for an IDX header; get the file again"),
        (None, label_bytes()[:6], f"{LABELS}: 6 bytes, too short for an IDX header; get the file again"),
        (
            struct.pack(">II", 0x903, 5),
            None,
            f"{IMAGES}: 3 dimensions of type 0x09, expected 3 (images) or 1 (labels) of type 0x08, unsigned bytes "
            "(magic 0x00000903)",
        ),
        (
            label_bytes(),
            image_bytes(),
            f"{LABELS}: holds images, expected labels (magic 0x00000803); are the two swapped?",
        ),
        (
            struct.pack("<IIII", 0x803, 5, 28, 28) + bytes(3920),
            None,
            f"{IMAGES}: little-endian IDX header, expected big-endian (magic 0x03080000); write it again as IDX has it",
        ),
        (
            image_bytes()[:-10],
            None,
            f"{IMAGES}: 3,910 bytes of data, expected 3,920 (the header declares 5 x 28 x 28); {CUT}",
        ),
        (
            image_bytes() + b"x",
            None,
            f"{IMAGES}: more than the expected 3,920 bytes of data (the header declares 5 x 28 x 28); "
            "get the file again",
        ),
        (
            image_bytes(MOST),
            None,
            f"{IMAGES}: the header declares 4,294,967,295 x 28 x 28 bytes, more than the file can hold; "
            "it is cut off or damaged",
        ),
        (
            image_bytes(MOST, MOST, MOST),
            None,
            f"{IMAGES}: pictures of 4,294,967,295 x 4,294,967,295, expected 28 x 28 (IDX header)",
        ),
        (image_bytes(rows=32), None, f"{IMAGES}: pictures of 32 x 28, expected 28 x 28 (IDX header)"),
        (image_bytes(0, data=b""), None, f"{IMAGES}: holds no images (IDX header)"),
        (None, label_bytes(0, b""), f"{LABELS}: holds no labels (IDX header)"),
        (
            None,
            label_bytes(4, bytes(4)),
            f"{LABELS}: 4 labels for the 5 images of {IMAGES}; the two must belong together",
        ),
    ],
    ids=lambda value: value.partition(": ")[2][:40] if isinstance(value, str) else "",
)
def test_idx_files_that_are_not_as_they_must_be(images: bytes | None, labels: bytes | None, said: str) -> None:
    Path(IMAGES).write_bytes(images or image_bytes())
    Path(LABELS).write_bytes(labels or label_bytes())
    for data in (IMAGES, "."):
        assert refused("train", "--data", data) == f"error: {said}\n"


PACKED = gzip.compress(image_bytes(), mtime=0)


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        (PACKED[:-20], r"the gzip data ends too early; the file was cut off; get it again"),
        (
            PACKED[:-8] + bytes([PACKED[-8] ^ 1]) + PACKED[-7:],
            r"damaged gzip data \(CRC check failed 0x[0-9a-f]+ != 0x[0-9a-f]+\); get the file again",
        ),
        (
            gzip.compress(image_bytes() + bytes(1_000_000), mtime=0),
            r"more than the expected 3,920 bytes of data \(the header declares 5 x 28 x 28\); get the file again",
        ),
    ],
    ids=["truncated", "bad CRC", "expanding past its header"],
)
def test_a_packed_idx_file_that_is_not_as_it_must_be(packed: bytes, said: str) -> None:
    Path(f"{IMAGES}.gz").write_bytes(packed)
    Path(LABELS).write_bytes(label_bytes())
    assert re.fullmatch(f"error: {IMAGES}.gz: {said}\n", refused("train", "--data", f"{IMAGES}.gz"))


# Images.

SHOULD = "expected a PNG, JPEG, WebP or BMP picture"
FRAMES = [Image.new("L", (28, 28), level) for level in (0, 100, 200)]
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (112, 112), np.uint8))


def bad_checksum() -> bytes:
    """A PNG whose pixel data carry the checksum of others."""
    data = bytearray(encode(FRAMES[1]))
    data[data.index(b"IEND") - 5] ^= 1
    return bytes(data)


def moving(kind: str) -> bytes:
    return encode(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", f"empty file; {SHOULD}"),
        (b"hello", f"text, not a picture that can be read; {SHOULD}"),
        (b"<!doctype html><p>", f"an HTML page, not a picture that can be read; {SHOULD}"),
        (b"%PDF-1.7\n%\xe2\xe3", f"a PDF document, not a picture that can be read; {SHOULD}"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', f"an SVG drawing, not a picture that can be read; {SHOULD}"),
        (moving("GIF"), f"a GIF picture, not a picture that can be read; {SHOULD}"),
        (moving("TIFF"), f"a TIFF picture, not a picture that can be read; {SHOULD}"),
        (encode(FRAMES[0], "PPM"), f"of no known format, not a picture that can be read; {SHOULD}"),
        (moving("PNG"), "3 pictures in one file, expected one; save one of them by itself"),
        (moving("WEBP"), "3 pictures in one file, expected one; save one of them by itself"),
        (png_header(50_000, 50_000), "more than 50 megapixels; make it smaller first"),
        (png_header(1, 1), "1 x 1 pixels, too small; each side needs at least 2"),
        (png_header(1, 20_000), "1 x 20,000 pixels, too small; each side needs at least 2"),
        (encode(NOISE)[:300], "damaged or cut off (*); get the file again"),
        (encode(NOISE, "JPEG")[:900], "damaged or cut off (*); get the file again"),
        (bad_checksum(), "damaged or cut off (*); get the file again"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("command", ["predict", "explain"])
def test_what_is_no_sound_picture(data: bytes, said: str, command: str, model: str) -> None:
    Path("a.png").write_bytes(data)
    warning = f"{CANNOT_REJECT}\n" if command == "predict" else ""
    line = re.escape(f"{warning}error: a.png: {said}\n").replace(r"\*", "[^\n]+")  # the decoder's own words
    assert re.fullmatch(line, refused(command, "--model", model, "a.png"))


GARMENT = np.zeros((28, 28), np.uint8)
GARMENT[8:24, 8:16] = 230  # nearly white: what is transparent around it becomes black
SHOWN = Image.fromarray(GARMENT)
CLEAR = Image.fromarray((GARMENT > 0).astype(np.uint8) * 255)
PALETTE = Image.fromarray((GARMENT > 0).astype(np.uint8), "L").convert("P")
PALETTE.putpalette([9, 9, 9, 230, 230, 230])
TURNED = Image.Exif()
TURNED[0x0112] = 6  # "rotate 90 degrees clockwise to show"


@pytest.mark.parametrize(
    ("data", "alike"),
    [
        (encode(CLEAR.convert("1")), CLEAR),
        (encode(PALETTE, transparency=0), SHOWN),
        (encode(Image.merge("LA", (Image.new("L", (28, 28), 230), CLEAR))), SHOWN),
        (encode(Image.merge("RGBA", (*[Image.new("L", (28, 28), 230)] * 3, CLEAR))), SHOWN),
        (encode(Image.fromarray(GARMENT.astype(np.uint16) * 257)), SHOWN),
        (encode(Image.merge("CMYK", (*[Image.new("L", (28, 28))] * 3, SHOWN.point(lambda v: 255 - v))), "JPEG"), SHOWN),
        (encode(Image.fromarray(np.rot90(GARMENT)), exif=TURNED), SHOWN),
    ],
    ids=["1", "P with transparency", "LA", "RGBA", "I;16", "CMYK", "EXIF orientation"],
)
def test_pictures_of_every_mode_are_answered_as_the_grey_one_that_they_show(
    data: bytes, alike: Image.Image, model: str
) -> None:
    Path("a.png").write_bytes(data)
    alike.save("b.png")
    done = attire("predict", "--model", model, "--json", "a.png", "b.png")
    assert (done.status, done.err) == (0, f"{CANNOT_REJECT}\n")
    grey, expected = (json.loads(line)["probabilities"] for line in done.out.splitlines())
    assert grey == pytest.approx(expected, abs=0.01)  # CMYK's JPEG rounds


# Bundles, checkpoints, cache.

FRESH = "use a fresh copy"
DIGEST = "m/model.safetensors: damaged: its digest is not the one in model.json"
NOT_OURS = "m/model.json: not one of ours, or changed after it was written"
PICKLE = pickle.dumps(Payload())


def change(name: str, make: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(make((folder / name).read_bytes()))


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def sealed(*given: Any, **about: Any) -> Callable[[Path], object]:
    """Changed by someone who makes digest and seal fit again."""
    return lambda folder: rewrite(folder, *given, **about)


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [
        (
            lambda folder: (folder / "model.json").unlink(),
            "m: not a bundle: it holds no model.json; give a folder such as runs/1/model",
        ),
        (change("model.json", lambda data: b"{}"), f"{NOT_OURS}; {FRESH}"),
        (change("model.json", lambda data: data.replace(b'"Bag"', b'"Bah"')), f"{NOT_OURS}; {FRESH}"),
        (change("model.json", lambda data: data[:5]), "m/model.json: not valid JSON (*); the file may be damaged"),
        (change("model.json", lambda data: PICKLE), "m/model.json: not valid JSON (*); the file may be damaged"),
        (change("model.safetensors", lambda data: data[:-1]), f"{DIGEST}; {FRESH}"),
        (change("model.safetensors", flip), f"{DIGEST}; {FRESH}"),
        (change("model.safetensors", lambda data: PICKLE), f"{DIGEST}; {FRESH}"),
        (
            change("neighbours.safetensors", lambda data: PICKLE),
            f"{DIGEST.replace('model.safe', 'neighbours.safe')}; {FRESH}, or delete this file",
        ),
        (sealed(PICKLE), "m/model.safetensors: not a safetensors file (*)"),
        (sealed(lambda tensors: tensors.pop("features.2.weight")), "m: tensor features.2.weight is missing"),
        (sealed(put("extra.bias", torch.zeros(3))), "m: tensor extra.bias is not part of this model"),
        (sealed(put("classifier.0.bias", torch.zeros(9))), "m: tensor classifier.0.bias is (9,), expected (16,)"),
        (sealed(spoil("features.0.bias", np.nan)), f"m: tensor features.0.bias holds NaN or infinity; {FRESH}"),
        (sealed(schema=2), "m/model.json: made by a newer Attire (schema 2, this one reads 1); update attire"),
        (sealed(schema="2"), f"m/model.json: not what a bundle holds (ValueError schema '2'); {FRESH}"),
        (sealed(classes=list("abcdefghi")), "m: tensor classifier.3.bias is (10,), expected (9,)"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_a_bundle_that_is_not_sound_is_refused(
    spoilt: Callable[[Path], object], said: str, model: str, small_csv: Path, synthetic: ImageDataset
) -> None:
    Image.fromarray(synthetic.images[0]).save("a.png")
    spoilt(Path(model))
    line = re.escape(f"error: {said}\n").replace(r"\*", "[^\n]+")  # a library's own words
    for command in (["predict", "--model", model, "a.png"], ["evaluate", model, "--data", small_csv]):
        assert re.fullmatch(line, refused(*command))
    assert not Path("payload-ran").exists()


def test_data_of_other_classes_than_the_bundle_s(model: str, small_csv: Path) -> None:
    names = ", ".join(FASHION_CLASSES)
    said = f"error: small.csv: its classes are not the bundle's ({names})\n"
    assert refused("evaluate", model, "--data", small_csv, "--classes", ",".join("abcdefghij")) == said


ABOUT = {"schema": 1, "format": "onnx", "classes": list("abcdefghij"), "precision": "fp32"}
OPEN = "cannot be opened by its runtime"


def exported(kind: str, **about: Any) -> bytes:
    """A file whose seal fits, with nothing sound in it."""
    facts = json.dumps({**ABOUT, "format": kind, "seal": runtimes.NO_SEAL, **about})
    length = bytes([len(facts) & 127 | 128, len(facts) >> 7])  # a varint, for 128 bytes to 16 kB
    return runtimes.seal_bytes(b"no network" + runtimes._METADATA_PREFIX + length + facts.encode())


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("x.onnx", b"", "not an ONNX file that `attire export` wrote, or damaged"),
        ("x.onnx", PICKLE, "not an ONNX file that `attire export` wrote, or damaged"),
        ("x.pt2", PICKLE, "not a torch.export file that `attire export` wrote, or damaged"),
        ("x.onnx", exported("onnx")[1:], "damaged, or changed after it was written: its digest does not match; *"),
        ("x.onnx", exported("onnx", schema=2), "made by a newer Attire (schema 2); update attire"),
        ("x.onnx", exported("onnx", schema="2"), "not a file that `attire export` wrote (schema '2')"),
        ("x.onnx", exported("onnx"), f"{OPEN} (*); export again"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_an_exported_file_that_is_not_sound_is_refused(name: str, data: bytes, said: str, small_csv: Path) -> None:
    Path(name).write_bytes(data)
    line = re.escape(f"error: {name}: {said}\n").replace(r"\*", "[^\n]+")
    for command in (["predict", "--model", name, small_csv], ["evaluate", name, "--data", small_csv]):
        assert re.fullmatch(line, refused(*command))
    assert not Path("payload-ran").exists()


@pytest.mark.parametrize("absolute", [False, True], ids=["../", "absolute"])
def test_a_manifest_that_points_elsewhere_is_not_followed(absolute: bool, here: Path) -> None:
    Path("outside.bin").write_bytes(b"mine")
    name = str(here / "outside.bin") if absolute else "../outside.bin"
    facts = {**ABOUT, "format": "openvino", "sha256": {name: files.sha256(b"mine")}}
    sealed_facts = {**facts, "seal": files.sha256(files.canonical_json(facts))}
    files.write_json(Path("x.openvino/attire.json"), sealed_facts)
    said = "damaged, or changed after it was written: its digest does not match; export again"
    assert refused("predict", "--model", "x.openvino", "a.png") == f"error: x.openvino/outside.bin: {said}\n"


@WARNED
@pytest.mark.parametrize("damage", [flip, lambda data: data[:-1], lambda data: PICKLE], ids=["byte", "cut", "pickle"])
def test_a_damaged_cache_entry_is_set_aside_and_made_again_with_one_warning(
    damage: Callable[[bytes], bytes], model: str, small_csv: Path, cache: Path
) -> None:
    command = ("evaluate", model, "--data", small_csv)
    first = attire(*command)
    (shard,) = (cache / "features").rglob("*.npy")
    whole = shard.read_bytes()
    shard.write_bytes(damage(whole))
    again = attire(*command)
    warned = [line for line in again.err.splitlines() if line.startswith("warning: ")]
    assert warned == [f"warning: {shard.parent}: 1 damaged shard set aside as *.damaged and made again"]
    assert (again.status, again.out) == (0, first.out)
    assert shard.read_bytes() == whole
    assert shard.with_suffix(".damaged").read_bytes() == damage(whole)
    assert not Path("payload-ran").exists()


@WARNED
@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize("damage", [flip, lambda data: data[:-1], lambda data: PICKLE], ids=["byte", "cut", "pickle"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(
    damage: Callable[[bytes], bytes], finished: tuple[Path, Done]
) -> None:
    run = Path(shutil.copytree(finished[0], "run"))
    newest = max((run / "checkpoints").iterdir())
    newest.write_bytes(damage(newest.read_bytes()))
    shutil.rmtree(run / "model")
    done = attire("train", "--resume", run, "--json")
    said = "not a whole Attire checkpoint: its digest does not match; going on from the one before"
    assert (done.status, done.err) == (0, f"warning: {newest}: {said}\n")
    weights = "model/model.safetensors"
    assert (run / weights).read_bytes() == (finished[0] / weights).read_bytes()
    assert not Path("payload-ran").exists()


# CLI.


@pytest.mark.parametrize("value", ["1.5", "abc"])
def test_epochs_that_are_no_whole_number(value: str) -> None:
    said = f"attire train: Invalid value for '--epochs': '{value}' is not a valid integer; see: attire train --help"
    assert refused("train", "--epochs", value, status=2) == f"error: {said}\n"


@pytest.mark.parametrize(
    "command", ["predict a.png", "evaluate m", "explain a.png", "ensemble m m", "sweep", "serve m"]
)
def test_a_device_that_is_not_there(command: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    said = "--device: cuda was asked for, but PyTorch finds none here; try --device auto"
    assert refused(*command.split(), "--device", "cuda", status=2) == f"error: {said}\n"


def test_a_port_out_of_range(model: str) -> None:
    said = "Invalid value for '--port': 70000 is not in the range 0<=x<=65535; see: attire serve --help"
    assert refused("serve", model, "--port", "70000", status=2) == f"error: attire serve: {said}\n"


def test_a_port_in_use(model: str) -> None:
    with listener.bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        said = f"error: 127.0.0.1:{port}: the port is in use; give another to --port, or 0 for a free one\n"
        assert refused("serve", model, "--port", port) == said


@pytest.fixture
def outputs(here: Path) -> None:
    """A file and a folder that is not empty, where output is asked for."""
    (here / "full").mkdir()
    for name in ("file", "full/kept.txt"):
        (here / name).write_text("mine")


FOLDERS = ["train --data {csv}", "evaluate m --data {csv}", "ensemble m m --data {csv}", "audit {csv}", "bench m"]


@pytest.mark.usefixtures("outputs", "model", "weights")
@pytest.mark.parametrize("command", FOLDERS)
def test_an_output_folder_that_is_a_file_or_not_empty(command: str, small_csv: Path) -> None:
    given = command.format(csv=small_csv).split()
    for out, what in (("file", "expected a folder, found a file"), ("full", "the folder is not empty")):
        assert refused(*given, "--out", out) == f"error: {out}: {what}; give --out another name\n"


@pytest.mark.usefixtures("outputs", "model")
def test_a_file_where_a_folder_of_output_belongs(small_csv: Path, synthetic: ImageDataset) -> None:
    Image.fromarray(synthetic.images[0]).save("a.png")
    said = "error: file: cannot make the folder (File exists)\n"
    assert refused("explain", "--model", "m", "--out", "file", "a.png") == said
    assert refused("sweep", "--data", small_csv, "--rows", "20", "--val", "10", "--out", "file") == said
    assert refused("export-csv", "file") == said


@pytest.mark.usefixtures("outputs")
def test_a_folder_where_a_page_belongs(finished: tuple[Path, Done]) -> None:
    said = "error: full: cannot write (Is a directory)\n"
    assert refused("compare", finished[0], finished[0], "--out", "full") == said
    said = "error: --out: names the page, found 'x.json'; end it in .html; the same in JSON lies beside it\n"
    assert refused("compare", finished[0], finished[0], "--out", "x.json", status=2) == said


@pytest.fixture
def locked(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may write into the folder `locked`, not even root."""
    (here / "locked").mkdir()
    for name in ("open", "mkdir"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name), here / "locked"))


def guarded(call: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    def refuse(path: Any, *rest: Any, **named: Any) -> Any:
        if Path(path).absolute().is_relative_to(folder) and (
            call.__name__ == "mkdir" or rest[0] & (os.O_CREAT | os.O_RDWR)
        ):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return call(path, *rest, **named)

    return refuse


@pytest.mark.usefixtures("locked", "model", "weights")
@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train --data {csv} --out locked/new", "locked: cannot write into it"),
        ("evaluate m --data {csv} --out locked/new", "locked: cannot write into it"),
        ("ensemble m m --data {csv} --out locked", "locked: cannot write into it"),
        ("audit {csv} --out locked/new", "locked: cannot write into it"),
        ("export m --out locked/m.onnx", "locked: cannot write into it"),
        ("release {run} --out locked/new", "locked: cannot write into it"),
        ("explain --model m --out locked a.png", "locked/a-explained.png: cannot write"),
        ("export-csv locked/new", "locked/new: cannot make the folder"),
        ("sweep --data {csv} --rows 20 --val 10 --out locked/new", "locked/new: cannot make the folder"),
        ("compare {run} {run} --out locked/page.html", "locked/page.html: cannot write"),
    ],
)
def test_an_output_folder_that_is_read_only(
    command: str, said: str, small_csv: Path, finished: tuple[Path, Done], synthetic: ImageDataset
) -> None:
    Image.fromarray(synthetic.images[0]).save("a.png")
    given = command.format(csv=small_csv, run=finished[0]).split()
    assert refused(*given) == f"error: {said} (Permission denied)\n"


@pytest.mark.usefixtures("model", "weights")
@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("explain --model m --out new a.png", "new/a-explained.png"),
        ("compare {run} {run} --out page.html", "page.html"),
    ],
)
def test_a_full_disk(
    command: str,
    name: str,
    small_csv: Path,
    finished: tuple[Path, Done],
    synthetic: ImageDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Image.fromarray(synthetic.images[0]).save("a.png")
    Path("new").mkdir()
    monkeypatch.setattr(os, "fsync", full)
    said = re.escape(f"error: {name}: cannot write (No space left on device); make room: ")
    line = refused(*command.format(csv=small_csv, run=finished[0]).split())
    assert re.fullmatch(said + r"\d[\d.]* \w+ are free there\n", line)


@pytest.mark.parametrize("name", ["a b.csv", "two\nlines.csv", "-dash.csv", "größe.csv", "\x1b[31m.csv", "\udcff.csv"])
def test_a_file_whatever_it_is_called(name: str, model: str) -> None:
    shown = {"two\nlines.csv": r"two\nlines.csv", "\x1b[31m.csv": r"\x1b[31m.csv", "\udcff.csv": r"\udcff.csv"}
    said = f"error: {shown.get(name, name)}: "
    assert refused("train", "--data", name) == f"{said}no such file\n"
    Path(name).write_text("x")
    line = f"no column {_COLUMNS[0]} among one column, x (line 1); {EXPECTED}"
    assert refused("evaluate", model, "--data", name) == f"{said}{line}\n"
    assert refused("predict", "--model", model, "--", name) == f"{CANNOT_REJECT}\n{said}{line}\n"
