"""python onnx_classify.py model.onnx picture.png ...    needs onnxruntime, numpy and Pillow: no Attire, no torch."""

import json
import sys

import numpy as np
import onnxruntime
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


session = onnxruntime.InferenceSession(sys.argv[1])
classes = json.loads(session.get_modelmeta().custom_metadata_map["attire"])["classes"]
images = np.stack([read(path) for path in sys.argv[2:]])
for path, p in zip(sys.argv[2:], session.run(None, {"images": images})[0], strict=True):
    print(path, classes[p.argmax()], f"{p.max():.3f}")
