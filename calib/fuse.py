"""Fuse what lies between two quantised layers of a uint8 graph, for ONNX Runtime on the CPU.

In a ResNet block of the encoder a convolution's bytes become floats, are normalised, gated and rounded to bytes again
for the next one, whose bytes become floats and are added to the residual stream. Two things are looked for, as they are
exported, x with 4 axes:

    x → Reshape [0, groups, −1] → InstanceNormalization (ones, zeros) → Reshape to x's shape → Mul gamma → Add beta
      ( → Sigmoid → Mul ) → QuantizeLinear
    DequantizeLinear → Add of another value of the same shape

Where x is a DequantizeLinear's output, its bytes are read in place of it. Each becomes one operator of
`mdnet_engines.quantised_ops`, whose function body is these very nodes: a file with it needs nothing of ours to run, and
is faster with the native library. The operators stand between Transposes, as their channels are last; ONNX Runtime has
the opposite ones at its quantised convolutions, and removes both.

What is not exactly as above stays as it is; so does a chain of which another node, or an output of the graph, reads a
value inside.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mdnet_engines.quantised_ops import GROUP_NORMS, RESIDUAL_SUM, function
from mdnet_engines.scan_op import DOMAIN, VERSION


@dataclass(frozen=True)
class _Part:
    """What is fused: nodes in their order, and those that take the place of the last.

    The others go where nothing reads them any more: DequantizeLinear and Shape may have other readers.
    """

    nodes: list[NodeProto]
    made: list[NodeProto]
    type: int  # of what the new operator gives

    @property
    def operator(self) -> NodeProto:
        return self.made[-2]


def fuse_between_layers(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Replace, in place, all that this module's description fits; constants may lie outside of the file."""
    graph, view = proto.graph, _View(proto)
    parts = [part for node in graph.node if (part := view.chain(node) or view.sum(node))]
    if not parts:
        return proto
    replaced = {part.nodes[-1].output[0]: part.made for part in parts}
    nodes = [made for node in graph.node for made in replaced.get(node.output[0], [node])]
    candidates = {output for part in parts for node in part.nodes[:-1] for output in node.output}
    kept: list[NodeProto] = []
    read = {value.name for value in graph.output}
    for node in reversed(nodes):
        if candidates.issuperset(node.output) and read.isdisjoint(node.output):
            continue
        kept.append(node)
        read.update(_reads(node))
    gone = {name for node in graph.node for name in (*node.input, *node.output)} - read
    gone -= {name for node in kept for name in node.output}
    _replace(graph.node, kept[::-1])
    _replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name not in gone])
    _replace(graph.value_info, [value for value in graph.value_info if value.name not in gone])
    # ONNX Runtime lays out a convolution channels last only where it knows the number of axes.
    known = {value.name for value in (*graph.value_info, *graph.output)}
    graph.value_info.extend(
        helper.make_tensor_value_info(node.output[0], part.type, [None] * 4)
        for part in parts
        for node in part.made[-2:]
        if node.output[0] not in known
    )
    there = {(body.domain, body.name) for body in proto.functions}
    names = sorted({part.operator.op_type for part in parts})
    proto.functions.extend(function(name) for name in names if (DOMAIN, name) not in there)
    if DOMAIN not in {opset.domain for opset in proto.opset_import}:
        proto.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    return proto


def _channels_last(
    end: NodeProto, operator: str, tensors: list[str], others: list[str], **attributes: Any
) -> list[NodeProto]:
    """The operator in place of `end`, with Transposes before it, of `tensors`, and behind it."""
    y, name = end.output[0], f"{end.name or end.output[0]}_fused"
    last = f"{y}_channels_last"
    inputs = [f"{last}_{i}" for i in range(len(tensors))]
    return [
        *(
            helper.make_node("Transpose", [tensor], [moved], name=f"{name}_in_{i}", perm=[0, 2, 3, 1])
            for i, (tensor, moved) in enumerate(zip(tensors, inputs, strict=True))
        ),
        helper.make_node(operator, [*inputs, *others], [last], name=name, domain=DOMAIN, **attributes),
        helper.make_node("Transpose", [last], [y], name=f"{name}_out", perm=[0, 3, 1, 2]),
    ]


class _View:
    """A graph as the search needs it: who makes and who reads a value, constants, shapes."""

    def __init__(self, proto: onnx.ModelProto):
        graph = proto.graph
        self.producer = {output: node for node in graph.node for output in node.output}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in _reads(node):
                self.readers[name].append(node)
        inputs = {value.name for value in graph.input}  # an initializer that is one too is only a default
        self.constants = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in inputs}
        self.outputs = {value.name for value in graph.output}
        inferred = onnx.shape_inference.infer_shapes(proto).graph
        self.shapes = {
            value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]  # 0: not known
            for value in (*inferred.input, *inferred.value_info)
            if value.type.tensor_type.HasField("shape")
        }

    def sum(self, node: NodeProto) -> _Part | None:
        """The residual sum that an Add is, if it is one."""
        if node.op_type != "Add":
            return None
        shapes = [self.shapes.get(name, []) for name in node.input]
        if shapes[0] != shapes[1] or len(shapes[0]) != 4 or not all(shapes[0]):
            return None
        for a, b in (node.input, reversed(node.input)):
            if start := self.bytes_of(b):
                made = _channels_last(node, RESIDUAL_SUM, [a, start.input[0]], list(start.input[1:]))
                return _Part([start, node], made, TensorProto.FLOAT)
        return None

    def chain(self, norm: NodeProto) -> _Part | None:
        """The chain around an InstanceNormalization, if it is exactly what this module describes."""
        if norm.op_type != "InstanceNormalization":
            return None
        grouped = self.producer.get(norm.input[0])
        restored = self.only_reader(norm, "Reshape")
        scaled = self.only_reader(restored, "Mul")
        shifted = self.only_reader(scaled, "Add")
        if not (grouped and restored and scaled and shifted) or self.only_reader(grouped) is None:
            return None
        groups = self.groups(norm, grouped)
        x = grouped.input[0]
        shape = self.producer.get(restored.input[1])
        gamma, beta = self.parameter(scaled, restored, x), self.parameter(shifted, scaled, x)
        if not (groups and gamma and beta and shape and _is_shape_of(shape, x)):
            return None
        if self.constants[gamma].dims[0] % groups or restored.input[0] != norm.output[0]:
            return None
        gate = self.gate(shifted)
        last = gate[-1] if gate else shifted
        end = self.only_reader(last, "QuantizeLinear")
        if not end or not self.rounds_to_bytes(end):
            return None
        start = self.bytes_of(x)
        made = _channels_last(
            end,
            GROUP_NORMS[start is not None, bool(gate)],
            [start.input[0] if start else x],
            [*(start.input[1:] if start else []), gamma, beta, *end.input[1:]],
            groups=groups,
            epsilon=next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5),
        )
        between = [shape, grouped, norm, restored, scaled, shifted, *gate]
        return _Part([*([start] if start else []), *between, end], made, TensorProto.UINT8)

    def bytes_of(self, name: str) -> NodeProto | None:
        """The DequantizeLinear that gives a value, if it reads uint8 with one scale."""
        node = self.producer.get(name)
        return node if node and node.op_type == "DequantizeLinear" and self.rounds_to_bytes(node) else None

    def only_reader(self, node: NodeProto | None, kind: str | None = None) -> NodeProto | None:
        """The one node that reads `node`'s output, if nothing else does and it is of that kind."""
        if node is None or node.output[0] in self.outputs or len(readers := self.readers[node.output[0]]) != 1:
            return None
        return readers[0] if kind in (None, readers[0].op_type) else None

    def groups(self, norm: NodeProto, grouped: NodeProto) -> int:
        """How many groups are normalised; 0 if the nodes do something else too."""
        if grouped.op_type != "Reshape" or any(a.name == "allowzero" and a.i for a in grouped.attribute):
            return 0
        target, scale, bias = (self.array(name) for name in (grouped.input[1], *norm.input[1:]))
        if target is None or scale is None or bias is None or (scale != 1).any() or bias.any():
            return 0
        return scale.size if target.tolist() == [0, scale.size, -1] else 0

    def gate(self, node: NodeProto) -> list[NodeProto]:
        """Sigmoid and Mul, if the value of `node` goes into a SiLU and nowhere else."""
        value, readers = node.output[0], self.readers[node.output[0]]
        if value in self.outputs or sorted(reader.op_type for reader in readers) != ["Mul", "Sigmoid"]:
            return []
        sigmoid, product = sorted(readers, key=lambda reader: reader.op_type, reverse=True)
        alone = self.only_reader(sigmoid) is product
        return [sigmoid, product] if alone and set(product.input) == {value, sigmoid.output[0]} else []

    def parameter(self, node: NodeProto, before: NodeProto, x: str) -> str | None:
        """The constant operand of Mul or Add, if it has one float for each channel of x."""
        (name, *others) = [name for name in node.input if name != before.output[0]] or [""]
        constant, shape = self.constants.get(name), self.shapes.get(x, [])
        if others or constant is None or constant.data_type != TensorProto.FLOAT or len(shape) != 4 or not shape[1]:
            return None
        return name if list(constant.dims) == [shape[1], 1, 1] else None

    def rounds_to_bytes(self, node: NodeProto) -> bool:
        """Whether a QuantizeLinear or DequantizeLinear has one constant scale and uint8 zero-point."""
        parts = [self.constants.get(name) for name in node.input[1:]]
        kinds = [part.data_type for part in parts if part is not None and not part.dims]
        return kinds == [TensorProto.FLOAT, TensorProto.UINT8]

    def array(self, name: str) -> np.ndarray | None:
        """A constant's values, if they are in the file."""
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        return numpy_helper.to_array(tensor)


def _is_shape_of(node: NodeProto, x: str) -> bool:
    """Whether `node` gives x's whole shape."""
    whole = not any(a.name == "end" or a.i for a in node.attribute)
    return whole and node.op_type == "Shape" and node.input[0] == x


def _reads(node: NodeProto) -> Iterator[str]:
    """Names of the values that a node reads, those that its subgraphs take from outside included."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from (value.name for value in graph.output)
            for inner in graph.node:
                yield from _reads(inner)


def _replace(field: Any, values: list[Any]) -> None:
    del field[:]
    field.extend(values)
