"""Images that arrive one by one → batches for the model, which runs in a thread of its own, one batch at a time."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np

from mdnet_engines.errors import GpuLostError, MDNetError, first_line


class Job(Protocol):
    """One preprocessed image on its way through the model."""

    image: np.ndarray
    """uint8 `[S, S, 3]`."""
    decoded_at: float
    """`time.monotonic()` when the image was put."""

    @property
    def unwanted(self) -> bool:
        """Whether nobody waits for it any more: it is then left out of the batch."""


Scores: TypeAlias = list[float] | MDNetError
"""One score per job of a batch, or why the batch has none."""


class Batcher:
    """A queue in front of a model.

    A batch is what has arrived when the model is free: up to `max_batch` images, in the order they were put. A batch
    that is not full waits for more until its oldest image is `max_wait` seconds old. How long the queue may get is for
    the caller to bound.

    Args:
        score: uint8 `[n, S, S, 3]` → `[n]` scores; only ever called by the batcher's thread.
        deliver: called by that thread with the jobs of a batch, their scores and the seconds the model took; unwanted
            jobs come with no scores and no time.
    """

    def __init__(
        self,
        score: Callable[[np.ndarray], np.ndarray],
        deliver: Callable[[list[Job], Scores, float], None],
        *,
        max_batch: int,
        max_wait: float,
    ):
        self._score, self._deliver = score, deliver
        self._max_batch, self._max_wait = max_batch, max_wait
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lost = False
        # A daemon: a model that hangs must not keep the process from ending at the second signal.
        self._thread = threading.Thread(target=self._run, name="mdnet-model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the model's thread runs and still has its GPU."""
        return self._thread.is_alive() and not self._lost

    def put(self, job: Job) -> None:
        """Queue an image. Called from any thread; never waits."""
        self._jobs.put(job)

    def close(self, *, wait: bool = True) -> None:
        """End the thread when it has scored what was put before; `wait` for that."""
        self._jobs.put(None)
        if wait:
            self._thread.join()

    def _run(self) -> None:
        more = True
        while more:
            batch, more = self._next_batch()
            wanted: list[Job] = []
            unwanted: list[Job] = []
            for job in batch:
                (unwanted if job.unwanted else wanted).append(job)
            if unwanted:
                self._deliver(unwanted, [], 0.0)
            if wanted:
                start = time.monotonic()
                scores = self._scores(wanted)
                self._deliver(wanted, scores, time.monotonic() - start)

    def _next_batch(self) -> tuple[list[Job], bool]:
        """The jobs of a batch, and whether more may come."""
        batch: list[Job] = []
        while len(batch) < self._max_batch:
            try:
                job = self._jobs.get(timeout=self._patience(batch))
            except queue.Empty:
                break
            if job is None:
                return batch, False
            batch.append(job)
        return batch, True

    def _patience(self, batch: list[Job]) -> float | None:
        """Seconds to wait for one more job; for ever where there is none yet."""
        return max(0.0, batch[0].decoded_at + self._max_wait - time.monotonic()) if batch else None

    def _scores(self, batch: list[Job]) -> Scores:
        try:
            return [float(score) for score in self._score(np.stack([job.image for job in batch]))]
        except MDNetError as error:
            self._lost |= isinstance(error, GpuLostError)
            return error
        except Exception as error:  # the thread must outlive whatever a model raises
            return MDNetError(f"unexpected {type(error).__name__}: {first_line(error)}")
