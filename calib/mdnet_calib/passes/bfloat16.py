"""Products of float32 graphs in bfloat16, for ONNX Runtime on CPUs that multiply it twice as fast.

What becomes `mdnet_engines.ops.product`'s operators: attention (MatMul → Softmax over the last axis → MatMul), and
products with a weight of at least `MIN_WIDTH` channels in and out. Inputs are rounded to bfloat16, sums stay float32. A
Transpose of the last two axes in front of a product is taken into it. Narrow products stay: packing their operands
costs what bfloat16 saves, and the scan's step sizes come from them. So do vectors, and operands that are broadcast
otherwise than as a whole for each leading index of the other: the kernels take neither.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import onnx
from onnx import NodeProto, helper

from mdnet_calib.passes.graph_view import GraphView, Part, attribute, copy_of, replace_parts
from mdnet_engines.ops.product import ATTENTION, PRODUCTS, function
from mdnet_engines.ops.selective_scan import DOMAIN

MIN_WIDTH = 128


def with_bfloat16_products(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with all replaced that this module's description fits; constants may lie outside of the file."""
    proto = copy_of(proto)
    view = GraphView(proto)
    replace_parts(proto, [part for node in proto.graph.node if (part := _attention(view, node))], function)
    view = GraphView(proto)
    replace_parts(proto, [part for node in proto.graph.node if (part := _product(view, node))], function)
    return proto


def _attention(view: GraphView, softmax: NodeProto) -> Part | None:
    if softmax.op_type != "Softmax":
        return None
    scores, rank = softmax.input[0], len(view.shapes.get(softmax.input[0], []))
    first, second = view.producer.get(scores), view.only_reader(softmax, "MatMul")
    last = attribute(softmax, "axis", -1) in (-1, rank - 1)
    if first is None or second is None or first.op_type != "MatMul" or view.only_reader(first) is not softmax:
        return None
    inputs = [*first.input, second.input[1]]  # q, k, v
    if not last or second.input[0] != softmax.output[0] or not all(_is_float(view, name) for name in inputs):
        return None
    if not _are_batches(view, inputs):
        return None
    name = f"{second.name or second.output[0]}_attention"
    return Part(
        [first, softmax, second], [helper.make_node(ATTENTION, inputs, second.output, name=name, domain=DOMAIN)]
    )


def _product(view: GraphView, product: NodeProto) -> Part | None:
    if product.op_type != "MatMul" or not all(_is_float(view, name) for name in product.input):
        return None
    weights = [shape for name in product.input if (shape := view.floats(name)) is not None]
    if not any(len(shape) == 2 and min(shape) >= MIN_WIDTH for shape in weights):
        return None
    if not _are_batches(view, product.input):
        return None
    inputs, transposed = list(product.input), [False, False]
    nodes = [product]
    for side, name in enumerate(product.input):
        before = view.producer.get(name)
        if before is not None and _swaps_last_two(before) and view.only_reader(before) is product:
            inputs[side], transposed[side] = before.input[0], True
            nodes.insert(0, before)
            break  # there is no operator with two
    operator = PRODUCTS[transposed[0], transposed[1]]
    return Part(nodes, [helper.make_node(operator, inputs, product.output, name=product.name, domain=DOMAIN)])


def _are_batches(view: GraphView, names: Iterable[str]) -> bool:
    """Whether all are matrices, or batches of them whose axes are the last ones of the largest batch.

    What shape inference does not know is taken to fit.
    """
    shapes = [shape for name in names if (shape := view.floats(name) or view.shapes.get(name))]
    batches = [list(itertools.dropwhile(lambda axis: axis == 1, shape[:-2])) for shape in shapes]
    largest = max(batches, key=len, default=[])
    pairs = [pair for batch in batches for pair in zip(reversed(batch), reversed(largest), strict=False)]
    known = [pair for pair in pairs if all(isinstance(axis, int) and axis for axis in pair)]
    return all(len(shape) >= 2 for shape in shapes) and all(one == other for one, other in known)


def _is_float(view: GraphView, name: str) -> bool:
    """Whether an operand is float32, and no weight of an int8 product."""
    if name in view.constants:
        return view.floats(name) is not None
    before = view.producer.get(name)
    return before is None or before.op_type != "DequantizeLinear" or before.input[0] not in view.constants


def _swaps_last_two(node: NodeProto) -> bool:
    if node.op_type != "Transpose":
        return False
    perm = attribute(node, "perm", [])
    last = len(perm) - 1
    return last >= 1 and perm == [*range(last - 1), last, last - 1]
