"""python onnx_classify.py model.onnx picture.png ...    needs onnxruntime, numpy and Pillow: no Attire, no torch."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1])
classes = json.loads(session.get_modelmeta().custom_metadata_map["attire"])["classes"]
images = np.stack([np.asarray(Image.open(path).convert("L").resize((28, 28))) for path in sys.argv[2:]])
for path, p in zip(sys.argv[2:], session.run(None, {"images": images})[0], strict=True):
    print(path, classes[p.argmax()], f"{p.max():.3f}")
