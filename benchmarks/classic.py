"""Recipe `classic` run to its end, for docs/performance.md, beside the plain script's rate (`peers.py --only rates`).

    attire export-csv data
    attire train --recipe classic --backend openvino-int8 --data data/fashion-mnist_train.csv     an empty cache
    python benchmarks/classic.py runs/1

Its seconds are those of the run's own report: reading, VGG16 over every row, ten epochs, evaluation, bundle and report.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import measuring

from attire.evaluation.run_result import RunResult, load_result
from attire.storage import files

OUT = measuring.RESULTS / "classic.json"


def summary(result: RunResult) -> dict[str, Any]:
    """What of a run is told. Raises SystemExit for another recipe, or features that were in the cache before."""
    backend, rows = result.environment["backend"], result.data["rows"]
    if result.recipe != "classic":
        raise SystemExit(f"error: expected a run of classic, found one of {result.recipe}")
    extracted, every = result.seconds["extract"], rows["train"] + rows["val"] + rows["test"]
    if every / extracted > 200:  # images/s: no processor of ours sends pictures of 224 px through VGG16 as fast
        raise SystemExit("error: its features were in the cache already; start it with an empty one (ATTIRE_CACHE)")
    interval = result.test.accuracy
    return {
        "backend": backend,
        "rows": rows,
        "epochs": len(result.history),
        "seconds": result.seconds,
        "accuracy": asdict(interval),
        "environment": result.environment,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="one for each backend")
    found = [summary(load_result(run)) for run in parser.parse_args().runs]
    files.write_json(OUT, {"runs": found})
    print(OUT)


if __name__ == "__main__":
    main()
