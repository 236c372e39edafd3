"""What the TensorRT sessions need of the CUDA runtime: calls that raise, and one place that frees what was taken.

The functions are those of `cuda.bindings.runtime` (the package cuda-bindings, part of mdnet[tensorrt] and mdnet[rtx]),
imported when the first is called. *Unverified on a GPU.*
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np

from mdnet_engines.errors import GpuLostError, MDNetError, first_line

_FOR_GOOD = frozenset(
    {
        *("cudaErrorDevicesUnavailable", "cudaErrorNoDevice", "cudaErrorInsufficientDriver", "cudaErrorUnknown"),
        *("cudaErrorECCUncorrectable", "cudaErrorNvlinkUncorrectable", "cudaErrorContained"),
        *("cudaErrorIllegalAddress", "cudaErrorLaunchTimeout", "cudaErrorLaunchFailure", "cudaErrorContextIsDestroyed"),
        *("cudaErrorHardwareStackError", "cudaErrorIllegalInstruction", "cudaErrorMisalignedAddress"),
        *("cudaErrorInvalidAddressSpace", "cudaErrorInvalidPc", "cudaErrorSystemDriverMismatch"),
    }
)
"""Errors after which every call fails until the process starts again: so CUDA's documentation, or there is no GPU."""


def call(name: str, *arguments: Any) -> Any:
    """Call the CUDA runtime's function `name`; give its result, or None if it has none.

    Raises:
        GpuLostError: it failed, and so will every later call of this process.
        MDNetError: it failed, or an earlier asynchronous call did, or cuda-bindings is missing.
    """
    runtime = _runtime()
    status, *results = getattr(runtime, name)(*arguments)
    if status == runtime.cudaError_t.cudaSuccess:
        return results[0] if results else None
    said = f"{name} failed with {status.name} ({_description(runtime, status)})"
    if status.name in _FOR_GOOD:
        raise GpuLostError(f"{said}; this process has lost the GPU: look at nvidia-smi, then start it again")
    hint = "; use a smaller batch size" if status == runtime.cudaError_t.cudaErrorMemoryAllocation else ""
    raise MDNetError(f"{said}{hint}")


def current_gpu() -> int:
    """Give the number of this thread's current GPU.

    Raises:
        MDNetError: there is none, or no driver for it. Without this check TensorRT's own calls may end the process.
    """
    runtime = _runtime()
    status, count = runtime.cudaGetDeviceCount()
    if status != runtime.cudaError_t.cudaSuccess:
        raise MDNetError(
            f"TensorRT needs an NVIDIA GPU and its driver: {_description(runtime, status)}; see nvidia-smi"
        )
    if not count:
        raise MDNetError("TensorRT needs an NVIDIA GPU; the driver sees none")
    return int(call("cudaGetDevice"))


def describe_gpu(number: int) -> str:
    """What decides which kernels run on a GPU: its name, its compute capability, and the CUDA of its driver."""
    properties, driver = call("cudaGetDeviceProperties", number), call("cudaDriverGetVersion")
    return f"{properties.name.decode(errors='replace')} sm_{properties.major}{properties.minor}, driver {driver}"


def upload(address: int, rows: np.ndarray, stream: Any) -> None:
    """Enqueue a copy of contiguous, pinned `rows` to device memory."""
    kind = _runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
    call("cudaMemcpyAsync", address, rows.ctypes.data, rows.nbytes, kind, stream)


def download(rows: np.ndarray, address: int, stream: Any) -> None:
    """Enqueue a copy of device memory to contiguous, pinned `rows`."""
    kind = _runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
    call("cudaMemcpyAsync", rows.ctypes.data, address, rows.nbytes, kind, stream)


class Resources:
    """What was taken from CUDA. `close` gives it back, the latest first, whatever fails on the way."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def device(self, nbytes: int) -> int:
        """Allocate device memory, aligned as TensorRT asks; give its address. Not even an empty one is null."""
        return int(self._take("cudaFree", "cudaMalloc", max(nbytes, 1)))

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Allocate page-locked host memory, from and to which copies are asynchronous, zeroed; it ends at `close`."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        address = int(self._take("cudaFreeHost", "cudaMallocHost", max(nbytes, 1)))
        array = np.frombuffer(memoryview((ctypes.c_uint8 * nbytes).from_address(address)), dtype).reshape(shape)
        array[:] = 0
        return array

    def stream(self) -> Any:
        """Create a stream that does not wait for the default stream, nor is waited for by it."""
        return self._take("cudaStreamDestroy", "cudaStreamCreateWithFlags", _runtime().cudaStreamNonBlocking)

    def event(self) -> Any:
        """Create an event, to order one stream after another."""
        return self._take("cudaEventDestroy", "cudaEventCreateWithFlags", _runtime().cudaEventDisableTiming)

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Any:
        """Record what `enqueue` puts on `stream`, and on streams it forks to and joins again, without running it.

        Returns:
            A CUDA graph for `cudaGraphLaunch`.
        """
        # Thread-local: allocations of other threads, other libraries among them, neither fail nor spoil the capture.
        mode = _runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("cudaStreamBeginCapture", stream, mode)
        try:
            enqueue()
        except BaseException:
            with suppress(MDNetError):  # the capture must end for the stream to be of use again; it is broken anyway
                call("cudaGraphDestroy", call("cudaStreamEndCapture", stream))
            raise
        recorded = call("cudaStreamEndCapture", stream)
        try:
            return self._take("cudaGraphExecDestroy", "cudaGraphInstantiate", recorded, 0)
        finally:
            _free("cudaGraphDestroy", recorded)

    def at_close(self, action: Callable[[], None]) -> None:
        """Do this too at `close`, in its turn."""
        self._stack.callback(action)

    def close(self) -> None:
        """Free everything. Nothing of it may be in use any more: synchronise the streams first."""
        self._stack.close()

    def _take(self, free: str, name: str, *arguments: Any) -> Any:
        taken = call(name, *arguments)
        self._stack.callback(_free, free, taken)
        return taken


def _free(name: str, handle: Any) -> None:
    with suppress(MDNetError):  # after a failed kernel every call fails, and only the end of the process frees
        call(name, handle)


def _description(runtime: Any, status: Any) -> str:
    _, text = runtime.cudaGetErrorString(status)
    return text.decode() if isinstance(text, bytes) else str(text)


def _runtime() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise MDNetError(
            f"cuda-bindings can't be imported ({first_line(error)}); it comes with mdnet[tensorrt] and mdnet[rtx]"
        ) from None
