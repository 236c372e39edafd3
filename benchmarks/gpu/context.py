"""What a stage is given, and how what becomes of its work turns into rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from gpu.clock import Device
from gpu.results import FAILED, NOT_INSTALLED, NOT_RUN, NOT_SUPPORTED, PASSED, Figure, Row, plain
from gpu.sizes import SIZES, Sizes

_OURS = ("gpu", "mdnet", "mdnet_calib", "mdnet_engines", "mdnet_export", "mdnet_rt")
Work = Callable[[], dict[str, Figure] | None]
"""Does one thing and gives its figures; `note` among them becomes the row's."""


class NotInstalled(Exception):  # noqa: N818 (a state, no error)
    """A package that the work needs is missing; the message names it."""


class NotSupported(Exception):  # noqa: N818
    """The device, or its runtime, can't do this; the message says why."""


class CheckFailed(Exception):  # noqa: N818
    """A check failed; figures that were measured all the same come with it."""

    def __init__(self, message: str, figures: dict[str, Figure] | None = None):
        super().__init__(message)
        self.figures = figures or {}


class Report(Protocol):
    """Takes down what a stage does, so that it outlives the stage's process."""

    def expect(self, names: Sequence[str]) -> None: ...

    def begin(self, name: str) -> None: ...

    def row(self, row: Row) -> None: ...


@dataclass(frozen=True)
class Context:
    """What a stage is given. `scratch` is shared by the stages of one run, `bundles` is kept from run to run."""

    device: Device
    sizes: Sizes
    scratch: Path
    bundles: Path
    deadline: float  # of time.monotonic
    report: Report

    def small(self) -> Context:
        """The same with the small model."""
        return replace(self, sizes=SIZES[self.sizes.small])

    def expect(self, *names: str) -> None:
        """Announce rows: where the stage ends too early, those that are missing are said to be."""
        self.report.expect(names)

    def left(self) -> float:
        """Seconds until the stage is stopped."""
        return self.deadline - time.monotonic()

    def series(self, works: Iterable[tuple[str, Work]]) -> None:
        """Attempt one thing after the other, each only where the time is left that the longest before it took."""
        longest, works = 0.0, list(works)
        self.expect(*(name for name, _ in works))
        for name, work in works:
            start = time.monotonic()
            self.attempt(name, work, needs_seconds=longest)
            longest = max(longest, time.monotonic() - start)

    def attempt(self, name: str, work: Work, *, needs_seconds: float = 0.0) -> dict[str, Figure] | None:
        """Do one thing and make a row of what becomes of it; gives its figures, None where it did not pass.

        Args:
            needs_seconds: what it is known to take; where less is left, the row says so and the stage goes on.
        """
        if needs_seconds > self.left():
            note = f"it takes about {needs_seconds:.0f} s, {max(self.left(), 0):.0f} s were left"
            self.report.row(Row(name, NOT_RUN, note))
            return None
        self.report.begin(name)
        try:
            figures = work() or {}
        except Exception as error:
            status, note, figures = judge(error)
            self.report.row(Row(name, status, note, plain(figures)))
            return None
        note = str(figures.pop("note", ""))
        self.report.row(Row(name, PASSED, note, plain(figures)))
        return figures


def judge(error: Exception) -> tuple[str, str, dict[str, Figure]]:
    """The status, note and figures of what an exception ended."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, CheckFailed):
        return FAILED, text, error.figures
    if isinstance(error, NotInstalled):
        return NOT_INSTALLED, text, {}
    if isinstance(error, NotSupported):
        return NOT_SUPPORTED, text, {}
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in ("", *_OURS):
        return NOT_INSTALLED, str(error.name).partition(".")[0], {}
    if type(error).__name__ == "OutOfMemoryError":
        return NOT_SUPPORTED, "the GPU's memory is too small", {}
    return FAILED, f"{type(error).__name__}: {text}", {}
