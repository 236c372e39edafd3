"""A run: images → rows in a writer, going on where an interrupted one has left off."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mdnet_rt.rows.result import Result, Summary

if TYPE_CHECKING:
    from mdnet_engines.backends.candidates import Backend
    from mdnet_engines.bundle.manifest import Manifest
    from mdnet_rt.rows.gallery import Gallery
    from mdnet_rt.rows.writers import Writer
    from mdnet_rt.sources.entry import Entry


@dataclass(frozen=True)
class Settings:
    """How images become rows, whichever executor does it; the names are those of `Scorer.open` and `Scorer.stream`.

    `column` is that of Parquet files.
    """

    bundle: Path | None = None
    backend: Backend = "auto"
    threads: int = 0
    batch_size: int = 16
    workers: int = 0
    column: str | None = None
    face: str | None = None
    keep_pixels: bool = False
    check: bool = True


class Executor(NamedTuple):
    """The engine that scores. `rows` takes locations, the names of existing rows in order, and an event that ends it
    early; it gives the other rows of these locations, in order.
    """

    manifest: Manifest
    rows: Callable[[Iterable[str], Iterator[str], threading.Event | None], Iterator[Result]]


@contextlib.contextmanager
def local_executor(settings: Settings) -> Iterator[Executor]:
    """Give an executor that scores in this process.

    Raises:
        As `Scorer.open` does.
    """
    from mdnet_rt.scoring.scorer import Scorer
    from mdnet_rt.sources.locations import read_locations

    def rows(locations: Iterable[str], done: Iterator[str], stop: threading.Event | None = None) -> Iterator[Result]:
        return scorer.stream(
            unfinished(read_locations(locations, column=settings.column), done),
            workers=settings.workers,
            keep_pixels=settings.keep_pixels,
            stop=stop,
        )

    with Scorer.open(
        settings.bundle,
        backend=settings.backend,
        threads=settings.threads,
        batch_size=settings.batch_size,
        check=settings.check,
        face=settings.face,
    ) as scorer:
        yield Executor(scorer.manifest, rows)


def score_all(
    rows: Iterable[Result],
    writer: Writer,
    *,
    gallery: Gallery | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Summary:
    """Write `rows`, after those that an interrupted run has left.

    Args:
        gallery: is shown each row, of the interrupted run too.
        advance: called with the number of new rows, those of the interrupted run first.

    Returns:
        Counts of all rows of the file, those of the interrupted run included.
    """
    summary = Summary()
    for result in writer.earlier():
        summary.add(result)
        if gallery:
            gallery.add(result)
    advance(summary.scored + summary.failed)
    for result in rows:
        writer.write(result)
        summary.add(result)
        if gallery:
            gallery.add(result)
        advance(1)
    return summary


def unfinished(images: Iterable[Entry], done: Iterator[str]) -> Iterator[Entry]:
    """The images without a row yet. `done`: names of the existing rows, in their order.

    Names are compared one by one as both are read. Where they differ, because images were added or removed, the
    remaining names are held in memory; from there on an image counts as done as often as its name is among them.
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
