"""Fuse what lies between two quantised layers of a uint8 graph, for ONNX Runtime on the CPU.

In a ResNet block of the encoder a convolution's bytes become floats, are normalised, gated and rounded to bytes again
for the next one, whose bytes become floats and are added to the residual stream. In a transformer block half of what a
product gives gates the other half. And the first convolution, in float for its few channels, begins the stream. Four
things are looked for, as they are exported, x of the first with 4 axes:

    x → Reshape [0, groups, −1] → InstanceNormalization (ones, zeros) → Reshape to x's shape → Mul gamma → Add beta
      ( → Sigmoid → Mul ) → QuantizeLinear
    DequantizeLinear → Add of another value of the same shape, from a DequantizeLinear too or not ( → QuantizeLinear )
    DequantizeLinear → Add bias → Split in two (h, g) → h · GELU(g) → QuantizeLinear
    Conv from fewer than `MIN_CHANNELS` channels to at least as many, steps and dilations 1, one pad all around

Where x is a DequantizeLinear's output, its bytes are read in place of it. Each becomes one operator of
`mdnet_engines.ops.quantised` or `conv_op`, whose function body is these very nodes: a file with it needs nothing of
ours to run, and is faster with the native library. All but the third stand between Transposes, as their channels are
last; ONNX Runtime has the opposite ones at its quantised convolutions, and removes both.

What is not exactly as above stays as it is; so does a chain of which another node, or an output of the graph, reads a
value inside.
"""

from __future__ import annotations

import math
from typing import Any

import onnx
from onnx import NodeProto, TensorProto, helper

from mdnet_calib.passes.graph_view import GraphView, Part, attribute, copy_of, replace_parts
from mdnet_calib.passes.group_norms import group_norm
from mdnet_calib.passes.int8 import MIN_CHANNELS
from mdnet_engines.ops import convolution as conv_op
from mdnet_engines.ops.convolution import IMAGE_CONV
from mdnet_engines.ops.quantised import GEGLU, GROUP_NORMS, RESIDUAL_SUMS, function
from mdnet_engines.ops.selective_scan import DOMAIN


def fuse_between_layers(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with all replaced that this module's description fits; constants may lie outside of the file."""
    proto = copy_of(proto)
    graph, view = proto.graph, _View(proto)
    searches = (view.chain, view.sum, view.geglu, view.image_conv)
    parts = [part for node in graph.node for search in searches if (part := search(node))]
    replace_parts(proto, parts, lambda name: conv_op.function(name) if name == IMAGE_CONV else function(name))
    # ONNX Runtime lays out a convolution channels last only where it knows the number of axes.
    known = {value.name for value in (*graph.value_info, *graph.output)}
    channels_last = [part.made for part in parts if part.made[-1].op_type == "Transpose"]
    graph.value_info.extend(
        helper.make_tensor_value_info(node.output[0], _type_of(made[-2]), [None] * 4)
        for made in channels_last
        for node in made[-2:]
        if node.output[0] not in known
    )
    return proto


def _type_of(operator: NodeProto) -> int:
    of_bytes = (*GROUP_NORMS.values(), RESIDUAL_SUMS[False, True], RESIDUAL_SUMS[True, True])
    return TensorProto.UINT8 if operator.op_type in of_bytes else TensorProto.FLOAT


def _channels_last(
    end: NodeProto, operator: str, tensors: list[str], others: list[list[str]], **attributes: Any
) -> list[NodeProto]:
    """The operator in place of `end`, with Transposes before it, of `tensors`, and behind it.

    Args:
        others: inputs that follow each tensor; what is behind the last comes last.
    """
    y, name = end.output[0], _name(end)
    last = f"{y}_channels_last"
    inputs = [f"{last}_{i}" for i in range(len(tensors))]
    arguments: list[str] = []
    for i, more in enumerate(others):
        arguments += [*inputs[i : i + 1], *more]
    return [
        *(
            helper.make_node("Transpose", [tensor], [moved], name=f"{name}_in_{i}", perm=[0, 2, 3, 1])
            for i, (tensor, moved) in enumerate(zip(tensors, inputs, strict=True))
        ),
        helper.make_node(operator, arguments, [last], name=name, domain=DOMAIN, **attributes),
        helper.make_node("Transpose", [last], [y], name=f"{name}_out", perm=[0, 3, 1, 2]),
    ]


def _name(end: NodeProto) -> str:
    return f"{end.name or end.output[0]}_fused"


class _View(GraphView):
    """A graph, searched for what is fused here."""

    def sum(self, node: NodeProto) -> Part | None:
        """The residual sum that an Add is, if it is one."""
        if node.op_type != "Add":
            return None
        shapes = [self.shapes.get(name, []) for name in node.input]
        if shapes[0] != shapes[1] or len(shapes[0]) != 4 or not all(shapes[0]):
            return None
        starts = [self.bytes_of(name) for name in node.input]
        a, b = (0, 1) if starts[1] else (1, 0)
        if (of_b := starts[b]) is None:
            return None
        of_a, end = starts[a], self.only_reader(node, "QuantizeLinear")
        end = end if end and self.rounds_to_bytes(end) else None
        tensors = [of_a.input[0] if of_a else node.input[a], of_b.input[0]]
        others = [list(start.input[1:]) if start else [] for start in (of_a, of_b, end)]
        made = _channels_last(end or node, RESIDUAL_SUMS[of_a is not None, end is not None], tensors, others)
        return Part([*([of_a] if of_a else []), of_b, node, *([end] if end else [])], made)

    def chain(self, node: NodeProto) -> Part | None:
        """Group normalisation between bytes, around an InstanceNormalization, if this module describes it."""
        if (norm := group_norm(self, node)) is None:
            return None
        end = self.only_reader(norm.nodes[-1], "QuantizeLinear")
        if not end or not self.rounds_to_bytes(end):
            return None
        start = self.bytes_of(norm.x)
        made = _channels_last(
            end,
            GROUP_NORMS[start is not None, norm.silu],
            [start.input[0] if start else norm.x],
            [[*(start.input[1:] if start else []), norm.gamma, norm.beta, *end.input[1:]]],
            **norm.attributes(),
        )
        return Part([*([start] if start else []), *norm.nodes, end], made)

    def geglu(self, split: NodeProto) -> Part | None:
        """What is around a Split in two, if it is GEGLU between bytes."""
        if split.op_type != "Split" or len(split.output) != 2 or attribute(split, "num_outputs") != 2:
            return None
        shifted = self.producer.get(split.input[0])
        if shifted is None or shifted.op_type != "Add" or self.only_reader(shifted) is not split:
            return None
        shape = self.shapes.get(split.input[0], [])
        if not shape or attribute(split, "axis", 0) % len(shape) != len(shape) - 1:
            return None
        biases = [name for name in shifted.input if self.floats(name) == shape[-1:]]
        values = [name for name in shifted.input if name not in biases]
        start = self.bytes_of(values[0]) if len(biases) == len(values) == 1 else None
        gelu = self.gelu(split.output[1])
        if start is None or not gelu or self.outputs.intersection(split.output):
            return None
        product = self.only_reader(gelu[-1], "Mul")
        if product is None or set(product.input) != {split.output[0], gelu[-1].output[0]}:
            return None
        end = self.only_reader(product, "QuantizeLinear")
        if end is None or not self.rounds_to_bytes(end) or self.readers[split.output[0]] != [product]:
            return None
        inputs = [*start.input, biases[0], *end.input[1:]]
        made = helper.make_node(GEGLU, inputs, [end.output[0]], name=_name(end), domain=DOMAIN)
        return Part([start, shifted, split, *gelu, product, end], [made])

    def image_conv(self, conv: NodeProto) -> Part | None:
        """The convolution of an image with few channels, if a Conv is one."""
        if conv.op_type != "Conv" or len(conv.input) != 3:
            return None
        weights, bias = (self.floats(name) for name in conv.input[1:])
        if not weights or not bias or len(weights) != 4 or not weights[1] < MIN_CHANNELS <= weights[0]:
            return None
        pads = attribute(conv, "pads", [0] * 4)
        plain = all(attribute(conv, name, [1, 1]) == [1, 1] for name in ("strides", "dilations"))
        explicit = attribute(conv, "auto_pad", b"NOTSET") == b"NOTSET"
        if not (plain and explicit) or attribute(conv, "group", 1) != 1 or len(set(pads)) != 1:
            return None
        return Part([conv], _channels_last(conv, IMAGE_CONV, [conv.input[0]], [list(conv.input[1:])], pad=pads[0]))

    def gelu(self, x: str) -> list[NodeProto]:
        """The nodes of GELU(x) = x · (½ · (1 + erf(x / √2))), if x goes into that and nowhere else."""
        ends = sorted(self.readers[x], key=lambda node: node.op_type)
        if [node.op_type for node in ends] != ["Div", "Mul"]:
            return []
        scaled, product = ends
        error = self.only_reader(scaled, "Erf")
        shifted = self.only_reader(error, "Add")
        halved = self.only_reader(shifted, "Mul")
        if not (error and shifted and halved) or self.only_reader(halved) is not product:
            return []
        if scaled.input[0] != x or set(product.input) != {x, halved.output[0]}:
            return []
        numbers = ((scaled, x, math.sqrt(2)), (shifted, error.output[0], 1), (halved, shifted.output[0], 0.5))
        close = all(self.has_number(node, other, number) for node, other, number in numbers)
        return [scaled, error, shifted, halved, product] if close else []

    def has_number(self, node: NodeProto, other: str, number: float) -> bool:
        """Whether a node of two operands computes with `other` and a constant that is that number, as a float."""
        arrays = [self.array(name) for name in node.input if name != other]
        if len(arrays) != 1 or arrays[0] is None or arrays[0].size != 1:
            return False
        return abs(float(arrays[0].item()) - number) < 1e-6

    def bytes_of(self, name: str) -> NodeProto | None:
        """The DequantizeLinear that gives a value, if it reads uint8 with one scale."""
        node = self.producer.get(name)
        return node if node and node.op_type == "DequantizeLinear" and self.rounds_to_bytes(node) else None

    def rounds_to_bytes(self, node: NodeProto) -> bool:
        """Whether a QuantizeLinear or DequantizeLinear has one constant scale and uint8 zero-point."""
        parts = [self.constants.get(name) for name in node.input[1:]]
        kinds = [part.data_type for part in parts if part is not None and not part.dims]
        return kinds == [TensorProto.FLOAT, TensorProto.UINT8]
