"""Fuse the ResNet blocks of a float32 graph into convolutions of ours, channels last, for ONNX Runtime on the CPU.

    group normalisation → SiLU → Conv 3 × 3, steps 1, one zero on each side ( → Add of a value of the same shape )

becomes an operator of `mdnet_engines.ops.resnet` where its weights are float32 constants of at least `MIN_CHANNELS`
channels in and out, and the image has at least `MIN_PLACES` places: the transformed weights, four times as large, are
read once for each image, which must take less time than they save. Where what is added is a 1 × 1 convolution that
nothing else reads, it becomes a MatMul of channels last, and its bias is added to the other's.

Channels are last between these, and second for all other nodes. ONNX Runtime takes the Transposes that remain into the
layout that its own convolutions have.
"""

from __future__ import annotations

import onnx
from onnx import NodeProto, TensorProto, helper

from mdnet_calib.passes.graph_view import GraphView, Part, attribute, copy_of, reads, replace_parts
from mdnet_calib.passes.group_norms import group_norm
from mdnet_calib.passes.int8 import MIN_CHANNELS
from mdnet_engines.ops.resnet import CONVOLUTIONS, function
from mdnet_engines.ops.selective_scan import DOMAIN

MIN_PLACES = 1024
_TO_LAST, _TO_SECOND = [0, 2, 3, 1], [0, 3, 1, 2]


def fuse_resnets(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with all replaced that this module's description fits; constants may lie outside of the file."""
    proto = copy_of(proto)
    view = GraphView(proto)
    parts = [part for node in proto.graph.node if (part := _convolution(view, node))]
    if not parts:
        return proto
    replace_parts(proto, parts, function)
    known = {value.name for value in proto.graph.value_info}
    last = [(part.made[-1].output[0], part.made[-1].input[0]) for part in parts]
    proto.graph.value_info.extend(  # ONNX Runtime chooses a layout only where it knows the number of axes
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4)
        for names in last
        for name in names
        if name not in known
    )
    _cancel_transposes(proto.graph)
    return proto


def _convolution(view: GraphView, node: NodeProto) -> Part | None:
    """What takes the place of a convolution behind the InstanceNormalization `node`, if there is one."""
    norm = group_norm(view, node)
    if norm is None or not norm.silu:
        return None
    conv = view.only_reader(norm.nodes[-1], "Conv")
    if conv is None or not _is_plain(view, conv, [3, 3], pads=1) or not _is_large(view, norm.x):
        return None
    name, shape = f"{conv.name or conv.output[0]}_fused", view.floats(conv.input[1]) or []
    end, residual = conv, ""
    added = view.only_reader(conv, "Add")
    if added is not None:
        (residual, *others) = [value for value in added.input if value != conv.output[0]] or [""]
        if residual and not others and _are_alike(view, residual, conv.output[0], shape[0]):
            end = added
        else:
            residual = ""
    nodes, made, bias = [*norm.nodes, conv], [_to_last(norm.x, f"{name}_x", name)], conv.input[2]
    shortcut = view.producer.get(residual)
    if residual and shortcut and view.only_reader(shortcut) is end and _is_plain(view, shortcut, [1, 1], pads=0):
        nodes.append(shortcut)
        made += _product(shortcut, name, bias)
        residual, bias = f"{name}_residual", f"{name}_bias"
    elif residual:
        made.append(_to_last(residual, f"{name}_residual", name))
        residual = f"{name}_residual"
    inputs = [f"{name}_x", norm.gamma, norm.beta, conv.input[1], bias, *([residual] if residual else [])]
    operator, output = CONVOLUTIONS[bool(residual)], f"{name}_channels_last"
    made.append(helper.make_node(operator, inputs, [output], name=name, domain=DOMAIN, **norm.attributes()))
    made.append(helper.make_node("Transpose", [output], end.output, name=f"{name}_out", perm=_TO_SECOND))
    return Part([*nodes, *([end] if end is not conv else [])], made)


def _to_last(x: str, y: str, name: str) -> NodeProto:
    return helper.make_node("Transpose", [x], [y], name=f"{name}_in_{y}", perm=_TO_LAST)


def _product(shortcut: NodeProto, name: str, bias: str) -> list[NodeProto]:
    """A 1 × 1 convolution as a product, channels last, and the sum of both biases.

    What is computed from constants alone ONNX Runtime computes when it opens the graph.
    """
    x, weights, its_bias = shortcut.input
    return [
        _to_last(x, f"{name}_shortcut", name),
        helper.make_node("Squeeze", [weights], [f"{name}_matrix"], name=f"{name}_squeeze"),
        helper.make_node("Transpose", [f"{name}_matrix"], [f"{name}_weights"], name=f"{name}_transpose", perm=[1, 0]),
        helper.make_node(
            "MatMul", [f"{name}_shortcut", f"{name}_weights"], [f"{name}_residual"], name=f"{name}_product"
        ),
        helper.make_node("Add", [bias, its_bias], [f"{name}_bias"], name=f"{name}_biases"),
    ]


def _is_plain(view: GraphView, conv: NodeProto, kernel: list[int], *, pads: int) -> bool:
    """Whether a node is a convolution with that kernel, and bias, padded on each side, with nothing else about it."""
    if conv.op_type != "Conv" or len(conv.input) != 3:
        return False
    weights, bias = (view.floats(name) for name in conv.input[1:])
    if not weights or not bias or weights[2:] != kernel or min(weights[:2]) < MIN_CHANNELS or bias != weights[:1]:
        return False
    plain = all(attribute(conv, name, [1, 1]) == [1, 1] for name in ("strides", "dilations"))
    explicit = attribute(conv, "auto_pad", b"NOTSET") == b"NOTSET"
    return plain and explicit and attribute(conv, "group", 1) == 1 and attribute(conv, "pads", [0] * 4) == [pads] * 4


def _is_large(view: GraphView, image: str) -> bool:
    height, width = view.shapes.get(image, [0] * 4)[2:]
    return isinstance(height, int) and isinstance(width, int) and height * width >= MIN_PLACES


def _are_alike(view: GraphView, a: str, b: str, channels: int) -> bool:
    """Whether two values have the same shape, of 4 axes with that many channels."""
    shapes = [view.shapes.get(name, []) for name in (a, b)]
    return shapes[0] == shapes[1] and len(shapes[0]) == 4 and all(shapes[0]) and shapes[0][1] == channels


def _cancel_transposes(graph: onnx.GraphProto) -> None:
    """Take out each Transpose to channels last of what was channels last before; and second ones of the same value."""
    producer = {output: node for node in graph.node for output in node.output}
    outputs = {value.name for value in graph.output}
    same: dict[str, str] = {}
    of: dict[str, str] = {}
    for node in graph.node:
        if node.op_type != "Transpose" or attribute(node, "perm") != _TO_LAST or node.output[0] in outputs:
            continue
        before = producer.get(node.input[0])
        if before is not None and before.op_type == "Transpose" and attribute(before, "perm") == _TO_SECOND:
            same[node.output[0]] = before.input[0]
        else:
            same[node.output[0]] = of.setdefault(node.input[0], node.output[0])
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = same.get(name, name)
    kept: list[NodeProto] = []
    read = set(outputs)
    for node in reversed(graph.node):
        if node.op_type == "Transpose" and read.isdisjoint(node.output):
            continue
        kept.append(node)
        read.update(reads(node))
    del graph.node[:]
    graph.node.extend(reversed(kept))
    made = {output for node in kept for output in node.output}
    known = [value for value in graph.value_info if value.name in made]
    del graph.value_info[:]
    graph.value_info.extend(known)
