"""INT8 as explicit Q/DQ: one layout that TensorRT, OpenVINO and ONNX Runtime all take.

What becomes int8: convolutions and products with a weight, with at least `MIN_CHANNELS` channels in and out. Their
inputs, outputs and weights are quantised symmetrically (TensorRT refuses zero-points other than 0), weights for each
output channel. What stays in float, and why:

- narrow convolutions: an int8 kernel has nothing to win there (the demo's VAE, 8 to 32 channels, was slower in int8),
  and few channels lose most;
- products of two activations and the softmax between them: attention loses most and gains least;
- products with the folded keys and values of the fixed prompt: OpenVINO can't take their per-channel scales;
- biases: TensorRT takes no int32 Q/DQ;
- normalisations, activations, the selective scan, the head.

Outputs of convolutions are quantised too: ONNX Runtime runs a convolution in float unless both its ends are.

Weights have 7 bits, −64 to 64. An x86 CPU without VNNI adds two products of a byte and an int8 in 16 bits, which 8-bit
weights overflow: 255·127·2 is 64,770, 255·64·2 is 32,640. So one file gives the same scores on every CPU.

ONNX Runtime's CPU kernels are fast for unsigned activations only. `with_unsigned_activations` gives the same graph in
that form: each activation's zero-point moves from 0 to 128, so every value is rounded as before.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Collection, Iterator, Mapping

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from mdnet_calib.passes.graph_view import copy_of
from mdnet_engines.errors import MDNetError, require

OP_TYPES = ("Conv", "MatMul", "Gemm")
MIN_CHANNELS = 32
_FLOOR = 1e-8  # of a range, so that a tensor that is always 0 has a scale


def int8_nodes(proto: onnx.ModelProto, *, keep: Collection[str] = ()) -> list[str]:
    """Names of the nodes that int8 is for, by the rules of this module, in the graph's order.

    Args:
        keep: prefixes of node names that stay in float.
    """
    weights = {tensor.name: tensor.dims for tensor in proto.graph.initializer}
    kept = tuple(keep)
    return [
        node.name
        for node in proto.graph.node
        if node.op_type in OP_TYPES
        and len(shape := weights.get(node.input[1], ())) == (4 if node.op_type == "Conv" else 2)
        and min(shape[:2]) >= MIN_CHANNELS
        and not (kept and node.name.startswith(kept))
    ]


def activations(proto: onnx.ModelProto, nodes: Collection[str]) -> list[str]:
    """Names of the values whose ranges `to_int8` needs for `nodes`."""
    chosen = set(nodes)
    found = (name for node in proto.graph.node if node.name in chosen for name in (node.input[0], node.output[0]))
    return list(dict.fromkeys(found))


def to_int8(proto: onnx.ModelProto, thresholds: Mapping[str, float], nodes: Collection[str]) -> onnx.ModelProto:
    """The float32 graph with `nodes` between Q/DQ pairs. `proto` is used up: full-size weights need not be there twice.

    Args:
        thresholds: T of the symmetric range [−T, T] for every name in `activations(proto, nodes)`.

    Raises:
        MDNetError: a range is missing.
    """
    if not nodes:
        return proto  # the quantiser would take all it knows
    require("onnxruntime", "cpu")
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    if missing := [name for name in activations(proto, nodes) if name not in thresholds]:
        raise MDNetError(f"no calibrated range for {', '.join(missing[:3])}; calibrate this graph again")
    shared = _scaled_alike(proto, thresholds)
    ranges = {
        name: TensorData(lowest=np.float32(-bound), highest=np.float32(bound))
        for name, bound in ((name, max(shared[name], _FLOOR)) for name in activations(proto, nodes))
    }
    with _quiet():
        quantizer = QDQQuantizer(
            proto,
            per_channel=True,
            reduce_range=True,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
            nodes_to_quantize=list(nodes),
            nodes_to_exclude=[],
            op_types_to_quantize=list(OP_TYPES),
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    return quantizer.model.model


def _scaled_alike(proto: onnx.ModelProto, thresholds: Mapping[str, float]) -> dict[str, float]:
    """Give both terms of a residual sum one range, the larger: a runtime can then add them without rescaling."""
    shared = dict(thresholds)
    sums = [node.input for node in proto.graph.node if node.op_type == "Add" and shared.keys() >= set(node.input)]
    settled = False
    while not settled:  # a sum may be a term of the next one
        settled = True
        for terms in sums:
            if len({shared[name] for name in terms}) > 1:
                shared.update(dict.fromkeys(terms, max(shared[name] for name in terms)))
                settled = False
    return shared


def with_unsigned_activations(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A graph of `to_int8` with uint8 activations of zero-point 128; weights stay int8."""
    proto = copy_of(proto)
    graph = proto.graph
    weights = {tensor.name for tensor in graph.initializer}
    points, quantised = set(), set()
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            points.add(node.input[2])
            quantised.update(node.output)
        elif node.op_type == "DequantizeLinear" and node.input[0] not in weights:
            points.add(node.input[2])
    for tensor in graph.initializer:
        if tensor.name in points:
            if tensor.data_type != TensorProto.INT8 or numpy_helper.to_array(tensor).any():
                raise MDNetError(f"{tensor.name} is not a symmetric int8 zero-point; quantise the graph anew")
            tensor.CopyFrom(numpy_helper.from_array(np.full(list(tensor.dims), 128, np.uint8), tensor.name))
    kept = [value for value in graph.value_info if value.name not in quantised]  # their types have changed
    del graph.value_info[:]
    graph.value_info.extend(kept)
    return proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser prints and warns about its own choices (each tensor it leaves alone); failures still raise."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.root.setLevel(level)
