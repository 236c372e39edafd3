"""Fuse what lies between Vim's products, for ONNX Runtime on the CPU.

Conv → Sigmoid → Mul, the mixer's depthwise convolution along the sequence with the SiLU behind it, becomes the operator
of `mdnet_engines.ops.convolution` where it has one filter for each channel, float32 constants as weights and bias,
steps and dilations of 1, an output as long as its input, and is read by the SiLU alone.

Sqrt → Reciprocal → Mul, in a root mean square norm, becomes Sqrt → Div: what ONNX Runtime itself fuses into one node.
"""

from __future__ import annotations

import onnx
from onnx import NodeProto, helper

from mdnet_calib.passes.graph_view import GraphView, Part, attribute, copy_of, replace_parts
from mdnet_engines.ops.convolution import CONV_SILU, function
from mdnet_engines.ops.selective_scan import DOMAIN


def fuse_vim(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with all replaced that this module's description fits; constants may lie outside of the file."""
    proto = copy_of(proto)
    view = GraphView(proto)
    parts = [part for node in proto.graph.node if (part := _conv_silu(view, node) or _division(view, node))]
    replace_parts(proto, parts, function)
    return proto


def _conv_silu(view: GraphView, conv: NodeProto) -> Part | None:
    if conv.op_type != "Conv" or len(conv.input) != 3:
        return None
    weights, bias = (view.floats(name) for name in conv.input[1:])
    if not weights or not bias or len(weights) != 3 or weights[1] != 1 or bias != weights[:1]:
        return None
    pads = attribute(conv, "pads", [0, 0])
    plain = all(attribute(conv, name, [1]) == [1] for name in ("strides", "dilations"))
    explicit = attribute(conv, "auto_pad", b"NOTSET") == b"NOTSET"
    if not (plain and explicit) or attribute(conv, "group", 1) != weights[0] or sum(pads) != weights[2] - 1:
        return None
    if not (gate := view.silu(conv)):
        return None
    name = f"{conv.name or conv.output[0]}_fused"
    attributes = {"group": weights[0], "before": pads[0]}
    made = helper.make_node(CONV_SILU, conv.input, gate[-1].output, name=name, domain=DOMAIN, **attributes)
    return Part([conv, *gate], [made])


def _division(view: GraphView, inverse: NodeProto) -> Part | None:
    if inverse.op_type != "Reciprocal" or (product := view.only_reader(inverse, "Mul")) is None:
        return None
    root = view.producer.get(inverse.input[0])
    others = [name for name in product.input if name != inverse.output[0]]
    if root is None or root.op_type != "Sqrt" or len(others) != 1:
        return None
    made = helper.make_node("Div", [*others, root.output[0]], product.output, name=product.name)
    return Part([inverse, product], [made])
