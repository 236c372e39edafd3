"""FP8 as explicit Q/DQ: E4M3 for the inputs and weights of convolutions and products, one scale for each tensor.

What becomes fp8 is what becomes int8 (`mdnet_calib.passes.int8`), where the channels are a multiple of 16: TensorRT has
no FP8 kernel for others. A scale puts the largest magnitude at 448, E4M3's largest number. Nothing is cut off: a number
with an exponent loses nothing to the outliers of its tensor.

Weights have one scale too. TensorRT takes a scale for each channel in products alone, and on Hopper alone, and NVIDIA's
own recipes for diffusion models do without. Outputs are not quantised: the next layer quantises what it reads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mdnet_calib.passes.fp16 import QDQ_OPSET
from mdnet_calib.passes.int8 import int8_nodes
from mdnet_engines.errors import MDNetError

LARGEST = 448.0
_E4M3 = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
_MULTIPLE = 16
_FLOOR = 2.0**-14  # of a scale: the least float16 number with all its bits


def fp8_nodes(proto: onnx.ModelProto) -> list[str]:
    """Names of the nodes that fp8 is for, by the rules of this module, in the graph's order."""
    weights = {tensor.name: tensor.dims for tensor in proto.graph.initializer}
    wide = set(int8_nodes(proto))
    return [
        node.name
        for node in proto.graph.node
        if node.name in wide and not any(channels % _MULTIPLE for channels in weights[node.input[1]][:2])
    ]


def activations(proto: onnx.ModelProto, nodes: Collection[str]) -> list[str]:
    """Names of the values whose ranges `to_fp8` needs for `nodes`."""
    chosen = set(nodes)
    return list(dict.fromkeys(node.input[0] for node in proto.graph.node if node.name in chosen))


def to_fp8(proto: onnx.ModelProto, thresholds: Mapping[str, float], nodes: Collection[str]) -> onnx.ModelProto:
    """The float32 graph with the inputs and weights of `nodes` behind Q/DQ. `proto` is used up, as in `to_int8`.

    Args:
        thresholds: the largest magnitude of every value in `activations(proto, nodes)`.

    Raises:
        MDNetError: a range is missing.
    """
    if not nodes:
        return proto
    if missing := [name for name in activations(proto, nodes) if name not in thresholds]:
        raise MDNetError(f"no calibrated range for {', '.join(missing[:3])}; calibrate this graph again")
    graph, chosen = proto.graph, set(nodes)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    made: list[NodeProto] = []
    dequantised: dict[str, str] = {}
    for node in graph.node:
        if node.name in chosen:
            for i, name in enumerate(node.input[:2]):
                if name not in dequantised:
                    dequantised[name] = f"{name}_dequantised"
                    if name in weights:
                        made += _weight(weights, name)
                    else:
                        made += _activation(weights, name, thresholds[name])
                node.input[i] = dequantised[name]
        made.append(node)
    used = {name for node in made for name in node.input}
    kept = [tensor for tensor in weights.values() if tensor.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(made)
    graph.initializer.extend(kept)
    for opset in proto.opset_import:
        if not opset.domain:
            opset.version = max(opset.version, QDQ_OPSET)
    return proto


def _activation(weights: dict[str, TensorProto], name: str, largest: float) -> list[NodeProto]:
    quantised = f"{name}_quantised"
    scales = _scale(weights, name, largest)
    return [
        helper.make_node("QuantizeLinear", [name, *scales], [quantised], name=f"{name}/QuantizeLinear"),
        helper.make_node(
            "DequantizeLinear", [quantised, *scales], [f"{name}_dequantised"], name=f"{name}/DequantizeLinear"
        ),
    ]


def _weight(weights: dict[str, TensorProto], name: str) -> list[NodeProto]:
    values, quantised = numpy_helper.to_array(weights[name]), f"{name}_quantised"
    scales = _scale(weights, name, float(np.abs(values).max()))
    scale = numpy_helper.to_array(weights[scales[0]])
    rounded = np.clip(values / scale, -LARGEST, LARGEST).astype(_E4M3)
    weights[quantised] = helper.make_tensor(
        quantised, TensorProto.FLOAT8E4M3FN, values.shape, rounded.tobytes(), raw=True
    )
    return [
        helper.make_node(
            "DequantizeLinear", [quantised, *scales], [f"{name}_dequantised"], name=f"{name}/DequantizeLinear"
        )
    ]


def _scale(weights: dict[str, TensorProto], name: str, largest: float) -> list[str]:
    """Names of the scale and the zero-point of a value, which are put among the weights."""
    scale, zero = f"{name}_scale", f"{name}_zero_point"
    rounded = np.float32(np.float16(max(largest / LARGEST, _FLOOR)))  # the same in both types
    weights[scale] = numpy_helper.from_array(np.array(rounded), scale)
    weights[zero] = helper.make_tensor(zero, TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    return [scale, zero]
