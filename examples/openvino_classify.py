"""python openvino_classify.py m.openvino picture.png ...    needs openvino, numpy and Pillow: no Attire, no torch."""

import json
import sys
from pathlib import Path

import numpy as np
import openvino
from PIL import Image


def read(path):
    """28x28, light on black; Attire also cuts the garment out, which this does not."""
    image = np.asarray(Image.open(path).convert("L").resize((28, 28)))
    return 255 - image if np.median(image[[0, 0, -1, -1], [0, -1, 0, -1]]) > 127 else image


folder = Path(sys.argv[1])
exact = {"INFERENCE_PRECISION_HINT": "f32"}  # left to itself OpenVINO takes bf16 where the processor has it
network = openvino.Core().compile_model(folder / "network.xml", "CPU", exact)
classes = json.loads((folder / "attire.json").read_text())["classes"]
images = np.stack([read(path) for path in sys.argv[2:]])
for path, p in zip(sys.argv[2:], network(images)[0], strict=True):
    print(path, classes[p.argmax()], f"{p.max():.3f}")
