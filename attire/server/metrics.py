"""Metrics for Prometheus: requests, batches, pictures that wait. One registry for each app."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

MEDIA_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Labels take only values that this program knows, never a client's, so that their number stays small.

    waiting: returns how many pictures are accepted and not yet answered.
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "attire_requests", "Responses sent.", ("route", "method", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "attire_request_seconds", "From headers to response.", ("route",), buckets=_SECONDS, registry=self.registry
        )
        self._sizes = Histogram(
            "attire_batch_images", "Pictures in a forward pass.", buckets=_SIZES, registry=self.registry
        )
        self._model = Histogram(
            "attire_batch_seconds", "Time of a forward pass.", buckets=_SECONDS, registry=self.registry
        )
        gauge = Gauge("attire_waiting_images", "Pictures accepted and not yet answered.", registry=self.registry)
        gauge.set_function(waiting)
        ProcessCollector(registry=self.registry)

    def observe_request(self, route: str, method: str, status: int, seconds: float) -> None:
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def observe_batch(self, images: int, seconds: float) -> None:
        self._sizes.observe(images)
        self._model.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
