"""VGG16's blocks as freeze boundaries: where each ends, its channels, the size of its features. Without torch."""

from attire.errors import UsageError

# Where each block of torchvision's `vgg16().features` ends, its max pooling included
BLOCKS = {"block1": 5, "block2": 10, "block3": 17, "block4": 24, "block5": 31}
UNFROZEN = "none"  # the boundary below which nothing is frozen: its features are the preprocessed picture
BLOCK_ENDS = {UNFROZEN: 0, **BLOCKS}  # where `features` is cut for each boundary
CHANNELS = {UNFROZEN: 3, "block1": 64, "block2": 128, "block3": 256, "block4": 512, "block5": 512}

# torchvision's index in `features`: (output, input) channels; every kernel is 3x3
CONVOLUTIONS = {
    **{0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256), 14: (256, 256)},
    **{17: (512, 256), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)},
}
WEIGHT_SHAPES: dict[str, tuple[int, ...]] = {
    f"features.{index}.{part}": (outputs, inputs, 3, 3) if part == "weight" else (outputs,)
    for index, (outputs, inputs) in CONVOLUTIONS.items()
    for part in ("weight", "bias")
}


def map_side(freeze_to: str, size: int) -> int:
    """Return the side of the feature map of a `size` x `size` picture at the boundary. Each block halves it."""
    return size >> list(BLOCK_ENDS).index(freeze_to)


def block_above(freeze_to: str, blocks: int) -> str:
    """Return the block that lies `blocks` above `freeze_to`. Raises UsageError where VGG16 has none."""
    names = list(BLOCK_ENDS)
    if freeze_to not in BLOCK_ENDS:
        return freeze_to  # `feature_shape` raises the error
    most = len(names) - 1 - names.index(freeze_to)
    if blocks > most:
        raise UsageError("--finetune-blocks", f"expected at most {most} above {freeze_to}, found {blocks}")
    return names[names.index(freeze_to) + blocks]


def feature_shape(freeze_to: str, size: int, pool: int) -> tuple[int, int, int]:
    """Return (channels, side, side) of one picture's features; `pool` is the pooled side, 0 for none.

    Raises UsageError for an unknown boundary, and where nothing would be left.
    """
    if freeze_to not in BLOCK_ENDS:
        raise UsageError("--freeze-to", f"expected one of {', '.join(BLOCK_ENDS)}, found {freeze_to!r}")
    if map_side(freeze_to, size) < 1:
        least = 1 << list(BLOCK_ENDS).index(freeze_to)
        raise UsageError("--image-size", f"{size} px leaves no feature at {freeze_to}", do=f"use {least} px or more")
    side = pool or map_side(freeze_to, size)
    return CHANNELS[freeze_to], side, side
