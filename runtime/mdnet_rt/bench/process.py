"""A contestant of a benchmark in a process of its own, so that its threads and its peak memory are its own.

The protocol, which `mdnet_rt.bench.worker` and `mdnet.cli.bench_worker` speak: when it is ready, the process writes one
line of JSON, which says what it is; then the name of a stage comes in on a line, is run once, and its seconds go out on
a line when the process is at rest again. At the end of its standard input it ends. What goes wrong is the last line of
its standard error, and ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdnet_engines.errors import MDNetError, UsageError, printable


class Worker:
    """A contestant's process. It starts at once; `ready` waits for it. Use it in a `with` block, which ends it.

    Args:
        name: what messages call it.
        program: what Python runs, with its arguments: `-m` and a module, or a file.
        threads: of OpenMP, for libraries that take no other word.
    """

    def __init__(self, name: str, program: Sequence[str], *, threads: int):
        self.name = name
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin would take the other contestants' cores
            "PYTHONSAFEPATH": "1",  # not the current folder's modules
        }
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (`close` closes it)
        self._process = subprocess.Popen(
            [sys.executable, *program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the parent, which ends its workers
        )

    def ready(self) -> dict[str, Any]:
        """Wait until it can run; give what it says of itself.

        Raises:
            UsageError, MDNetError: it ended instead, for the reason given.
        """
        return json.loads(self._answer())

    def run(self, stage: str) -> float:
        """Run `stage` once; its seconds.

        Raises:
            MDNetError: the process ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{stage}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return float(self._answer())

    def peak_memory(self) -> int | None:
        """Bytes it has held at most until now; None where the system does not say (all but Linux)."""
        # Not rusage, where a process starts with its parent's peak.
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8")
        except OSError:
            return None
        found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
        return int(found[1]) * 1024 if found else None

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        self._errors.close()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # a line that was never taken
                pipe.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line
        raise self._ended()

    def _ended(self) -> MDNetError:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        said = printable(lines[-1].strip())[:400] if lines else ""
        if code < 0:
            how = "was killed (out of memory?)" if code == -signal.SIGKILL else f"ended by {signal.Signals(-code).name}"
            return MDNetError(f"{self.name}: its process {how}" + (f", having said: {said}" if said else ""))
        kind = UsageError if code == UsageError.exit_code else MDNetError
        return kind(f"{self.name}: {said or f'its process ended without a word (exit code {code})'}")
