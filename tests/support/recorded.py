"""A `Progress` that a test can look at, or stop the work from."""

from __future__ import annotations

from collections.abc import Callable

from mdnet_engines.progress import Progress


class Recorded(Progress):
    """Keeps what it is told, in order; `stop` is called with each text and each number, and may raise."""

    def __init__(self, stop: Callable[[str | int], None] = lambda _: None):
        self.steps: list[str] = []
        self.notes: list[str] = []
        self.counts: list[tuple[int | None, list[int]]] = []
        """Of each count: its total, and what it was advanced by."""
        self._stop = stop

    def step(self, text: str) -> None:
        self.steps.append(text)
        self._stop(text)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._stop(text)

    def count(self, title: str, total: int | None) -> Callable[[int], None]:
        advances: list[int] = []
        self.counts.append((total, advances))

        def advance(more: int) -> None:
            advances.append(more)
            self._stop(more)

        return advance
