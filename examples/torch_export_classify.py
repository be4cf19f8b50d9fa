"""python torch_export_classify.py model.pt2 picture.png ...    needs torch, numpy and Pillow: no Attire."""

import json
import sys

import numpy as np
import torch
from PIL import Image


def read(path):
    """28x28, light on black; Attire also cuts the garment out, which this does not."""
    image = np.asarray(Image.open(path).convert("L").resize((28, 28)))
    return 255 - image if np.median(image[[0, 0, -1, -1], [0, -1, 0, -1]]) > 127 else image


about = {"attire.json": ""}
network = torch.export.load(sys.argv[1], extra_files=about).module()
classes = json.loads(about["attire.json"])["classes"]
images = np.stack([read(path) for path in sys.argv[2:]])
for path, p in zip(sys.argv[2:], network(torch.from_numpy(images)).detach().numpy(), strict=True):
    print(path, classes[p.argmax()], f"{p.max():.3f}")
