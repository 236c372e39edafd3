"""The selective scan as a PyTorch operator, `mdnet::selective_scan`, with its gradient.

For channel d and state n, with dt = softplus(delta + delta_bias) and h₀ = 0 (Mamba, arXiv 2312.00752, section 3.2):

    h[t] = exp(dt[t]·A)·h[t−1] + dt[t]·u[t]·B[t]          y[t] = (Σₙ h[t]·C[t] + D·u[t]) · silu(z[t])

The reverse scan runs t from L−1 down to 0. The state is float32 (float64 for float64 input) whatever the input is.
On the CPU the native library runs it (`mdnet.scan.native_call`); on CUDA mamba-ssm's kernel if it is installed
(`mdnet.scan.mamba_ssm`); elsewhere `mdnet.scan.loop`. This is version 1 of the operator, `mdnet.scan.op_v2` the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdnet.scan import loop as scan_loop
from mdnet.scan import mamba_ssm as scan_mamba
from mdnet.scan import native_call
from mdnet_engines.ops.scan_shapes import INPUTS, check_shapes


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
    if native_call.available(u):
        return native_call.scan(*inputs, reverse=reverse, last_state=False)[0]
    if scan_mamba.available(u, A):
        return scan_mamba.scan(*inputs, reverse=reverse)
    return scan_loop.scan(*inputs, reverse=reverse)[0]


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
    if native_call.available(u):
        return _eight(native_call.scan_backward(grad, *inputs, reverse=reverse))
    if scan_mamba.available(u, A):
        return _eight(scan_mamba.scan_backward(grad, *inputs, reverse=reverse))
    return _eight(scan_loop.scan_backward(grad, *inputs, reverse=reverse))


def _eight(grads: scan_loop.Gradients) -> Any:
    return grads[: len(INPUTS)]


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
    check_kinds(**dict(zip(INPUTS, inputs, strict=True)))
    check_shapes(*(tensor.shape for tensor in inputs))


def check_kinds(u: Tensor, **others: Tensor | None) -> None:
    """Raise where a tensor is not of a floating-point type, or not on the device of `u`."""
    for name, tensor in {"u": u, **others}.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; the selective scan takes floating-point tensors")
        if tensor.device != u.device:
            raise ValueError(f"{name} is on {tensor.device}, u on {u.device}")
