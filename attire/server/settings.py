"""Every limit of the server, and who may use it."""

from dataclasses import dataclass

from attire.errors import UsageError
from attire.server.guards import LOOPBACK

_MB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """Limits of the app, and who may use it. Raises UsageError for impossible ones.

    max_queue: pictures accepted and not yet answered; max_batch: pictures in a forward pass, 16 because larger ones
    were not reliably faster on two cores (docs/serving.md) and each picture waits for the whole batch; max_images:
    pictures in one request to /predict/batch; max_explain: explanations accepted and not yet answered.
    max_upload, max_json: bytes of one body, a picture or a batch; max_arriving: bytes of all bodies together.
    seconds, explain_seconds: from the end of a body to its answer; stall_seconds: between two parts of a body;
    body_seconds: for a whole body.
    workers: threads that run the model, 0 for two on a CPU (docs/serving.md) and one elsewhere; threads: PyTorch's in
    each of them, 0 for its share of the cores.
    hosts: names allowed in a Host header; token: what a client must send as a bearer token; report: HTML of the
    model's report; access_log: print a JSON line on stderr for each request.
    """

    max_queue: int = 128
    max_batch: int = 16
    max_images: int = 64
    max_explain: int = 8
    max_upload: int = 20 * _MB
    max_json: int = 16 * _MB
    max_arriving: int = 256 * _MB
    seconds: float = 10.0
    explain_seconds: float = 30.0
    stall_seconds: float = 10.0
    body_seconds: float = 60.0
    workers: int = 0
    threads: int = 0
    hosts: tuple[str, ...] = LOOPBACK
    token: str | None = None
    report: str | None = None
    access_log: bool = False

    def __post_init__(self) -> None:
        positive = min(self.max_queue, self.max_batch, self.max_images, self.max_explain) >= 1
        if not positive or min(self.threads, self.workers) < 0:
            raise UsageError("server", "limits are numbers of at least 1")
        if self.token is not None and len(self.token) < 16:
            raise UsageError("token", "shorter than 16 characters", do="make one with: openssl rand -hex 16")

    @property
    def batch_images(self) -> int:
        """Pictures that one request to /predict/batch may hold: a batch enters the queue as a whole."""
        return min(self.max_images, self.max_queue)
