"""Pictures that are no garment, to choose a method on and, of other kinds, to report on; and garments slightly altered.

Each set is a function of a generator and gives (n, 28, 28) uint8, light on black where that makes sense.
"""

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits, load_sample_images

from attire.data.pictures import decode_colour

Images = NDArray[np.uint8]
Rng = np.random.Generator

N = 1000
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Italic", "STIXGeneral", "DejaVuSansMono-Oblique")
PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
    *("hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg", "moon.png"),
)


def letters(rng: Rng) -> Images:
    """Latin letters of six fonts that matplotlib ships, 18 to 27 px, slightly moved and turned."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    out = []
    for _ in range(N):
        image = Image.new("L", (28, 28))
        font = ImageFont.truetype(str(folder / f"{rng.choice(FONTS)}.ttf"), int(rng.integers(18, 28)))
        letter = chr(int(rng.integers(26)) + (65 if rng.random() < 0.5 else 97))
        place = tuple(int(v) for v in 14 + rng.integers(-2, 3, 2))
        ImageDraw.Draw(image).text(place, letter, font=font, fill=int(rng.integers(180, 256)), anchor="mm")
        out.append(np.array(image.rotate(float(rng.normal(0, 8)), Image.Resampling.BICUBIC)))
    return np.stack(out)


def strokes(rng: Rng) -> Images:
    """One to four bent lines."""
    out = []
    for _ in range(N):
        image = Image.new("L", (28, 28))
        for _ in range(int(rng.integers(1, 5))):
            points = [tuple(rng.integers(2, 26, 2).tolist()) for _ in range(int(rng.integers(2, 5)))]
            fill, width = int(rng.integers(120, 256)), int(rng.integers(1, 4))
            ImageDraw.Draw(image).line(points, fill=fill, width=width, joint="curve")
        out.append(np.array(image))
    return np.stack(out)


def shapes(rng: Rng) -> Images:
    """One to three filled rectangles, ellipses and triangles of any size."""
    out = []
    for _ in range(N):
        image = Image.new("L", (56, 56))
        draw = ImageDraw.Draw(image)
        for _ in range(int(rng.integers(1, 4))):
            (left, right), (top, bottom) = np.sort(rng.integers(4, 52, (2, 2))).tolist()
            kind, fill = int(rng.integers(3)), int(rng.integers(90, 256))
            if kind < 2:
                (draw.rectangle, draw.ellipse)[kind]((left, top, right + 4, bottom + 4), fill=fill)
            else:
                draw.polygon([tuple(rng.integers(4, 52, 2).tolist()) for _ in range(3)], fill=fill)
        out.append(np.array(image.resize((28, 28), Image.Resampling.BILINEAR)))
    return np.stack(out)


def full_range(x: NDArray[np.float64]) -> Images:
    low, high = x.min((1, 2), keepdims=True), x.max((1, 2), keepdims=True)
    return np.asarray(255 * (x - low) / (high - low), dtype=np.uint8)


def pink_noise(rng: Rng) -> Images:
    """Amplitude falls with frequency to the power of 0.6 to 2."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(28), np.fft.fftfreq(28)))
    frequency[0, 0] = 1
    power = rng.uniform(0.6, 2, (N, 1, 1))
    return full_range(np.fft.ifft2(np.fft.fft2(rng.standard_normal((N, 28, 28))) / frequency**power).real)


def gratings(rng: Rng) -> Images:
    """Waves and bars of 2.5 to 14 px."""
    y, x = np.mgrid[:28, :28]
    angle, length, phase = (rng.uniform(0, high, (N, 1, 1)) for high in (np.pi, 11.5, 7))
    wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / (length + 2.5) + phase)
    wave = np.where(rng.random((N, 1, 1)) < 0.5, wave, np.sign(wave))
    return np.asarray(127.5 + 127.5 * wave * rng.uniform(0.4, 1, (N, 1, 1)), dtype=np.uint8)


def speckle(rng: Rng) -> Images:
    return rng.exponential(rng.uniform(30, 90, (N, 1, 1)), (N, 28, 28)).clip(0, 255).astype(np.uint8)


def patches(photographs: list[Image.Image], rng: Rng) -> Images:
    """Squares of 28, 56 or 84 px, averaged to 28; those of one tone (deviation below 5) are drawn again."""
    out: list[Images] = []
    while len(out) < N:
        image, side = photographs[int(rng.integers(len(photographs)))], 28 * int(rng.integers(1, 4))
        left, top = (int(rng.integers(0, length - side + 1)) for length in image.size)
        patch = np.array(image.crop((left, top, left + side, top + side)).resize((28, 28), Image.Resampling.BOX))
        if patch.std() >= 5:
            out.append(patch)
    return np.stack(out)


def two_photographs(rng: Rng) -> Images:
    return patches([Image.fromarray(image).convert("L") for image in load_sample_images().images], rng)


def skimage_folder() -> Path:
    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the photographs come with scikit-image: pip install scikit-image")
    return Path(found.submodule_search_locations[0]) / "data"


def photographs() -> list[Image.Image]:
    return [Image.open(skimage_folder() / name).convert("L") for name in PHOTOGRAPHS]


def many_photographs(rng: Rng) -> Images:
    return patches(photographs(), rng)


def whole_photographs(rng: Rng) -> Images:
    """Squares of half the shorter side or more, shrunk to 28 px: what a user might send."""
    out, images = [], photographs()
    for _ in range(300):
        image = images[int(rng.integers(len(images)))]
        side = int(min(image.size) * rng.uniform(0.5, 1))
        left, top = (int(rng.integers(0, length - side + 1)) for length in image.size)
        out.append(resized(image.crop((left, top, left + side, top + side))))
    return np.stack(out)


def faces(rng: Rng) -> Images:
    """The 200 patches of 25 px, 100 of them faces, that scikit-image took from Labeled Faces in the Wild."""
    found = np.load(skimage_folder() / "lfw_subset.npy")
    return np.stack([resized(Image.fromarray((255 * x).astype(np.uint8))) for x in found])


def digits(rng: Rng) -> Images:
    """scikit-learn's 1,797 digits of 8x8 px, enlarged to 28x28."""
    return np.stack([resized(Image.fromarray((x / 16 * 255).astype(np.uint8))) for x in load_digits().images])


def digits_with_margin(rng: Rng) -> Images:
    """The same, enlarged to 20x20 on black, as MNIST has them."""
    small = [Image.fromarray((x / 16 * 255).astype(np.uint8)) for x in load_digits().images]
    return np.stack([np.pad(np.array(x.resize((20, 20), Image.Resampling.BICUBIC)), 4) for x in small])


def resized(image: Image.Image) -> Images:
    return np.array(image.resize((28, 28), Image.Resampling.BICUBIC))


def uniform(rng: Rng) -> Images:
    return rng.integers(0, 256, (N, 28, 28), np.uint8)


def gaussian(rng: Rng) -> Images:
    return rng.normal(128, rng.uniform(20, 80, (N, 1, 1)), (N, 28, 28)).clip(0, 255).astype(np.uint8)


def salt_and_pepper(rng: Rng) -> Images:
    return np.where(rng.random((N, 28, 28)) < rng.uniform(0.05, 0.5, (N, 1, 1)), 255, 0).astype(np.uint8)


def blobs(rng: Rng) -> Images:
    """White noise under a Gaussian of 1.5 to 5 px."""
    return full_range(np.stack([gaussian_filter(rng.standard_normal((28, 28)), rng.uniform(1.5, 5)) for _ in range(N)]))


def moved(right: int, down: int, angle: float = 0, side: int = 28) -> Callable[[Images, Rng], Images]:
    def alter(image: Images, rng: Rng) -> Images:
        turned = Image.fromarray(image).rotate(angle, Image.Resampling.BICUBIC)
        out = Image.new("L", (28, 28))
        edge = (28 - side) // 2
        out.paste(turned.resize((side, side), Image.Resampling.LANCZOS), (edge + right, edge + down))
        return np.array(out)

    return alter


def enlarged_jpeg(image: Images, rng: Rng) -> Images:
    """224 px, JPEG of quality 85, read as any file is."""
    file = io.BytesIO()
    Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
    return np.array(decode_colour(file.getvalue()).convert("L").resize((28, 28), Image.Resampling.LANCZOS))


def noisy(deviation: float) -> Callable[[Images, Rng], Images]:
    return lambda image, rng: (image + rng.normal(0, deviation, image.shape)).clip(0, 255).astype(np.uint8)


def brighter(factor: float) -> Callable[[Images, Rng], Images]:
    return lambda image, rng: (image * factor).clip(0, 255).astype(np.uint8)


SETS: dict[str, dict[str, Callable[[Rng], Images]]] = {
    "choosing": {
        "letters": letters,
        "strokes": strokes,
        "shapes": shapes,
        "pink noise": pink_noise,
        "gratings": gratings,
        "speckle": speckle,
        "textures of two photographs": two_photographs,
    },
    "reporting": {
        "digits": digits,
        "digits with a margin": digits_with_margin,
        "noise, uniform": uniform,
        "noise, Gaussian": gaussian,
        "noise, salt and pepper": salt_and_pepper,
        "noise, smooth blobs": blobs,
        "textures of 14 photographs": many_photographs,
        "whole photographs": whole_photographs,
        "faces and other patches": faces,
    },
}
ALTERED: dict[str, Callable[[Images, Rng], Images]] = {
    "mirrored": lambda image, rng: image[:, ::-1],
    "moved by (1, 1) px": moved(1, 1),
    "moved by (2, -2) px": moved(2, -2),
    "turned by 5 degrees": moved(0, 0, 5),
    "turned by 15 degrees": moved(0, 0, 15),
    "shrunk to 24 px": moved(0, 0, 0, 24),
    "shrunk to 20 px": moved(0, 0, 0, 20),
    "darker by 0.7": brighter(0.7),
    "brighter by 1.3": brighter(1.3),
    "blurred, 0.5 px": lambda image, rng: gaussian_filter(image, 0.5),
    "noise of 3 levels": noisy(3),
    "noise of 8 levels": noisy(8),
    "background of 8 levels": lambda image, rng: image.clip(8),
    "enlarged, JPEG, read back": enlarged_jpeg,
}
