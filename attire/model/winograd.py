"""VGG16's 3x3 convolutions by Winograd's minimal filtering: a quarter of the multiplications, the same result but for
rounding.

Lavin and Gray 2015, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308: a tile of m x m outputs
needs t x t inputs, t = m + 2; input tile d, kernel g and output y are related by

    y = A' [(G g G') * (B' d B)] A          * by element, and summed over the input channels

so that each of the t x t elements is a matrix product over channels of its own. The matrices are those of Cook and
Toom for the points 0, 1, -1 (m = 2) and 0, 1, -1, 2, -2 (m = 4), and infinity. Applied on both sides they are one
matrix on the flattened tile: vec(B' d B) = (B' kron B') vec(d).
"""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEAST_CHANNELS = 16  # fewer (VGG16's first layer has 3) leave too little product to pay for the transforms


@dataclass(frozen=True)
class _Form:
    """F(m x m, 3x3). Rows of B' (t, t), G (t, 3) and A' (m, t), t = m + 2."""

    side: int  # m
    inputs: Sequence[Sequence[float]]
    kernels: Sequence[Sequence[float]]
    outputs: Sequence[Sequence[float]]

    @property
    def reach(self) -> int:
        """t: the side of an input tile; neighbours overlap by two."""
        return self.side + 2

    @cached_property
    def b(self) -> Tensor:
        """(t^2, t^2) float32: tile to transformed tile."""
        return _twice(self.inputs).float()

    @cached_property
    def g(self) -> Tensor:
        """(t^2, 9) float64: kernel to transformed kernel."""
        return _twice(self.kernels)

    @cached_property
    def a(self) -> Tensor:
        """(m^2, t^2) float32: sum of products to outputs."""
        return _twice(self.outputs).float()

    @property
    def one(self) -> int:
        """The element that adds itself to every output: the point 1 in both directions. The bias goes there."""
        return self.reach + 1

    def tiles(self, length: int) -> int:
        return -(-length // self.side)


def _twice(matrix: Sequence[Sequence[float]]) -> Tensor:
    with torch.inference_mode(False):  # it outlives the mode it is first asked for in
        once = torch.tensor(matrix, dtype=torch.float64)
        return torch.kron(once, once)


_F2 = _Form(
    2,
    ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    ((1, 1, 1, 0), (0, 1, -1, -1)),
)
_F4 = _Form(
    4,
    (
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
    (
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
    ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
)


def _transform_weight(weight: Tensor, form: _Form = _F4, dtype: torch.dtype = torch.float64) -> Tensor:
    """Kernels (K, C, 3, 3) as (t^2, C, K) float32 factors; differentiable.

    dtype: what is computed in; float64 for a layer that is frozen, float32 for one that changes with every step.
    """
    outputs, inputs = weight.shape[:2]
    flat = weight.to(dtype).permute(2, 3, 1, 0).reshape(9, inputs * outputs)
    return (form.g.to(dtype) @ flat).view(form.reach**2, inputs, outputs).float()


def _tiles_of(padded: Tensor, form: _Form) -> Tensor:
    """All overlapping tiles of (n, m r + 2, m c + 2, C), a view (t, t, n, r, c, C)."""
    n, height, width, channels = padded.shape
    rows, columns = (height - 2) // form.side, (width - 2) // form.side
    sn, sh, sw, sc = padded.stride()
    shape = (form.reach, form.reach, n, rows, columns, channels)
    strides = (sh, sw, sn, form.side * sh, form.side * sw, sc)
    return padded.as_strided(shape, strides, int(padded.storage_offset()))


def _grid_of(images: Tensor, side: int) -> Tensor:
    """(n, side r, side c, K) by place in its tile: a view (side, side, n, r, c, K)."""
    n, height, width, channels = images.shape
    split = images.view(n, height // side, side, width // side, side, channels)
    return split.permute(2, 4, 0, 1, 3, 5)


class _Winograd(torch.autograd.Function):
    """Whole tensors at a time: the transformed tiles are kept for the backward pass, 2.25 times the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor, bias: Tensor, form: _Form) -> Tensor:
        n, height, width, channels = x.shape  # (n, H, W, C)
        rows, columns, outputs = form.tiles(height), form.tiles(width), factors.shape[2]
        padded = F.pad(x, (0, 0, 1, form.side * columns - width + 1, 1, form.side * rows - height + 1))
        tiles = _tiles_of(padded, form).reshape(form.reach**2, -1)
        transformed = torch.mm(form.b, tiles).view(form.reach**2, -1, channels)  # (t^2, P, C), P tiles
        products = torch.bmm(transformed, factors)
        products[form.one].add_(bias)
        y = torch.mm(form.a, products.flatten(1)).view(form.side, form.side, n, rows, columns, outputs)
        ctx.save_for_backward(transformed, factors)
        ctx.form, ctx.shape = form, x.shape
        y = y.permute(2, 3, 0, 4, 1, 5).reshape(n, form.side * rows, form.side * columns, outputs)
        return y[:, :height, :width]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, None]:
        (dy,), (transformed, factors), form = gradients, ctx.saved_tensors, ctx.form
        n, height, width, channels = ctx.shape
        rows, columns, outputs = form.tiles(height), form.tiles(width), factors.shape[2]
        dy = F.pad(dy, (0, 0, 0, form.side * columns - width, 0, form.side * rows - height))
        dy = _grid_of(dy.contiguous(), form.side).reshape(form.side**2, -1)
        products = torch.mm(form.a.t(), dy).view(form.reach**2, -1, outputs)  # their gradient, (t^2, P, K)
        dfactors = torch.bmm(transformed.transpose(1, 2), products) if ctx.needs_input_grad[1] else None
        dx = None
        if ctx.needs_input_grad[0]:
            tiles = torch.bmm(products, factors.transpose(1, 2)).flatten(1)
            tiles = torch.mm(form.b.t(), tiles).view(form.reach, form.reach, n, rows, columns, channels)
            dx = _overlap_add(tiles, form)[:, 1 : height + 1, 1 : width + 1]
        return dx, dfactors, products[form.one].sum(0), None


def _overlap_add(tiles: Tensor, form: _Form) -> Tensor:
    """(t, t, n, r, c, C) added up where they overlap, (n, m (r + 1), m (c + 1), C): the transpose of `tiles_of`."""
    _, _, n, rows, columns, channels = tiles.shape
    m, t = form.side, form.reach
    total = tiles.new_zeros(n, m * (rows + 1), m * (columns + 1), channels)
    for top in range(0, t, m):  # a tile and the strips that it shares with the next ones
        for left in range(0, t, m):
            part = tiles[top : top + m, left : left + m]
            at = total[:, top : top + m * rows, left : left + m * columns]
            n_, h_, w_, c_ = total.stride()
            grid = at.as_strided(part.shape, (h_, w_, n_, m * h_, m * w_, c_), int(at.storage_offset()))
            grid.add_(part)
    return total


def _conv2d_winograd(x: Tensor, transformed_weight: Tensor, bias: Tensor, form: _Form = _F4) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=1)` for 3x3 kernels, with gradients for all three.

    x: (n, C, H, W), fastest in channels_last; transformed_weight: `transform_weight(weight)`. Returns (n, K, H, W) in
    channels_last. float32 on the CPU.
    """
    y: Tensor = _Winograd.apply(x.permute(0, 2, 3, 1), transformed_weight, bias, form)
    return y.permute(0, 3, 1, 2)


class _Scratch(threading.local):
    """A thread's working memory, used over and over, so that it stays in the processor's cache."""

    def __init__(self) -> None:
        self.flat = torch.empty(0)

    def split(self, *shapes: tuple[int, ...]) -> Iterator[Tensor]:
        sizes = [math.prod(shape) for shape in shapes]
        if self.flat.numel() < sum(sizes):
            with torch.inference_mode(False):
                self.flat = torch.empty(sum(sizes))
        parts = torch.split(self.flat[: sum(sizes)], sizes)
        return (part.view(shape) for part, shape in zip(parts, shapes, strict=True))


_SCRATCH = _Scratch()


class Convolution(nn.Module):
    """A frozen 3x3 convolution with the ReLU and, where `pool`, the 2x2 max-pooling that follow it in VGG16.

    (n, C, H, W) to (n, K, H, W), or half the sides; channels_last. Without gradients: `conv2d_winograd` has them.
    """

    def __init__(self, original: nn.Conv2d, pool: bool, form: _Form = _F4) -> None:
        super().__init__()
        self.form, self.pool, self.channels, self.outputs = form, pool, original.in_channels, original.out_channels
        self.factors, self.bias = (
            _transform_weight(original.weight.detach(), form),
            cast(Tensor, original.bias).detach(),
        )

    @property
    def tiles(self) -> int:
        """How many tiles are worked on at a time: 36 transformed ones of these channels take some 5 MB."""
        return max(128, 2**15 // self.channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (n, H, W, C)
        n, height, width, _ = x.shape
        rows, columns = self.form.tiles(height), self.form.tiles(width)
        side = self.form.side // 2 if self.pool else self.form.side
        out = x.new_empty(n, side * rows, side * columns, self.outputs)
        step = max(1, self.tiles // (rows * columns))  # images, or where one has too many tiles: rows of tiles
        lines = min(rows, max(1, self.tiles // columns))
        for i in range(0, n, step):
            for top in range(0, rows, lines):
                part = out[i : i + step, side * top : side * min(top + lines, rows)]
                self.chunk(x[i : i + step], top, part)
        halve = 2 if self.pool else 1
        return out[:, : height // halve, : width // halve].permute(0, 3, 1, 2)

    def chunk(self, x: Tensor, top: int, out: Tensor) -> None:
        """Rows of tiles from `top` on of a few images (c, H, W, C), as many as `out` (c, h, w, K) has room for."""
        form, m, t, side = self.form, self.form.side, self.form.reach, self.form.side // (2 if self.pool else 1)
        (c, height, width, inputs), outputs = x.shape, self.outputs
        rows, columns = out.shape[1] // side, out.shape[2] // side
        p = c * rows * columns
        padded, tiles, transformed, products, y, taller = _SCRATCH.split(
            (c, m * rows + 2, m * columns + 2, inputs),
            (t * t, p * inputs),
            (t * t, p * inputs),
            (t * t, p, outputs),
            (m * m, p * outputs),
            (m * m // 2, p * outputs),
        )
        first, last = max(0, m * top - 1), min(height, m * (top + rows) + 1)
        offset = first - (m * top - 1)
        padded.zero_()[:, offset : offset + last - first, 1 : width + 1] = x[:, first:last]
        tiles.view(t, t, c, rows, columns, inputs).copy_(_tiles_of(padded, form))
        torch.mm(form.b, tiles, out=transformed)
        torch.bmm(transformed.view(t * t, p, inputs), self.factors, out=products)
        products[form.one].add_(self.bias)
        torch.mm(form.a, products.flatten(1), out=y)
        if self.pool:  # before the ReLU, which then has a quarter of the work
            torch.maximum(*y.view(m // 2, 2, m, -1).unbind(1), out=taller.view(m // 2, m, -1))
            y = y[: m * m // 4]
            torch.maximum(*taller.view(m * m // 4, 2, -1).unbind(1), out=y)
        torch.clamp_min(y.view(side, side, c, rows, columns, outputs), 0, out=self.grid(out, side))

    @staticmethod
    def grid(out: Tensor, side: int) -> Tensor:
        """`out` (c, side r, side w, K), a slice of whole images, as a view (side, side, c, r, w, K)."""
        c, height, width, outputs = out.shape
        sn, sh, sw, sk = out.stride()
        shape = (side, side, c, height // side, width // side, outputs)
        return out.as_strided(shape, (sh, sw, sn, side * sh, side * sw, sk), int(out.storage_offset()))


def accelerate(features: nn.Sequential, form: _Form = _F4) -> nn.Sequential:
    """VGG16's `features` with every convolution that gains, and what follows it, in one; indices stay as they were."""
    layers: list[nn.Module] = list(features)
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d) and layer.in_channels >= _LEAST_CHANNELS:
            pool = i + 2 < len(layers) and isinstance(layers[i + 2], nn.MaxPool2d)
            layers[i] = Convolution(layer, pool, form)
            layers[i + 1 : i + 2 + pool] = [nn.Identity()] * (1 + pool)
    return nn.Sequential(*layers)
