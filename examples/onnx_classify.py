"""python onnx_classify.py model.onnx picture.png ...    needs onnxruntime, numpy and Pillow: no Attire, no torch."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image


def read(path):
    """28x28, light on black; Attire also cuts the garment out, which this does not."""
    image = np.asarray(Image.open(path).convert("L").resize((28, 28)))
    return 255 - image if np.median(image[[0, 0, -1, -1], [0, -1, 0, -1]]) > 127 else image


session = onnxruntime.InferenceSession(sys.argv[1])
classes = json.loads(session.get_modelmeta().custom_metadata_map["attire"])["classes"]
images = np.stack([read(path) for path in sys.argv[2:]])
for path, p in zip(sys.argv[2:], session.run(None, {"images": images})[0], strict=True):
    print(path, classes[p.argmax()], f"{p.max():.3f}")
