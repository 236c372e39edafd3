"""The pipeline: one row for each task, in order, however slow its parts are; bounded; and nothing left running."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from mdnet_engines.errors import MDNetError
from mdnet_rt.images.preprocess import Decoded, ImageError
from mdnet_rt.rows.result import Result
from mdnet_rt.scoring import pipeline as module
from mdnet_rt.scoring.pipeline import BATCHES_AHEAD, Pipeline, Task

SIZE = 4
WAIT = 60  # seconds after which something that should have happened has not


class NoFaceError(ImageError):
    status = "no_face"


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + WAIT
    while left := [thread.name for thread in threading.enumerate() if thread.name.startswith("mdnet-")]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.01)


def image(value: int) -> Decoded:
    return Decoded(np.full((SIZE, SIZE, 3), value, np.uint8), value + 1, value + 2)


def first_values(pixels: np.ndarray) -> np.ndarray:
    """A score function: what `image` was made of."""
    assert pixels.dtype == np.uint8
    assert pixels.shape[1:] == (SIZE, SIZE, 3)
    return pixels[:, 0, 0, 0].astype(np.float32)


def task(value: int, *, before: Callable[[], object] = lambda: None, size: int = 0) -> Task:
    def decode() -> Decoded:
        before()
        return image(value)

    return Task(str(value), decode, size)


def bad(name: str, error: ImageError) -> Task:
    def decode() -> Decoded:
        raise error

    return Task(name, decode)


def until_it_fails(results: Iterator[Result], rows: list[Result]) -> None:
    """Put results into `rows` for as long as they come."""
    while (each := next(results, None)) is not None:
        rows.append(each)


def pipeline(
    score: Callable[[np.ndarray], np.ndarray] = first_values,
    *,
    batch_size: int = 4,
    workers: int = 3,
    keep_pixels: bool = False,
    stop: threading.Event | None = None,
) -> Pipeline:
    return Pipeline(score, SIZE, batch_size, workers, keep_pixels, stop)


def row(value: int) -> Result:
    return Result(str(value), float(value), "ok", None, value + 1, value + 2)


@pytest.mark.parametrize("workers", [1, 7])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_rows_come_in_the_order_of_the_tasks_however_long_each_takes(batch_size: int, workers: int) -> None:
    delays = random.Random(0).choices([0, 0, 0.004], k=60)
    tasks = [task(i, before=lambda i=i: time.sleep(delays[i])) for i in range(60)]
    assert list(pipeline(batch_size=batch_size, workers=workers).run(tasks)) == [row(i) for i in range(60)]


def test_no_tasks_are_no_rows() -> None:
    assert list(pipeline().run([])) == []


@pytest.mark.parametrize("count", [1, 4, 5, 11, 12, 13])
def test_the_last_batch_may_be_smaller_and_none_is_empty(count: int) -> None:
    seen = []

    def score(pixels: np.ndarray) -> np.ndarray:
        seen.append(len(pixels))
        return first_values(pixels)

    assert list(pipeline(score).run(task(i) for i in range(count))) == [row(i) for i in range(count)]
    assert seen == [4] * (count // 4) + ([count % 4] if count % 4 else [])


def test_what_cannot_be_decoded_is_a_row_with_its_reason_and_is_not_scored() -> None:
    seen = []

    def score(pixels: np.ndarray) -> np.ndarray:
        seen.extend(pixels[:, 0, 0, 0].tolist())
        return first_values(pixels)

    tasks = [bad("a", ImageError("empty file")), task(1), bad("b", NoFaceError("no face")), task(3), task(4)]
    assert list(pipeline(score).run(tasks)) == [
        Result("a", None, "unreadable", "empty file"),
        row(1),
        Result("b", None, "no_face", "no face"),
        row(3),
        row(4),
    ]
    assert seen == [1, 3, 4]


def test_the_graphs_do_not_run_where_nothing_could_be_decoded() -> None:
    def score(pixels: np.ndarray) -> np.ndarray:
        raise AssertionError(f"called with {len(pixels)} images")

    rows = list(pipeline(score).run(bad(str(i), ImageError("x")) for i in range(9)))
    assert [each.path for each in rows] == [str(i) for i in range(9)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_a_row_that_says_so(value: float) -> None:
    def score(pixels: np.ndarray) -> np.ndarray:
        scores = first_values(pixels)
        scores[scores == 2] = value
        return scores

    rows = list(pipeline(score).run(task(i) for i in range(5)))
    assert rows[2] == Result("2", None, "not_finite", f"score is not finite ({value})", 3, 4)
    assert rows[:2] + rows[3:] == [row(i) for i in (0, 1, 3, 4)]


def test_pixels_are_kept_for_rows_that_have_a_score() -> None:
    rows = list(pipeline(keep_pixels=True).run([task(7), bad("a", ImageError("x")), task(9)]))
    assert rows[1].pixels is None
    for each, value in ((rows[0], 7), (rows[2], 9)):
        assert each.pixels is not None
        np.testing.assert_array_equal(each.pixels, image(value).pixels)


def test_the_source_is_read_no_further_than_the_batches_under_way() -> None:
    taken = 0

    def tasks() -> Iterator[Task]:
        nonlocal taken
        for i in range(200):
            taken += 1
            yield task(i)

    for given, _ in enumerate(pipeline().run(tasks())):
        assert taken - given <= (BATCHES_AHEAD + 1) * 4
    assert taken == 200


@pytest.mark.parametrize("sizes", [[40] * 60, [1000, 1, 1000], [99, 1, 1, 99, 100, 101, 0, 0, 3] * 6])
def test_no_more_bytes_wait_to_be_decoded_than_the_limit_and_one_image(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    monkeypatch.setattr(module, "MAX_BYTES_AHEAD", 100)
    lock, held, most = threading.Lock(), 0, 0

    def tasks() -> Iterator[Task]:
        nonlocal held, most
        for i, size in enumerate(sizes):
            with lock:
                held += size
                most = max(most, held - max(sizes))
            yield task(i, size=size, before=lambda size=size: done(size))

    def done(size: int) -> None:
        nonlocal held
        time.sleep(0.001)
        with lock:
            held -= size

    assert len(list(pipeline(batch_size=16, workers=2).run(tasks()))) == len(sizes)
    assert held == 0
    assert most <= 100


def test_decoding_goes_on_while_the_graphs_run() -> None:
    decoded_ahead = threading.Event()

    def score(pixels: np.ndarray) -> np.ndarray:
        assert decoded_ahead.wait(WAIT), "nothing was decoded while the graphs were running"
        return first_values(pixels)

    tasks = [task(i, before=decoded_ahead.set if i >= 4 else lambda: None) for i in range(12)]
    assert len(list(pipeline(score).run(tasks))) == 12


def test_the_graphs_are_called_by_one_thread_at_a_time_and_decoders_by_no_more_than_asked() -> None:
    lock, now, most = threading.Lock(), {"graphs": 0, "decode": 0}, {"graphs": 0, "decode": 0}

    def busy(what: str) -> None:
        with lock:
            now[what] += 1
            most[what] = max(most[what], now[what])
        time.sleep(0.002)
        with lock:
            now[what] -= 1

    def score(pixels: np.ndarray) -> np.ndarray:
        busy("graphs")
        return first_values(pixels)

    list(pipeline(score, workers=3).run(task(i, before=lambda: busy("decode")) for i in range(40)))
    assert most["graphs"] == 1
    assert 1 < most["decode"] <= 3


def test_what_is_decoded_at_once_is_decoded_where_it_is_taken() -> None:
    frame = np.zeros((SIZE, SIZE, 3), np.uint8)
    threads = set()

    def decode() -> Decoded:
        threads.add(threading.current_thread())
        return Decoded(frame, 1, 2)

    def tasks() -> Iterator[Task]:
        for i in range(10):
            frame[:] = i  # as a video reader does with its one buffer
            yield Task(str(i), decode, at_once=True)

    assert [each.score for each in pipeline().run(tasks())] == list(range(10))
    assert threads == {threading.current_thread()}


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 30])
def test_a_source_that_fails_is_told_after_the_rows_of_all_before(count: int) -> None:
    def tasks() -> Iterator[Task]:
        yield from (task(i) for i in range(count))
        raise MDNetError("the folder is gone")

    rows: list[Result] = []
    with pytest.raises(MDNetError, match="the folder is gone"):
        until_it_fails(pipeline().run(tasks()), rows)
    assert rows == [row(i) for i in range(count)]


@pytest.mark.parametrize("error", [MDNetError("no memory on the GPU"), MemoryError(), KeyboardInterrupt()])
def test_graphs_that_fail_end_the_run_after_the_rows_before(error: BaseException) -> None:
    calls = []

    def score(pixels: np.ndarray) -> np.ndarray:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return first_values(pixels)

    rows: list[Result] = []
    with pytest.raises(type(error)):
        until_it_fails(pipeline(score).run(task(i) for i in range(40)), rows)
    assert rows == [row(i) for i in range(8)]
    assert len(calls) <= 3 + BATCHES_AHEAD


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_the_source_is_not_put_off(error: type[BaseException]) -> None:
    def tasks() -> Iterator[Task]:
        yield from (task(i) for i in range(6))
        raise error

    with pytest.raises(error):
        list(pipeline().run(tasks()))


def test_a_stop_lets_the_batch_in_the_graphs_finish_and_leaves_the_others() -> None:
    stop, taken, scored = threading.Event(), [], []

    def tasks() -> Iterator[Task]:
        for i in range(100):
            taken.append(i)
            yield task(i)

    def score(pixels: np.ndarray) -> np.ndarray:
        scored.append(len(pixels))
        if len(scored) == 3:
            stop.set()
        return first_values(pixels)

    assert list(pipeline(score, stop=stop).run(tasks())) == [row(i) for i in range(12)]
    assert len(scored) == 3
    assert len(taken) <= (3 + BATCHES_AHEAD + 1) * 4


def test_a_stop_before_the_beginning_reads_nothing() -> None:
    stop, taken = threading.Event(), []
    stop.set()
    tasks = (taken.append(i) or task(i) for i in range(10))  # type: ignore[func-returns-value]
    assert list(pipeline(stop=stop).run(tasks)) == []
    assert taken == []


def test_who_stops_taking_rows_leaves_nothing_running() -> None:
    decoded = []
    rows = pipeline().run(task(i, before=lambda i=i: decoded.append(i)) for i in range(1000))
    assert next(rows) == row(0)
    rows.close()
    assert len(decoded) <= (BATCHES_AHEAD + 1) * 4
