"""Views of a picture that are cached: plain, mirrored, shifted, synthetic."""

import numpy as np
from numpy.typing import NDArray

from attire.data import synthetic

_VIEWS = ("plain", "flip", "negative")  # as it is, mirrored, black on white
SYNTHETIC_DRAWING, OUTLIER = (f"{name}{synthetic.VERSION}" for name in ("drawing", "outlier"))  # see synthetic.py
_SHIFTS = ((0, -2), (0, 2), (-2, 0), (2, 0), (-1, -1), (1, 1), (-1, 1), (1, -1))  # (down, right), of 28 px


def apply_view(images: NDArray[np.uint8], view: str) -> NDArray[np.uint8]:
    """Images (n, H, W) of a view: one of VIEWS, or "shift+1-2", moved down and right, black filled in; DRAWN and
    STRANGE are those of `drawings`, of 28x28 pictures.

    "... flip" mirrors what was shifted or drawn.
    """
    if view == "negative":
        return 255 - images
    if view == OUTLIER:
        return synthetic.draw_outliers(images)
    if view.startswith(SYNTHETIC_DRAWING):
        images = synthetic.draw_garments(images)
    if down_right := view_shift(view):
        down, right = down_right
        height, width = images.shape[1:]
        moved = np.zeros_like(images)
        moved[:, max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = images[
            :, max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
        ]
        images = moved
    return images[:, :, ::-1].copy() if view.endswith("flip") else images


def view_shift(view: str) -> tuple[int, int] | None:
    """Pixels down and right; None for a view that is not moved."""
    return (int(view[5:7]), int(view[7:9])) if view.startswith("shift") else None


def augmentation_views(flips: bool, shifts: int, drawn: bool = False, strange: bool = False) -> tuple[str, ...]:
    """The views that training draws from, in the order of their numbers: as it is, mirrored, then shifted ones, drawn
    ones, and last what is none of the classes."""
    names = ["plain", *(f"shift{down:+d}{right:+d}" for down, right in _SHIFTS[:shifts]), *([SYNTHETIC_DRAWING] if drawn else [])]
    found = [name for base in names for name in ([base, flipped(base)] if flips else [base])]
    return (*found, OUTLIER) if strange else tuple(found)


def tta_views(count: int) -> tuple[str, ...]:
    """The first `count` views, those that are averaged for an answer: plain, mirrored, then left, right, up, down."""
    return augmentation_views(True, len(_SHIFTS))[:count]


def flipped(view: str) -> str:
    return "flip" if view == "plain" else f"{view} flip"
