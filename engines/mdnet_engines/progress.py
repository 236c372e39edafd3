"""What long work reports while it runs: steps, notes and counts. `mdnet_engines.console.show_progress` shows them."""

from __future__ import annotations

import time
from collections.abc import Callable


class Progress:
    """Takes reports and shows nothing: what a library call does unless it is given another."""

    def step(self, text: str) -> None:
        """Say what is done now."""

    def note(self, text: str) -> None:
        """Say, in one line, what the user should know and is no error."""

    def count(self, title: str, total: int | None) -> Callable[[int], None]:
        """Begin to count up to `total`, None where it is unknown; gives what to call with how many more are done."""
        return lambda _: None


SILENT = Progress()


class Laps(Progress):
    """Passes reports on, and tells how long each lap took. The first begins with the last count that has begun."""

    def __init__(self, progress: Progress):
        self._progress, self._began = progress, time.perf_counter()

    def step(self, text: str) -> None:
        self._progress.step(text)

    def note(self, text: str) -> None:
        self._progress.note(text)

    def count(self, title: str, total: int | None) -> Callable[[int], None]:
        self._began = time.perf_counter()
        return self._progress.count(title, total)

    def lap(self) -> float:
        """Seconds since the last lap's end; a new one begins."""
        began, self._began = self._began, time.perf_counter()
        return self._began - began


class Lines(Progress):
    """Each step as a line with the seconds so far; a count as one at its start, its end, and every `EVERY` seconds.

    Args:
        write: takes a line.
    """

    EVERY = 30.0

    def __init__(self, write: Callable[[str], None]):
        self._write, self._start = write, time.perf_counter()

    def step(self, text: str) -> None:
        self._write(f"[{time.perf_counter() - self._start:.1f} s] {text}")

    def note(self, text: str) -> None:
        self._write(f"note: {text}")

    def count(self, title: str, total: int | None) -> Callable[[int], None]:
        of = "" if total is None else f" of {total}"
        done, began = 0, time.perf_counter()
        said = began
        self.step(f"{title}: 0{of}")

        def advance(more: int) -> None:
            nonlocal done, said
            done, now = done + more, time.perf_counter()
            if more and done == total:
                self.step(f"{title}: {done}{of}, {now - began:.1f} s")
            elif now - said >= self.EVERY:
                said = now
                self.step(f"{title}: {done}{of}")

        return advance
