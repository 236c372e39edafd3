"""Requests → outcomes: what is let in, decoding in a small pool, batches through the model, time-outs.

    admitted ──► decode (threads; large images in processes) ──► batcher ──► model (one thread) ──► the event loop,
                                                                                                   once per batch
All bookkeeping is done by the event loop's thread; decoders and model only hand over what they made.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from mdnet_engines.errors import MDNetError, first_line
from mdnet_engines.system.cores import available_cores
from mdnet_rt.images.face_crop import face_finder
from mdnet_rt.images.preprocess import Decoded, ImageError, decode
from mdnet_rt.rows.result import judge
from mdnet_rt.server.batcher import Batcher, Job, Scores
from mdnet_rt.server.large import Job as LargeJob
from mdnet_rt.server.large import LargeDecoders, LargeError, refuse_large
from mdnet_rt.server.metrics import Metrics
from mdnet_rt.server.settings import Settings
from mdnet_rt.server.wire import ClientLeftError, RefusedError, Wire

MAX_DECODERS = 4  # threads, for images that are not large; half as many processes for those that are
MAX_SCANS = 100
"""Of a progressive JPEG, each of which goes over all its pixels; encoders write ten or so."""
_SMOOTHING = 0.2  # of the newest batch in the running mean of seconds per image

Payload: TypeAlias = bytes | np.ndarray | ImageError
"""An image: its file, preprocessed pixels (uint8 `[S, S, 3]`), or why the request has none."""
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What became of one image; `status` and `reason` are those of `mdnet_rt.rows.result.Result`."""

    score: float | None
    status: str = "ok"
    reason: str | None = None


@dataclass(eq=False)
class _Task:
    """The images of one request."""

    done: asyncio.Future[None]
    outcomes: list[Outcome | None]
    missing: int
    error: MDNetError | None = None
    unwanted: bool = False


@dataclass(eq=False)
class _ImageJob:
    """One image of a task, on its way through decoder and model."""

    task: _Task
    index: int
    payload: Payload
    image: np.ndarray = field(init=False, repr=False)
    warning: str | None = None
    decoded_at: float = 0.0

    @property
    def unwanted(self) -> bool:
        return self.task.unwanted


class Work:
    """The part of the server that turns images into scores. Made inside the event loop that uses it.

    Args:
        score: uint8 `[n, S, S, 3]` → `[n]` scores.
        image_size: S.
        to_srgb: whether colour profiles of images are applied.
        face: the framing, as the manifest has it.
    """

    def __init__(
        self,
        score: Callable[[np.ndarray], np.ndarray],
        image_size: int,
        settings: Settings,
        metrics: Metrics,
        *,
        to_srgb: bool = True,
        face: float | None = None,
    ):
        self.image_size = image_size
        self.load = 0
        self._settings, self._metrics = settings, metrics
        self._options: dict[str, Any] = {"size": image_size, "to_srgb": to_srgb, "max_pixels": settings.max_pixels}
        self._face = face
        self._seconds_per_image = 0.0
        self._loop = asyncio.get_running_loop()
        decoders = min(MAX_DECODERS, available_cores())
        self._pool = ThreadPoolExecutor(decoders, thread_name_prefix="mdnet-decode")
        self._large = LargeDecoders(max(1, decoders // 2), settings.score_timeout)
        self._batcher = Batcher(score, self._from_engine, max_batch=settings.max_batch, max_wait=settings.max_wait)
        metrics.watch("mdnet_queue_images", "Images that are decoded, waiting or in the model.", lambda: self.load)

    @property
    def alive(self) -> bool:
        """Whether the model's thread runs."""
        return self._batcher.alive

    def check_room(self, images: int = 1) -> None:
        """Raise `RefusedError` (429) where the queue has no room, or is so long that the scores would come too late."""
        backlog = (self.load + images) * self._seconds_per_image
        if self.load + images > self._settings.max_queue or (self.load and backlog > self._settings.score_timeout):
            wait = max(1, math.ceil(self.load * self._seconds_per_image))
            raise RefusedError(429, f"busy: {self.load} images are waiting; retry in {wait} s", retry_after=wait)

    async def in_pool(self, function: Callable[..., T], *args: object) -> T:
        """Run `function` in a decoder's thread."""
        return await self._loop.run_in_executor(self._pool, function, *args)

    async def score(self, payloads: Sequence[Payload], wire: Wire) -> list[Outcome]:
        """Score a request's images: one outcome for each, in their order.

        Raises:
            RefusedError: no room (429), too many images (413), scoring failed (500), or no scores in time (504).
            ClientLeftError: the connection was lost.
        """
        if len(payloads) > self._settings.max_images:
            raise RefusedError(
                413, f"{len(payloads)} images in one request; at most {self._settings.max_images} are allowed"
            )
        self.check_room(len(payloads))
        self.load += len(payloads)
        task = _Task(self._loop.create_future(), [None] * len(payloads), len(payloads))
        for index, payload in enumerate(payloads):
            self._pool.submit(self._decode, _ImageJob(task, index, payload))
        seconds = self._settings.score_timeout
        too_late = RefusedError(504, f"no scores within {seconds:g} s")
        late = self._loop.call_later(seconds, _give_up, task, too_late)
        wire.on_lost = lambda: _give_up(task, ClientLeftError())
        try:
            await task.done
        finally:
            late.cancel()
            wire.on_lost = None
            task.unwanted = True
        if task.error is not None:
            raise RefusedError(500, f"scoring failed: {first_line(task.error)}")
        return [outcome for outcome in task.outcomes if outcome is not None]

    def close(self, *, finish: bool = True) -> None:
        """End the threads, when what was put in is done or, without `finish`, whenever they get to it."""
        self._pool.shutdown(wait=finish, cancel_futures=not finish)
        self._large.close(wait=finish)
        self._batcher.close(wait=finish)

    # In a decoder's thread.

    def _decode(self, job: _ImageJob) -> None:
        start = time.monotonic()
        if job.unwanted:
            self._decoded(job, None, start)
            return
        found: Decoded | ImageError | MDNetError
        try:
            found = self._pixels(job.payload)
        except LargeError:
            assert isinstance(job.payload, bytes)
            deliver = functools.partial(self._decoded, job, start=start)
            self._large.put(LargeJob(job.payload, self._options, lambda: job.unwanted, deliver, self._face))
            job.payload = b""  # the other job has it
            return
        except ImageError as error:
            found = error
        except Exception as error:  # the image must leave the queue, whatever a decoder raises
            found = MDNetError(f"unexpected {type(error).__name__}: {first_line(error)}")
        self._decoded(job, found, start)

    def _decoded(self, job: _ImageJob, found: Decoded | MDNetError | None, start: float) -> None:
        """An image is decoded, or can't be, or (None) nobody wants it any more."""
        job.payload = b""  # frees the file
        if found is not None:
            self._metrics.decode_seconds.observe(time.monotonic() - start)
        if job.unwanted or not isinstance(found, Decoded):
            outcome = Outcome(None, found.status, str(found)) if isinstance(found, ImageError) else found
            self._call(self._finish, job, outcome)
            return
        job.image, job.warning = found.pixels, found.warning
        job.decoded_at = time.monotonic()
        self._batcher.put(job)

    def _pixels(self, payload: Payload) -> Decoded:
        if isinstance(payload, ImageError):
            raise payload
        if isinstance(payload, np.ndarray):
            return Decoded(payload, self.image_size, self.image_size)

        def admit(image: Image.Image, pixels: int) -> None:
            if image.info.get("progressive") and payload.count(b"\xff\xda") > MAX_SCANS:
                raise ImageError(f"a JPEG of more than {MAX_SCANS} scans")
            refuse_large(image, pixels)

        return decode(payload, admit=admit, find_box=face_finder(self._face), **self._options)

    # In the model's thread.

    def _from_engine(self, jobs: list[Job], scores: Scores, seconds: float) -> None:
        self._call(self._deliver, jobs, scores, seconds, time.monotonic() - seconds)

    def _call(self, function: Callable[..., object], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop was closed by force: nobody is there to be told
            return

    # In the event loop.

    def _deliver(self, jobs: list[_ImageJob], scores: Scores, seconds: float, start: float) -> None:
        if not scores:
            for job in jobs:
                self._finish(job, None)
            return
        self._metrics.batch_size.observe(len(jobs))
        self._metrics.model_seconds.observe(seconds)
        newest = seconds / len(jobs)
        self._seconds_per_image += (newest - self._seconds_per_image) * (_SMOOTHING if self._seconds_per_image else 1)
        for index, job in enumerate(jobs):
            self._metrics.queue_seconds.observe(start - job.decoded_at)
            self._finish(job, scores if isinstance(scores, MDNetError) else Outcome(*judge(scores[index], job.warning)))

    def _finish(self, job: _ImageJob, outcome: Outcome | MDNetError | None) -> None:
        """An image leaves: with its outcome, with an error of ours, or with neither as nobody wants it any more."""
        self.load -= 1
        task = job.task
        if isinstance(outcome, Outcome):
            self._metrics.images.labels(outcome.status).inc()
            task.outcomes[job.index] = outcome
        elif outcome is not None:
            self._metrics.images.labels("failed").inc()
            task.error = outcome
        else:
            self._metrics.images.labels("abandoned").inc()
        task.missing -= 1
        if not task.missing and not task.done.done():
            task.done.set_result(None)


def _give_up(task: _Task, reason: Exception) -> None:
    if not task.done.done():
        task.done.set_exception(reason)
