"""What long work reports while it runs: steps, notes and counts. `mdnet_engines.console.progress` shows them."""

from __future__ import annotations

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
