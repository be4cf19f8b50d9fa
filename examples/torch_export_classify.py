"""python torch_export_classify.py model.pt2 picture.png ...    needs torch, numpy and Pillow: no Attire."""

import json
import sys

import numpy as np
import torch
from PIL import Image

about = {"attire.json": ""}
network = torch.export.load(sys.argv[1], extra_files=about).module()
classes = json.loads(about["attire.json"])["classes"]
images = np.stack([np.asarray(Image.open(path).convert("L").resize((28, 28))) for path in sys.argv[2:]])
for path, p in zip(sys.argv[2:], network(torch.from_numpy(images)).detach().numpy(), strict=True):
    print(path, classes[p.argmax()], f"{p.max():.3f}")
