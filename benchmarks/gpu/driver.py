"""`selective_scan.cu` launched from Python: the committed PTX, the CUDA driver by ctypes, tensors of PyTorch.

PyTorch's context must be current, as it is once a tensor was made on the GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mdnet_engines.cuda import kernel as cuda_kernel

if TYPE_CHECKING:
    from torch import Tensor


class DriverError(Exception):
    """The CUDA driver refused a call; the message has its words."""


class Module:
    """Kernels of a PTX text, compiled by the driver for the GPU at hand."""

    def __init__(self, ptx: str):
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self._module), ptx.encode())

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
        self._call("cuModuleGetFunction", ctypes.byref(function), self._module, kernel.encode())
        places = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        sizes = map(ctypes.c_uint, (*grid, threads, 1, 1, 0))
        self._call("cuLaunchKernel", function, *sizes, ctypes.c_void_p(stream), places, None)

    def _call(self, name: str, *arguments: object) -> None:
        if status := getattr(self._cuda, name)(*arguments):
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(status, ctypes.byref(text))
            raise DriverError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")


class ScanKernel:
    """The scan's kernels; call it with the operator's inputs by name and an output, all on the GPU and contiguous."""

    def __init__(self) -> None:
        self._module = Module(cuda_kernel.ptx())

    def __call__(self, inputs: Mapping[str, Tensor], y: Tensor, *, reverse: bool, stream: int | None = None) -> None:
        """Enqueue one scan into `y` on `stream`, by default PyTorch's current one.

        u, delta, z, y [batch, D, L] and B, C [batch, N, L] of one type; A [D, N], D [D], delta_bias [D] float32.
        """
        (batch, channels, length), states = inputs["u"].shape, inputs["A"].shape[1]
        tensors = {**inputs, "y": y}
        for name, tensor in tensors.items():
            if not tensor.is_contiguous():
                raise ValueError(f"{name} is not contiguous")
        sizes = {"channels": channels, "length": length, "states": states}
        arguments = [
            ctypes.c_int32(sizes[name]) if name in sizes else ctypes.c_void_p(tensors[name].data_ptr())
            for name in cuda_kernel.ARGUMENTS
        ]
        dtype = str(inputs["u"].dtype).removeprefix("torch.")
        kernel = cuda_kernel.kernel_name(reverse=reverse, dtype=dtype, states=states)
        blocks = -(-channels // cuda_kernel.CHANNELS_PER_BLOCK)
        if stream is None:
            import torch

            stream = torch.cuda.current_stream().cuda_stream
        self._module.launch(kernel, (batch, blocks, 1), cuda_kernel.THREADS, arguments, stream)
