"""What is trained: classifiers on features, and VGG16 blocks above the freeze boundary in front of them."""

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from attire.blocks import ENDS, above, feature_shape
from attire.model import vgg
from attire.model.batch_norm import BatchNorm
from attire.recipes import Recipe


class _BothPools(nn.Module):
    """(n, C, H, W) to (n, 2 C): each channel's largest value, then each channel's mean."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1)


def build(
    shape: tuple[int, int, int], conv: Sequence[int], hidden: Sequence[int], classes: int, dropout: float
) -> nn.Sequential:
    """A new classifier of features (n, C * H * W) in C, H, W order; `conv` puts 3x3 convolutions in front.

    The map is normalised by batch statistics; each convolution is followed by batch normalisation and ReLU, and from
    the second on preceded by max pooling while the map is wider than 2.
    """
    if not conv:
        return vgg.build_classifier(math.prod(shape), hidden, classes, dropout)
    channels, side = shape[0], shape[1]
    layers: list[nn.Module] = [nn.Unflatten(1, shape), BatchNorm(channels)]
    for i, width in enumerate(conv):
        if i and side > 2:
            layers.append(nn.MaxPool2d(2))
            side //= 2
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), BatchNorm(width), nn.ReLU()]
        channels = width
    dense = vgg.build_classifier(2 * channels, hidden, classes, dropout)
    return nn.Sequential(*layers, _BothPools(), nn.Dropout(dropout), *dense)


class TunedHead(nn.Sequential):
    """VGG16 blocks above the boundary, to be trained on from ImageNet, and the classifier behind them.

    Takes features (n, D) of the boundary as the cache keeps them. blocks: one Sequential a block, its layers named as
    in torchvision's `features`, `norm<i>` after convolution `<i>`.
    """

    map: nn.Module
    blocks: nn.Sequential
    pool: nn.Module
    flat: nn.Module
    classifier: nn.Sequential

    def __init__(
        self, shape: tuple[int, int, int], blocks: nn.Sequential, pool: int, classifier: nn.Sequential
    ) -> None:
        parts = OrderedDict[str, nn.Module](map=nn.Unflatten(1, shape), blocks=blocks)
        parts["pool"] = nn.AdaptiveAvgPool2d(pool) if pool else nn.Identity()
        super().__init__(parts | OrderedDict[str, nn.Module](flat=nn.Flatten(), classifier=classifier))

    def tuned(self, x: Tensor) -> Tensor:
        """What the classifier gets, (n, D'), not negative."""
        found: Tensor = self.flat(self.pool(self.blocks(self.map(x))))
        return found


def tuned_head(weights: Path, recipe: Recipe, classifier: nn.Sequential) -> TunedHead:
    """The recipe's blocks with ImageNet's weights in front of `classifier`; see `calibrate` for batch normalisation."""
    tensors, names, blocks = vgg.read_tensors(weights), list(ENDS), []
    first = names.index(recipe.freeze_to) + 1
    for i in range(first, first + recipe.finetune_blocks):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index in range(ENDS[names[i - 1]], ENDS[names[i]]):
            layers[str(index)] = layer = vgg.layer(index)
            if isinstance(layer, nn.Conv2d):
                layer.load_state_dict(
                    {part: tensors[f"features.{index}.{part}"].float() for part in ("weight", "bias")}
                )
                if recipe.batch_norm:
                    layers[f"norm{index}"] = BatchNorm(layer.out_channels)
        blocks.append(nn.Sequential(layers))
    shape = feature_shape(recipe.freeze_to, recipe.image_size, 0)
    return TunedHead(shape, nn.Sequential(*blocks), recipe.pool, classifier)


def _norms(head: TunedHead) -> list[nn.BatchNorm2d]:
    return [layer for layer in head.blocks.modules() if isinstance(layer, nn.BatchNorm2d)]


def calibrate(head: TunedHead, batches: Iterable[Tensor]) -> None:
    """Set each batch normalisation so that the network computes what it did without, by one pass over `batches` (n, D).

    Its running moments become those of the convolution before it, its weight and bias undo them.
    """
    sums: dict[nn.Module, tuple[Tensor, Tensor, int]] = {}

    def add(norm: nn.Module, given: tuple[Any, ...]) -> None:
        x = given[0].double()
        total, squares, count = sums.get(norm, (torch.zeros(()), torch.zeros(()), 0))
        rows = x.numel() // x.shape[1]
        sums[norm] = (total + x.sum((0, 2, 3)), squares + x.square().sum((0, 2, 3)), count + rows)

    head.eval()
    for norm in _norms(head):
        norm.running_mean.zero_(), norm.running_var.fill_(1 - norm.eps)  # type: ignore[union-attr]
    hooks = [norm.register_forward_pre_hook(add) for norm in _norms(head)]
    with torch.no_grad():
        for x in batches:
            head.tuned(x)
        for hook in hooks:
            hook.remove()
        for norm in _norms(head):
            total, squares, count = sums[norm]
            mean, variance = total / count, (squares / count - (total / count).square()).clamp_min(0)
            norm.running_mean.copy_(mean), norm.running_var.copy_(variance)  # type: ignore[union-attr]
            norm.weight.copy_((variance + norm.eps).sqrt())
            norm.bias.copy_(mean)


def folded(head: TunedHead) -> dict[str, Tensor]:
    """The trained convolutions under torchvision's names, batch normalisation folded into them."""
    found: dict[str, Tensor] = {}
    for block in head.blocks:
        for name, layer in block.named_children():
            if not isinstance(layer, nn.Conv2d):
                continue
            weight, bias = layer.weight, layer.bias
            norm = dict(block.named_children()).get(f"norm{name}")
            if isinstance(norm, nn.BatchNorm2d):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                moments = (norm.running_mean, norm.running_var, norm.eps)
                weight, bias = fuse_conv_bn_weights(weight, bias, *moments, norm.weight, norm.bias)
            assert bias is not None
            found |= {f"features.{name}.weight": weight.detach().cpu(), f"features.{name}.bias": bias.detach().cpu()}
    return found


def set_phase(head: nn.Module, probing: bool) -> None:
    """Training mode; while `probing`, trained blocks stay as they are and only the classifier behind them learns."""
    head.train()
    if isinstance(head, TunedHead):
        head.blocks.requires_grad_(not probing).train(not probing)


def parameter_groups(head: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
    """For the optimiser: `scale` multiplies the learning rate, by `layer_decay` once more for each block further down.

    In heads with convolutions biases and normalisation are not decayed; in the plain classifier all is.
    """
    if not any(isinstance(layer, nn.Conv2d) for layer in head.modules()):
        return [{"params": list(head.parameters()), "scale": 1.0}]
    parts: list[tuple[nn.Module, float]] = [(head, 1.0)]
    if isinstance(head, TunedHead):
        blocks = list(head.blocks)
        parts = [(head.classifier, 1.0)]
        parts += [(block, layer_decay ** (len(blocks) - i)) for i, block in enumerate(blocks)]
    groups: list[dict[str, Any]] = []
    for part, scale in parts:
        decayed = [p for p in part.parameters() if p.ndim > 1]
        rest = [p for p in part.parameters() if p.ndim <= 1]
        groups += [{"params": decayed, "scale": scale}, {"params": rest, "scale": scale, "weight_decay": 0.0}]
    return groups


def last_linear(head: nn.Module) -> nn.Linear:
    return [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1]


def classes_of(head: nn.Module) -> int:
    return last_linear(head).out_features


def last_hidden(head: nn.Module) -> nn.Sequential:
    """The head up to what its last Linear gets, (n, D): one without hidden layers leaves its features as they are."""
    layers = list(head.children())
    last = [] if isinstance(layers[-1], nn.Linear) else [last_hidden(layers[-1])]
    return nn.Sequential(*layers[:-1], *last)


def _outline(recipe: Recipe, classes: int) -> nn.Sequential:
    """What a recipe trains, from features (n, D) to logits, without memory for its weights: to be counted."""
    end = above(recipe.freeze_to, recipe.finetune_blocks)
    with torch.device("meta"):
        blocks = [vgg.layer(index) for index in range(ENDS[recipe.freeze_to], ENDS[end])]
        pool = nn.AdaptiveAvgPool2d(recipe.pool) if recipe.pool and recipe.finetune_blocks else nn.Identity()
        shape = feature_shape(end, recipe.image_size, recipe.pool)
        head = build(shape, recipe.conv, recipe.hidden, classes, recipe.dropout)
        return nn.Sequential(nn.Unflatten(1, recipe.map_shape), *blocks, pool, nn.Flatten(), head)


def weight_count(recipe: Recipe, classes: int) -> int:
    return sum(parameter.numel() for parameter in _outline(recipe, classes).parameters())


def training_bytes(recipe: Recipe, classes: int) -> int:
    """About what training holds: weights, gradients, two moments, an average if any; and for a batch what each layer
    hands on, with its gradient."""
    whole, values = _outline(recipe, classes), list[int]()
    for layer in whole.modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda layer, given, found: values.append(found.numel()))
    whole(torch.empty(recipe.batch_size, math.prod(recipe.map_shape), device="meta"))
    copies = 5 if recipe.ema else 4
    return 4 * (copies * weight_count(recipe, classes) + 2 * sum(values))


def fold_standardisation(classifier: nn.Sequential, mean: Tensor, scale: Tensor) -> None:
    """Move (x - mean) / scale into the first Linear: W' = W / scale, b' = b - W' mean. The function stays the same."""
    first = next(layer for layer in classifier if isinstance(layer, nn.Linear))
    with torch.no_grad():
        weight = first.weight.double().cpu() / scale.double()  # (H, D)
        bias = first.bias.double().cpu() - weight @ mean.double()
        first.weight.copy_(weight)
        first.bias.copy_(bias)
