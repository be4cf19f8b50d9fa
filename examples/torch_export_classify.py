"""python torch_export_classify.py model.pt2 picture.png ...    needs torch, numpy and Pillow: no Attire."""

import json
import sys

import numpy as np
import torch
from PIL import Image, ImageOps


def read(path):
    """28x28, light on black; a larger picture is cut to what differs from its corners. Attire cuts with more care."""
    grey = np.asarray(Image.open(path).convert("L"), float)
    corner = np.median(grey[[0, 0, -1, -1], [0, -1, 0, -1]])
    if grey.shape == (28, 28):
        return np.uint8(255 - grey if corner > 127 else grey)
    far = Image.fromarray(np.uint8(abs(grey - corner)))
    box = far.point(lambda value: 255 * (value > 25)).getbbox()
    return np.asarray(ImageOps.autocontrast(ImageOps.pad(far.crop(box), (28, 28))))


about = {"attire.json": ""}
network = torch.export.load(sys.argv[1], extra_files=about).module()
classes = json.loads(about["attire.json"])["classes"]
images = np.stack([read(path) for path in sys.argv[2:]])
for path, p in zip(sys.argv[2:], network(torch.from_numpy(images)).detach().numpy(), strict=True):
    print(path, classes[p.argmax()], f"{p.max():.3f}")
