"""The selective scan in PyTorch's own operations, forward and backward: a loop over the steps, on any device.

`mdnet.scan` runs it where there is no kernel. Both functions take the tensors that `mdnet.scan.selective_scan` takes.
Inside, channels are (G, P): the P channels of each of the G groups of B and C.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

Gradients = tuple[Tensor | None, ...]
"""Of u, delta, A, B, C, D, z, delta_bias, h0; None for a tensor that the call lacks."""

_CHUNK_BYTES = 64 * 2**20  # bounds the decay and state tensors that one stretch of the forward pass holds


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    reverse: bool,
    softplus: bool = True,
) -> tuple[Tensor, Tensor]:
    """y (batch, channels, length), in the type of `u`, and the last state (batch, channels, states)."""
    kind = state_dtype(u)
    B_, C_ = _mixes(B, C, kind=kind)  # (L, batch, G, N)
    groups = B_.shape[2]
    u_, dt = _rows(u, _step_size(delta, delta_bias, kind, softplus), kind=kind, groups=groups)  # (L, batch, G, P)
    length = len(u_)
    A_, y = A.to(kind).unflatten(0, (groups, -1)), torch.empty_like(u_)
    h = _first_state(u, A, h0, groups)
    chunk = max(1, _CHUNK_BYTES // h.nbytes)
    starts = range(0, length, chunk)
    for start in reversed(starts) if reverse else starts:
        span = slice(start, min(start + chunk, length))
        _, states = _states(dt[span], u_[span], A_, B_[span], h, reverse)
        h = states[0 if reverse else -1]
        y[span] = (states @ C_[span, ..., None]).squeeze(-1)
    y = y.flatten(2)
    if D is not None:
        y = y + D.to(kind) * u_.flatten(2)
    if z is not None:
        y = y * F.silu(_time_major(z, kind))
    return y.permute(1, 2, 0).to(u.dtype).contiguous(), h.flatten(1, 2).clone()


def scan_backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    reverse: bool,
    softplus: bool = True,
    grad_last: Tensor | None = None,
) -> Gradients:
    """Gradients of the tensors, from those of y and the last state. States are recomputed, not kept from before."""
    kind = state_dtype(u)
    B_, C_ = _mixes(B, C, kind=kind)
    groups = B_.shape[2]
    step = _step_size(delta, delta_bias, kind, softplus)
    g, u_, dt = _rows(grad, u, step, kind=kind, groups=groups)
    A_, h_before = A.to(kind).unflatten(0, (groups, -1)), _first_state(u, A, h0, groups)
    decay, h = _states(dt, u_, A_, B_, h_before, reverse)  # (L, batch, G, P, N) each

    D_ = None if D is None else D.to(kind).unflatten(0, (groups, -1))
    grad_z = None
    if z is not None:
        (z_,) = _rows(z, kind=kind, groups=groups)
        y = (h @ C_[..., None]).squeeze(-1)
        y = y if D_ is None else y + D_ * u_
        gate = torch.sigmoid(z_)
        grad_z = g * y * gate * (1 + z_ * (1 - gate))
        g = g * gate * z_  # with respect to the ungated output

    # dL/dh runs against the scan: dL/dh[t] = g[t]·C[t] + decay[t+1]·dL/dh[t+1].
    grad_h = g[..., None] * C_[:, :, :, None, :]
    order = list(range(len(h))) if reverse else list(reversed(range(len(h))))
    if grad_last is not None:
        grad_h[order[0]] += grad_last.to(kind).unflatten(1, (groups, -1))
    for later, now in itertools.pairwise(order):
        grad_h[now].addcmul_(decay[later], grad_h[later])

    dtu = dt * u_
    grad_C = (g[:, :, :, None, :] @ h).squeeze(3)
    grad_B = (dtu[:, :, :, None, :] @ grad_h).squeeze(3)
    grad_dtu = (grad_h @ B_[..., None]).squeeze(-1)
    # The decay's share: dL/d(dt·A) = dL/dh · decay · h[t−1].
    grad_exponent = decay.mul_(grad_h)
    first, others, before = (-1, slice(-1), slice(1, None)) if reverse else (0, slice(1, None), slice(-1))
    grad_h0 = None if h0 is None else grad_exponent[first].flatten(1, 2).clone()
    grad_exponent[others] *= h[before]
    grad_exponent[first] = 0 if h0 is None else grad_exponent[first] * h_before
    grad_dt = torch.einsum("lbgpn,gpn->lbgp", grad_exponent, A_) + grad_dtu * u_
    grad_A = torch.einsum("lbgpn,lbgp->gpn", grad_exponent, dt).flatten(0, 1)
    grad_delta = grad_dt * -torch.expm1(-dt) if softplus else grad_dt  # softplus' = 1 − exp(−softplus)
    grad_u = grad_dtu * dt if D_ is None else grad_dtu * dt + g * D_

    def rows(values: Tensor) -> Tensor:
        return values.flatten(2).permute(1, 2, 0)

    grads = (
        rows(grad_u),
        rows(grad_delta),
        grad_A,
        grad_B.permute(1, 2, 3, 0).reshape(B.shape),
        grad_C.permute(1, 2, 3, 0).reshape(C.shape),
        (g * u_).sum((0, 1)).flatten(),
        None if grad_z is None else rows(grad_z),
        grad_delta.sum((0, 1)).flatten(),
        grad_h0,
    )
    tensors = (u, delta, A, B, C, D, z, delta_bias, h0)
    return tuple(
        None if like is None or value is None else value.to(like.dtype).contiguous()
        for value, like in zip(grads, tensors, strict=True)
    )


def state_dtype(u: Tensor) -> torch.dtype:
    """The type of the state: float32, or float64 for float64 activations."""
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _states(dt: Tensor, u: Tensor, A: Tensor, B: Tensor, h: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Decays and states of every step, (L, batch, G, P, N) each, from the state `h` before the first."""
    decay = (dt[..., None] * A).exp_()
    states = (dt * u)[..., None] * B[:, :, :, None, :]
    for t in reversed(range(len(states))) if reverse else range(len(states)):
        h = states[t].addcmul_(decay[t], h)
    return decay, states


def _first_state(u: Tensor, A: Tensor, h0: Tensor | None, groups: int) -> Tensor:
    if h0 is None:
        h0 = u.new_zeros(*u.shape[:2], A.shape[1], dtype=state_dtype(u))
    return h0.to(state_dtype(u)).unflatten(1, (groups, -1))


def _time_major(tensor: Tensor, kind: torch.dtype) -> Tensor:
    """(batch, X, L) → (L, batch, X) of the type `kind`, contiguous, so that one step is one stretch of memory."""
    return tensor.to(kind).permute(2, 0, 1).contiguous()


def _rows(*tensors: Tensor, kind: torch.dtype, groups: int) -> tuple[Tensor, ...]:
    """(batch, G·P, L) → (L, batch, G, P)."""
    return tuple(_time_major(tensor, kind).unflatten(2, (groups, -1)) for tensor in tensors)


def _mixes(*tensors: Tensor, kind: torch.dtype) -> tuple[Tensor, ...]:
    """B and C, (batch, N, L) or (batch, G, N, L) → (L, batch, G, N)."""
    grouped = (tensor if tensor.ndim == 4 else tensor[:, None] for tensor in tensors)
    return tuple(tensor.to(kind).permute(3, 0, 1, 2).contiguous() for tensor in grouped)


def _step_size(delta: Tensor, delta_bias: Tensor | None, kind: torch.dtype, softplus: bool) -> Tensor:
    step = delta.to(kind)
    if delta_bias is not None:
        step = step + delta_bias.to(kind)[:, None]
    # By default softplus(x) is x from 20 on, which float64 can tell from the truth; from 40 on it can't.
    return F.softplus(step, threshold=40) if softplus else step
