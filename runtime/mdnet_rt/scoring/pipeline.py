"""Overlapped stages with bounded queues: read, decode, batch, score, and rows in the order of the images.

    source ──► decode (threads) ──► batch, uint8 [n, S, S, 3] ──► graphs (one thread) ──► rows, to whoever takes them

Each stage works while the others do. Three batches are under way at most, and the source is read only as rows are
taken, so that memory does not grow with the number of images and a slow reader of rows slows everything down.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple, TypeAlias

import numpy as np

from mdnet_rt.images.preprocess import Decoded, ImageError
from mdnet_rt.rows.result import Result, judge

BATCHES_AHEAD = 2
MAX_BYTES_AHEAD = 256 * 2**20
"""Bytes of image files that are held before they are decoded; one image more may be."""

Decode = Callable[[], Decoded]
"""Reads and decodes one image; raises `ImageError`."""


@dataclass(frozen=True)
class Task:
    """One image to decode and score: the name of its row, how it is decoded, and the bytes held until it is.

    `at_once`: the thread that takes it from the source decodes it.
    """

    name: str
    decode: Decode
    size: int = 0
    at_once: bool = False


@dataclass(frozen=True)
class Pipeline:
    """What a run needs: the graphs as a function of pixels, and how much of everything.

    Args:
        score: uint8 `[n, size, size, 3]` → scores `[n]`.
        size: side of the preprocessed images.
        batch_size: images that are scored at once.
        workers: threads that read and decode.
        keep_pixels: whether rows carry the pixels that were scored.
        stop: when set, the batch in the graphs is finished and the run ends; other images are left.
    """

    score: Callable[[np.ndarray], np.ndarray]
    size: int
    batch_size: int
    workers: int
    keep_pixels: bool = False
    stop: threading.Event | None = None

    def run(self, tasks: Iterable[Task]) -> Generator[Result, None, None]:
        """One row for each task, in order.

        Raises:
            What `score` and the iterator of tasks raise; the latter's after the rows of all tasks before it.
        """
        decoders = ThreadPoolExecutor(self.workers, thread_name_prefix="mdnet-decode")
        graphs = ThreadPoolExecutor(1, thread_name_prefix="mdnet-graphs")
        source, failure = self._batches(tasks, decoders), None
        waiting: deque[Future[list[Result] | None]] = deque()
        try:
            more = True
            while True:
                while more and len(waiting) <= BATCHES_AHEAD and not self._stopped:
                    try:
                        batch = next(source)
                    except StopIteration:
                        more = False
                    except Exception as error:
                        more, failure = False, error
                    else:
                        waiting.append(graphs.submit(self._rows, batch))
                if not waiting:
                    break
                if (rows := waiting.popleft().result()) is None:
                    return
                yield from rows
            if failure is not None:
                raise failure
        finally:  # also when the caller stops early or the graphs fail
            for each in waiting:
                each.cancel()
            decoders.shutdown(cancel_futures=True)
            graphs.shutdown()

    def _rows(self, batch: _Batch) -> list[Result] | None:
        # In the graphs' own thread, which would begin with the next batch before anyone else could hold it back.
        return None if self._stopped else batch.score(self.score, self.keep_pixels)

    @property
    def _stopped(self) -> bool:
        return self.stop is not None and self.stop.is_set()

    def _batches(self, tasks: Iterable[Task], decoders: ThreadPoolExecutor) -> Iterator[_Batch]:
        """Batches that are being decoded, no further ahead than `MAX_BYTES_AHEAD`."""
        tasks, held = iter(tasks), _Held()
        while True:
            batch, failure = _Batch(self.batch_size, self.size), None
            try:
                for task in islice(tasks, self.batch_size):
                    held.make_room(task.size)
                    held.add(batch.add(task, decoders), task.size)
            except Exception as error:
                failure = error
            if batch.names:
                yield batch
            if failure is not None:
                raise failure
            if len(batch.names) < self.batch_size:
                return


class _Batch:
    """Images on their way to the graphs; each is decoded into its row of `pixels`."""

    def __init__(self, capacity: int, size: int):
        self.names: list[str] = []
        self._pixels = np.empty((capacity, size, size, 3), np.uint8)
        self._found: list[Future[_Found]] = []

    def add(self, task: Task, decoders: ThreadPoolExecutor) -> Future[_Found]:
        row = len(self.names)
        self.names.append(task.name)
        if task.at_once:
            found: Future[_Found] = Future()
            found.set_result(self._decode(row, task))
        else:
            found = decoders.submit(self._decode, row, task)
        self._found.append(found)
        return found

    def score(self, run: Callable[[np.ndarray], np.ndarray], keep_pixels: bool) -> list[Result]:
        """Wait for the images, then run the graphs on those that could be decoded."""
        found = [each.result() for each in self._found]
        good = [row for row, each in enumerate(found) if not isinstance(each, ImageError)]
        pixels = self._pixels[: len(found)] if len(good) == len(found) else self._pixels[good]
        scores = iter(run(pixels) if good else ())
        rows = [_row(name, each, scores) for name, each in zip(self.names, found, strict=True)]
        if keep_pixels:
            rows = [replace(row, pixels=self._pixels[i]) if row.ok else row for i, row in enumerate(rows)]
        return rows

    def _decode(self, row: int, task: Task) -> _Found:
        try:
            decoded = task.decode()
        except ImageError as error:
            return error
        self._pixels[row] = decoded.pixels
        return _Facts(decoded.width, decoded.height, decoded.warning)


class _Facts(NamedTuple):
    """What is known of an image that could be decoded."""

    width: int
    height: int
    warning: str | None


_Found: TypeAlias = _Facts | ImageError
"""An image that could be decoded, or what is wrong with it."""


class _Held:
    """Counts the bytes that wait to be decoded."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Future[_Found], int]] = deque()
        self._total = 0

    def make_room(self, size: int) -> None:
        while self._waiting and self._total + size > MAX_BYTES_AHEAD:
            first, freed = self._waiting.popleft()
            first.result()
            self._total -= freed

    def add(self, found: Future[_Found], size: int) -> None:
        if size:
            self._waiting.append((found, size))
            self._total += size


def _row(name: str, found: _Found, scores: Iterator[np.floating]) -> Result:
    if isinstance(found, ImageError):
        return Result(name, None, found.status, str(found))
    return Result(name, *judge(float(next(scores)), found.warning), found.width, found.height)
