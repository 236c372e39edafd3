"""Function bodies of the operators of the domain "mdnet", as ONNX files carry them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper

from mdnet_engines.ops.selective_scan import DOMAIN, OPSET


def body(
    name: str, inputs: Sequence[str], nodes: Sequence[NodeProto], attributes: Sequence[str] = ()
) -> onnx.FunctionProto:
    """The function that gives `y` from `inputs`; `attributes` are required of its node."""
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_function(DOMAIN, name, inputs, ["y"], nodes, opsets, attributes)


def group_norm(x: str, *, silu: bool) -> list[NodeProto]:
    """Nodes of a body: group normalisation of float32 channels last, then SiLU or not; the last gives channels second.

    The function has the inputs `gamma` and `beta`, an element for each channel, and the attributes `groups`, `epsilon`.
    """
    node = helper.make_node
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1])
    return [
        node("Constant", [], ["rest"], value_ints=[-1]),
        node("Constant", [], ["keep"], value_ints=[0]),
        node("Constant", [], ["column"], value_ints=[-1, 1, 1]),
        with_attribute(node("Constant", [], ["count"]), "value_int", "groups", AttributeProto.INT),
        node("Reshape", ["count", "rest"], ["groups_axis"]),
        node("Concat", ["keep", "groups_axis", "rest"], ["by_group"], axis=0),
        node("ConstantOfShape", ["groups_axis"], ["zeros"]),
        node("ConstantOfShape", ["groups_axis"], ["ones"], value=one),
        node("Transpose", [x], ["channels_second"], perm=[0, 3, 1, 2]),
        node("Shape", ["channels_second"], ["shape"]),
        node("Reshape", ["channels_second", "by_group"], ["grouped"]),
        with_attribute(
            node("InstanceNormalization", ["grouped", "ones", "zeros"], ["unit"]),
            "epsilon",
            "epsilon",
            AttributeProto.FLOAT,
        ),
        node("Reshape", ["unit", "shape"], ["restored"]),
        node("Reshape", ["gamma", "column"], ["gamma_column"]),
        node("Reshape", ["beta", "column"], ["beta_column"]),
        node("Mul", ["restored", "gamma_column"], ["scaled"]),
        node("Add", ["scaled", "beta_column"], ["normalised"]),
        *((node("Sigmoid", ["normalised"], ["gate"]), node("Mul", ["normalised", "gate"], ["gated"])) if silu else ()),
    ]


def with_attribute(node: NodeProto, name: str, of_function: str, kind: AttributeProto.AttributeType) -> NodeProto:
    """Give a node of a body an attribute that the function's node decides."""
    node.attribute.append(AttributeProto(name=name, ref_attr_name=of_function, type=kind))
    return node
