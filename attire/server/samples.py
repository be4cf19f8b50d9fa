"""Sample garments for the page: one small PNG of 28x28 cells, their names inside it."""

import json
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from attire.evaluation.png import read_sheet


def read_samples() -> list[tuple[str, NDArray[np.uint8]]]:
    """Name and image (28, 28) uint8 of each sample in the package; none where it ships none.

    The names are a JSON list in the PNG's text chunk "names"; the sheet's last cells may be empty.
    """
    path = files("attire").joinpath("shipped/samples.png")
    if not path.is_file():
        return []
    cells, texts = read_sheet(path.read_bytes())
    return list(zip(json.loads(texts["names"]), cells, strict=False))
