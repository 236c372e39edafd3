"""mamba-ssm's functions by their own signatures, on `mdnet.scan.selective_scan`: for code written for that package.

They take the place of an import (`from mamba_ssm.ops.selective_scan_interface import selective_scan_fn`), or of a name
in a module with loops of its own (transformers' `modeling_mamba.mamba_selective_scan`). All run, export and have
gradients wherever `selective_scan` does. An argument without a counterpart is refused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mdnet.scan.function import selective_scan
from mdnet_engines.errors import MDNetError


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    cu_seqlens: None = None,
    *,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
) -> Any:
    """mamba-ssm's `selective_scan_fn`: the scan from a state of zeros.

    Args:
        u, delta, z: (batch, channels, length).
        A: (channels, states), real.
        B, C: (batch, states, length); (batch, groups, states, length); or, constant over time, (channels, states),
            which is expanded to a group for each channel and so takes channels × states × length of memory.
        D, delta_bias: (channels,).
        delta_softplus: off by default, as there.
        cu_seqlens: must be None.
        use_mambapy, use_associative_scan: ignored; transformers chooses among its own loops with them.

    Returns:
        As `selective_scan`. The last state has a gradient; in mamba-ssm it has none.

    Raises:
        MDNetError: `A`, `B` or `C` is complex, or sequences are packed.
        ValueError, TypeError: as `selective_scan`.
    """
    _refuse(cu_seqlens=cu_seqlens)
    for name, tensor in (("A", A), ("B", B), ("C", C)):
        if isinstance(tensor, Tensor) and tensor.is_complex():
            raise MDNetError(
                f"{name} is {tensor.dtype}: a scan with complex parameters has no counterpart here; "
                "train the model with real ones, as Mamba's own models have"
            )
    if isinstance(B, Tensor) and isinstance(C, Tensor):  # selective_scan names what is no tensor
        B, C = _alike(B, C, u)
    return selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus=delta_softplus, return_last_state=return_last_state
    )


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: None = None,
) -> Tensor:
    """mamba-ssm's `selective_state_update`: one step of the scan, which changes `state` in place.

    Args:
        state: (batch, channels, states), or with heads (batch, heads, channels, states).
        x, dt, z: (batch, channels) or (batch, heads, channels).
        A: (channels, states) or (heads, channels, states).
        B, C: (batch, states) or (batch, groups, states).
        D, dt_bias: (channels,) or (heads, channels).
        state_batch_indices: must be None.

    Returns:
        y, like `x`.
    """
    _refuse(state_batch_indices=state_batch_indices)
    shape = state.shape
    channels = 1 if state.ndim == 3 else 2  # how many axes the channels have

    def step(tensor: Tensor) -> Tensor:
        return tensor.flatten(1)[..., None]

    y, after = selective_scan(
        step(x),
        step(dt),
        A.flatten(0, channels - 1),
        B[..., None],
        C[..., None],
        None if D is None else D.flatten(),
        None if z is None else step(z),
        None if dt_bias is None else dt_bias.flatten(),
        delta_softplus=dt_softplus,
        h0=state.flatten(1, channels),
        return_last_state=True,
    )
    state.copy_(after.unflatten(1, shape[1:-1]))
    return y[..., 0].unflatten(1, x.shape[1:])


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: None = None,
    cu_seqlens: None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Any:
    """mamba-ssm's `mamba_chunk_scan_combined`: Mamba-2's scan by heads. The channels of a head share its `A` and `dt`.

    Args:
        x, z: (batch, length, heads, channels).
        dt: (batch, length, heads).
        A, dt_bias: (heads,).
        B, C: (batch, length, groups, states).
        chunk_size: ignored; the result does not depend on it.
        D: (heads,) or (heads, channels).
        initial_states: (batch, heads, channels, states).
        seq_idx, cu_seqlens, return_varlen_states: must be None, None and False.

    Returns:
        y like `x`; with `return_final_states` a tuple of y and the final states, shaped like the initial ones.
    """
    _refuse(seq_idx=seq_idx, cu_seqlens=cu_seqlens, return_varlen_states=return_varlen_states or None)
    heads, channels = x.shape[2:]
    if tuple(dt_limit) != (0.0, float("inf")):
        dt = dt if dt_bias is None else dt + dt_bias
        dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
        dt_bias, dt_softplus = None, False

    def each(tensor: Tensor) -> Tensor:  # (heads, …) → (heads · channels, …)
        return tensor.repeat_interleave(channels, 0)

    def rows(tensor: Tensor) -> Tensor:  # (batch, length, heads, channels) → (batch, heads · channels, length)
        return tensor.flatten(2).mT

    result = selective_scan(
        rows(x),
        rows(dt[..., None].expand(-1, -1, -1, channels)),
        each(A)[:, None].expand(-1, B.shape[3]),
        B.permute(0, 2, 3, 1),
        C.permute(0, 2, 3, 1),
        None if D is None else D.flatten() if D.ndim == 2 else each(D),
        None if z is None else rows(z),
        None if dt_bias is None else each(dt_bias),
        delta_softplus=dt_softplus,
        h0=None if initial_states is None else initial_states.flatten(1, 2),
        return_last_state=return_final_states,
    )
    shape = (heads, channels)
    if not return_final_states:
        return result.mT.unflatten(2, shape)
    y, after = result
    return y.mT.unflatten(2, shape), after.unflatten(1, shape)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: None = None,
    activation: str | None = None,
) -> Any:
    """causal-conv1d's `causal_conv1d_fn`: the depthwise convolution before a scan, with its state.

    Args:
        x: (batch, channels, length); any length, so that one step of a decoder is a call like any other.
        weight: (channels, taps).
        bias: (channels,).
        initial_states: (batch, channels, taps − 1), the inputs before `x`; zeros by default.
        activation: None, "silu" or "swish".
        seq_idx, final_states_out: must be None.

    Returns:
        y like `x`; with `return_final_states` a tuple of y and the last taps − 1 inputs.
    """
    _refuse(seq_idx=seq_idx, final_states_out=final_states_out)
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation is {activation!r}; it must be None, 'silu' or 'swish'")
    channels, taps = weight.shape
    before = x.new_zeros(x.shape[0], channels, taps - 1) if initial_states is None else initial_states.to(x.dtype)
    padded = torch.cat([before, x], dim=-1)
    y = F.conv1d(padded.to(weight.dtype), weight[:, None], bias, groups=channels)
    y = (y if activation is None else F.silu(y)).to(x.dtype)
    return (y, padded[..., x.shape[-1] :]) if return_final_states else y


def _alike(B: Tensor, C: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """B and C both (batch, N, L), or both with the same number of groups."""
    if B.ndim == C.ndim == 3 or not {B.ndim, C.ndim} <= {2, 3, 4}:  # selective_scan names a wrong shape
        return B, C
    batch, _, length = u.shape
    mixes = [mix[None, :, :, None].expand(batch, -1, -1, length) if mix.ndim == 2 else mix for mix in (B, C)]
    mixes = [mix[:, None] if mix.ndim == 3 else mix for mix in mixes]
    groups = max(mix.shape[1] for mix in mixes)
    if groups == 1:  # version 1 of the operator can serve
        return mixes[0].squeeze(1), mixes[1].squeeze(1)
    B, C = (_spread(mix, groups) for mix in mixes)
    return B, C


def _spread(mix: Tensor, groups: int) -> Tensor:
    """(batch, G, N, L) → (batch, groups, N, L), where G divides groups."""
    return mix if mix.shape[1] == groups else mix.repeat_interleave(groups // mix.shape[1], 1)


def _refuse(**given: object) -> None:
    """Raise where an argument that has no counterpart has a value."""
    for name, value in given.items():
        if value is not None:
            raise MDNetError(f"{name} has no counterpart here: leave it out, and run packed sequences one by one")
