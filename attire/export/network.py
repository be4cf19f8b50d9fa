"""What an export holds: a bundle's network with everything before and behind it, from raw images to probabilities."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attire.features import views
from attire.inference.classifier import Classifier
from attire.inference.out_of_distribution import add_confidence_term, mahalanobis_distance, pool_features
from attire.model import vgg


class EndToEndNetwork(nn.Module):
    """Raw images (n, 28, 28) uint8 to calibrated probabilities (n, K) float32: preprocessing and temperature inside.

    So is test-time augmentation: for V views the batches inside are V times as large. Where the classifier has an
    OODDetector, distances (n,) are a second output. dtype: what the network computes with; both outputs are float32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.model, self.dtype = classifier.model.float(), torch.float32
        self.size, self.views = classifier.architecture.image_size, classifier.architecture.views
        self.temperature = classifier.temperature
        self.ood: nn.Module | None = None
        if (ood_detector := classifier.ood_detector) is not None:
            self.ood, self.confidence_weight = nn.Module(), ood_detector.confidence_weight
            for name, value in ood_detector.tensors().items():
                self.ood.register_buffer(name.removeprefix(ood_detector.PREFIX), value)
        self.register_buffer("mean", torch.tensor(vgg.IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(vgg.IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        count, grey = images.shape[0], images[:, None].float() / 255
        if len(self.views) > 1:
            grey = torch.cat([_apply_view(grey, view) for view in self.views])  # (V * n, 1, 28, 28), view after view
        if self.size != 28:
            grey = F.interpolate(grey, size=(self.size, self.size), mode="bilinear", antialias=self.size < 28)
        x = (grey.expand(-1, 3, -1, -1) - self.mean) / self.std
        x = self.model.avgpool(self.model.features(x.to(self.dtype))).flatten(1)
        logits = self.model.classifier(x).float()
        if len(self.views) > 1:
            x, logits = x[:count], logits.unflatten(0, (len(self.views), count)).mean(0)
        probabilities = torch.softmax(logits / self.temperature, 1)
        if self.ood is None:
            return probabilities
        centre, whitening, class_means = (getattr(self.ood, name) for name in ("centre", "whitening", "class_means"))
        distances = mahalanobis_distance(pool_features(x, len(centre)), centre, whitening, class_means)
        return probabilities, add_confidence_term(distances, probabilities, self.confidence_weight)


def _apply_view(grey: Tensor, view: str) -> Tensor:
    """As `features.views.apply_view`, for (n, 1, 28, 28) of 0..1 and in operations that every runtime has."""
    if down_right := views.view_shift(view):
        down, right = down_right
        grey = F.pad(grey, (right, -right, down, -down))
    return grey.flip(3) if view.endswith("flip") else grey
