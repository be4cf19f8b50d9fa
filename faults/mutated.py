"""Pictures with bytes changed, cut, doubled and moved, against a real server: no failure, none slow, memory bounded.

    python faults/mutated.py runs/1/model --count 10000

Equal seeds make equal pictures. Each request is timed by itself; four are under way at a time.
"""

import argparse
import collections
import http.client
import io
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from load import quantiles
from serving import resident, served

KINDS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP", "image/bmp": "BMP"}
NUMBERS = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\xc3\x50", b"\0\1", b"\xff\xff")
AT_A_TIME = 4
MAX_SECONDS = 1.0


def originals(rng: np.random.Generator) -> list[tuple[str, bytes]]:
    """Sound pictures of each type: small and middling, grey and colour, progressive, with a palette, with EXIF."""
    found = []
    for media_type, kind in KINDS.items():
        for side, mode in ((28, "L"), (90, "RGB"), (64, "P"), (300, "RGB")):
            image = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).convert("RGB")
            image = image.resize((side, side + 9)).convert(mode if kind in ("PNG", "BMP") or mode != "P" else "RGB")
            exif = Image.Exif()
            exif[0x0112] = 6
            options: dict[str, Any] = {} if kind == "BMP" else {"exif": exif}
            if kind == "JPEG" and side == 90:
                options["progressive"] = True
            out = io.BytesIO()
            image.save(out, kind, **options)
            found.append((media_type, out.getvalue()))
    return found


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four changes, more of them near the head, where the structure is."""
    found = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        size = len(found)
        place = int(rng.integers(0, size if rng.random() < 0.5 else min(size, 64))) if size else 0
        other = int(rng.integers(0, size)) if size else 0
        kind = rng.integers(0, 7)
        if kind == 0 and size:
            found[place] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            number = NUMBERS[rng.integers(0, len(NUMBERS))]
            found[place : place + len(number)] = number
        elif kind == 2:
            del found[place:]
        elif kind == 3:
            del found[place : place + int(rng.integers(1, 64))]
        elif kind == 4:
            found[place:place] = found[other : other + int(rng.integers(1, 256))]
        elif kind == 5:
            found[place:place] = rng.integers(0, 256, int(rng.integers(1, 64)), np.uint8).tobytes()
        else:
            found[place : place + 16] = found[other : other + 16]
    return bytes(found)


def post(port: int, media_type: str, data: bytes) -> tuple[int, float]:
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/predict", data, {"Content-Type": media_type})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    rng = np.random.default_rng(chosen.seed)
    sound = originals(rng)
    with served(chosen.bundle) as (process, port), ThreadPoolExecutor(AT_A_TIME) as pool:
        for media_type, data in sound:
            assert post(port, media_type, data)[0] == 200, media_type
        before, found = resident(process.pid), []
        for start in range(0, chosen.count, 500):
            picked = [sound[rng.integers(0, len(sound))] for _ in range(min(500, chosen.count - start))]
            made = [(media_type, mutated(data, rng)) for media_type, data in picked]
            found += pool.map(lambda one: post(port, *one), made)
        after = resident(process.pid)
        assert process.poll() is None, "the server ended"
        for media_type, data in sound:
            assert post(port, media_type, data)[0] == 200, media_type
    statuses = collections.Counter(status for status, _ in found)
    times = [seconds for _, seconds in found]
    print(f"{chosen.count:,} mutated pictures, seed {chosen.seed}: statuses {dict(sorted(statuses.items()))}")
    print(f"milliseconds {quantiles(times)}; resident {before:.0f} MB before, {after:.0f} MB after")
    assert not [status for status in statuses if status >= 500], "a failure of the server"
    assert max(times) <= MAX_SECONDS, "one took too long"


if __name__ == "__main__":
    main()
