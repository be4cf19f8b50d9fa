"""Pictures a core makes ready in a second: bytes to 28x28, in processor time, so that other work hardly counts.

    python research/decoding.py

Two kinds: official test images as 28x28 PNG, taken as they are, and JPEG photographs of 640x480, on which the garment
is looked for. Prints both rates; docs/scale.md reckons with them.
"""

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from attire.data import loading
from attire.data.photos import prepare

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from measuring import ROUNDS, spread, told

PNGS, PHOTOS = 2000, 12


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, quality=85)
    return file.getvalue()


def processor_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    images = loading.load_dataset(part="test").images
    pngs = [encoded(Image.fromarray(image), "PNG") for image in images[:PNGS]]
    large = [Image.fromarray(255 - image).resize((640, 480), Image.Resampling.LANCZOS) for image in images[:PHOTOS]]
    photos = [encoded(image.convert("RGB"), "JPEG") for image in large]
    kinds = {"png": pngs, "photo": photos}
    for pictures in kinds.values():
        prepare(pictures[0])
    for kind, pictures in kinds.items():
        took = [processor_seconds(lambda: [prepare(one) for one in pictures]) for _ in range(ROUNDS)]  # noqa: B023
        rate = spread([len(pictures) / seconds for seconds in took])
        print(f"{kind:6} {told(rate)} a second and core, {np.mean([len(one) for one in pictures]):,.0f} bytes each")


if __name__ == "__main__":
    main()
