"""What is trained: heads on features, and VGG16's blocks above the freeze boundary in front of them."""

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from attire.blocks import BLOCK_ENDS, block_above, feature_shape
from attire.model import vgg
from attire.model.batch_norm import BatchNorm
from attire.recipes import Recipe


class _MaxAvgPool(nn.Module):
    """(n, C, H, W) to (n, 2 C): each channel's largest value, then each channel's mean."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1)


def _build_mlp(inputs: int, hidden: Sequence[int], classes: int, dropout: float) -> nn.Sequential:
    """Linear, ReLU, Dropout for each hidden width, then a Linear to the classes; PyTorch's default initialisation."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def build_head(
    shape: tuple[int, int, int], conv: Sequence[int], hidden: Sequence[int], classes: int, dropout: float
) -> nn.Sequential:
    """A new head on features (n, C * H * W) in C, H, W order; `conv` puts 3x3 convolutions of these widths in front.

    With convolutions, the map is normalised by batch statistics, batch normalisation and ReLU follow each convolution,
    and max pooling precedes each but the first while the map is wider than 2.
    """
    if not conv:
        return _build_mlp(math.prod(shape), hidden, classes, dropout)
    channels, side = shape[0], shape[1]
    layers: list[nn.Module] = [nn.Unflatten(1, shape), BatchNorm(channels)]
    for i, width in enumerate(conv):
        if i and side > 2:
            layers.append(nn.MaxPool2d(2))
            side //= 2
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), BatchNorm(width), nn.ReLU()]
        channels = width
    mlp = _build_mlp(2 * channels, hidden, classes, dropout)
    return nn.Sequential(*layers, _MaxAvgPool(), nn.Dropout(dropout), *mlp)


class FineTunedHead(nn.Sequential):
    """VGG16's blocks above the boundary, to be fine-tuned from ImageNet's weights, and the head behind them.

    Takes features (n, D) of the boundary as the cache keeps them. blocks: one Sequential a block, its layers named as
    in torchvision's `features`, `norm<i>` after convolution `<i>`; pool: side that the map is averaged to, 0 for none.
    """

    map: nn.Module
    blocks: nn.Sequential
    pool: nn.Module
    flat: nn.Module
    head: nn.Sequential

    def __init__(self, shape: tuple[int, int, int], blocks: nn.Sequential, pool: int, head: nn.Sequential) -> None:
        parts = OrderedDict[str, nn.Module](map=nn.Unflatten(1, shape), blocks=blocks)
        parts["pool"] = nn.AdaptiveAvgPool2d(pool) if pool else nn.Identity()
        super().__init__(parts | OrderedDict[str, nn.Module](flat=nn.Flatten(), head=head))

    @classmethod
    def from_imagenet(cls, weights: Path, recipe: Recipe, head: nn.Sequential) -> "FineTunedHead":
        """The recipe's blocks with ImageNet's weights in front of `head`; see `calibrate_batch_norm`."""
        tensors, names, blocks = vgg.read_tensors(weights), list(BLOCK_ENDS), []
        first = names.index(recipe.freeze_to) + 1
        for i in range(first, first + recipe.finetune_blocks):
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            for index in range(BLOCK_ENDS[names[i - 1]], BLOCK_ENDS[names[i]]):
                layers[str(index)] = layer = vgg.build_layer(index)
                if isinstance(layer, nn.Conv2d):
                    state = {part: tensors[f"features.{index}.{part}"].float() for part in ("weight", "bias")}
                    layer.load_state_dict(state)
                    if recipe.batch_norm:
                        layers[f"norm{index}"] = BatchNorm(layer.out_channels)
            blocks.append(nn.Sequential(layers))
        shape = feature_shape(recipe.freeze_to, recipe.image_size, 0)
        return cls(shape, nn.Sequential(*blocks), recipe.pool, head)

    def forward_features(self, x: Tensor) -> Tensor:
        """The features (n, D') that the head gets, not negative."""
        return cast(Tensor, self.flat(self.pool(self.blocks(self.map(x)))))

    def norms(self) -> list[nn.BatchNorm2d]:
        """Batch normalisation of the fine-tuned blocks, in order."""
        return [layer for layer in self.blocks.modules() if isinstance(layer, nn.BatchNorm2d)]

    def calibrate_batch_norm(self, batches: Iterable[Tensor]) -> None:
        """Set each batch normalisation so that the network computes what it would without, by one pass over `batches`
        (n, D).

        Its running moments become those of the convolution before it, its weight and bias undo them.
        """
        sums: dict[nn.Module, tuple[Tensor, Tensor, int]] = {}

        def add(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].double()
            total, squares, count = sums.get(norm, (torch.zeros(()), torch.zeros(()), 0))
            rows = x.numel() // x.shape[1]
            sums[norm] = (total + x.sum((0, 2, 3)), squares + x.square().sum((0, 2, 3)), count + rows)

        self.eval()
        for norm in self.norms():
            norm.running_mean.zero_(), norm.running_var.fill_(1 - norm.eps)  # type: ignore[union-attr]
        hooks = [norm.register_forward_pre_hook(add) for norm in self.norms()]
        with torch.no_grad():
            for x in batches:
                self.forward_features(x)
            for hook in hooks:
                hook.remove()
            for norm in self.norms():
                total, squares, count = sums[norm]
                mean, variance = total / count, (squares / count - (total / count).square()).clamp_min(0)
                norm.running_mean.copy_(mean), norm.running_var.copy_(variance)  # type: ignore[union-attr]
                norm.weight.copy_((variance + norm.eps).sqrt())
                norm.bias.copy_(mean)

    def folded_convolutions(self) -> dict[str, Tensor]:
        """The fine-tuned convolutions under torchvision's names, batch normalisation folded into them."""
        tensors: dict[str, Tensor] = {}
        for block in self.blocks:
            layers = dict(block.named_children())
            for name, layer in layers.items():
                if not isinstance(layer, nn.Conv2d):
                    continue
                weight, bias = layer.weight, layer.bias
                norm = layers.get(f"norm{name}")
                if isinstance(norm, nn.BatchNorm2d):
                    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
                    weight, bias = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, norm.weight, norm.bias)
                assert bias is not None
                tensors[f"features.{name}.weight"] = weight.detach().cpu()
                tensors[f"features.{name}.bias"] = bias.detach().cpu()
        return tensors


def set_train_mode(head: nn.Module, head_only: bool) -> None:
    """Training mode; with `head_only` fine-tuned blocks stay as they are, and the head behind them learns alone."""
    head.train()
    if isinstance(head, FineTunedHead):
        head.blocks.requires_grad_(not head_only).train(not head_only)


def parameter_groups(head: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
    """Groups for the optimiser: `scale` multiplies the learning rate, once more by `layer_decay` for each block down.

    In heads with convolutions weight decay spares biases and normalisation; in a plain MLP it takes all.
    """
    if not any(isinstance(layer, nn.Conv2d) for layer in head.modules()):
        return [{"params": list(head.parameters()), "scale": 1.0}]
    parts: list[tuple[nn.Module, float]] = [(head, 1.0)]
    if isinstance(head, FineTunedHead):
        blocks = list(head.blocks)
        parts = [(head.head, 1.0)]
        parts += [(block, layer_decay ** (len(blocks) - i)) for i, block in enumerate(blocks)]
    groups: list[dict[str, Any]] = []
    for part, scale in parts:
        decayed = [p for p in part.parameters() if p.ndim > 1]
        rest = [p for p in part.parameters() if p.ndim <= 1]
        groups += [{"params": decayed, "scale": scale}, {"params": rest, "scale": scale, "weight_decay": 0.0}]
    return groups


def last_linear(head: nn.Module) -> nn.Linear:
    """The layer that gives the logits."""
    return [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1]


def penultimate_layers(head: nn.Module) -> nn.Sequential:
    """The head up to the input (n, D) of its last Linear; of a head without hidden layers nothing is left."""
    layers = list(head.children())
    inner = [] if isinstance(layers[-1], nn.Linear) else [penultimate_layers(layers[-1])]
    return nn.Sequential(*layers[:-1], *inner)


def _meta_model(recipe: Recipe, classes: int) -> nn.Sequential:
    """What a recipe trains, from features (n, D) to logits, on PyTorch's meta device: its weights take no memory."""
    end = block_above(recipe.freeze_to, recipe.finetune_blocks)
    with torch.device("meta"):
        blocks = [vgg.build_layer(index) for index in range(BLOCK_ENDS[recipe.freeze_to], BLOCK_ENDS[end])]
        pool = nn.AdaptiveAvgPool2d(recipe.pool) if recipe.pool and recipe.finetune_blocks else nn.Identity()
        shape = feature_shape(end, recipe.image_size, recipe.pool)
        head = build_head(shape, recipe.conv, recipe.hidden, classes, recipe.dropout)
        return nn.Sequential(nn.Unflatten(1, recipe.map_shape), *blocks, pool, nn.Flatten(), head)


def parameter_count(recipe: Recipe, classes: int) -> int:
    """How many parameters a recipe trains."""
    return sum(parameter.numel() for parameter in _meta_model(recipe, classes).parameters())


def training_bytes(recipe: Recipe, classes: int) -> int:
    """About how many bytes training holds: weights, gradients, two moments and an average, and for one batch the output
    of each layer with its gradient."""
    model, sizes = _meta_model(recipe, classes), list[int]()
    for layer in model.modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda layer, inputs, output: sizes.append(output.numel()))
    model(torch.empty(recipe.batch_size, math.prod(recipe.map_shape), device="meta"))
    copies = 5 if recipe.ema else 4
    return 4 * (copies * parameter_count(recipe, classes) + 2 * sum(sizes))


def fold_standardisation(head: nn.Sequential, mean: Tensor, scale: Tensor) -> None:
    """Move (x - mean) / scale into the first Linear, which leaves the function as it is.

    W' = W / scale and b' = b - W' mean; mean and scale: (D,).
    """
    first = next(layer for layer in head if isinstance(layer, nn.Linear))
    with torch.no_grad():
        weight = first.weight.double().cpu() / scale.double()  # (H, D)
        bias = first.bias.double().cpu() - weight @ mean.double()
        first.weight.copy_(weight)
        first.bias.copy_(bias)
