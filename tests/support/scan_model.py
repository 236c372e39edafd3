"""ONNX models of one scan, for every host that reads ONNX files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from scan_cases import PARAMETERS, ScanCase, VariantCase

from mdnet_engines.ops import scan_v2
from mdnet_engines.ops import selective_scan as scan_op

_SHAPES = {
    **dict.fromkeys(("u", "delta", "z"), ("batch", "channels", "length")),
    **dict.fromkeys(("B", "C"), ("batch", "states", "length")),
    "A": ("channels", "states"),
    "D": ("channels",),
    "delta_bias": ("channels",),
}


def operator_of(case: ScanCase) -> str:
    return scan_op.REVERSE if case.reverse else scan_op.FORWARD


def model(name: str, dtype: str = "float32", sizes: Mapping[str, int] | None = None) -> onnx.ModelProto:
    """One node and its function body; every axis that `sizes` does not fix is symbolic.

    Inputs and outputs are float32 for bfloat16, which NumPy has not: a Cast is in between, exact for what is bfloat16.
    """
    return _one_node(name, scan_op.INPUTS, ("y",), scan_op.function(name), _SHAPES, dtype, sizes or {})


def _one_node(
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    function: onnx.FunctionProto,
    shapes: Mapping[str, tuple[str, ...]],
    dtype: str,
    sizes: Mapping[str, int],
) -> onnx.ModelProto:
    activations = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    outside = TensorProto.FLOAT if dtype == "bfloat16" else activations

    def value(tensor: str) -> onnx.ValueInfoProto:
        kind = TensorProto.FLOAT if tensor in (*PARAMETERS, "h0", "h_last") else outside
        shape = shapes["u" if tensor == "y" else tensor]
        return helper.make_tensor_value_info(tensor, kind, [sizes.get(axis, axis) for axis in shape])

    node = helper.make_node(name, list(inputs), list(outputs), domain=scan_op.DOMAIN)
    nodes = [node]
    if outside != activations:
        for i, tensor in enumerate(inputs):
            if tensor not in (*PARAMETERS, "h0"):
                node.input[i] = f"{tensor}_cast"
                nodes.insert(0, helper.make_node("Cast", [tensor], [f"{tensor}_cast"], to=activations))
        node.output[0] = "y_cast"
        nodes.append(helper.make_node("Cast", ["y_cast"], ["y"], to=outside))
    graph = helper.make_graph(nodes, "one_scan", [value(n) for n in inputs], [value(n) for n in outputs])
    opsets = [helper.make_opsetid("", scan_op.OPSET), helper.make_opsetid(scan_op.DOMAIN, scan_op.VERSION)]
    return helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)


def variant_of(case: VariantCase) -> scan_v2.Variant:
    """Which operator of version 2 runs the case. D and delta_bias must be among its inputs, zeros if need be."""
    return scan_v2.Variant(case.reverse, "z" not in case.without, case.softplus, case.state)


def variant_model(
    variant: scan_v2.Variant, dtype: str = "float32", grouped: bool = True, sizes: Mapping[str, int] | None = None
) -> onnx.ModelProto:
    """As `model`, of one operator of version 2; B and C have an axis of groups if `grouped`."""
    mix = ("batch", "groups", "states", "length") if grouped else ("batch", "states", "length")
    state = ("batch", "channels", "states")
    shapes = {**_SHAPES, "B": mix, "C": mix, "h0": state, "h_last": state}
    return _one_node(variant.name, variant.inputs, variant.outputs, variant.function(), shapes, dtype, sizes or {})


def run(session: onnxruntime.InferenceSession, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """y for the inputs of a `ScanCase`."""
    return session.run(None, _feeds(inputs))[0]


def run_variant(
    session: onnxruntime.InferenceSession, case: VariantCase, inputs: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """y, and the last state if there is one, for the inputs of a `VariantCase`."""
    zeros = dict.fromkeys(("D", "delta_bias"), np.zeros(case.channels, np.float32))
    return session.run(None, _feeds({**zeros, **inputs}))


def _feeds(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {n: x.astype(np.float32) if x.dtype.name == "bfloat16" else x for n, x in inputs.items()}
