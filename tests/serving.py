"""A server over real sockets in a thread of its own, a classifier that waits when told to, and raw HTTP."""

import io
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from attire.data.dataset import FASHION_CLASSES
from attire.inference.classifier import Architecture, Classifier
from attire.inference.prediction import Prediction
from attire.server import listener
from attire.server.app import create_app
from attire.server.service import Service

PATIENCE = 30.0  # seconds; only a test that fails waits so long


class Fake:
    """Answers with the class of a picture's brightest pixel divided by 12; waits while `gate` is shut."""

    classes = FASHION_CLASSES
    temperature = 1.0
    ood_detector = None
    architecture = Architecture("block2", 16, 0, (8,), 0.5)

    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {"name": "fake", "home": "/home/someone"}
        self.model = torch.nn.Identity()
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[int] = []
        self.entered = threading.Semaphore(0)
        self.error: Exception | None = None

    def predict(self, images: NDArray[np.uint8]) -> list[Prediction]:
        self.entered.release()
        assert self.gate.wait(PATIENCE)
        if self.error:
            raise self.error
        self.batches.append(len(images))
        rows = np.full((len(images), 10), 0.01, np.float32)
        rows[np.arange(len(images)), images.max((1, 2)) // 12 % 10] = 0.91
        return [Prediction.from_probabilities(self.classes, row) for row in rows]

    def shut(self) -> None:
        """The next batch waits. Called when nothing is being answered."""
        while self.entered.acquire(blocking=False):
            pass
        self.gate.clear()
        self.batches.clear()


@dataclass(frozen=True)
class Live:
    port: int
    service: Service
    client: httpx.Client

    def raw(self, *parts: bytes, patience: float = PATIENCE) -> bytes:
        """All that comes back until the server closes the connection."""
        with self.connect(*parts, patience=patience) as connection:
            return received(connection)

    def connect(self, *parts: bytes, patience: float = PATIENCE) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), patience)
        for part in parts:
            connection.sendall(part)
        return connection

    def post(self, data: bytes, path: str = "/predict", **headers: str) -> httpx.Response:
        return self.client.post(path, content=data, headers={"Content-Type": "image/png", **headers})


def received(connection: socket.socket) -> bytes:
    found = b""
    with suppress(ConnectionResetError):  # closed while more was under way to it
        while part := connection.recv(65536):
            found += part
    return found


def statuses(answer: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


@contextmanager
def running(classifier: Any, **settings: Any) -> Iterator[Live]:
    settings = {"workers": 1, **settings}  # so that what waits can be told from what is worked on
    app, ready = create_app(cast(Classifier, classifier), **settings), threading.Event()
    service: Service = app.state.service
    found = listener.bind("127.0.0.1", 0)
    port = found.getsockname()[1]
    server = listener._make_server(app, service.start_draining, ready.set)
    thread = threading.Thread(target=server.run, args=([found],))
    thread.start()
    try:
        assert ready.wait(PATIENCE)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE, trust_env=False) as client:
            yield Live(port, service, client)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def picture(number: int = 0, side: int = 28, kind: str = "PNG") -> bytes:
    """That `Fake` takes for class `number`."""
    out = io.BytesIO()
    Image.fromarray(np.full((side, side), number * 12 + 6, np.uint8)).save(out, kind)
    return out.getvalue()


def head(method: str = "POST", path: str = "/predict", headers: Sequence[str] = (), close: bool = True) -> bytes:
    """The head of a request for a picture, with more headers; the server closes afterwards."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: image/png", *headers]
    return "\r\n".join([*lines, *(["Connection: close"] if close else []), "", ""]).encode()
