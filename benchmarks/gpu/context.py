"""What a stage is given, and how what becomes of its work turns into rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from gpu.clock import Device
from gpu.results import FAILED, NO_TIME, NOT_INSTALLED, NOT_SUPPORTED, PASSED, Figure, Row, plain
from gpu.sizes import Sizes

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


@dataclass
class Context:
    """What a stage is given. `scratch` is shared by the stages of one run, `bundles` may be kept from run to run."""

    device: Device
    sizes: Sizes
    scratch: Path
    bundles: Path
    deadline: float  # of time.monotonic
    emit: Callable[[Row], None]

    def left(self) -> float:
        """Seconds until the stage is stopped."""
        return self.deadline - time.monotonic()

    def series(self, works: Iterable[tuple[str, Work]]) -> None:
        """Attempt one thing after the other, each only where the time is left that the longest before it took."""
        longest = 0.0
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
            self.emit(Row(name, NO_TIME, note))
            return None
        try:
            figures = work() or {}
        except Exception as error:
            status, note, figures = judge(error)
            self.emit(Row(name, status, note, plain(figures)))
            return None
        note = str(figures.pop("note", ""))
        self.emit(Row(name, PASSED, note, plain(figures)))
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
