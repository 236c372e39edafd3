"""A run: images → rows in a writer, going on where an interrupted one has left off."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from mdnet_rt.results import Result, Summary

if TYPE_CHECKING:
    from mdnet_rt.gallery import Gallery
    from mdnet_rt.sources import Entry
    from mdnet_rt.writers import Writer

Stream = Callable[["Iterable[Entry]"], Iterator[Result]]
"""Scores images, giving a row for each, in their order."""


def score_all(
    images: Iterable[Entry],
    stream: Stream,
    writer: Writer,
    *,
    gallery: Gallery | None = None,
    on_row: Callable[[int], None] = lambda _: None,
) -> Summary:
    """Write a row for each of `images`, but for those that have theirs from an interrupted run.

    Args:
        gallery: is shown each row, of the interrupted run too.
        on_row: is called with the number of rows that are there more than before.

    Returns:
        Counts of all rows of the file, those of the interrupted run included.
    """
    summary = Summary()
    for result in writer.earlier():
        summary.add(result)
        if gallery:
            gallery.add(result)
    on_row(summary.scored + summary.failed)
    for result in stream(unfinished(images, (row.path for row in writer.earlier()))):
        writer.write(result)
        summary.add(result)
        if gallery:
            gallery.add(result)
        on_row(1)
    return summary


def unfinished(images: Iterable[Entry], done: Iterator[str]) -> Iterator[Entry]:
    """The images without a row yet. `done`: names of the rows that are there, in their order.

    Names are compared one by one as both are read. Where they part, since images have come or gone, the names left are
    held in memory; from there on an image counts as done as often as its name is among them.
    """
    images = iter(images)
    for image in images:
        name = next(done, None)
        if name is None:
            yield image
            break
        if name == image.name:
            continue
        left = Counter([name, *done])
        yield from (each for each in chain([image], images) if not _take(left, each.name))
    yield from images


def _take(left: Counter[str], name: str) -> bool:
    found = left[name] > 0
    left[name] -= found
    return found


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Give an event that Ctrl-C or SIGTERM sets; the second of them interrupts at once.

    Raises:
        KeyboardInterrupt: where the block has come to its end with the event set.
    """
    stop = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(each, handle) for each in signals]
    try:
        yield stop
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)
    if stop.is_set():
        raise KeyboardInterrupt
