"""The selective scan in PyTorch's own operations, forward and backward: a loop over the steps, on any device.

`mdnet.scan` runs it where there is no kernel. Both functions take what `mdnet.scan.selective_scan` takes.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_CHUNK_BYTES = 64 * 2**20  # bounds the decay and state tensors that one stretch of the forward pass holds


def scan(*inputs: Tensor, reverse: bool) -> Tensor:
    """y (batch, channels, length), in the type of `u`."""
    u, delta, A, B, C, D, z, delta_bias = inputs
    kind = state_dtype(u)
    u_, z_, dt, B_, C_ = _time_major(u, z, _step_size(delta, delta_bias, kind), B, C, kind=kind)
    length, batch, channels = u_.shape
    A_, y = A.to(kind), torch.empty_like(u_)
    h = u_.new_zeros(batch, channels, A.shape[1])
    chunk = max(1, _CHUNK_BYTES // h.nbytes)
    starts = range(0, length, chunk)
    for start in reversed(starts) if reverse else starts:
        span = slice(start, min(start + chunk, length))
        _, states = _states(dt[span], u_[span], A_, B_[span], h, reverse)
        h = states[0 if reverse else -1]
        y[span] = (states @ C_[span, :, :, None]).squeeze(-1)
    y = (y + D.to(kind) * u_) * F.silu(z_)
    return y.permute(1, 2, 0).to(u.dtype).contiguous()


def scan_backward(grad: Tensor, *inputs: Tensor, reverse: bool) -> Gradients:
    """Gradients of the eight tensors, from `grad` of y. States are recomputed, not kept from the forward pass."""
    u, delta, A, B, C, D, z, delta_bias = inputs
    kind = state_dtype(u)
    g, u_, z_, dt, B_, C_ = _time_major(grad, u, z, _step_size(delta, delta_bias, kind), B, C, kind=kind)
    A_, D_ = A.to(kind), D.to(kind)
    decay, h = _states(dt, u_, A_, B_, u_.new_zeros(*u_.shape[1:], A.shape[1]), reverse)  # (L, B, D, N) each

    y = (h @ C_[..., None]).squeeze(-1) + D_ * u_
    gate = torch.sigmoid(z_)
    grad_z = g * y * gate * (1 + z_ * (1 - gate))
    g = g * gate * z_  # with respect to the ungated output

    # dL/dh runs against the scan: dL/dh[t] = g[t]·C[t] + decay[t+1]·dL/dh[t+1].
    grad_h = g[..., None] * C_[:, :, None, :]
    order = list(range(len(h))) if reverse else list(reversed(range(len(h))))
    for later, now in itertools.pairwise(order):
        grad_h[now].addcmul_(decay[later], grad_h[later])

    dtu = dt * u_
    grad_C = (g[:, :, None, :] @ h).squeeze(2)
    grad_B = (dtu[:, :, None, :] @ grad_h).squeeze(2)
    grad_dtu = (grad_h @ B_[..., None]).squeeze(-1)
    # The decay's share: dL/d(dt·A) = dL/dh · decay · h[t−1], nothing at the first step.
    grad_exponent = decay.mul_(grad_h)
    first, others, before = (-1, slice(-1), slice(1, None)) if reverse else (0, slice(1, None), slice(-1))
    grad_exponent[others] *= h[before]
    grad_exponent[first] = 0
    grad_dt = torch.einsum("lbdn,dn->lbd", grad_exponent, A_) + grad_dtu * u_
    grad_A = torch.einsum("lbdn,lbd->dn", grad_exponent, dt)
    grad_delta = grad_dt * -torch.expm1(-dt)  # softplus' = 1 − exp(−softplus)
    grads = (
        (grad_dtu * dt + g * D_).permute(1, 2, 0),
        grad_delta.permute(1, 2, 0),
        grad_A,
        grad_B.permute(1, 2, 0),
        grad_C.permute(1, 2, 0),
        (g * u_).sum((0, 1)),
        grad_z.permute(1, 2, 0),
        grad_delta.sum((0, 1)),
    )
    return tuple(  # type: ignore[return-value]
        value.to(like.dtype).contiguous() for value, like in zip(grads, inputs, strict=True)
    )


def state_dtype(u: Tensor) -> torch.dtype:
    """The type of the state: float32, or float64 for float64 activations."""
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _states(dt: Tensor, u: Tensor, A: Tensor, B: Tensor, h: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Decays and states of every step, (L, B, D, N) each, from the state `h` (B, D, N) before the first."""
    decay = (dt[..., None] * A).exp_()
    states = (dt * u)[..., None] * B[:, :, None, :]
    for t in reversed(range(len(states))) if reverse else range(len(states)):
        h = states[t].addcmul_(decay[t], h)
    return decay, states


def _time_major(*tensors: Tensor, kind: torch.dtype) -> tuple[Tensor, ...]:
    """(B, X, L) → (L, B, X) of the type `kind`, contiguous, so that one step is one stretch of memory."""
    return tuple(tensor.to(kind).permute(2, 0, 1).contiguous() for tensor in tensors)


def _step_size(delta: Tensor, delta_bias: Tensor, kind: torch.dtype) -> Tensor:
    # By default softplus(x) is x from 20 on, which float64 can tell from the truth; from 40 on it can't.
    return F.softplus(delta.to(kind) + delta_bias.to(kind)[:, None], threshold=40)
