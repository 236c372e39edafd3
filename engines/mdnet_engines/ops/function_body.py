"""Function bodies of the operators of the domain "mdnet", as ONNX files carry them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import AttributeProto, NodeProto, helper

from mdnet_engines.ops.selective_scan import DOMAIN, OPSET


def body(
    name: str, inputs: Sequence[str], nodes: Sequence[NodeProto], attributes: Sequence[str] = ()
) -> onnx.FunctionProto:
    """The function that gives `y` from `inputs`; `attributes` are required of its node."""
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_function(DOMAIN, name, inputs, ["y"], nodes, opsets, attributes)


def with_attribute(node: NodeProto, name: str, of_function: str, kind: AttributeProto.AttributeType) -> NodeProto:
    """Give a node of a body an attribute that the function's node decides."""
    node.attribute.append(AttributeProto(name=name, ref_attr_name=of_function, type=kind))
    return node
