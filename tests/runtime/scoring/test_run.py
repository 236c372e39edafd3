"""A run: which images still need a row, what is counted, and how a signal ends it."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdnet_rt.rows.encoding import read_rows
from mdnet_rt.rows.result import Result, Stamp
from mdnet_rt.rows.writers import open_writer
from mdnet_rt.scoring.run import Settings, local_executor, score_all, stop_on_signal, unfinished
from mdnet_rt.sources.entry import Entry

Photo = Callable[..., Path]


def left(images: list[str], done: list[str]) -> list[str]:
    return [entry.name for entry in unfinished((Entry(name, b"") for name in images), iter(done))]


@pytest.mark.parametrize(
    ("images", "done", "expected"),
    [
        ("abcd", "", "abcd"),
        ("abcd", "ab", "cd"),
        ("abcd", "abcd", ""),
        ("", "ab", ""),
        ("abXcd", "abc", "Xd"),  # one more
        ("Xabcd", "abc", "Xd"),
        ("abcdX", "abcd", "X"),
        ("acd", "abc", "d"),  # one less
        ("bcd", "abc", "d"),
        ("dcba", "abc", "d"),  # another order
        ("aabbc", "aab", "bc"),  # twice
        ("abab", "ab", "ab"),
        ("baab", "ab", "ab"),
        ("aXa", "aa", "X"),
        ("XaYaZa", "aa", "XYZa"),
        ("ab", "aab", ""),
    ],
)
def test_what_has_no_row_yet_is_left(images: str, done: str, expected: str) -> None:
    assert left(list(images), list(done)) == list(expected)


NAMES = st.lists(st.sampled_from("abcd"), max_size=12)


@given(NAMES, NAMES)
def test_each_image_is_scored_once_whatever_came_and_went(images: list[str], done: list[str]) -> None:
    remaining = left(images, done)
    # As often as it is there, less the rows it has; `Counter` knows nothing of the order.
    assert Counter(remaining) == Counter(images) - Counter(done)
    rest = iter(images)
    assert all(name in rest for name in remaining)  # in the order of the images


@given(NAMES, st.integers(0, 12))
def test_a_run_over_the_same_images_goes_on_where_it_stopped(images: list[str], rows: int) -> None:
    assert left(images, images[:rows]) == images[rows:]


def test_rows_are_not_read_further_than_the_images() -> None:
    read = []

    def done() -> Iterator[str]:
        for i in range(1000):
            read.append(i)
            yield str(i)

    images = (Entry(str(i), b"") for i in range(2000))
    remaining = unfinished(images, done())
    assert next(remaining).name == "1000"
    assert len(read) == 1000


class Gallery:
    """Remembers what it was shown."""

    def __init__(self) -> None:
        self.shown: list[Result] = []

    def add(self, result: Result) -> None:
        self.shown.append(result)


def test_rows_of_the_interrupted_run_are_counted_and_shown_and_not_written_again(tmp_path: Path) -> None:
    output, stamp = tmp_path / "scores.csv", Stamp("m", "b")
    results = [Result("a", 1.0), Result("b", None, "unreadable", "x"), Result("c", 3.0), Result("d", 2.0)]
    with pytest.raises(Exception, match="2 rows"), open_writer("csv", output, stamp) as writer:
        score_all(fail_after(results[:2]), writer)
    gallery, progress = Gallery(), []
    with open_writer("csv", output, stamp, resume=True) as writer:
        summary = score_all(iter(results[2:]), writer, gallery=gallery, advance=progress.append)  # type: ignore[arg-type]
    assert (summary.scored, summary.failed, summary.low, summary.high) == (3, 1, 1.0, 3.0)
    assert gallery.shown == results
    assert progress == [2, 1, 1]
    with output.open("rb") as stream:
        assert [row.result for row in read_rows("csv", stream)] == results


def fail_after(results: list[Result]) -> Iterator[Result]:
    yield from results
    raise OSError("the disk is gone")


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_every_image_has_one_row_when_images_come_and_go_between_two_runs(
    shared_bundle: Path, photo: Photo, tmp_path: Path, format: str
) -> None:
    files = {name: str(photo(f"{name}.png", seed=i)) for i, name in enumerate("abcdef")}
    output = tmp_path / "scores"

    def rows() -> list[Result]:
        with output.open("rb") as stream:
            return [row.result for row in read_rows(format, stream)]  # type: ignore[arg-type]

    with local_executor(Settings(shared_bundle, backend="onnxruntime-cpu", threads=1, batch_size=2)) as executor:

        def score(names: str, *, stop_after: int | None = None, resume: bool = True) -> None:
            stamp = Stamp.of(executor.manifest)
            with open_writer(format, output, stamp, resume=resume) as writer:  # type: ignore[arg-type]
                done = (result.path for result in writer.earlier())
                results = executor.rows([files[name] for name in names], done, None)
                for i, result in enumerate(results):
                    if i == stop_after:
                        raise KeyboardInterrupt
                    writer.write(result)

        with pytest.raises(Exception, match="interrupted; the 3 rows"):
            score("abcde", stop_after=3, resume=False)
        score("fabbcde")  # f is new, b is there twice
        first = rows()
    assert [Path(each.path).stem for each in first] == list("abcfbde")
    assert all(each.ok for each in first)
    assert first[1] == first[4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_sets_the_event_and_the_second_interrupts(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    reached = []

    def block() -> None:
        with stop_on_signal() as stop:
            assert not stop.is_set()
            os.kill(os.getpid(), number)
            assert stop.wait(60)
            reached.append("first")
            os.kill(os.getpid(), number)
            threading.Event().wait(10)
            reached.append("not interrupted")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert reached == ["first"]
    assert signal.getsignal(number) is before


def test_a_block_that_comes_to_its_end_after_a_signal_counts_as_interrupted() -> None:
    reached = []

    def block() -> None:
        with stop_on_signal() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.wait(60)
            reached.append("end")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert reached == ["end"]


def test_without_a_signal_nothing_happens_and_handlers_are_as_before() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_on_signal() as stop:
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert not stop.is_set()
    with pytest.raises(ZeroDivisionError), stop_on_signal():
        raise ZeroDivisionError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def block() -> None:
        with stop_on_signal() as stop:
            seen.extend([stop.is_set(), signal.getsignal(signal.SIGINT)])

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert seen == [False, before]
