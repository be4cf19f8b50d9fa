"""Views of a picture that are cached: as it is, mirrored, shifted, inverted, or synthetic.

"plain" is the picture as it is, "flip" mirrored, "negative" black on white, "shift+1-2" moved 1 pixel down and 2 to the
left, with black filled in. SYNTHETIC_DRAWING and OUTLIER are made by `data.synthetic` from pictures of 28 x 28 pixels.
"... flip" is mirrored after that.
"""

import numpy as np
from numpy.typing import NDArray

from attire.data import synthetic

SYNTHETIC_DRAWING, OUTLIER = (f"{name}{synthetic.VERSION}" for name in ("drawing", "outlier"))
_SHIFTS = ((0, -2), (0, 2), (-2, 0), (2, 0), (-1, -1), (1, 1), (-1, 1), (1, -1))  # (down, right), of 28 px


def apply_view(images: NDArray[np.uint8], view: str) -> NDArray[np.uint8]:
    """Images (n, H, W) in this view."""
    if view == "negative":
        return 255 - images
    if view == OUTLIER:
        return synthetic.draw_outliers(images)
    if view.startswith(SYNTHETIC_DRAWING):
        images = synthetic.draw_garments(images)
    if shift := view_shift(view):
        down, right = shift
        height, width = images.shape[1:]
        moved = np.zeros_like(images)
        moved[:, max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = images[
            :, max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
        ]
        images = moved
    return images[:, :, ::-1].copy() if view.endswith("flip") else images


def view_shift(view: str) -> tuple[int, int] | None:
    """Pixels down and right; None for a view that is not shifted."""
    return (int(view[5:7]), int(view[7:9])) if view.startswith("shift") else None


def augmentation_views(
    flips: bool, shifts: int, synthetic_drawings: bool = False, outlier_exposure: bool = False
) -> tuple[str, ...]:
    """The views of training's augmentation, in the order of their numbers: plain, shifted, drawings, last outliers.

    With `flips` the mirrored view follows each but the outliers.
    """
    names = ["plain", *(f"shift{down:+d}{right:+d}" for down, right in _SHIFTS[:shifts])]
    names += [SYNTHETIC_DRAWING] if synthetic_drawings else []
    if flips:
        names = [view for name in names for view in (name, flipped(name))]
    return (*names, OUTLIER) if outlier_exposure else tuple(names)


def tta_views(count: int) -> tuple[str, ...]:
    """The first `count` views of test-time augmentation: plain, mirrored, then left, right, up and down, each mirrored
    too."""
    return augmentation_views(True, len(_SHIFTS))[:count]


def flipped(view: str) -> str:
    return "flip" if view == "plain" else f"{view} flip"
