"""The device that a stage runs on, and how time is taken there: CUDA, or a CPU in its place for the dry run.

PyTorch is imported when it is needed.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from gpu.busy import BusyError, mean_during, nvml_utilisation

Run = Callable[[], object]
_FLUSH_BYTES = 2**28  # more than any level-2 cache
_MOST = 50  # repeats


@dataclass(frozen=True)
class Device:
    """`cuda` or `cpu`. Times are medians of repeats after two runs that warm up."""

    kind: Literal["cuda", "cpu"]

    @property
    def is_cuda(self) -> bool:
        return self.kind == "cuda"

    def synchronize(self) -> None:
        if self.is_cuda:
            import torch

            torch.cuda.synchronize()

    def measure(self, run: Run, *, seconds: float, flush: bool = False) -> float:
        """Seconds that PyTorch's stream takes for `run`: by CUDA events, or by the clock on a CPU.

        Args:
            seconds: of repeats, three at least.
            flush: overwrite the level-2 cache before each; the GPU is then behind, so that no launch is waited for.
        """
        repeats = self._repeats(run, seconds)
        if not self.is_cuda:
            return statistics.median(_clock(run) for _ in range(repeats))
        import torch

        waste = torch.empty(_FLUSH_BYTES if flush else 0, dtype=torch.uint8, device="cuda")
        pairs = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            waste.zero_()
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3

    def measure_blocking(self, run: Run, *, seconds: float) -> float:
        """Seconds by the clock of a `run` that returns when its results are on the host."""
        return statistics.median(_clock(run) for _ in range(self._repeats(run, seconds)))

    def memory(self) -> float:
        """GiB in use on the whole device; on a CPU the most that this process has had."""
        if self.is_cuda:
            import torch

            free, total = torch.cuda.mem_get_info()
            return (total - free) / 2**30
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def busy_during(self, run: Run) -> tuple[float, float | str]:
        """Seconds of `run`, and the share of them in which the device was at work, or why that is not known.

        Of a GPU what `gpu.busy` reads; of a CPU the share of its cores' time that this process took.
        """
        start = time.perf_counter()
        if not self.is_cuda:
            cores, before = os.cpu_count() or 1, sum(os.times()[:2])
            run()
            seconds = time.perf_counter() - start
            return seconds, (sum(os.times()[:2]) - before) / (seconds * cores)
        import torch

        try:
            busy: float | str = mean_during(run, nvml_utilisation(f"GPU-{torch.cuda.get_device_properties(0).uuid}"))
        except BusyError as error:
            run()
            busy = str(error)
        return time.perf_counter() - start, busy

    def _repeats(self, run: Run, seconds: float) -> int:
        run()
        self.synchronize()

        def once() -> None:
            run()
            self.synchronize()

        return max(3, min(_MOST, int(seconds / max(_clock(once), 1e-9))))


def _clock(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_torch_memory(device: Device, run: Run) -> float:
    """GiB that PyTorch's tensors take at most during `run`; on a CPU what the process has had."""
    if not device.is_cuda:
        run()
        return device.memory()
    import torch

    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def quiet_fp32() -> None:
    """Float32 that is float32: no TF32 in products and convolutions."""
    import torch

    backends: Any = torch.backends
    backends.cuda.matmul.allow_tf32 = False
    backends.cudnn.allow_tf32 = False
