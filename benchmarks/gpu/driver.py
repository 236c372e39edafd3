"""`selective_scan.cu` launched from Python: the committed PTX, the driver by ctypes, PyTorch's tensors or `Buffer`s.

A context must be current: PyTorch's, as it is once a tensor was made on the GPU, or that of `start`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mdnet_engines.cuda import kernel as cuda_kernel

if TYPE_CHECKING:
    from torch import Tensor


class DriverError(Exception):
    """The CUDA driver refused a call; the message has its words."""


def call(name: str, *arguments: object) -> None:
    """Call the driver.

    Raises:
        DriverError: see there.
    """
    cuda = ctypes.CDLL("libcuda.so.1")
    if status := getattr(cuda, name)(*arguments):
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(status, ctypes.byref(text))
        raise DriverError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")


def start() -> None:
    """Make the first GPU's primary context the current one, in a process without PyTorch."""
    context = ctypes.c_void_p()
    call("cuInit", 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    call("cuCtxSetCurrent", context)


class Buffer:
    """A contiguous tensor in GPU memory of its own, which nothing frees; bfloat16 is the upper half of float32."""

    def __init__(self, values: np.ndarray, dtype: str):
        self.shape, self.dtype = values.shape, dtype
        words = values.astype(np.float32)
        stored = (words.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else words.astype(dtype)
        self._stored, self._address = np.ascontiguousarray(stored), ctypes.c_uint64()
        call("cuMemAlloc_v2", ctypes.byref(self._address), ctypes.c_size_t(stored.nbytes))
        call(
            "cuMemcpyHtoD_v2", self._address, ctypes.c_void_p(self._stored.ctypes.data), ctypes.c_size_t(stored.nbytes)
        )

    def data_ptr(self) -> int:
        return self._address.value

    def is_contiguous(self) -> bool:
        return True

    def read(self) -> np.ndarray:
        """What it has now, when all that was enqueued is done."""
        call("cuCtxSynchronize")
        stored, size = self._stored, ctypes.c_size_t(self._stored.nbytes)
        call("cuMemcpyDtoH_v2", ctypes.c_void_p(stored.ctypes.data), self._address, size)
        return (stored.astype(np.uint32) << 16).view(np.float32) if self.dtype == "bfloat16" else stored


class Module:
    """Kernels of a PTX text, compiled by the driver for the GPU at hand."""

    def __init__(self, ptx: str):
        self._module = ctypes.c_void_p()
        call("cuModuleLoadData", ctypes.byref(self._module), ptx.encode())

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        arguments: Sequence[Any],
        stream: int,
    ) -> None:
        """Enqueue a launch without dynamic shared memory on `stream`, a stream's handle; arguments as C values."""
        function = ctypes.c_void_p()
        call("cuModuleGetFunction", ctypes.byref(function), self._module, kernel.encode())
        places = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        sizes = map(ctypes.c_uint, (*grid, threads, 1, 1, 0))
        call("cuLaunchKernel", function, *sizes, ctypes.c_void_p(stream), places, None)


class ScanKernel:
    """The scan's kernels; call it with the operator's inputs by name and an output, all on the GPU and contiguous."""

    def __init__(self) -> None:
        self._module = Module(cuda_kernel.ptx())

    def __call__(
        self,
        inputs: Mapping[str, Tensor | Buffer],
        y: Tensor | Buffer,
        *,
        reverse: bool,
        small: bool | None = None,
        softplus: bool | None = None,
        h_last: Tensor | Buffer | None = None,
        stream: int | None = None,
    ) -> None:
        """Enqueue one scan into `y` on `stream`, by default PyTorch's current one.

        `small` is for the kernel for small launches; by default the sizes decide, as in the native library.
        u, delta, z, y [batch, D, L] and B, C [batch, N, L] of one type; A [D, N], D [D], delta_bias [D] float32.

        With `softplus`, on or off, it is version 2's kernel: D, z, delta_bias and h0 [batch, D, N] may be missing, B
        and C may be [batch, G, N, L], and the last state goes into `h_last`.
        """
        (batch, channels, length), states, B = inputs["u"].shape, inputs["A"].shape[1], inputs["B"]
        version = 1 if softplus is None else 2
        groups = B.shape[1] if len(B.shape) == 4 else 1
        tensors = {**inputs, "y": y, **({} if h_last is None else {"h_last": h_last})}
        for name, tensor in tensors.items():
            if not tensor.is_contiguous():
                raise ValueError(f"{name} is not contiguous")
        numbers = {
            **{"channels": channels // groups, "length": length, "states": states, "groups": groups},
            "softplus": int(bool(softplus)),
        }
        arguments = [
            ctypes.c_int32(numbers[name])
            if name in numbers
            else ctypes.c_void_p(tensors[name].data_ptr() if name in tensors else None)
            for name in (cuda_kernel.ARGUMENTS if version == 1 else cuda_kernel.ARGUMENTS_V2)
        ]
        dtype = str(inputs["u"].dtype).removeprefix("torch.")
        if small is None:
            small = version == 1 and cuda_kernel.is_small(batch, channels, states)
        kernel = cuda_kernel.kernel_name(reverse=reverse, dtype=dtype, states=states, small=small, version=version)
        blocks = -(-numbers["channels"] // cuda_kernel.channels_per_block(kernel))
        if stream is None:
            import torch

            stream = torch.cuda.current_stream().cuda_stream
        self._module.launch(kernel, (batch, blocks, groups), cuda_kernel.THREADS, arguments, stream)
