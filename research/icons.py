"""Icons drawn by this file: 23 garments and 20 other things, each in four manners, and how a bundle answers them.

    python research/icons.py attire/shipped

Flat on nothing, with a pen's outline, as an outline alone, flat on white; eight pairs of colours. They were looked at
while `photos.prepare` and `drawings.drawn` were changed, so that they prove less than pictures that were not.
"""

import io
import sys
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from attire.data.photos import prepare
from attire.inference.classifier import load_bundle

SIDE = 512  # px on which they are drawn
MANNERS = (("flat", False, 128), ("pen", False, 128), ("outline", False, 128), ("flat", True, 400))
COLOURS = (
    "3b88c3 226699,dd2e44 a01428,77b255 3e721d,ffcc4d f4900c,292f33 5a6469,ccd6dd 99aab5,be1931 780a19,8d563c 502d1e"
)
INK = (30, 30, 30, 255)
# A part: its kind, its shade (m: cloth, b: darker, l: ink or darker, g: gone), its numbers in hundredths of the side.
# p: polygon, s: polygon of which the right half mirrors the left, e: ellipse, c: half an ellipse, r: rectangle,
# o: rounded rectangle, h: handle, l: line.
GARMENTS = """
T-shirt/top: s m 40 12 32 12 8 28 18 46 28 40 28 90
T-shirt/top: s m 42 15 34 13 12 24 14 44 30 40 30 86; e g 40 8 60 22
Trouser: s m 28 8 20 92 42 92 50 34
Trouser: s m 30 10 24 92 46 92 50 30; r b 30 10 70 18
Trouser: s m 25 8 14 94 38 94 50 40
Dress: s m 40 20 40 8 34 8 32 26 40 44 20 92
Dress: s m 44 18 36 8 32 10 34 44 16 88 50 92; r b 34 42 66 47
Dress: s m 40 10 30 12 22 30 30 34 34 50 22 92
Pullover: s m 40 12 30 14 14 26 6 82 18 86 27 46 27 88
Pullover: s m 42 10 30 14 16 26 10 80 22 84 29 50 29 86; r b 29 80 71 86; r b 40 8 60 14
Coat: s m 40 8 28 12 16 24 10 72 22 74 28 42 26 94; r l 49 14 51 94; p b 40 8 50 24 46 30 34 12; \
  p b 60 8 50 24 54 30 66 12
Coat: s m 42 6 30 10 18 22 12 66 24 70 30 40 24 96; r l 49 10 51 96; e l 53 40 57 44; e l 53 55 57 59; e l 53 70 57 74
Shirt: s m 42 10 32 12 16 22 8 78 20 82 28 46 28 90; r l 49.3 14 50.7 90; p b 42 10 50 18 44 24 36 12; \
  p b 58 10 50 18 56 24 64 12; e l 51 30 54 33; e l 51 45 54 48; e l 51 60 54 63; e l 51 75 54 78
Sneaker: p m 6 62 10 52 30 46 48 30 56 34 66 40 84 36 94 46 95 62; p b 4 62 96 62 95 72 8 72; l l 40 40 46 48; \
  l l 46 34 53 44
Sneaker: p m 8 60 14 50 38 44 54 30 62 38 78 40 90 34 94 62; p b 6 60 95 60 93 68 10 68
Ankle boot: p m 10 80 12 66 36 56 46 44 48 12 82 12 84 56 86 80; p b 8 80 88 80 88 88 8 88
Ankle boot: p m 14 84 18 70 44 60 52 40 50 10 78 10 76 50 82 70 80 92 72 92 68 80 50 84
Ankle boot: p m 8 78 10 62 40 54 46 36 44 18 84 16 88 78; p b 6 78 90 78 90 88 6 88; l l 46 40 58 44; \
  l l 45 32 58 36; l l 44 48 56 52
Sandal: p b 4 74 20 70 60 68 86 58 96 60 96 74; p m 14 70 30 48 42 46 30 70; \
  p m 60 67 74 40 88 38 90 60 84 60 82 46 76 48 68 66
Sandal: p m 6 80 30 72 60 50 84 40 92 44 90 88 84 88 82 56 62 64 36 80; p m 14 76 22 60 34 58 30 74; \
  p b 74 44 78 22 86 22 84 42
Bag: p m 14 42 86 42 92 90 8 90; h b 30 14 70 66
Bag: o m 12 36 88 88; h b 34 12 66 60; o b 44 52 56 64
Bag: p m 20 40 80 40 94 84 6 84; h b 26 8 74 72; r b 20 40 80 48
"""
OTHERS = """
star: p m 50 5 61 38 96 38 68 59 79 94 50 72 21 94 32 59 4 38 39 38
heart: e m 10 14 52 56; e m 48 14 90 56; p m 14 46 86 46 50 92
disc: e m 8 8 92 92
face: e m 8 8 92 92; e l 30 32 40 46; e l 60 32 70 46; l l 30 66 50 76 70 66
house: p m 50 8 94 48 82 48 82 92 18 92 18 48 6 48; r b 42 60 58 92
car: p m 4 70 6 54 22 50 34 34 66 34 80 50 94 54 96 70; e l 16 60 36 80; e l 64 60 84 80
tree: e m 18 6 82 66; r b 44 60 56 96
cup: p m 16 20 72 20 66 84 22 84; h b 56 28 92 66
cat: e m 14 22 86 90; p m 16 50 14 8 44 26; p m 84 50 86 8 56 26; e l 32 46 40 56; e l 60 46 68 56
fish: e m 6 28 74 74; p m 66 50 96 26 96 76; e l 18 42 24 48
key: e m 4 32 40 68; r m 36 46 96 54; r m 80 50 86 68; r m 68 50 74 64; e g 14 42 28 58
apple: e m 12 26 60 92; e m 40 26 88 92; r b 48 8 53 32
bottle: o m 32 34 68 96; r m 43 6 57 40; r b 32 54 68 74
phone: o m 28 4 72 96; r b 32 12 68 84
arrow: p m 6 40 56 40 56 18 96 50 56 82 56 60 6 60
moon: e m 10 8 90 88; e g 34 2 104 74
umbrella: c m 6 10 94 98; r b 48 50 52 94
book: r m 10 16 90 84; r l 49 16 51 84
plane: p m 4 50 40 42 56 10 66 10 60 42 84 42 92 30 97 30 94 50 97 70 92 70 84 58 60 58 66 90 56 90 40 58
mushroom: c m 8 10 92 94; o b 38 50 62 92
"""


def icons() -> list[tuple[str, str, bytes]]:
    """What it shows, its manner, a PNG file."""
    pairs = [[(*bytes.fromhex(shade), 255) for shade in pair.split()] for pair in COLOURS.split(",")]
    found = []
    for table in (GARMENTS, OTHERS):
        for n, line in enumerate(table.strip().splitlines()):
            name, _, parts = line.partition(": ")
            for k, (manner, paper, side) in enumerate(MANNERS):
                image = drawing(parts.split("; "), manner, pairs[(3 * n + 5 * k) % len(pairs)], paper)
                file = io.BytesIO()
                image.resize((side, side), Image.Resampling.LANCZOS).save(file, "PNG")
                found.append((name if table is GARMENTS else "none", manner, file.getvalue()))
    return found


def drawing(parts: list[str], manner: str, colours: list[Any], paper: bool) -> Image.Image:
    clear = (255, 255, 255, 255) if paper else (0, 0, 0, 0)
    ink = colours[1] if manner == "flat" else INK
    image = Image.new("RGBA", (SIDE, SIDE), clear)
    pen, width = ImageDraw.Draw(image), {"flat": 0, "pen": 14, "outline": 16}[manner]
    for part in parts:
        kind, shade, *numbers = part.split()
        at = [float(number) * SIDE / 100 for number in numbers]
        cloth = clear if manner == "outline" else colours[0 if shade == "m" else 1]
        fill = {"g": clear, "l": ink}.get(shade, cloth)
        line = {"outline": INK, "width": width} if width and shade in "mb" else {"width": 1}
        points = list(zip(at[::2], at[1::2], strict=True))
        if kind == "s":
            points += [(SIDE - x, y) for x, y in reversed(points)]
        if kind in "ps":
            pen.polygon(points, fill=fill)
            if "outline" in line:
                pen.line([*points, *points[:2]], fill=INK, width=width, joint="curve")
        elif kind == "h":
            pen.arc(
                at, 180, 360, fill=INK if manner == "outline" else colours[1], width=16 if manner == "outline" else 26
            )
        elif kind == "l":
            pen.line(points, fill=ink, width=12)
        elif kind == "c":
            pen.pieslice(at, 180, 360, fill=fill, **line)
        elif kind == "o":
            pen.rounded_rectangle(at, 40, fill=fill, **line)
        else:
            (pen.ellipse if kind == "e" else pen.rectangle)(at, fill=fill, **line)
    return image


def main(bundle: str) -> None:
    pictures, model = icons(), load_bundle(bundle, "cpu")
    found = model.predict(np.stack([prepare(data).image for _, _, data in pictures]))
    rows = [(name, answer) for (name, _, _), answer in zip(pictures, found, strict=True)]
    print(f"{'':14}{'right':>8}{'taken':>8}{'both':>8}{'of':>8}")
    garments = [(name, answer) for name, answer in rows if name != "none"]
    groups = {name: [row for row in garments if row[0] == name] for name in dict.fromkeys(name for name, _ in garments)}
    for title, part in {
        **groups,
        "garments": garments,
        "other things": [row for row in rows if row[0] == "none"],
    }.items():
        right = [answer.label == name for name, answer in part]
        taken = [not answer.out_of_distribution for _, answer in part]
        print(f"{title:14}{sum(right):8}{sum(taken):8}{sum(np.logical_and(right, taken)):8}{len(part):8}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
