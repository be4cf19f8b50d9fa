"""Batch normalisation over the whole batch, whichever processes hold its rows."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from attire.model import distributed


class BatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that normalises by the moments of the whole batch when several processes train together.

    `nn.SyncBatchNorm` does the same, but only on CUDA, and not for a process without rows.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or distributed.world_size() == 1:
            return super().forward(x)
        y, mean, variance = cast(tuple[Tensor, ...], _SyncBatchNorm.apply(x, self.weight, self.bias, self.eps))
        for running, value in ((self.running_mean, mean), (self.running_var, variance)):
            cast(Tensor, running).lerp_(value, cast(float, self.momentum))
        cast(Tensor, self.num_batches_tracked).add_(1)
        return y


class _FrozenBatchNorm(nn.Module):
    """A trained batch normalisation as one multiplication and one addition, (b, C, H, W) to the same shape.

    Exporters fold `nn.BatchNorm2d` into the convolution, whose weights would then differ from the bundle's. They leave
    this module as it is.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        scale = (norm.weight * (variance + norm.eps).rsqrt()).detach()
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", scale)
        self.register_buffer("shift", (norm.bias - mean * scale).detach())

    def forward(self, x: Tensor) -> Tensor:
        return x * _per_channel(self.scale) + _per_channel(self.shift)


def freeze_batch_norm(model: nn.Module) -> None:
    """Replace each `nn.BatchNorm2d` of a model by its frozen form, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            model.set_submodule(name, _FrozenBatchNorm(layer))


class _SyncBatchNorm(torch.autograd.Function):
    """Returns normalised maps (b, C, H, W), and mean and unbiased variance (C,) over all processes; b may be 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        maps = x.float()
        size = maps.numel() // maps.shape[1]
        mean = maps.sum((0, 2, 3)) / max(1, size)
        squares = (maps - _per_channel(mean)).square().sum((0, 2, 3))
        own = torch.stack([torch.full_like(mean, size), mean, squares])
        sizes, means, parts = distributed.gather_columns(own)  # (processes, C) each
        total = sizes.sum(0)
        mean = (sizes * means).sum(0) / total
        squares = (parts + sizes * (means - mean).square()).sum(0)  # Chan et al. 1983: no cancellation
        scale = (squares / total + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale, total)
        y = (maps - _per_channel(mean)) * _per_channel(scale * weight) + _per_channel(bias)
        variance = squares / (total - 1).clamp_min(1)
        ctx.mark_non_differentiable(mean, variance)
        return y.to(x.dtype), mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, scale, total = ctx.saved_tensors
        dy, normal = gradients[0].float(), (x.float() - _per_channel(mean)) * _per_channel(scale)
        # Of this process's rows alone: `distributed.sum_gradients` adds those of weight and bias up.
        own = torch.stack([(dy * normal).sum((0, 2, 3)), dy.sum((0, 2, 3))])  # (2, C): of weight and bias
        mean_dweight, mean_dbias = distributed.all_reduce(own) / total
        dx = (dy - normal * _per_channel(mean_dweight) - _per_channel(mean_dbias)) * _per_channel(scale * weight)
        return dx.to(x.dtype), own[0], own[1], None


def _per_channel(values: Tensor) -> Tensor:
    """(C,) as (C, 1, 1), to broadcast over maps (b, C, H, W)."""
    return values[:, None, None]
