"""schemathesis against a real server: its answers are those that /openapi.json describes, and none is a failure.

    python faults/described.py runs/1/model --examples 150

Every check of schemathesis is on. It is told how to make pictures, for an OpenAPI description cannot say what bytes a
PNG is made of; half of those it gets are sound, and requests it makes invalid on purpose keep what it made of them.
"""

import argparse
import io
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
KINDS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP", "image/bmp": "BMP"}


def tell_schemathesis() -> None:
    """Pictures of each type, of all sizes and modes that Pillow can write there. Called where this file is a hook."""
    import schemathesis
    from hypothesis import strategies as st
    from PIL import Image

    def picture(kind: str, side: tuple[int, int], mode: str, seed: int) -> bytes:
        out = io.BytesIO()
        Image.effect_noise(side, 1 + seed).convert(mode).save(out, kind)
        return out.getvalue()

    sides = st.tuples(st.integers(8, 64), st.integers(8, 64))
    for media_type, kind in KINDS.items():
        made = st.builds(picture, st.just(kind), sides, st.sampled_from(["L", "RGB"]), st.integers(0, 200))
        schemathesis.openapi.media_type(media_type, made)


def main() -> None:
    sys.path.append(str(HERE.parent / "benchmarks"))
    from serving import served

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--examples", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    chosen, more = parser.parse_known_args()  # the rest is for schemathesis
    with served(chosen.bundle) as (_, port):
        run = [
            *(str(Path(sys.executable).with_name("schemathesis")), "run"),
            f"http://127.0.0.1:{port}/openapi.json",
            *("--checks", "all", "--max-examples", str(chosen.examples), "--seed", str(chosen.seed)),
            *("--no-shrink", "--continue-on-failure", "--request-timeout", "20", "--max-response-time", "5"),
            *more,
        ]
        path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "SCHEMATHESIS_HOOKS": "described", "PYTHONPATH": path}
        sys.exit(subprocess.run(run, env=environment).returncode)


if __name__ == "__main__":
    main()
elif os.environ.get("SCHEMATHESIS_HOOKS") == "described":
    tell_schemathesis()
