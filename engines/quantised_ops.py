"""What lies between two quantised layers, as ONNX operators with a function body of standard operators.

Domain "mdnet", version 1. Group normalisation, with SiLU or without: the first two take bytes, as a convolution leaves
them, the next two floats, as in a residual stream. And the sum that makes such a stream:

    y = QLinearGroupNorm     (x, x_scale, x_zero_point, gamma, beta, y_scale, y_zero_point)
    y = QLinearGroupNormSilu (x, x_scale, x_zero_point, gamma, beta, y_scale, y_zero_point)
    y = GroupNormQuantize    (x, gamma, beta, y_scale, y_zero_point)
    y = GroupNormSiluQuantize(x, gamma, beta, y_scale, y_zero_point)
    y = ResidualSum          (a, b, b_scale, b_zero_point)

    x [batch, height, width, C] uint8 or float32   gamma, beta: C elements in any shape   scales, zero-points: scalars
    → y uint8, of x's shape: QuantizeLinear(silu(gamma·(x − mean)/√(variance + epsilon) + beta))

    a float32, b uint8, of one shape → y float32: a + DequantizeLinear(b)

Mean and variance are those of an image's group of C/`groups` channels. Channels are last because ONNX Runtime's
quantised convolutions work that way: with channels second each of them transposes its input and its output.

`groups` and `epsilon` are attributes, both required: the operators are for ONNX Runtime on the CPU only. The native
kernels may differ from the function bodies by one step of y, where a value lies between two, and by a float's rounding.
"""

from __future__ import annotations

import onnx
from onnx import AttributeProto, TensorProto, helper

from mdnet_engines.scan_op import DOMAIN, OPSET

RESIDUAL_SUM = "ResidualSum"
GROUP_NORMS = {
    (True, False): "QLinearGroupNorm",
    (True, True): "QLinearGroupNormSilu",
    (False, False): "GroupNormQuantize",
    (False, True): "GroupNormSiluQuantize",
}
"""By whether x is in bytes, and whether SiLU follows."""


def function(name: str) -> onnx.FunctionProto:
    """The function body of the operator `name`."""
    if name == RESIDUAL_SUM:
        return _residual_sum()
    quantised, silu = next(kind for kind, operator in GROUP_NORMS.items() if operator == name)
    return _group_norm(quantised=quantised, silu=silu)


def _residual_sum() -> onnx.FunctionProto:
    inputs = ["a", "b", "b_scale", "b_zero_point"]
    nodes = [
        helper.make_node("DequantizeLinear", inputs[1:], ["b32"]),
        helper.make_node("Add", ["a", "b32"], ["y"]),
    ]
    return helper.make_function(DOMAIN, RESIDUAL_SUM, inputs, ["y"], nodes, [helper.make_opsetid("", OPSET)])


def _group_norm(*, quantised: bool, silu: bool) -> onnx.FunctionProto:
    node = helper.make_node
    x = ("x", "x_scale", "x_zero_point") if quantised else ("x",)
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1])
    nodes = [
        node("Constant", [], ["rest"], value_ints=[-1]),
        node("Constant", [], ["keep"], value_ints=[0]),
        node("Constant", [], ["column"], value_ints=[-1, 1, 1]),
        _with_attribute(node("Constant", [], ["count"]), "value_int", "groups", AttributeProto.INT),
        node("Reshape", ["count", "rest"], ["groups_axis"]),
        node("Concat", ["keep", "groups_axis", "rest"], ["by_group"], axis=0),
        node("ConstantOfShape", ["groups_axis"], ["zeros"]),
        node("ConstantOfShape", ["groups_axis"], ["ones"], value=one),
        node("DequantizeLinear", x, ["x32"]) if quantised else node("Identity", x, ["x32"]),
        node("Transpose", ["x32"], ["channels_second"], perm=[0, 3, 1, 2]),
        node("Shape", ["channels_second"], ["shape"]),
        node("Reshape", ["channels_second", "by_group"], ["grouped"]),
        _with_attribute(
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
        node("QuantizeLinear", ["gated" if silu else "normalised", "y_scale", "y_zero_point"], ["bytes"]),
        node("Transpose", ["bytes"], ["y"], perm=[0, 2, 3, 1]),
    ]
    return helper.make_function(
        DOMAIN,
        GROUP_NORMS[quantised, silu],
        [*x, "gamma", "beta", "y_scale", "y_zero_point"],
        ["y"],
        nodes,
        [helper.make_opsetid("", OPSET)],
        ["groups", "epsilon"],
    )


def _with_attribute(
    node: onnx.NodeProto, name: str, of_function: str, kind: AttributeProto.AttributeType
) -> onnx.NodeProto:
    """Give a node of the body an attribute that the function's node decides."""
    node.attribute.append(AttributeProto(name=name, ref_attr_name=of_function, type=kind))
    return node
