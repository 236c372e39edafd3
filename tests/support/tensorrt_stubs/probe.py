"""Ask TensorRT's plugin classes what they know of the SelectiveScan plugins: python probe.py QUESTION JSON → JSON.

The classes are NVIDIA's, and are called as its builder calls them (`IPluginV3QuickCore`, `…QuickBuild`,
`…QuickAOTBuild`, `…QuickRuntime`). What the builder would bring is a stand-in: expressions of dimensions, and where to
put the answers. The CUDA driver is the stub of tests/support/cuda_stub.

    registry  {}                                  our plugins in the registry, after registering twice
    undecided {name}                              the refusal of a node that does not say how to be built
    describe  {name, dtype, sizes, batches}       output types and shapes, the combinations of types and layouts
    misfit    {name, dtype, sizes, tensor}        the refusal of a node, one of whose tensors has other sizes
    aot       {name, dtype, sizes, batches}       for each tactic its kernel and PTX, and for each batch its grid, block
                                                  and scalars
    aot_of_each {nodes}                           the same for many nodes, each {name, dtype, sizes, batches}
    jit       {name, dtype, sizes, stream}        what the CUDA driver is called with

`sizes` has batch (−1 where it is symbolic), channels, length and states, and groups if B and C have such an axis.
"""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Callable
from typing import Any

import tensorrt as trt
import tensorrt.plugin as trtp
from cuda_stub import Driver

from mdnet_engines.errors import MDNetError
from mdnet_engines.ops.scan_shapes import VARIANTS
from mdnet_engines.tensorrt import plugin as tensorrt_plugin

INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
PARAMETERS = ("A", "D", "delta_bias", "h0", "h_last")
DTYPES = {"float32": trt.float32, "float16": trt.float16, "bfloat16": trt.bfloat16}


class Expression(trt.IDimensionExpr):
    """A dimension as a function of the batch. Only TensorRT can construct its own, hence `expression` below."""

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        assert self.constant
        return self.at(0)


def expression(at: Callable[[int], int], constant: bool) -> Expression:
    made = Expression.__new__(Expression)
    made.at, made.constant = at, constant
    return made


OPERATIONS: dict[Any, Callable[[int, int], int]] = {
    trt.DimensionOperation.SUM: operator.add,
    trt.DimensionOperation.SUB: operator.sub,
    trt.DimensionOperation.PROD: operator.mul,
    trt.DimensionOperation.FLOOR_DIV: operator.floordiv,
    trt.DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
}


class Builder:
    """Of expressions: what `trt.IExprBuilder` is for plugins."""

    def constant(self, value: int) -> Expression:
        return expression(lambda _: value, True)

    def operation(self, op: Any, a: Expression, b: Expression) -> Expression:
        apply = OPERATIONS[op]
        return expression(lambda batch: apply(a.at(batch), b.at(batch)), a.constant and b.constant)


class Launch:
    """Where TensorRT's class puts the launch: stands in for `trt.KernelLaunchParams`."""


class Scalars(dict):
    """Where it puts the scalars: stands in for `trt.ISymExprs`."""

    nbSymExprs = 0  # noqa: N815


def inputs_of(name: str) -> tuple[str, ...]:
    return VARIANTS[name].inputs if name in VARIANTS else INPUTS


def outputs_of(name: str) -> tuple[str, ...]:
    return VARIANTS[name].outputs if name in VARIANTS else ("y",)


def shapes(sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    batch, channels, length, states = (sizes[name] for name in ("batch", "channels", "length", "states"))
    groups = (sizes["groups"],) if sizes.get("groups") else ()
    return {
        **dict.fromkeys(("u", "delta", "z", "y"), (batch, channels, length)),
        **dict.fromkeys(("B", "C"), (batch, *groups, states, length)),
        **dict.fromkeys(("D", "delta_bias"), (channels,)),
        **dict.fromkeys(("h0", "h_last"), (batch, channels, states)),
        "A": (channels, states),
    }


def type_of(tensor: str, dtype: str) -> Any:
    return trt.float32 if tensor in PARAMETERS else DTYPES[dtype]


def static_description(tensor: str, dtype: str, sizes: dict[str, int]) -> trt.PluginTensorDesc:
    made = trt.PluginTensorDesc()
    made.dims, made.type, made.format = shapes(sizes)[tensor], type_of(tensor, dtype), trt.TensorFormat.LINEAR
    return made


def description(tensor: str, dtype: str, sizes: dict[str, int]) -> trt.DynamicPluginTensorDesc:
    made = trt.DynamicPluginTensorDesc()
    made.desc = static_description(tensor, dtype, sizes)
    made.min, made.opt, made.max = (shapes({**sizes, "batch": batch})[tensor] for batch in (1, 8, 64))
    return made


def plugin(name: str, request: Any) -> Any:
    tensorrt_plugin.register_plugins()
    creator = trt.get_plugin_registry().get_creator(name, "1", "mdnet")
    return creator.create_plugin(name, "mdnet", trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD, request)


def described(name: str, dtype: str, sizes: dict[str, int]) -> tuple[Any, list[Any], list[Any]]:
    """An ahead-of-time plugin that has been told its inputs, with the types and shapes that it answered."""
    made = plugin(name, trt.QuickPluginCreationRequest.STRICT_AOT)
    dims = [shapes(sizes)[tensor] for tensor in inputs_of(name)]
    types = [type_of(tensor, dtype) for tensor in inputs_of(name)]
    output_types = made.get_output_data_types(types, [len(d) for d in dims])
    builder = Builder()
    symbolic = expression(lambda batch: batch, False)
    inputs = [[symbolic if size < 0 else builder.constant(size) for size in d] for d in dims]
    return made, output_types, made.get_output_shapes(inputs, [], builder)


def registry() -> Any:
    tensorrt_plugin.register_plugins()
    tensorrt_plugin.register_plugins()
    ours = [c for c in trt.get_plugin_registry().all_creators if c.plugin_namespace == "mdnet"]
    return {
        "version": trt.__version__,
        "plugins": [(c.name, c.plugin_version) for c in ours],
        "inputs": {c.name: getattr(trtp.op.mdnet, c.name).input_tensor_names for c in ours},
        "attributes": {c.name: len(c.field_names) for c in ours},
        "imported_rtx": "tensorrt_rtx" in sys.modules,
    }


def undecided(name: str) -> Any:
    try:
        plugin(name, trt.QuickPluginCreationRequest.UNKNOWN)
    except ValueError as error:
        return str(error)


def misfit(name: str, dtype: str, sizes: dict[str, int], tensor: str) -> Any:
    made, _, _ = described(name, dtype, sizes)
    grown = {**sizes, **{size: sizes[size] + 1 for size in ("channels", "length", "states")}}
    inputs, outputs = inputs_of(name), outputs_of(name)
    in_out = [description(t, dtype, grown if t == tensor else sizes) for t in (*inputs, *outputs)]
    made.get_supported_format_combinations(in_out, len(inputs))
    made.set_tactic(0)
    try:
        made.get_launch_params([], in_out, len(inputs), Launch(), Scalars(), Builder())
        made.get_kernel([d.desc for d in in_out[: len(inputs)]], [d.desc for d in in_out[len(inputs) :]])
    except MDNetError as error:
        return str(error)


def describe(name: str, dtype: str, sizes: dict[str, int], batches: list[int]) -> Any:
    made, output_types, output_shapes = described(name, dtype, sizes)
    in_out = [description(tensor, dtype, sizes) for tensor in (*inputs_of(name), *outputs_of(name))]
    offered, count = made.get_supported_format_combinations(in_out, len(inputs_of(name))), len(in_out)
    return {
        "types": [kind.name for kind in output_types],
        "shapes": {batch: [[dim.at(batch) for dim in shape] for shape in output_shapes] for batch in batches},
        "symbolic": [[not dim.constant for dim in shape] for shape in output_shapes],
        "combinations": [[d.type.name for d in offered[i : i + count]] for i in range(0, len(offered), count)],
        "layouts": sorted({d.format.name for d in offered}),
    }


def aot(name: str, dtype: str, sizes: dict[str, int], batches: list[int]) -> Any:
    made, _, _ = described(name, dtype, sizes)
    count = len(inputs_of(name))
    in_out = [description(tensor, dtype, sizes) for tensor in (*inputs_of(name), *outputs_of(name))]
    made.get_supported_format_combinations(in_out, count)
    made.configure_plugin(in_out[:count], in_out[count:])
    tactics = sorted(made.get_valid_tactics()) or [0]
    return {tactic: of_tactic(made, tactic, in_out, count, batches) for tactic in tactics}


def of_tactic(made: Any, tactic: int, in_out: list[trt.DynamicPluginTensorDesc], count: int, batches: list[int]) -> Any:
    made.set_tactic(tactic)
    launch, scalars = Launch(), Scalars()
    made.get_launch_params([], in_out, count, launch, scalars, Builder())
    kernel, ptx = made.get_kernel([d.desc for d in in_out[:count]], [d.desc for d in in_out[count:]])
    assert scalars.nbSymExprs == len(scalars)

    def at(batch: int, *names: str) -> list[int]:
        return [getattr(launch, name)._expr.at(batch) for name in names]

    return {
        "kernel": kernel,
        "ptx": ptx.decode(),
        "grid": {batch: at(batch, "grid_x", "grid_y", "grid_z") for batch in batches},
        "block": {batch: at(batch, "block_x", "block_y", "block_z") for batch in batches},
        "shared": {batch: at(batch, "shared_mem") for batch in batches},
        "scalars": {batch: [scalars[i]._expr.at(batch) for i in range(len(scalars))] for batch in batches},
    }


def aot_of_each(nodes: list[dict[str, Any]]) -> Any:
    return [aot(**node) for node in nodes]


def jit(name: str, dtype: str, sizes: dict[str, int], stream: int) -> Any:
    made = plugin(name, trt.QuickPluginCreationRequest.STRICT_JIT)
    descriptions = [static_description(tensor, dtype, sizes) for tensor in (*INPUTS, "y")]
    pointers = [0x1000 * (1 + i) for i in range(9)]
    strides = [()] * 9  # the layout is linear
    made.enqueue(descriptions[:8], descriptions[8:], pointers[:8], pointers[8:], strides[:8], strides[8:], stream)
    return {"pointers": dict(zip((*INPUTS, "y"), pointers, strict=True)), "calls": Driver().calls}


if __name__ == "__main__":
    # Two of TensorRT's classes take only expressions of its own, which no one else can construct; a list will do, and
    # the expression itself.
    trt.DimsExprs = lambda length: [None] * length
    sys.modules[trtp.SymInt32.__module__].SymExprImpl = lambda symbol: symbol
    questions = {
        question.__name__: question for question in (registry, undecided, describe, misfit, aot, aot_of_each, jit)
    }
    print(json.dumps(questions[sys.argv[1]](**json.loads(sys.argv[2]))))
