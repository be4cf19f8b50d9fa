"""The pictures of docs/freezing.md: real garments in VGG16's real feature maps. Wants data and weights: `attire fetch`.

python docs/make/pictures.py
"""

import io
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from attire.blocks import BLOCKS
from attire.data.loading import load_dataset
from attire.evaluation.figures import png
from attire.model import pretrained, vgg
from attire.storage import files

FOLDER = Path(__file__).parent.parent / "pictures"
GARMENTS = ("Ankle boot", "Shirt", "Bag")  # the first training image of each
SIDE = 4  # a tile shows so many channels in a row, and so many rows of them
LEAST = 64  # px of one map in a tile
GREYS = 24  # of the palette that the PNG is saved with


def feature_maps(images: NDArray[np.uint8], size: int) -> dict[str, NDArray[np.float32]]:
    """What each block makes of (n, 28, 28) images seen at `size` px: (n, C, H, W), all of it frozen."""
    features = vgg.vgg16(pretrained.vgg16_weights(), "block5", 0, nn.Sequential()).features
    x: Tensor = vgg.preprocess(images, size)
    found = {}
    with torch.inference_mode():
        for index, layer in enumerate(features, 1):
            x = layer(x)
            found |= {name: x.numpy().copy() for name, end in BLOCKS.items() if end == index}
    return found


def liveliest(maps: NDArray[np.float32]) -> NDArray[np.int64]:
    """The channels that differ most between places and garments, liveliest first."""
    spread = maps.transpose(1, 0, 2, 3).reshape(maps.shape[1], -1).std(1)
    return np.argsort(-spread)[: SIDE * SIDE]


def tile(maps: NDArray[np.float32], most: NDArray[np.float32]) -> NDArray[np.float32]:
    """(SIDE * SIDE, H, W) as one picture between white lines; each channel from 0 to its most over all garments."""
    times = -(-LEAST // maps.shape[1])
    shown = (maps / most[:, None, None]).repeat(times, 1).repeat(times, 2)
    framed = np.pad(shown, ((0, 0), (0, 3), (0, 3)), constant_values=1)
    height, width = framed.shape[1:]
    return framed.reshape(SIDE, SIDE, height, width).swapaxes(1, 2).reshape(SIDE * height, SIDE * width)


def sheet(images: NDArray[np.uint8], size: int, boundary: str) -> Figure:
    """A row for each garment: what VGG16 is shown, then its blocks; those behind a recipe's freeze boundary say so."""
    found = feature_maps(images, size)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots(len(images), 1 + len(found))
    seen = vgg.preprocess(images, size)[:, 0].numpy()
    for row, ax in enumerate(axes[:, 0]):
        ax.imshow(seen[row], cmap="gray")
        ax.set_ylabel(GARMENTS[row])
    axes[0, 0].set_title(f"seen: {size} px", fontsize=8)
    behind = False
    for column, (name, maps) in enumerate(found.items(), 1):
        picked = liveliest(maps)
        most = np.maximum(maps[:, picked].max((0, 2, 3)), 1e-6)
        for row, ax in enumerate(axes[:, column]):
            ax.imshow(tile(maps[row, picked], most), cmap="gray", interpolation="nearest")
        size_told = "not computed" if behind else f"{maps.shape[1]} maps, {maps.shape[2]} px"
        axes[0, column].set_title(f"{name}\n{size_told}", fontsize=8)
        behind = behind or name == boundary
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return figure


def small(drawing: bytes) -> bytes:
    """The same PNG with few greys."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(drawing)) as image:
        image.convert("L").quantize(GREYS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    training = load_dataset(None, part="train")
    rows = [int(np.flatnonzero(training.labels == training.classes.index(name))[0]) for name in GARMENTS]
    for recipe, size, boundary in (("classic", 224, "block5"), ("fast", 32, "block3")):
        path = FOLDER / f"freezing-{recipe}.png"
        files.write_bytes(path, small(png(sheet(training.images[rows], size, boundary))))
        print(f"{path}   {files.human_size(path.stat().st_size)}")


if __name__ == "__main__":
    main()
