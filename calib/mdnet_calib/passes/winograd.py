"""Convolutions of a uint8 graph by Winograd's algorithm, for ONNX Runtime on CPUs where that is faster.

What is looked for, behind `mdnet_calib.passes.fuse`: a convolution between bytes, 3 by 3 with int8 weights, steps,
dilations and groups 1 and one zero padded on each side, with at most `MOST_WEIGHTS` weights for a place of y:

    DequantizeLinear → Conv → QuantizeLinear ( → Transpose to channels last → residual sum )

Each becomes one operator of `mdnet_engines.ops.winograd`, with the residual sum if only that reads it. A transformed
weight takes eight bytes or more, and spares time at each place: with more than `MOST_TRANSFORMED` for a place they stay
bytes.
"""

from __future__ import annotations

import math

import onnx
from onnx import NodeProto, TensorProto, helper

from mdnet_calib.passes.graph_view import GraphView, Part, attribute, copy_of, replace_parts
from mdnet_engines.ops.quantised import RESIDUAL_SUMS
from mdnet_engines.ops.selective_scan import DOMAIN
from mdnet_engines.ops.winograd import CONV_QUANTIZE, CONV_SUMS, function

MOST_WEIGHTS, MOST_TRANSFORMED = 5000, 600  # for a place of y
_LAST, _SECOND = [0, 2, 3, 1], [0, 3, 1, 2]


def with_winograd_convolutions(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with all replaced that this module's description fits; constants may lie outside of the file."""
    proto = copy_of(proto)
    view = _View(proto)
    parts = [part for node in proto.graph.node if (part := view.convolution(node))]
    replace_parts(proto, parts, function)
    known = {value.name for value in (*proto.graph.value_info, *proto.graph.output)}
    proto.graph.value_info.extend(  # ONNX Runtime must know the number of axes, or it keeps the Transposes
        helper.make_tensor_value_info(node.output[0], TensorProto.UINT8, [None] * 4)
        for part in parts
        for node in part.made
        if node.output[0] not in known
    )
    return proto


class _View(GraphView):
    def convolution(self, conv: NodeProto) -> Part | None:
        """A convolution with its neighbours, if it is one of those."""
        if not self.is_plain(conv):
            return None
        x, w = (self.producer.get(name) for name in conv.input[:2])
        end = self.only_reader(conv, "QuantizeLinear")
        if end is None or not x or not w or not self.is_of_bytes(x) or not self.is_of_bytes(end):
            return None
        if not self.has_symmetric_weights(w):
            return None
        weights = self.weights_per_place(conv, self.constants[w.input[0]])
        if weights is None or weights > MOST_WEIGHTS:
            return None
        keep_bytes = int(weights > MOST_TRANSFORMED)
        name = conv.name or conv.output[0]
        last = f"{x.input[0]}_of_{name}"
        to_last = helper.make_node("Transpose", [x.input[0]], [last], name=f"{name}_in", perm=_LAST)
        inputs = [last, *x.input[1:], *w.input[:2], conv.input[2], *end.input[1:]]
        summed = self.residual_sum(end)
        if summed is None:
            made = f"{end.output[0]}_last"
            node = helper.make_node(
                CONV_QUANTIZE, inputs, [made], name=f"{name}_winograd", domain=DOMAIN, keep_bytes=keep_bytes
            )
            to_second = helper.make_node("Transpose", [made], end.output, name=f"{name}_out", perm=_SECOND)
            return Part([x, w, conv, end], [to_last, node, to_second])
        turned, total = summed
        kind = next(kind for kind, known in RESIDUAL_SUMS.items() if known == total.op_type)
        b = list(total.input).index(turned.output[0])
        inputs += [*total.input[:b], *total.input[b + 3 :]]
        node = helper.make_node(
            CONV_SUMS[kind], inputs, total.output, name=f"{name}_winograd", domain=DOMAIN, keep_bytes=keep_bytes
        )
        return Part([x, w, conv, end, turned, total], [to_last, node])

    def residual_sum(self, end: NodeProto) -> tuple[NodeProto, NodeProto] | None:
        """The Transpose and the sum that read a convolution's bytes as their b, and nothing else does."""
        turned = self.only_reader(end, "Transpose")
        total = self.only_reader(turned)
        if turned is None or total is None or total.op_type not in RESIDUAL_SUMS.values():
            return None
        b = 3 if total.op_type in (RESIDUAL_SUMS[True, False], RESIDUAL_SUMS[True, True]) else 1
        fits = attribute(turned, "perm") == _LAST and total.input[b] == turned.output[0]
        return (turned, total) if fits and list(total.input).count(turned.output[0]) == 1 else None

    def is_plain(self, conv: NodeProto) -> bool:
        if conv.op_type != "Conv" or len(conv.input) != 3 or attribute(conv, "group", 1) != 1:
            return False
        ones = all(attribute(conv, name, [1, 1]) == [1, 1] for name in ("strides", "dilations"))
        explicit = attribute(conv, "auto_pad", b"NOTSET") == b"NOTSET" and attribute(conv, "pads", [0] * 4) == [1] * 4
        return ones and explicit and self.floats(conv.input[2]) is not None

    def weights_per_place(self, conv: NodeProto, w: TensorProto) -> float | None:
        """How many weights there are for each place of y; None where y's size is not known."""
        height, width = (self.shapes.get(conv.output[0]) or [0] * 4)[2:]
        known = isinstance(height, int) and isinstance(width, int) and height and width
        return math.prod(w.dims) / (height * width) if known else None

    def has_symmetric_weights(self, w: NodeProto) -> bool:
        """Whether a node gives 3 by 3 weights of int8 with a scale for each output and zero-points that are 0."""
        if w.op_type != "DequantizeLinear":
            return False
        values, scale = (self.constants.get(name) for name in w.input[:2])
        if values is None or scale is None or values.data_type != TensorProto.INT8 or list(values.dims[2:]) != [3, 3]:
            return False
        points = self.array(w.input[2]) if len(w.input) > 2 else None
        zero = len(w.input) < 3 or (points is not None and not points.any())
        return zero and attribute(w, "axis", 1) == 0 and list(scale.dims) == [values.dims[0]]

    def is_of_bytes(self, node: NodeProto) -> bool:
        """Whether a node quantises to or from uint8 with one scale."""
        parts = [self.constants.get(name) for name in node.input[1:]]
        kinds = [part.data_type for part in parts if part is not None and not part.dims]
        return node.op_type in ("QuantizeLinear", "DequantizeLinear") and kinds == [
            TensorProto.FLOAT,
            TensorProto.UINT8,
        ]
