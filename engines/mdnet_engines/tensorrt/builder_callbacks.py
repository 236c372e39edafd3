"""What TensorRT's builder calls while it works: a progress monitor and a logger, for either runtime's module."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from mdnet_engines.errors import printable


class BuilderProgress:
    """What the builder does, as text for people; called from several of its threads.

    Args:
        title: in front of the text.
        tell: called with each new text; steps that change no whole per cent give none.
    """

    def __init__(self, title: str, tell: Callable[[str], None]):
        self._title, self._tell = title, tell
        self._steps: dict[str, int] = {}  # of the phases that have begun and not finished
        self._last = ""
        self._lock = threading.Lock()

    def start(self, phase: str, steps: int) -> None:
        with self._lock:
            self._steps[phase] = steps
            self._say(phase, 0)

    def step(self, phase: str, step: int) -> None:
        with self._lock:
            self._say(phase, step + 1)

    def finish(self, phase: str) -> None:
        with self._lock:
            self._steps.pop(phase, None)

    def _say(self, phase: str, done: int) -> None:
        steps = self._steps.get(phase, 0)
        part = f", {100 * min(done, steps) // steps} %" if steps > 1 else ""
        text = printable(f"{self._title}: {phase.lower()}{part}")
        if text != self._last:
            self._last = text
            self._tell(text)


def make_monitor(trt: Any, progress: BuilderProgress) -> Any:
    """An `IProgressMonitor` of the module `trt` that tells `progress`."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress.step(phase_name, step)
            return True  # False would end the build

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()


def make_logger(trt: Any) -> Any:
    """An `ILogger` that keeps the first error: the later ones only say that something failed before."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.first_error = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR) and not self.first_error:
                self.first_error = one_line(message)

    return Logger()


def one_line(text: str) -> str:
    """A foreign message as part of a line of ours, not longer than one can read."""
    return printable(" ".join(text.split()))[:400]
