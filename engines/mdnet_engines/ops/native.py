"""The native library: the selective scan on the CPU, and the operators that ONNX Runtime loads from it.

The library is built with the package (`engines/cpp/CMakeLists.txt`). Where there was no compiler, the package is
installed without it: graphs then run the operator's function body, and PyTorch a loop over the steps.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from pathlib import Path

import mdnet_engines
from mdnet_engines.errors import MDNetError, first_line

_NAME = "libmdnet_ops.so"
_SAYING = threading.Lock()
MISSING = (
    "mdnet was installed without its native library: there was no compiler, or the build failed (pip install -v shows "
    "it); it takes Linux, and GCC 12 or newer or Clang"
)
BROKEN = "{} can't be loaded ({}); install mdnet again on this machine"
TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
"""`Scan.type`: of u, delta, B, C, z and y."""
ISAS = {"best": 0, "portable": 1, "avx2": 2, "avx512": 3}
"""`Scan.isa`: which build of the kernel runs; "best" is the widest that the processor has."""


class Rows(ctypes.Structure):
    """A tensor (batch, rows, length) whose last axis is contiguous; strides in elements."""

    _fields_ = [("data", ctypes.c_void_p), ("batch_stride", ctypes.c_int64), ("row_stride", ctypes.c_int64)]


class Scan(ctypes.Structure):
    """One call of the scan: `MdnetScan` of `engines/cpp/scan/scan.h`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels", "length", "states")),
        *((name, ctypes.c_int32) for name in ("type", "reverse", "isa")),
        *((name, Rows) for name in ("u", "delta", "z", "B", "C")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "delta_bias", "y")),
        *((name, ctypes.c_int32) for name in ("groups", "no_softplus")),
        *((name, ctypes.c_void_p) for name in ("h0", "h_last")),
    ]


class Gradients(ctypes.Structure):
    """Where the gradients go: `MdnetScanGradients` of `engines/cpp/scan/scan.h`."""

    _fields_ = [
        ("grad", Rows),
        *((name, ctypes.c_void_p) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")),
        *((name, ctypes.c_void_p) for name in ("h_last", "h0")),
    ]


def custom_op_library() -> Path | None:
    """The library to give to ONNX Runtime's `SessionOptions.register_custom_ops_library`; None where none was built.

    It has kernels of our operators for the CPU, and of the selective scans for CUDA too (unverified on a GPU), for
    onnxruntime 1.20 and newer. Graphs carry function bodies of the operators, so they run without it, slower.
    """
    # An editable install has its Python files and its library in different folders, both on the package's path.
    candidates = (Path(folder, _NAME) for folder in mdnet_engines.__path__)
    return next((file.resolve() for file in candidates if file.is_file()), None)


def say_it_is_missing() -> None:
    """Log, once in a process, that this install has no native library."""
    with _SAYING:  # graphs are opened in several threads, and a cache alone lets two of them in
        _say_it_once()


@functools.cache
def _say_it_once() -> None:
    logging.getLogger("mdnet_engines").warning(
        f"{MISSING} (until then the selective scan runs its portable form, several times slower)"
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None where none was built.

    Raises:
        MDNetError: it exists but can't be loaded (built for another machine).
    """
    file = custom_op_library()
    if file is None:
        say_it_is_missing()
        return None
    try:
        loaded = ctypes.CDLL(str(file))
    except OSError as error:
        raise MDNetError(BROKEN.format(file.name, first_line(error))) from None
    loaded.mdnet_scan_openmp.argtypes = [
        ctypes.POINTER(Scan),
        ctypes.POINTER(Gradients),
        ctypes.c_void_p,
        ctypes.c_int,
    ]
    loaded.mdnet_scan_cuda.argtypes = [ctypes.POINTER(Scan), ctypes.c_void_p]
    loaded.mdnet_scan_cuda.restype = ctypes.c_char_p
    loaded.mdnet_scan_splits.argtypes = [ctypes.c_int64]
    loaded.mdnet_scan_splits.restype = ctypes.c_int64
    return loaded


def run(scan: Scan, gradients: Gradients | None = None, *, gomp_parallel: int | None = None, threads: int = 1) -> None:
    """Run the forward pass, or the backward pass where `gradients` says where its results go.

    Args:
        gomp_parallel: address of `GOMP_parallel` in the OpenMP runtime whose threads are to be used; by default the
            scan runs on the calling thread.
        threads: how many of them.

    Raises:
        MDNetError: the library is missing, the arguments are refused, or memory ran out.
    """
    status = _required().mdnet_scan_openmp(
        ctypes.byref(scan), gradients and ctypes.byref(gradients), gomp_parallel, threads
    )
    if status:
        reasons = {1: "no memory", 2: "this processor lacks that instruction set", 3: "sizes or type out of range"}
        raise MDNetError(f"the native selective scan failed: {reasons.get(status, f'status {status}')}")


def run_cuda(scan: Scan, stream: int) -> None:
    """Enqueue the forward pass on `stream`, a stream's handle, in the thread's current CUDA context.

    All tensors are contiguous and on the device; strides are not looked at.

    Raises:
        MDNetError: the library or the CUDA driver is missing, there is no kernel for this, or the driver refuses it.
    """
    problem = _required().mdnet_scan_cuda(ctypes.byref(scan), stream)
    if problem:
        raise MDNetError(problem.decode())


def _required() -> ctypes.CDLL:
    loaded = library()
    if loaded is None:
        raise MDNetError(MISSING)
    return loaded


def best_isa() -> str:
    """The build of the kernel that this processor runs; "none" without a library."""
    loaded = library()
    return "none" if loaded is None else next(name for name, code in ISAS.items() if code == loaded.mdnet_isa())
