"""The batcher: what has arrived makes a batch, in its order, and nothing that was put is lost."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from mdnet_engines.errors import GpuLostError, MDNetError
from mdnet_rt.server.batcher import Batcher, Job, Scores

DEADLINE = 60
LOST = 15


@dataclass(eq=False)
class Number:
    """An image whose score is its number."""

    number: int
    unwanted: bool = False
    decoded_at: float = field(default_factory=time.monotonic)

    @property
    def image(self) -> np.ndarray:
        return np.full((2, 2, 3), self.number, np.uint8)


class Model:
    """Scores an image by its number; waits, where it is told to, until it may go on."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.began: queue.Queue[list[int]] = queue.Queue()

    def score(self, images: np.ndarray) -> np.ndarray:
        numbers = images[:, 0, 0, 0]
        self.began.put(numbers.tolist())
        assert self.go.wait(DEADLINE)
        if 13 in numbers:
            raise MDNetError("thirteen")
        if 14 in numbers:
            raise ZeroDivisionError
        if LOST in numbers:
            raise GpuLostError("gone")
        return numbers.astype(np.float32)


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def delivered() -> queue.Queue[tuple[list[int], Scores]]:
    return queue.Queue()


@pytest.fixture
def make(model: Model, delivered: queue.Queue[tuple[list[int], Scores]]) -> Iterator[Callable[..., Batcher]]:
    batchers = []

    def start(*, max_batch: int = 4, max_wait: float = 0.0) -> Batcher:
        def deliver(jobs: list[Job], scores: Scores, seconds: float) -> None:
            delivered.put(([int(job.image[0, 0, 0]) for job in jobs], scores))

        batchers.append(Batcher(model.score, deliver, max_batch=max_batch, max_wait=max_wait))
        return batchers[-1]

    yield start
    model.go.set()
    for batcher in batchers:
        batcher.close()


def test_what_came_while_the_model_was_busy_is_the_next_batches_in_its_order(
    make: Callable[..., Batcher], model: Model, delivered: queue.Queue[tuple[list[int], Scores]]
) -> None:
    batcher = make(max_batch=4)
    model.go.clear()
    batcher.put(Number(0))
    assert model.began.get(timeout=DEADLINE) == [0]
    for number in range(1, 7):
        batcher.put(Number(number))
    model.go.set()
    batches = [delivered.get(timeout=DEADLINE) for _ in range(3)]
    assert [jobs for jobs, _ in batches] == [[0], [1, 2, 3, 4], [5, 6]]
    assert [scores for _, scores in batches] == [[0.0], [1.0, 2.0, 3.0, 4.0], [5.0, 6.0]]


def test_a_batch_that_is_not_full_waits_for_more(make: Callable[..., Batcher], model: Model) -> None:
    batcher = make(max_batch=3, max_wait=DEADLINE)
    for number in range(3):
        time.sleep(0.02)
        batcher.put(Number(number))
    assert model.began.get(timeout=DEADLINE / 2) == [0, 1, 2]


def test_the_oldest_image_has_waited_max_wait_and_goes(make: Callable[..., Batcher], model: Model) -> None:
    batcher = make(max_batch=64, max_wait=0.05)
    start = time.monotonic()
    batcher.put(Number(1))
    assert model.began.get(timeout=DEADLINE) == [1]
    assert time.monotonic() - start >= 0.05


def test_unwanted_images_do_not_reach_the_model(
    make: Callable[..., Batcher], model: Model, delivered: queue.Queue[tuple[list[int], Scores]]
) -> None:
    batcher = make()
    model.go.clear()
    batcher.put(Number(0))
    model.began.get(timeout=DEADLINE)
    jobs = [Number(1), Number(2), Number(3)]
    for job in jobs:
        batcher.put(job)
    jobs[1].unwanted = True
    model.go.set()
    assert model.began.get(timeout=DEADLINE) == [1, 3]
    batches = [delivered.get(timeout=DEADLINE) for _ in range(3)]
    assert batches[1:] == [([2], []), ([1, 3], [1.0, 3.0])]


@pytest.mark.parametrize(("number", "text"), [(13, "thirteen"), (14, "unexpected ZeroDivisionError")])
def test_a_model_that_fails_fails_its_batch_only(
    make: Callable[..., Batcher], delivered: queue.Queue[tuple[list[int], Scores]], number: int, text: str
) -> None:
    batcher = make()
    batcher.put(Number(number))
    _, scores = delivered.get(timeout=DEADLINE)
    assert isinstance(scores, MDNetError)
    assert str(scores).startswith(text)
    batcher.put(Number(1))
    assert delivered.get(timeout=DEADLINE) == ([1], [1.0])
    assert batcher.alive


def test_a_model_that_lost_its_gpu_is_not_alive(
    make: Callable[..., Batcher], delivered: queue.Queue[tuple[list[int], Scores]]
) -> None:
    batcher = make()
    batcher.put(Number(LOST))
    _, scores = delivered.get(timeout=DEADLINE)
    assert isinstance(scores, GpuLostError)
    assert not batcher.alive


def test_closing_scores_what_was_put_before(
    make: Callable[..., Batcher], delivered: queue.Queue[tuple[list[int], Scores]]
) -> None:
    batcher = make(max_batch=4, max_wait=DEADLINE)
    for number in range(6):
        batcher.put(Number(number))
    batcher.close()
    assert not batcher.alive
    assert [delivered.get_nowait()[0] for _ in range(2)] == [[0, 1, 2, 3], [4, 5]]
