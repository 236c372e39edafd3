"""A stage's process: start it, wait for it, and end it with everything that it started, whatever that does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu.checkout import ROOT
from gpu.results import CRASHED, TIMED_OUT

_MARK = "MDNET_GPU_CHECK_STAGE"  # in the environment of the process, which all that it starts inherit
_PERIOD = 0.25  # seconds between looks at what it has done
_PATIENCE = 5.0  # for a killed process to end: in a driver that hangs it never does


class StageProcess:
    """`python -m gpu.worker` with a request; what it says goes to the file `said`."""

    def __init__(self, request: dict[str, Any], said: Path, environment: dict[str, str], folder: Path):
        self._said, self._mark = said, f"{_MARK}={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        with said.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gpu.worker"],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**environment, name: value},
                cwd=folder,
                start_new_session=True,  # a terminal's Ctrl-C is for the script, which then ends the stage
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(json.dumps(request).encode())

    def wait(self, limit: float, look: Callable[[], None]) -> tuple[str, str]:
        """How it ended: a status and a note, both empty where it came to its end; TIMED_OUT where it did not.

        Args:
            limit: seconds to wait at most.
            look: called again and again meanwhile.
        """
        end = time.monotonic() + limit
        while True:
            try:
                return self._ended(self._process.wait(timeout=max(0.0, min(_PERIOD, end - time.monotonic()))))
            except subprocess.TimeoutExpired:
                look()
                if time.monotonic() >= end:
                    return TIMED_OUT, f"stopped after {limit:.0f} s"

    def end(self) -> bool:
        """Kill it and all that it started; False where it does not end."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        while marked := _with_in_environment(self._mark):  # also what made a session of its own
            for pid in marked:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not self._gone():
                return False
            time.sleep(0.02)
        return self._gone()

    def _gone(self) -> bool:
        try:
            self._process.wait(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _ended(self, code: int) -> tuple[str, str]:
        if code == 0:
            return "", ""
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = self._said.read_text(encoding="utf-8", errors="replace").splitlines()
        words = [line for line in lines if line.strip()]
        last = f", having said: {words[-1].strip()[:200]}" if words else ""
        return CRASHED, how + last.replace(str(ROOT), ".")


def _with_in_environment(mark: str) -> list[int]:
    """Processes that were started with `mark` in their environment; none where there is no /proc."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found
