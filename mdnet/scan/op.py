"""The selective scan as a PyTorch operator, `mdnet::selective_scan`, with its gradient.

For channel d and state n, with dt = softplus(delta + delta_bias) and h₀ = 0 (Mamba, arXiv 2312.00752, section 3.2):

    h[t] = exp(dt[t]·A)·h[t−1] + dt[t]·u[t]·B[t]          y[t] = (Σₙ h[t]·C[t] + D·u[t]) · silu(z[t])

The reverse scan runs t from L−1 down to 0. The state is float32 (float64 for float64 input) whatever the input is.
On the CPU the native library runs it, on PyTorch's own threads; on CUDA mamba-ssm's kernel if it is installed
(`mdnet.scan.mamba_ssm`); elsewhere `mdnet.scan.loop`.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdnet.scan import loop as scan_loop
from mdnet.scan import mamba_ssm as scan_mamba
from mdnet_engines.ops import native
from mdnet_engines.ops.scan_shapes import INPUTS, check_shapes

_TYPES: dict[torch.dtype, int] = {getattr(torch, name): code for name, code in native.TYPES.items()}


@torch.library.custom_op("mdnet::selective_scan", mutates_args=())
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    reverse: bool = False,
) -> Tensor:
    """Selective scan over the last axis of `u`. Differentiable once, in reverse mode; forward mode gives zero tangents.

    Args:
        u, delta, z: (batch, channels, length).
        A: (channels, states), negative for a decaying state.
        B, C: (batch, states, length).
        D, delta_bias: (channels,).
        reverse: scan from the last step to the first.

    Returns:
        (batch, channels, length), in the type of `u`.

    Raises:
        ValueError: a shape does not fit the others (the message names both), or a device.
        TypeError: a tensor is not of a floating-point type.
        MDNetError: the native library can't be loaded, or memory ran out.
    """
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    check_inputs(*inputs)
    if _runs_natively(u):
        return _native_scan(*inputs, reverse=reverse)
    if scan_mamba.available(u, A):
        return scan_mamba.scan(*inputs, reverse=reverse)
    return scan_loop.scan(*inputs, reverse=reverse)


@selective_scan.register_fake
def _(*arguments: Any) -> Tensor:
    inputs = arguments[: len(INPUTS)]
    check_inputs(*inputs)
    return torch.empty_like(inputs[0], memory_format=torch.contiguous_format)


@torch.library.custom_op("mdnet::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `selective_scan` for its eight tensors, each of its tensor's shape and type.

    Raises:
        ValueError: `grad` has another shape than `u`; or as `selective_scan`.
    """
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    check_inputs(*inputs)
    if grad.shape != u.shape or grad.device != u.device:
        raise ValueError(f"grad is {tuple(grad.shape)} on {grad.device}, u is {tuple(u.shape)} on {u.device}")
    if _runs_natively(u):
        return _native_backward(grad, *inputs, reverse=reverse)
    if scan_mamba.available(u, A):
        return scan_mamba.scan_backward(grad, *inputs, reverse=reverse)
    return scan_loop.scan_backward(grad, *inputs, reverse=reverse)


@selective_scan_backward.register_fake
def _(_grad: Tensor, *inputs: Tensor | bool) -> tuple[Tensor, ...]:
    tensors = (value for value in inputs if isinstance(value, Tensor))
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *selective_scan_backward(grad, *ctx.saved_tensors, ctx.reverse), None


selective_scan.register_autograd(_differentiate, setup_context=_save)


def check_inputs(*inputs: Tensor) -> None:
    """Raise where the eight tensors are no inputs of a scan; see `selective_scan`."""
    for name, tensor in zip(INPUTS, inputs, strict=True):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; the selective scan takes floating-point tensors")
        if tensor.device != inputs[0].device:
            raise ValueError(f"{name} is on {tensor.device}, u on {inputs[0].device}")
    check_shapes(*(tensor.shape for tensor in inputs))


def _runs_natively(u: Tensor) -> bool:
    return u.device.type == "cpu" and u.dtype in _TYPES and native.library() is not None


def _native_scan(*inputs: Tensor, reverse: bool) -> Tensor:
    u, delta, A, B, C, D, z, delta_bias = inputs
    kind = scan_loop.state_dtype(u)
    steps = (u, delta, z, B, C)
    io = u.dtype if all(tensor.dtype == u.dtype for tensor in steps) else kind
    call = _Call(steps, (A, D, delta_bias), io, kind, reverse)
    y = torch.empty(u.shape, dtype=io)
    call.scan.y = y.data_ptr()
    call.run()
    return y.to(u.dtype)


def _native_backward(grad: Tensor, *inputs: Tensor, reverse: bool) -> scan_loop.Gradients:
    u, delta, A, B, C, D, z, delta_bias = inputs
    kind = scan_loop.state_dtype(u)
    call = _Call((u, delta, z, B, C), (A, D, delta_bias), kind, kind, reverse)
    grad = _rows(grad, kind)
    (batch, channels, length), states = u.shape, A.shape[1]
    # What many channels or images share comes in parts, which are summed here: the same way whatever the threads do.
    splits = call.library.mdnet_scan_splits(channels)
    shapes = {
        **dict.fromkeys(("u", "delta", "z"), (batch, channels, length)),
        "A": (batch, channels, states),
        **dict.fromkeys(("B", "C"), (splits, batch, length, states)),
        **dict.fromkeys(("D", "delta_bias"), (batch, channels)),
    }
    parts = {name: torch.empty(shape, dtype=kind) for name, shape in shapes.items()}
    call.run(native.Gradients(_view(grad), **{name: part.data_ptr() for name, part in parts.items()}))
    grads = (
        parts["u"],
        parts["delta"],
        parts["A"].sum(0),
        parts["B"].sum(0).mT,
        parts["C"].sum(0).mT,
        parts["D"].sum(0),
        parts["z"],
        parts["delta_bias"].sum(0),
    )
    return tuple(  # type: ignore[return-value]
        value.to(like.dtype).contiguous() for value, like in zip(grads, inputs, strict=True)
    )


class _Call:
    """The arguments of one native call, and the tensors that they point to."""

    def __init__(
        self,
        steps: tuple[Tensor, ...],
        parameters: tuple[Tensor, ...],
        io: torch.dtype,
        kind: torch.dtype,
        reverse: bool,
    ):
        loaded = native.library()
        assert loaded is not None
        self.library = loaded
        self._steps = [_rows(tensor, io) for tensor in steps]
        self._parameters = [tensor.to(kind).contiguous() for tensor in parameters]
        u, delta, z, B, C = map(_view, self._steps)
        A, D, delta_bias = (tensor.data_ptr() for tensor in self._parameters)
        sizes = (*self._steps[0].shape, self._parameters[0].shape[1])
        self.scan = native.Scan(*sizes, _TYPES[io], reverse, 0, u, delta, z, B, C, A, D, delta_bias)

    def run(self, gradients: native.Gradients | None = None) -> None:
        native.run(self.scan, gradients, gomp_parallel=_gomp_parallel(), threads=torch.get_num_threads())


def _rows(tensor: Tensor, kind: torch.dtype) -> Tensor:
    """The tensor in the type `kind`, with steps side by side; views of larger tensors stay views."""
    tensor = tensor.to(kind)
    return tensor if tensor.stride(2) == 1 or tensor.shape[2] == 1 else tensor.contiguous()


def _view(tensor: Tensor) -> native.Rows:
    return native.Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


@functools.cache
def _gomp_parallel() -> int | None:
    """The entry of the OpenMP runtime that PyTorch runs on: its threads, not a second set."""
    # A runtime that was preloaded in place of PyTorch's own is found in the process, as PyTorch finds it.
    for library in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        try:
            return ctypes.cast(ctypes.CDLL(library).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None  # a PyTorch built without OpenMP
