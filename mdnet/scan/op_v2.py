"""Version 2 of the PyTorch operator, `mdnet::selective_scan_v2`: states, groups and optional inputs.

    dt = softplus(delta + delta_bias), or delta + delta_bias                                              h[−1] = h0
    h[t] = exp(dt[t]·A)·h[t−1] + dt[t]·u[t]·B[t]          y[t] = (Σₙ h[t]·C[t] + D·u[t]) · silu(z[t])

A sequence may come in pieces, each piece's last state the next one's `h0`: the native kernel then gives the results of
the whole sequence, bit for bit. On CUDA `mdnet.scan.loop` runs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdnet.scan import loop as scan_loop
from mdnet.scan import native_call
from mdnet.scan.op import check_kinds
from mdnet_engines.ops.scan_shapes import INPUTS_V2, check_shapes_v2

_COUNT = len(INPUTS_V2)


@torch.library.custom_op("mdnet::selective_scan_v2", mutates_args=())
def selective_scan_v2(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    h0: Tensor | None,
    reverse: bool,
    delta_softplus: bool,
    return_last_state: bool,
) -> tuple[Tensor, Tensor]:
    """`mdnet.scan.selective_scan` with every argument; without `return_last_state` the last state is empty."""
    inputs = (u, delta, A, B, C, D, z, delta_bias, h0)
    _check(inputs)
    if native_call.available(u):
        return native_call.scan(*inputs, reverse=reverse, softplus=delta_softplus, last_state=return_last_state)
    y, h_last = scan_loop.scan(*inputs, reverse=reverse, softplus=delta_softplus)
    return y, h_last if return_last_state else h_last.new_empty(0)


@selective_scan_v2.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs = arguments[:_COUNT]
    _check(inputs)
    u, A = inputs[0], inputs[2]
    shape = (*u.shape[:2], A.shape[1]) if arguments[-1] else (0,)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return y, u.new_empty(shape, dtype=scan_loop.state_dtype(u))


@torch.library.custom_op("mdnet::selective_scan_v2_backward", mutates_args=())
def selective_scan_v2_backward(
    grad: Tensor,
    grad_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    h0: Tensor | None,
    reverse: bool,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the nine tensors, from those of y and of the last state; an empty tensor for one that is None.

    Raises:
        ValueError: `grad` or `grad_last` has the wrong shape or device; or as `selective_scan_v2`.
    """
    inputs = (u, delta, A, B, C, D, z, delta_bias, h0)
    _check(inputs)
    for name, found, wanted in (("grad", grad, u.shape), ("grad_last", grad_last, (*u.shape[:2], A.shape[1]))):
        if found is not None and (found.shape != wanted or found.device != u.device):
            raise ValueError(
                f"{name} is {tuple(found.shape)} on {found.device}; u and A need {tuple(wanted)} on {u.device}"
            )
    run = native_call.scan_backward if native_call.available(u) else scan_loop.scan_backward
    grads = run(grad, *inputs, reverse=reverse, softplus=delta_softplus, grad_last=grad_last)
    return tuple(grad.new_empty(0) if value is None else value for value in grads)  # type: ignore[return-value]


@selective_scan_v2_backward.register_fake
def _(grad: Tensor, _grad_last: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(
        grad.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in arguments[:_COUNT]
    )


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_COUNT])
    ctx.reverse, ctx.delta_softplus, ctx.return_last_state = inputs[_COUNT:]


def _differentiate(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    last = grad_last if ctx.return_last_state else None
    grads = selective_scan_v2_backward(grad, last, *ctx.saved_tensors, ctx.reverse, ctx.delta_softplus)
    given = (tensor is not None for tensor in ctx.saved_tensors)
    return *(value if there else None for value, there in zip(grads, given, strict=True)), None, None, None


selective_scan_v2.register_autograd(_differentiate, setup_context=_save)


def _check(inputs: tuple[Tensor | None, ...]) -> None:
    tensors = {name: tensor for name, tensor in zip(INPUTS_V2, inputs, strict=True) if tensor is not None}
    check_kinds(**tensors)
    check_shapes_v2(**{name: tensor.shape for name, tensor in tensors.items()})
