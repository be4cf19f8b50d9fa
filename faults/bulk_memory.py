"""Parquet to Parquet: what `attire predict --out` takes of memory and processor as the rows grow, the model left out.

    python faults/bulk_memory.py [--rows 20000 100000]

Official test images as PNG in Parquet, answered by a model that does nothing: decoding, reading and writing remain.
Each run is a process of its own. Prints a line for each number of rows: peak of resident memory, processor time a row.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from pyarrow import parquet as pq

from attire.data import dataset, loading
from attire.inference import parquet_predict
from attire.inference.prediction import Prediction

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from measuring import forget_peak, peak_memory, spread, told

ROUNDS = 3
GROUP = 1000  # rows of a row group, as Hugging Face writes pictures


class Idle:
    """The same answer for every picture."""

    classes = dataset.FASHION_CLASSES

    def predict(self, images: Any) -> list[Prediction]:
        ranking = (("Bag", 0.5), ("Coat", 0.3), ("Shirt", 0.2))
        return [Prediction("Bag", 0.5, ranking, 1.0, False) for _ in images]


def png(image: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write_rows(path: Path, rows: int) -> None:
    pictures = [png(image) for image in loading.load_dataset(part="test").images[:GROUP]]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("label", pa.int64())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, GROUP):
            cells = [{"bytes": one, "path": f"{start + i}.png"} for i, one in enumerate(pictures[: rows - start])]
            writer.write_table(pa.table([pa.array(cells, kind), pa.array(range(len(cells)))], schema=schema))


def one(source: Path, out: Path) -> None:
    """In a process of its own: one run, told as a line of JSON."""
    base, start = forget_peak(), time.process_time()
    done = parquet_predict.predict_parquet(source, out, Idle(), "idle")
    print(json.dumps({"rows": done.rows, "base": base, "peak": peak_memory(), "cpu": time.process_time() - start}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--one", type=Path, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one(*given.one)
        return
    with tempfile.TemporaryDirectory(prefix="attire-bulk-") as folder:
        for rows in given.rows:
            source = Path(folder) / f"{rows}.parquet"
            write_rows(source, rows)
            found = []
            for i in range(ROUNDS):
                command = [sys.executable, __file__, "--one", str(source), str(Path(folder) / f"{rows}-{i}.parquet")]
                found.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
            peak = spread([line["peak"] / 2**20 for line in found])
            cost = spread([1e6 * line["cpu"] / rows for line in found])
            print(f"{rows:,} rows: peak {told(peak)} MiB, {told(cost)} us of processor time a row")


if __name__ == "__main__":
    main()
