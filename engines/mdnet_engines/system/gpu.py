"""Which NVIDIA GPU this process would use, asked of the driver alone: no CUDA toolkit, no package.

It starts the driver in the process that asks, and a started driver does not survive a fork.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

_MAJOR, _MINOR = 75, 76  # CUdevice_attribute: the compute capability's two numbers


@dataclass(frozen=True)
class Gpu:
    """A GPU: `sm` is its compute capability as compilers write it (`sm_90`), `driver` the CUDA version it speaks.

    `count` says how many GPUs this process sees, this one among them.
    """

    name: str
    sm: str
    driver: str
    count: int = 1


def visible_gpu() -> Gpu | None:
    """The first GPU that `CUDA_VISIBLE_DEVICES` leaves, which is where CUDA starts; None without one, or a driver."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        count, device, major, minor, driver = (ctypes.c_int() for _ in range(5))
        name = ctypes.create_string_buffer(256)
        answers = (
            cuda.cuInit(0),
            cuda.cuDeviceGetCount(ctypes.byref(count)),
            cuda.cuDeviceGet(ctypes.byref(device), 0),
            cuda.cuDeviceGetName(name, len(name), device),
            cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
            cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
            cuda.cuDriverGetVersion(ctypes.byref(driver)),
        )
    except (OSError, AttributeError):  # no driver, or one without these entries
        return None
    if any(answers):
        return None
    version = f"{driver.value // 1000}.{driver.value % 1000 // 10}"
    return Gpu(name.value.decode(errors="replace"), f"sm_{major.value}{minor.value}", version, count.value)
