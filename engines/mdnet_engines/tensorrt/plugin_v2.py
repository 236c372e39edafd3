"""Version 2 of the selective scan for TensorRT 11: a plugin for each of its 16 operators.

`mdnet_engines.tensorrt.plugin.register_plugins` registers them. They are built ahead of time only. There is one kernel
for all operators of a direction; what an operator lacks becomes a constant in its PTX (`mdnet_engines.cuda.ptx`).

*Unverified on a GPU*; tested as version 1's.
"""

# No `from __future__ import annotations`: `tensorrt.plugin` compares annotations with its classes, not with strings.

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from mdnet_engines.cuda.kernel import THREADS, Dtype, channels_per_block, kernel_name
from mdnet_engines.cuda.ptx import ptx_of
from mdnet_engines.ops.scan_shapes import VARIANTS, Variant, check_shapes_v2

DTYPES: dict[str, Dtype] = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}  # TensorRT's names → ours
_PARAMETERS = ("A", "D", "delta_bias", "h0", "h_last")  # float32 whatever the activations' type


def register(trtp: Any, namespace: str) -> None:
    """Make the plugins known to TensorRT in this process; `trtp` is `tensorrt.plugin`. Idempotent."""
    for variant in VARIANTS.values():
        if not hasattr(getattr(trtp.op, namespace, None), variant.name):
            _register(trtp, f"{namespace}::{variant.name}", variant)


def fixed_arguments(variant: Variant) -> dict[str, int]:
    """The arguments of the kernel that are no tensors or sizes of this operator, and their values."""
    missing = {"z": variant.z, "h0": variant.state, "h_last": variant.state}
    return {**{name: 0 for name, there in missing.items() if not there}, "softplus": int(variant.softplus)}


def _register(trtp: Any, plugin_id: str, variant: Variant) -> None:
    names, description = variant.inputs, trtp.TensorDesc

    def describe(*inputs: Any) -> Any:
        u, h0 = inputs[0], inputs[-1]
        return (u.like(), h0.like()) if variant.state else u.like()

    def supported(*arguments: Any) -> Any:
        combination, tensors = trtp.AutoTuneCombination(), (*names, *variant.outputs)
        activations = [place for place, name in enumerate(tensors) if name not in _PARAMETERS]
        combination.pos(activations, "FP32|FP16|BF16", "LINEAR")  # all of the same type
        combination.pos([place for place in range(len(tensors)) if place not in activations], "FP32", "LINEAR")
        return [combination]

    def into_engine(*arguments: Any) -> Any:
        inputs = dict(zip(names, arguments, strict=False))  # outputs and tactic come after them
        check_shapes_v2(**{name: tensor.shape for name, tensor in inputs.items()})
        u, A, B = inputs["u"], inputs["A"], inputs["B"]
        batch, channels, length = u.shape_expr
        groups = B.shape_expr[1] if len(B.shape_expr) == 4 else trtp.SymInt32(1)
        channels = channels // groups
        # The number of states chooses the kernel, so it must be a number here, not a symbol.
        kernel = kernel_name(reverse=variant.reverse, dtype=DTYPES[u.dtype.name], states=A.shape[1], version=2)
        blocks = trtp.cdiv(channels, channels_per_block(kernel))
        grid = trtp.KernelLaunchParams(grid_x=batch, grid_y=blocks, grid_z=groups, block_x=THREADS, shared_mem=0)
        scalars = trtp.SymIntExprs.from_tuple((channels, length, A.shape_expr[1], groups))
        return kernel, ptx_of(kernel, fixed_arguments(variant)), grid, scalars

    returns = tuple[(description,) * len(variant.outputs)] if variant.state else description  # type: ignore[misc]
    trtp.register(plugin_id)(_signed(describe, names, description, returns))
    trtp.autotune(plugin_id)(_signed(supported, (*names, "outputs")))
    launch = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    trtp.aot_impl(plugin_id)(_signed(into_engine, (*names, "outputs", "tactic"), returns=launch))


def _signed(
    function: Callable[..., Any], names: Sequence[str], annotation: Any = None, returns: Any = None
) -> Callable[..., Any]:
    """The function with a signature of these names, which is what `tensorrt.plugin` looks at; it calls by position."""
    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    parameters = [inspect.Parameter(name, kind, annotation=annotation or empty) for name in names]
    function.__signature__ = inspect.Signature(parameters, return_annotation=returns or empty)  # type: ignore[attr-defined]
    return function
