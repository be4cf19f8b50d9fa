"""What a cluster costs: the same extraction by one process with all cores, and by two nodes of half of them each.

    python benchmarks/cluster_overhead.py --images 20000 --times 3

Recipe `fast`'s features of official training images, alternating, each into an empty cache; nodes are processes of this
machine (`tests/nodes.py`). Seconds with and without the driver's joining. Run it on a quiet machine.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "faults")]

from cluster import cache_of, digests, measured_before  # noqa: E402

from attire import cluster  # noqa: E402
from attire.data.loading import load_dataset  # noqa: E402
from attire.features import backbones, cache  # noqa: E402
from attire.model import devices, pretrained  # noqa: E402
from attire.model.weights import read_weights, tensor_digest  # noqa: E402
from attire.recipes import named  # noqa: E402
from tests.nodes import nodes  # noqa: E402


@contextmanager
def empty_cache(folder: Path) -> Iterator[None]:
    known = measured_before()
    with cache_of(folder):
        folder.mkdir()
        for name, data in known.items():
            (folder / name).write_bytes(data)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--times", type=int, default=3)
    given = parser.parse_args()
    recipe, device, data = named("fast"), torch.device("cpu"), load_dataset()
    images, weights = data.images[: given.images], pretrained.vgg16_weights()
    precision, backend = backbones.choose_backbone(recipe.freeze_to, recipe.backend, recipe.precision, device)
    digest = tensor_digest(read_weights(weights))
    spec = cache.FeatureSpec(recipe.freeze_to, recipe.image_size, recipe.pool, digest, precision, backend=backend)
    load = partial(backbones.load_backbone, weights, spec, device, 10**6)
    load()  # measured once, before any clock runs
    asked = (images, f"first {len(images)}", spec, load, None)
    alone, joined, inside, equal = [], [], [], []
    with tempfile.TemporaryDirectory(prefix="attire-overhead-") as name:
        folder, cores = Path(name), os.cpu_count() or 2
        with nodes(folder, cpus=cores // 2) as found:
            os.environ.update({key: found.environment[key] for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")})
            for i in range(given.times):
                with empty_cache(folder / f"alone-{i}"):
                    start = time.perf_counter()
                    one = digests(cache.extract(*asked).folder)
                    alone.append(time.perf_counter() - start)
                with empty_cache(folder / f"joined-{i}"):
                    start = time.perf_counter()
                    with cluster.connect(found.address) as there:
                        began = time.perf_counter()
                        two = digests(cache.extract(*asked, there.extract_shards).folder)
                        inside.append(time.perf_counter() - began)
                    joined.append(time.perf_counter() - start)
                equal.append(one == two)
    told = {
        "images": len(images),
        "precision": precision,
        "alone": [round(x, 1) for x in alone],
        "cluster": [round(x, 1) for x in inside],
        "cluster, joining included": [round(x, 1) for x in joined],
        "overhead": round(statistics.median(inside) / statistics.median(alone) - 1, 3),
        "overhead, joining included": round(statistics.median(joined) / statistics.median(alone) - 1, 3),
        "equal": all(equal),
        "load before": os.getloadavg()[0],
        **devices.environment(device),
    }
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
