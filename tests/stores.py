"""A real S3 server on 127.0.0.1: moto's, where its program can be found; and Parquet files of pictures."""

import io
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image
from pyarrow import parquet as pq

VARIABLE = "ATTIRE_TEST_S3_SERVER"
SECONDS = 60  # that it may take to start on a busy machine


def program() -> str:
    path = os.environ.get(VARIABLE) or shutil.which("moto_server")
    if not path:
        pytest.skip(f"needs moto_server on PATH or in {VARIABLE}: pip install 'moto[server]'")
    return path


@contextmanager
def serve() -> Iterator[str]:
    """The URL of a server that holds nothing yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program(), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None, "moto_server ended at once"
                assert time.monotonic() < until, "moto_server does not answer"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


def png(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Any = None,
    names: Sequence[str] | None = None,
    group: int = 16,
    **more: Any,
) -> Path:
    """As Hugging Face's `datasets` writes pictures: struct{bytes, path}, class names in the schema's metadata."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [None if data is None else {"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    columns = {"image": pa.array(cells, kind), **({} if labels is None else {"label": pa.array(labels)}), **more}
    table = pa.table(columns)
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)
    return path
