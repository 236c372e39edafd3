"""The share of time in which a GPU runs kernels, as NVML samples it.

NVML's utilisation is the share of its last sampling period (a sixth of a second to a second, says its documentation) in
which a kernel ran. It is read ten times a second; the mean over a run of some seconds is what is told.
"""

from __future__ import annotations

import ctypes
import statistics
import threading
from collections.abc import Callable

_PERIOD = 0.1


class BusyError(Exception):
    """NVML is missing, or does not know the device."""


def nvml_utilisation(uuid: str) -> Callable[[], float]:
    """A function that reads the utilisation of the GPU `uuid`, 0 to 1.

    Raises:
        BusyError: see there.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        raise BusyError("libnvidia-ml.so.1 is missing") from None
    handle, rates = ctypes.c_void_p(), (ctypes.c_uint * 2)()  # of the GPU, of its memory; per cent
    status = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle))

    def read() -> float:
        nvml.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(rates))
        return rates[0] / 100

    if status or nvml.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(rates)):
        raise BusyError("NVML does not tell this GPU's utilisation")
    return read


def mean_during(run: Callable[[], object], read: Callable[[], float]) -> float:
    """The mean of what `read` gives while `run` runs."""
    found: list[float] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(_PERIOD):
            found.append(read())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        run()
    finally:
        ended.set()
        thread.join()
    return statistics.mean(found or [read()])
