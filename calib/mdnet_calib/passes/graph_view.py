"""Looking for groups of nodes in a graph, and putting others in their place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mdnet_engines.ops.selective_scan import DOMAIN, VERSION


@dataclass(frozen=True)
class Part:
    """What is replaced: nodes in their order, and those that take the place of the last.

    The others go where nothing reads them any more: DequantizeLinear and Shape may have other readers.
    """

    nodes: list[NodeProto]
    made: list[NodeProto]


class GraphView:
    """A graph as a search needs it: who makes and who reads a value, constants, shapes."""

    def __init__(self, proto: onnx.ModelProto):
        graph = proto.graph
        self.producer = {output: node for node in graph.node for output in node.output}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in reads(node):
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

    def only_reader(self, node: NodeProto | None, kind: str | None = None) -> NodeProto | None:
        """The one node that reads `node`'s output, if nothing else does and it is of that kind."""
        if node is None or node.output[0] in self.outputs or len(readers := self.readers[node.output[0]]) != 1:
            return None
        return readers[0] if kind in (None, readers[0].op_type) else None

    def silu(self, node: NodeProto) -> list[NodeProto]:
        """Sigmoid and Mul, if the value of `node` goes into a SiLU and nowhere else."""
        value, readers = node.output[0], self.readers[node.output[0]]
        if value in self.outputs or sorted(reader.op_type for reader in readers) != ["Mul", "Sigmoid"]:
            return []
        sigmoid, product = sorted(readers, key=lambda reader: reader.op_type, reverse=True)
        alone = self.only_reader(sigmoid) is product
        return [sigmoid, product] if alone and set(product.input) == {value, sigmoid.output[0]} else []

    def floats(self, name: str) -> list[int] | None:
        """The shape of a constant of float32 numbers, if it is one."""
        constant = self.constants.get(name)
        return None if constant is None or constant.data_type != TensorProto.FLOAT else list(constant.dims)

    def array(self, name: str) -> np.ndarray | None:
        """A constant's values, if they are in the file."""
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        return numpy_helper.to_array(tensor)


def replace_parts(proto: onnx.ModelProto, parts: Sequence[Part], function: Callable[[str], onnx.FunctionProto]) -> None:
    """Put, in place, what was made in the place of each part, and take out what nothing reads any more.

    Args:
        function: gives the function body of an operator of the domain "mdnet" by its name.
    """
    if not parts:
        return
    graph = proto.graph
    replaced = {part.nodes[-1].output[0]: part.made for part in parts}
    nodes = [made for node in graph.node for made in replaced.get(node.output[0], [node])]
    candidates = {output for part in parts for node in part.nodes[:-1] for output in node.output}
    kept: list[NodeProto] = []
    read = {value.name for value in graph.output}
    for node in reversed(nodes):
        if candidates.issuperset(node.output) and read.isdisjoint(node.output):
            continue
        kept.append(node)
        read.update(reads(node))
    gone = {name for node in graph.node for name in (*node.input, *node.output)} - read
    gone -= {name for node in kept for name in node.output}
    _replace(graph.node, kept[::-1])
    _replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name not in gone])
    _replace(graph.value_info, [value for value in graph.value_info if value.name not in gone])
    names = {node.op_type for part in parts for node in part.made if node.domain == DOMAIN}
    there = {(body.domain, body.name) for body in proto.functions}
    proto.functions.extend(function(name) for name in sorted(names) if (DOMAIN, name) not in there)
    if names and DOMAIN not in {opset.domain for opset in proto.opset_import}:
        proto.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))


def copy_of(proto: onnx.ModelProto) -> onnx.ModelProto:
    """What a pass works on, so that the graph it was given stays as it is; external weights are not read."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute."""
    return next((helper.get_attribute_value(found) for found in node.attribute if found.name == name), default)


def reads(node: NodeProto) -> Iterator[str]:
    """Names of the values that a node reads, those that its subgraphs take from outside included."""
    yield from node.input
    for found in node.attribute:
        for graph in (found.g, *found.graphs):
            yield from (value.name for value in graph.output)
            for inner in graph.node:
                yield from reads(inner)


def _replace(field: Any, values: list[Any]) -> None:
    del field[:]
    field.extend(values)
