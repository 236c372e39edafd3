"""ONNX models of one scan, for every host that reads ONNX files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from scan_cases import PARAMETERS, ScanCase

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
    activations = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    outside = TensorProto.FLOAT if dtype == "bfloat16" else activations

    def value(tensor: str, kind: int, shape: Iterable[str]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(tensor, kind, [(sizes or {}).get(axis, axis) for axis in shape])

    node = helper.make_node(name, list(scan_op.INPUTS), ["y"], domain=scan_op.DOMAIN)
    nodes = [node]
    if outside != activations:
        for i, tensor in enumerate(scan_op.INPUTS):
            if tensor not in PARAMETERS:
                node.input[i] = f"{tensor}_cast"
                nodes.insert(0, helper.make_node("Cast", [tensor], [f"{tensor}_cast"], to=activations))
        node.output[0] = "y_cast"
        nodes.append(helper.make_node("Cast", ["y_cast"], ["y"], to=outside))
    graph = helper.make_graph(
        nodes,
        "one_scan",
        [value(n, TensorProto.FLOAT if n in PARAMETERS else outside, _SHAPES[n]) for n in scan_op.INPUTS],
        [value("y", outside, _SHAPES["u"])],
    )
    opsets = [helper.make_opsetid("", scan_op.OPSET), helper.make_opsetid(scan_op.DOMAIN, scan_op.VERSION)]
    return helper.make_model(graph, opset_imports=opsets, functions=[scan_op.function(name)], ir_version=10)


def run(session: onnxruntime.InferenceSession, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """y for the inputs of a `ScanCase`."""
    feeds = {n: x.astype(np.float32) if x.dtype.name == "bfloat16" else x for n, x in inputs.items()}
    return session.run(None, feeds)[0]
