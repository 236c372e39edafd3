"""How long a run takes, without leaving work behind that the next one would pay for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """What `run` gives, and its seconds; returns when no thread of this process works any more.

    Threads that spin while they wait for more, as ONNX Runtime's do, would take cores from whatever is timed next.
    """
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        before = time.process_time()
        time.sleep(0.004)
        if time.process_time() - before < 0.0005:
            break
    return result, seconds
