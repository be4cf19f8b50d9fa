"""python safetensors_classify.py model.safetensors picture.png ...    needs safetensors, torch, Pillow: no Attire."""

import json
import sys

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import safe_open


def read(path):
    """28x28, light on black; a larger picture is cut to what differs from its corners. Attire cuts with more care."""
    grey = np.asarray(Image.open(path).convert("L"), float)
    corner = np.median(grey[[0, 0, -1, -1], [0, -1, 0, -1]])
    if grey.shape == (28, 28):
        return np.uint8(255 - grey if corner > 127 else grey)
    far = Image.fromarray(np.uint8(abs(grey - corner)))
    box = far.point(lambda value: 255 * (value > 25)).getbbox()
    return np.asarray(ImageOps.autocontrast(ImageOps.pad(far.crop(box), (28, 28))))


with safe_open(sys.argv[1], "pt") as file:
    about = json.loads(file.metadata()["attire"])
    weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
shape, blocks = about["architecture"], (2, 7, 14, 21, 28)  # the last convolution of each of VGG16's blocks
end = blocks[int(shape["freeze_to"][-1]) - 1]
images = np.stack([read(path) for path in sys.argv[2:]])
x = torch.from_numpy(images)[:, None].float() / 255
x = torch.nn.functional.interpolate(x, (shape["image_size"],) * 2, mode="bilinear", antialias=shape["image_size"] < 28)
mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
x = (x.expand(-1, 3, -1, -1) - mean) / std
for i in range(end + 1):
    if f"features.{i}.weight" in weights:
        x = torch.conv2d(x, weights[f"features.{i}.weight"], weights[f"features.{i}.bias"], padding=1).relu()
    if i in blocks:
        x = torch.max_pool2d(x, 2)
x = (torch.nn.functional.adaptive_avg_pool2d(x, shape["pool"]) if shape["pool"] else x).flatten(1)
layers = sorted({int(name.split(".")[1]) for name in weights if name.startswith("classifier.")})
for i in layers:
    x = (x if i == 0 else x.relu()) @ weights[f"classifier.{i}.weight"].T + weights[f"classifier.{i}.bias"]
for path, p in zip(sys.argv[2:], (x / about["temperature"]).softmax(1), strict=True):
    print(path, about["classes"][p.argmax()], f"{p.max():.3f}")
