"""Every limit and time-out of the server, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from mdnet_engines.errors import UsageError
from mdnet_rt.images.preprocess import MAX_PIXELS

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Settings:
    """What the server takes on. Times are in seconds, sizes in bytes.

    Raises:
        UsageError: limits that contradict each other.
    """

    model_name: str = "mdnet"
    """The model's name in the paths of the Open Inference Protocol."""
    max_batch: int = 16
    max_wait: float = 0.005
    """How long the oldest image of a batch that is not full waits for others."""
    max_queue: int = 256
    """Images of all requests that are decoded, waiting or in the model; a request that would exceed it gets 429."""
    max_images: int = 64
    """Images in one request."""
    max_body: int = 32 * MEBIBYTE
    max_held: int = 512 * MEBIBYTE
    """Bodies of all requests together; a request that would exceed it gets 429."""
    max_pixels: int = 25_000_000
    """Width times height that an image may declare; a face photograph has no more."""
    max_connections: int = 512
    """Requests on connections beyond it get 503."""
    read_timeout: float = 30.0
    """From a request's first byte to its last; as long may a new connection stay silent."""
    score_timeout: float = 30.0
    """From a request's last byte to its scores."""
    keep_alive: float = 75.0
    """How long a connection may be idle between requests."""
    drain_timeout: float = 30.0
    """How long requests may take to end after the signal to stop."""

    def __post_init__(self) -> None:
        if self.max_images > self.max_queue:
            raise UsageError(
                f"a request may have {self.max_images} images, but only {self.max_queue} fit into the queue; "
                "raise --max-queue or lower --max-images"
            )
        if self.max_body > self.max_held:
            raise UsageError(
                f"a body may have {self.max_body // MEBIBYTE} MiB, but all together only {self.max_held // MEBIBYTE}; "
                "raise --max-held-mib or lower --max-body-mib"
            )
        if self.max_pixels > MAX_PIXELS:
            raise UsageError(f"images may have at most {MAX_PIXELS} pixels; lower --max-pixels")
