"""The mixer of Vim: one scan direction; and both in a training step on the CPU, with their gradient written out.

Left to autograd, much of a step is copies between layouts and the gradient of the depthwise convolution. Here sequences
lie channel by channel, (D, B, L): steps side by side, as the scan reads them, and a product over the whole batch is one
matrix product without a copy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mdnet.scan import selective_scan, selective_scan_backward


class Branch(NamedTuple):
    """The tensors of one scan direction. D channels, N states, K taps, R the rank of the step-size projection."""

    taps: Tensor  # (D, 1, K), in the order in which the convolution meets the sequence
    conv_bias: Tensor | None  # (D,)
    x_proj: Tensor  # (R + 2N, D)
    dt_proj: Tensor  # (D, R)
    dt_bias: Tensor  # (D,)
    A: Tensor  # (D, N)
    D: Tensor  # (D,)

    def run(self, x: Tensor, z: Tensor, reverse: bool) -> Tensor:
        """x, z (B, D, L) → y (B, D, L): depthwise convolution, SiLU, projections, scan and gate."""
        rank, states, taps = self.dt_proj.shape[1], self.A.shape[1], self.taps.shape[2]
        past = (0, taps - 1) if reverse else (taps - 1, 0)
        x = F.silu(F.conv1d(F.pad(x, past), self.taps, self.conv_bias, groups=x.shape[1]))
        dt, B, C = (self.x_proj @ x).split([rank, states, states], dim=1)  # (B, R, L), (B, N, L), (B, N, L)
        return selective_scan(x, self.dt_proj @ dt, self.A, B, C, self.D, z, self.dt_bias, reverse)


def mix(tokens: Tensor, in_proj: Tensor, out_proj: Tensor, forward: Branch, backward: Branch) -> Tensor:
    """tokens (B, L, d), in_proj (2D, d), out_proj (d, D) → (B, L, d). Differentiable once, in reverse mode.

    Under autocast the products take and give its type, as they would there; what is between them has that of the
    weights: on the CPU a convolution and a scan in bfloat16 are slower, and less exact.
    """
    device = tokens.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else in_proj.dtype
    with torch.autocast(device, enabled=False):
        return _Mix.apply(kind, tokens, in_proj, out_proj, *forward, *backward)


class _Kept(NamedTuple):
    """What the backward pass of one direction takes from its forward pass. Sequences are (D, B, L)."""

    before: Tensor  # of SiLU
    u: Tensor
    mixed: Tensor  # (R + 2N, B·L), in the type of the products
    delta: Tensor


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kind: torch.dtype, tokens: Tensor, in_proj: Tensor, out_proj: Tensor, *both: Tensor
    ) -> Tensor:
        rows = tokens.flatten(0, 1).to(kind)  # (B·L, d)
        x, z = _sequences((in_proj.to(kind) @ rows.mT).to(in_proj.dtype), tokens.shape).chunk(2)
        y, kept = _run(x, z, both[: len(both) // 2], kind, reverse=False)
        y_back, kept_back = _run(x, z, both[len(both) // 2 :], kind, reverse=True)
        total = torch.add(y.transpose(0, 1), y_back.transpose(0, 1), out=torch.empty_like(x)).flatten(1).to(kind)
        ctx.kind, ctx.tokens = kind, (tokens.shape, tokens.dtype)
        ctx.save_for_backward(rows, x, z, total, in_proj, out_proj, *both, *kept, *kept_back)
        # The mean of the directions: halving the weights is exact too, and less work.
        return (total.mT @ (out_proj / 2).to(kind).mT).view(tokens.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, x, z, total, in_proj, out_proj, *rest = ctx.saved_tensors
        count = len(_Kept._fields)
        both, kept, kept_back = rest[: -2 * count], _Kept(*rest[-2 * count : -count]), _Kept(*rest[-count:])
        kind, half, (shape, dtype) = ctx.kind, len(both) // 2, ctx.tokens
        grad = grad.flatten(0, 1).to(kind)
        grad_y = _sequences(((out_proj / 2).to(kind).mT @ grad.mT).to(x.dtype), shape).transpose(0, 1)
        inputs = x.new_empty(2, *x.shape)
        forward = _differentiate(grad_y, x, z, both[:half], kept, kind, inputs, reverse=False)
        backward = _differentiate(grad_y, x, z, both[half:], kept_back, kind, inputs, reverse=True)
        inputs = inputs.flatten(0, 1).flatten(1).to(kind)  # (2D, B·L)
        return (
            None,
            (inputs.mT @ in_proj.to(kind)).to(dtype).view(shape),
            (inputs @ rows).to(in_proj.dtype),
            (grad.mT @ total.mT).to(out_proj.dtype) / 2,
            *forward,
            *backward,
        )


def _run(x: Tensor, z: Tensor, branch: tuple[Tensor, ...], kind: torch.dtype, *, reverse: bool) -> tuple[Tensor, _Kept]:
    """x, z (D, B, L) → y (B, D, L), as `Branch.run`."""
    taps, conv_bias, x_proj, dt_proj, *_ = branch
    before = _convolve(x, taps, conv_bias, reverse)
    u = F.silu(before)
    mixed = x_proj.to(kind) @ u.flatten(1).to(kind)
    delta = (dt_proj.to(kind) @ mixed[: dt_proj.shape[1]]).to(x.dtype).view(x.shape)
    kept = _Kept(before, u, mixed, delta)
    return selective_scan(*_scan_inputs(z, branch, kept), reverse), kept


def _differentiate(
    grad_y: Tensor,
    x: Tensor,
    z: Tensor,
    branch: tuple[Tensor, ...],
    kept: _Kept,
    kind: torch.dtype,
    inputs: Tensor,
    *,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """The gradients of `branch`; those of x and z go to `inputs` (2, D, B, L), which the reverse direction adds to."""
    taps, _, x_proj, dt_proj, *_ = branch
    grads = selective_scan_backward(grad_y, *_scan_inputs(z, branch, kept), reverse)
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_dt_bias = grads
    rank = dt_proj.shape[1]
    step = grad_delta.transpose(0, 1).to(kind, memory_format=torch.contiguous_format).flatten(1)
    shared = torch.cat([grad_B, grad_C], dim=1).transpose(0, 1).flatten(1).to(kind)
    mixed = torch.cat([dt_proj.to(kind).mT @ step, shared])  # (R + 2N, B·L)
    grad_before = (x_proj.to(kind).mT @ mixed).to(x.dtype).view(x.shape)
    grad_before += grad_u.transpose(0, 1)
    torch.ops.aten.silu_backward.grad_input(grad_before, kept.before, grad_input=grad_before)
    if not reverse:
        inputs[0].zero_()
        inputs[1].copy_(grad_z.transpose(0, 1))
    else:
        inputs[1].add_(grad_z.transpose(0, 1))
    grad_taps = _convolve_backward(grad_before, x, taps, inputs[0], reverse)
    return (
        grad_taps,
        grad_before.sum((1, 2)),
        (mixed @ kept.u.flatten(1).to(kind).mT).to(x_proj.dtype),
        (step @ kept.mixed[:rank].mT).to(dt_proj.dtype),
        grad_dt_bias,
        grad_A,
        grad_D,
    )


def _sequences(rows: Tensor, tokens: torch.Size) -> Tensor:
    """(X, B·L) → (X, B, L), of tokens (B, L, d)."""
    return rows.view(-1, *tokens[:2])


def _scan_inputs(
    z: Tensor, branch: tuple[Tensor, ...], kept: _Kept
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `selective_scan` takes, as views."""
    *_, dt_proj, dt_bias, A, D = branch
    states = kept.mixed[dt_proj.shape[1] :].to(z.dtype).view(2, -1, *z.shape[1:])
    B, C = states.transpose(1, 2)
    return kept.u.transpose(0, 1), kept.delta.transpose(0, 1), A, B, C, D, z.transpose(0, 1), dt_bias


def _overlaps(steps: int, taps: int, reverse: bool) -> list[tuple[slice, slice]]:
    """For each tap: the steps of the output that it adds to, and those of the input that it takes."""
    shifts = range(taps) if reverse else range(taps - 1, -1, -1)
    pairs = [(slice(min(shift, steps), steps), slice(0, max(steps - shift, 0))) for shift in shifts]
    return [(early, late) if reverse else (late, early) for late, early in pairs]


def _convolve(x: Tensor, taps: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """x (D, B, L), taps (D, 1, K), bias (D,) → (D, B, L): the depthwise convolution of `Branch.run`."""
    y = bias[:, None, None].expand_as(x).contiguous()
    for k, (to, of) in enumerate(_overlaps(x.shape[2], taps.shape[2], reverse)):
        y[..., to].addcmul_(x[..., of], taps[..., k, None])
    return y


def _convolve_backward(grad: Tensor, x: Tensor, taps: Tensor, grad_x: Tensor, reverse: bool) -> Tensor:
    """Add to `grad_x`; give the gradient of `taps`."""
    grads = []
    for k, (to, of) in enumerate(_overlaps(x.shape[2], taps.shape[2], reverse)):
        grad_x[..., of].addcmul_(grad[..., to], taps[..., k, None])
        grads.append((grad[..., to] * x[..., of]).sum((1, 2)))
    return torch.stack(grads, dim=-1)[:, None]
