"""What the server tells Prometheus. Every server has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self, *, max_batch: int):
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, buckets=_SECONDS, registry=registry)

        self.requests = Counter(
            "mdnet_requests",
            "Answers by endpoint and status; 499: the client left.",
            ["endpoint", "code"],
            registry=registry,
        )
        self.images = Counter(
            "mdnet_images",
            "Images let in, by what became of them; failed: by no fault of theirs; abandoned: nobody waited any more.",
            ["status"],
            registry=registry,
        )
        self.batch_size = Histogram(
            "mdnet_batch_size", "Images in a batch.", buckets=_batch_buckets(max_batch), registry=registry
        )
        self.request_seconds = histogram(
            "mdnet_request_seconds", "From a request's head to its answer, if it was scored."
        )
        self.decode_seconds = histogram("mdnet_decode_seconds", "Decoding and preprocessing of one image.")
        self.queue_seconds = histogram("mdnet_queue_seconds", "From a decoded image to its batch.")
        self.model_seconds = histogram("mdnet_model_seconds", "The model's time for one batch.")

    def count_nameless(self, status: int) -> None:
        """Count an answer to what has no readable path."""
        self.requests.labels("none", str(status)).inc()

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge that is read when Prometheus asks."""
        Gauge(name, text, registry=self._registry).set_function(value)

    def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)


def _batch_buckets(max_batch: int) -> list[float]:
    """Powers of two below `max_batch`, and that."""
    return [*(2.0**power for power in range((max_batch - 1).bit_length())), float(max_batch)]
