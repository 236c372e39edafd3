"""A contestant of a benchmark in a process of its own, so that its threads and its peak memory are its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mdnet_engines.errors import MDNetError
from mdnet_engines.system.child_process import Child, CrashError


class Worker(Child):
    """A contestant's process, which answers as `mdnet_rt.bench.worker` and `mdnet.cli.bench_worker` do.

    Args:
        name: what messages call it.
        program: what Python runs, with its arguments: `-m` and a module, or a file.
        options: what it is to open.
        threads: per graph, and of OpenMP, for libraries that take no other word.
    """

    def __init__(self, name: str, program: Sequence[str], options: Mapping[str, Any], *, threads: int):
        self._options = {**options, "threads": threads}
        # Threads that spin would take the other contestants' cores.
        openmp = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        super().__init__(program, name=name, environment=openmp)

    def ready(self) -> dict[str, Any]:
        """Wait until it can run; give what it says of itself.

        Raises:
            UsageError, MDNetError: it can't, for the reason given.
        """
        return self._named({"ask": "open", **self._options})

    def run(self, stage: str) -> float:
        """Run `stage` once; its seconds.

        Raises:
            MDNetError: it failed, or the process ended.
        """
        return self._named({"ask": "run", "stage": stage})

    def peak_memory(self) -> int | None:
        """Bytes it has held at most until now; None where the system does not say (all but Linux)."""
        # Not rusage, where a process starts with its parent's peak.
        try:
            status = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8")
        except OSError:
            return None
        found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
        return int(found[1]) * 1024 if found else None

    def _named(self, request: Mapping[str, Any]) -> Any:
        try:
            return self.ask(request)
        except CrashError:
            raise
        except MDNetError as error:
            raise type(error)(f"{self.name}: {error}") from None
