"""VGG16's frozen 3x3 convolutions by Winograd's minimal filtering: a quarter of the multiplications, the same result
but for rounding.

Lavin and Gray 2015, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308: F(4x4, 3x3). A tile of 4 x 4
outputs needs 6 x 6 inputs; input tile d, kernel g and output y are related by

    y = A' [(G g G') * (B' d B)] A          * by element, and summed over the input channels

so that each of the 6 x 6 elements is a matrix product over channels of its own. The matrices are those of Cook and
Toom for the points 0, 1, -1, 2, -2 and infinity. Applied on both sides they are one matrix on the flattened tile:
vec(B' d B) = (B' kron B') vec(d).
"""

import math
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn

_LEAST_CHANNELS = 16  # fewer (VGG16's first layer has 3) leave too little product to pay for the transforms
_OUT = 4  # side of a tile of outputs
_IN = 6  # side of a tile of inputs; neighbours overlap by two
_BIAS = _IN + 1  # the element that adds itself to every output: the point 1 in both directions

# B' (6, 6), G (6, 3) and A' (4, 6).
_INPUT_TRANSFORM = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_KERNEL_TRANSFORM = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OUTPUT_TRANSFORM = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


@cache
def _both_sides(matrix: Sequence[Sequence[float]], dtype: torch.dtype = torch.float32) -> Tensor:
    """(m, n) as (m^2, n^2), to be applied to a flattened tile or kernel."""
    with torch.inference_mode(False):  # it outlives the mode in which it is first asked for
        once = torch.tensor(matrix, dtype=torch.float64)
        return torch.kron(once, once).to(dtype)


def _transform_weight(weight: Tensor) -> Tensor:
    """Kernels (K, C, 3, 3) as (36, C, K) float32 factors, computed in float64."""
    outputs, inputs = weight.shape[:2]
    flat = weight.double().permute(2, 3, 1, 0).reshape(9, inputs * outputs)
    return (_both_sides(_KERNEL_TRANSFORM, torch.float64) @ flat).view(_IN**2, inputs, outputs).float()


def _tiles_of(padded: Tensor) -> Tensor:
    """All overlapping tiles of (n, 4 r + 2, 4 c + 2, C), a view (6, 6, n, r, c, C)."""
    n, height, width, channels = padded.shape
    rows, columns = (height - 2) // _OUT, (width - 2) // _OUT
    sn, sh, sw, sc = padded.stride()
    shape = (_IN, _IN, n, rows, columns, channels)
    return padded.as_strided(shape, (sh, sw, sn, _OUT * sh, _OUT * sw, sc), int(padded.storage_offset()))


class _Scratch(threading.local):
    """A thread's working memory, used over and over, so that it stays in the processor's cache."""

    def __init__(self) -> None:
        self.flat = torch.empty(0)

    def split(self, *shapes: tuple[int, ...]) -> Iterator[Tensor]:
        """Uninitialised tensors of these shapes, valid until the next call."""
        sizes = [math.prod(shape) for shape in shapes]
        if self.flat.numel() < sum(sizes):
            with torch.inference_mode(False):
                self.flat = torch.empty(sum(sizes))
        parts = torch.split(self.flat[: sum(sizes)], sizes)
        return (part.view(shape) for part, shape in zip(parts, shapes, strict=True))


_SCRATCH = _Scratch()


class WinogradConv2d(nn.Module):
    """A frozen 3x3 convolution with the ReLU and, where `pool`, the 2x2 max-pooling that follow it in VGG16.

    (n, C, H, W) to (n, K, H, W), or half the sides; float32 on the CPU, channels_last, without gradients.
    """

    def __init__(self, original: nn.Conv2d, pool: bool) -> None:
        super().__init__()
        self.pool, self.channels, self.outputs = pool, original.in_channels, original.out_channels
        self.side = _OUT // 2 if pool else _OUT  # of what one tile gives
        self.factors = _transform_weight(original.weight.detach())
        self.bias = cast(Tensor, original.bias).detach()

    @property
    def tiles(self) -> int:
        """How many tiles are worked on at a time: 36 transformed ones of these channels take some 5 MB."""
        return max(128, 2**15 // self.channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (n, H, W, C)
        n, height, width, _ = x.shape
        rows, columns, side = -(-height // _OUT), -(-width // _OUT), self.side
        out = x.new_empty(n, side * rows, side * columns, self.outputs)
        images = max(1, self.tiles // (rows * columns))  # at a time; of one with too many tiles so many rows of tiles:
        lines = min(rows, max(1, self.tiles // columns))
        for i in range(0, n, images):
            for top in range(0, rows, lines):
                part = out[i : i + images, side * top : side * min(top + lines, rows)]
                self._compute(x[i : i + images], top, part)
        halve = 2 if self.pool else 1
        return out[:, : height // halve, : width // halve].permute(0, 3, 1, 2)

    def _compute(self, x: Tensor, top: int, out: Tensor) -> None:
        """Rows of tiles from `top` on of a few images (c, H, W, C), as many as `out` (c, h, w, K) has room for."""
        (c, height, width, inputs), outputs, side = x.shape, self.outputs, self.side
        rows, columns = out.shape[1] // side, out.shape[2] // side
        p = c * rows * columns
        padded, tiles, transformed, products, y, taller = _SCRATCH.split(
            (c, _OUT * rows + 2, _OUT * columns + 2, inputs),
            (_IN**2, p * inputs),
            (_IN**2, p * inputs),
            (_IN**2, p, outputs),
            (_OUT**2, p * outputs),
            (_OUT**2 // 2, p * outputs),
        )
        first, last = max(0, _OUT * top - 1), min(height, _OUT * (top + rows) + 1)
        offset = first - (_OUT * top - 1)
        padded.zero_()[:, offset : offset + last - first, 1 : width + 1] = x[:, first:last]
        tiles.view(_IN, _IN, c, rows, columns, inputs).copy_(_tiles_of(padded))
        torch.mm(_both_sides(_INPUT_TRANSFORM), tiles, out=transformed)
        torch.bmm(transformed.view(_IN**2, p, inputs), self.factors, out=products)
        products[_BIAS].add_(self.bias)
        torch.mm(_both_sides(_OUTPUT_TRANSFORM), products.flatten(1), out=y)
        if self.pool:  # before the ReLU, which then has a quarter of the work
            upper, lower = y.view(_OUT // 2, 2, _OUT, -1).unbind(1)
            torch.maximum(upper, lower, out=taller.view(_OUT // 2, _OUT, -1))
            left, right = taller.view(_OUT**2 // 4, 2, -1).unbind(1)
            y = y[: _OUT**2 // 4]
            torch.maximum(left, right, out=y)
        torch.clamp_min(y.view(side, side, c, rows, columns, outputs), 0, out=_grid_of(out, side))


def _grid_of(out: Tensor, side: int) -> Tensor:
    """`out` (c, side r, side w, K), a slice of whole images, as a view (side, side, c, r, w, K)."""
    c, height, width, outputs = out.shape
    sn, sh, sw, sk = out.stride()
    shape = (side, side, c, height // side, width // side, outputs)
    return out.as_strided(shape, (sh, sw, sn, side * sh, side * sw, sk), int(out.storage_offset()))


def accelerate(features: nn.Sequential) -> nn.Sequential:
    """VGG16's `features` with each convolution that gains, and what follows it, in one; indices stay as they were."""
    layers: list[nn.Module] = list(features)
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d) and layer.in_channels >= _LEAST_CHANNELS:
            pool = i + 2 < len(layers) and isinstance(layers[i + 2], nn.MaxPool2d)
            layers[i] = WinogradConv2d(layer, pool)
            layers[i + 1 : i + 2 + pool] = [nn.Identity()] * (1 + pool)
    return nn.Sequential(*layers)
