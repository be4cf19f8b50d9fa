"""python digits.py FOLDER [ROWS]    scikit-learn's 1,797 handwritten digits in each form of data that Attire takes."""

import struct
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

folder, rows = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None
pixels, labels = load_digits(return_X_y=True)
grey = np.rint(pixels[:rows].reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)  # they come as 8 x 8, 0 to 16
labels = labels[:rows].astype(np.uint8)
images = np.stack([Image.fromarray(x).resize((28, 28), Image.Resampling.BILINEAR) for x in grey])
folder.mkdir(parents=True, exist_ok=True)

# Kaggle's form.
header = ",".join(["label", *(f"pixel{i + 1}" for i in range(784))])
table = np.column_stack([labels, images.reshape(-1, 784)])
np.savetxt(folder / "digits.csv", table, "%d", ",", header=header, comments="")

# IDX, as the official files are.
head = struct.pack(">IIII", 2051, len(images), 28, 28)
(folder / "digits-images-idx3-ubyte").write_bytes(head + images.tobytes())
(folder / "digits-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(labels)) + labels.tobytes())

# Class folders of pictures as a camera would see them: dark ink on white paper.
for i, (image, label) in enumerate(zip(images, labels, strict=True)):
    place = folder / "photos" / f"digit {label}"
    place.mkdir(parents=True, exist_ok=True)
    paper = ImageOps.expand(ImageOps.invert(Image.fromarray(image)).resize((140, 140)), 30, 255)
    paper.save(place / f"{i:04}.png")
