"""Batch normalisation by all the rows of a batch, whichever processes they are in."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from attire.model import distributed


class BatchNorm(nn.BatchNorm2d):
    """Normalises by the moments of the whole batch, whichever processes its rows are in; torch's own for one process.

    (torch.nn.SyncBatchNorm does the same on CUDA alone, and not for a process without rows.)
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or distributed.count() == 1:
            return super().forward(x)
        found, mean, variance = cast(tuple[Tensor, ...], _Normalised.apply(x, self.weight, self.bias, self.eps))
        for running, value in ((self.running_mean, mean), (self.running_var, variance)):
            cast(Tensor, running).lerp_(value, cast(float, self.momentum))
        cast(Tensor, self.num_batches_tracked).add_(1)
        return found


class _Scaled(nn.Module):
    """What a trained batch normalisation computes, (b, C, H, W) to the same: exporters leave it beside the convolution,
    where they fold batch normalisation into weights that are then not the bundle's any more."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        scale = (norm.weight * (variance + norm.eps).rsqrt()).detach()
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", scale)
        self.register_buffer("shift", (norm.bias - mean * scale).detach())

    def forward(self, x: Tensor) -> Tensor:
        return x * _along(self.scale) + _along(self.shift)


def scale_only(model: nn.Module) -> None:
    """Put a `Scaled` in the place of each batch normalisation."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            model.set_submodule(name, _Scaled(layer))


class _Normalised(torch.autograd.Function):
    """Maps (b, C, H, W), of which b may be 0, normalised; mean and unbiased variance (C,) over all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        given = x.float()
        size = given.numel() // given.shape[1]
        mean = given.sum((0, 2, 3)) / max(1, size)
        squares = (given - _along(mean)).square().sum((0, 2, 3))
        own = torch.stack([torch.full_like(mean, size), mean, squares])
        sizes, means, parts = distributed.side_by_side(own)  # (processes, C) each
        total = sizes.sum(0)
        mean = (sizes * means).sum(0) / total
        squares = (parts + sizes * (means - mean).square()).sum(0)  # Chan et al. 1983: nothing is cancelled out
        scale = (squares / total + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale, total)
        found = (given - _along(mean)) * _along(scale * weight) + _along(bias)
        variance = squares / (total - 1).clamp_min(1)
        ctx.mark_non_differentiable(mean, variance)
        return found.to(x.dtype), mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, scale, total = ctx.saved_tensors
        got, normal = gradients[0].float(), (x.float() - _along(mean)) * _along(scale)
        own = torch.stack([(got * normal).sum((0, 2, 3)), got.sum((0, 2, 3))])  # of this process's rows: add_up's
        straight, level = distributed.summed(own) / total
        found = (got - normal * _along(straight) - _along(level)) * _along(scale * weight)
        return found.to(x.dtype), own[0], own[1], None


def _along(values: Tensor) -> Tensor:
    """(C,) beside maps (b, C, H, W)."""
    return values[:, None, None]
