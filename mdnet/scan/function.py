"""`mdnet.scan.selective_scan`: the function for models, and which operator it calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdnet.scan import op, op_v2
from mdnet_engines.errors import MDNetError

translated = False
"""Whether `mdnet_export.scan.translation_table` was called in this process."""


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    reverse: bool = False,
    *,
    delta_softplus: bool = True,
    h0: Tensor | None = None,
    return_last_state: bool = False,
) -> Any:
    """Selective scan over the last axis of `u`. Differentiable once, in reverse mode; forward mode gives zero tangents.

    A call that version 1 of the operator can serve is version 1 of the operator, also in an export.

    Args:
        u, delta, z: (batch, channels, length). Without `z` there is no gate.
        A: (channels, states), negative for a decaying state.
        B, C: (batch, states, length), or (batch, groups, states, length): channel d takes group
            d // (channels // groups).
        D, delta_bias: (channels,); zeros by default.
        reverse: scan from the last step to the first.
        delta_softplus: if False, delta + delta_bias is the size of the step itself.
        h0: (batch, channels, states), the state before the first step of the scan; zeros by default.
        return_last_state: return the state after the last step of the scan too.

    Returns:
        A tensor y (batch, channels, length), in the type of `u`; with `return_last_state` a tuple of y and the last
        state (batch, channels, states), in float32, or float64 for float64 input.

    Raises:
        ValueError: a shape does not fit the others (the message names both), or a device.
        TypeError: a tensor is missing, or not of a floating-point type.
        MDNetError: the native library can't be loaded, or memory ran out; or an export can't succeed.
    """
    for name, tensor in (("u", u), ("delta", delta), ("A", A), ("B", B), ("C", C)):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name} is {type(tensor).__name__}; the scan needs a tensor there (D, z, delta_bias, h0 may be None)"
            )
    _check_export()
    as_before = B.ndim == C.ndim == 3 and delta_softplus and h0 is None and not return_last_state
    if as_before and D is not None and z is not None and delta_bias is not None:
        return op.selective_scan(u, delta, A, B, C, D, z, delta_bias, reverse)
    y, h_last = op_v2.selective_scan_v2(
        u, delta, A, B, C, D, z, delta_bias, h0, reverse, delta_softplus, return_last_state
    )
    return (y, h_last) if return_last_state else y


def _check_export() -> None:
    """Raise where `torch.onnx.export` is about to fail, in words that say why."""
    if not torch.onnx.is_in_onnx_export():
        return
    if torch.jit.is_tracing():
        raise MDNetError("torch.onnx.export(dynamo=False) knows no selective scan; export with dynamo=True")
    if not translated:
        raise MDNetError(
            "torch.onnx.export does not know the selective scan; pass it "
            "custom_translation_table=mdnet_export.scan.translation_table(), or call mdnet_export.scan.export"
        )


# The exporter tries a second time, by a tracer that would skip the check. This is the mark of
# torch.compiler.assume_constant_result, which itself imports the compiler: a second at every start.
_check_export._dynamo_marked_constant = True  # type: ignore[attr-defined]
