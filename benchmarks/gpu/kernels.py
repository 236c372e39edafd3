"""The scan's kernel as a stage gets it: on the GPU; in the dry run its source on the CPU, or else our CPU kernel."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu.clock import Device
from gpu.context import NotInstalled
from mdnet_engines.cuda import kernel as cuda_kernel
from mdnet_engines.ops.scan_shapes import INPUTS

Kernel = Callable[..., None]
"""`kernel(inputs, y, reverse=…, small=…)`: inputs by name, contiguous and on the device; the result goes into y.

`small` says which of two kernels runs; by default the sizes do. Our CPU kernel has no use for it. With `softplus=…` it
is version 2's kernel, which puts the last state into `h_last` if there is one.
"""
PARAMETERS = ("A", "D", "delta_bias", "h0")  # always float32


def cases_module() -> Any:
    """`tests/support/scan_cases.py`; without ml_dtypes its bfloat16 values are float32, which `tensors` rounds."""
    try:
        import ml_dtypes  # noqa: F401
    except ModuleNotFoundError:
        stand_in = types.ModuleType("ml_dtypes")
        stand_in.bfloat16 = np.float32  # type: ignore[attr-defined]
        sys.modules["ml_dtypes"] = stand_in
    import scan_cases

    return scan_cases


def tensors(inputs: Mapping[str, np.ndarray], dtype: torch.dtype, device: Device) -> dict[str, Tensor]:
    """A case's arrays as contiguous tensors on the device, what has steps in `dtype`."""
    return {
        name: torch.from_numpy(np.ascontiguousarray(value, np.float32)).to(
            device.kind, torch.float32 if name in PARAMETERS else dtype
        )
        for name, value in inputs.items()
    }


def random_tensors(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, device: Device, seed: int
) -> dict[str, Tensor]:
    """Inputs of any size, made on the device, as a trained Mamba has them."""
    batch, channels, length, states = sizes
    random = torch.Generator(device.kind).manual_seed(seed)
    shapes = {
        **dict.fromkeys(("u", "delta", "z"), (batch, channels, length)),
        **dict.fromkeys(("B", "C"), (batch, states, length)),
        "A": (channels, states),
        **dict.fromkeys(("D", "delta_bias"), (channels,)),
    }
    made = {name: torch.randn(shapes[name], generator=random, device=device.kind) for name in INPUTS}
    made["A"] = -torch.exp(made["A"].clamp(-3, 3))
    made["delta_bias"] -= 2
    return {name: value if name in PARAMETERS else value.to(dtype) for name, value in made.items()}


def double(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in inputs.items()}


def open_kernel(device: Device, scratch: Path) -> tuple[Kernel, str]:
    """The kernel, and what runs it."""
    if device.is_cuda:
        from gpu.driver import ScanKernel

        torch.zeros(1, device="cuda")  # makes PyTorch's context the current one
        return ScanKernel(), "the GPU"
    try:
        import cuda_emulation

        if not (program := scratch / "launch").exists():  # by an earlier stage
            program = cuda_emulation.build(cuda_kernel.source(), scratch)
    except (ValueError, OSError):  # no such compiler, or one without its sanitizers
        return _native, "our CPU kernel"

    def emulated(
        inputs: Mapping[str, Tensor],
        y: Tensor,
        *,
        reverse: bool,
        small: bool | None = None,
        softplus: bool | None = None,
        h_last: Tensor | None = None,
    ) -> None:
        arrays = {name: _array(value) for name, value in inputs.items()}
        if softplus is None:
            made, last = cuda_emulation.launch(program, scratch, arrays, reverse=reverse, small=small), None
        else:
            options = {"reverse": reverse, "softplus": softplus, "state": h_last is not None}
            made, last = cuda_emulation.launch_v2(program, scratch, arrays, **options)
        y.copy_(torch.from_numpy(made.astype(np.float32)))
        if h_last is not None and last is not None:
            h_last.copy_(torch.from_numpy(last.copy()))

    return emulated, "the CPU, thread by thread"


def both(states: int) -> tuple[bool, ...]:
    """The values of `small` that there are kernels for."""
    return (False, True) if cuda_kernel.has_small(states) else (False,)


def _native(
    inputs: Mapping[str, Tensor],
    y: Tensor,
    *,
    reverse: bool,
    small: bool | None = None,
    softplus: bool | None = None,
    h_last: Tensor | None = None,
) -> None:
    from mdnet.scan import selective_scan

    made, last = selective_scan(
        *(inputs.get(name) for name in INPUTS),
        reverse,
        delta_softplus=softplus is not False,
        h0=inputs.get("h0"),
        return_last_state=True,
    )
    y.copy_(made)
    if h_last is not None:
        h_last.copy_(last)


def _array(value: Tensor) -> np.ndarray:
    if value.dtype is not torch.bfloat16:
        return value.numpy()
    bfloat16 = cases_module().NUMPY_TYPES["bfloat16"]
    if bfloat16 is np.float32:
        raise NotInstalled("ml_dtypes, which the emulation takes bfloat16 from")
    return value.view(torch.int16).numpy().view(bfloat16)
