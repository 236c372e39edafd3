"""What lies between two quantised layers, as ONNX operators with a function body of standard operators.

Domain "mdnet", version 1. Group normalisation, with SiLU or without: the first two take bytes, as a convolution leaves
them, the next two floats, as in a residual stream. The sum that makes such a stream. And GEGLU, in a transformer block:

    y = QLinearGroupNorm     (x, x_scale, x_zero_point, gamma, beta, y_scale, y_zero_point)
    y = QLinearGroupNormSilu (x, x_scale, x_zero_point, gamma, beta, y_scale, y_zero_point)
    y = GroupNormQuantize    (x, gamma, beta, y_scale, y_zero_point)
    y = GroupNormSiluQuantize(x, gamma, beta, y_scale, y_zero_point)
    y = ResidualSum               (a, b, b_scale, b_zero_point)
    y = ResidualSumQuantize       (a, b, b_scale, b_zero_point, y_scale, y_zero_point)
    y = QLinearResidualSum        (a, a_scale, a_zero_point, b, b_scale, b_zero_point)
    y = QLinearResidualSumQuantize(a, a_scale, a_zero_point, b, b_scale, b_zero_point, y_scale, y_zero_point)
    y = QLinearGeglu         (x, x_scale, x_zero_point, bias, y_scale, y_zero_point)

    x [batch, height, width, C] uint8 or float32   gamma, beta: C elements in any shape   scales, zero-points: scalars
    → y uint8, of x's shape: QuantizeLinear(silu(gamma·(x − mean)/√(variance + epsilon) + beta))

    a float32 or, with QLinear, uint8; b uint8; of one shape → y float32 or, with Quantize, uint8: a + b, of bytes what
    DequantizeLinear gives, and rounded by QuantizeLinear

    x [..., 2C] uint8   bias [2C] → y [..., C] uint8: QuantizeLinear(h·g·Φ(g)), where h and g are the halves of
    DequantizeLinear(x) + bias and Φ is the normal distribution's

Mean and variance are those of an image's group of C/`groups` channels. Channels are last because ONNX Runtime's
quantised convolutions work that way: with channels second each of them transposes its input and its output.

`groups` and `epsilon` are attributes of the first four, both required: the operators are for ONNX Runtime on the CPU
only. The native kernels may differ from the function bodies by one step of y, where a value lies between two, and by a
float's rounding.
"""

from __future__ import annotations

import math

import onnx
from onnx import helper

from mdnet_engines.ops.function_body import body, group_norm

RESIDUAL_SUMS = {
    (False, False): "ResidualSum",
    (False, True): "ResidualSumQuantize",
    (True, False): "QLinearResidualSum",
    (True, True): "QLinearResidualSumQuantize",
}
"""By whether a, and y, is in bytes."""
GEGLU = "QLinearGeglu"
GROUP_NORMS = {
    (True, False): "QLinearGroupNorm",
    (True, True): "QLinearGroupNormSilu",
    (False, False): "GroupNormQuantize",
    (False, True): "GroupNormSiluQuantize",
}
"""By whether x is in bytes, and whether SiLU follows."""


def function(name: str) -> onnx.FunctionProto:
    """The function body of the operator `name`."""
    if name in RESIDUAL_SUMS.values():
        return _residual_sum(name)
    if name == GEGLU:
        return _geglu()
    quantised, silu = next(kind for kind, operator in GROUP_NORMS.items() if operator == name)
    return _group_norm(quantised=quantised, silu=silu)


def _residual_sum(name: str) -> onnx.FunctionProto:
    a_in_bytes, y_in_bytes = next(kind for kind, known in RESIDUAL_SUMS.items() if known == name)
    a = ["a", "a_scale", "a_zero_point"] if a_in_bytes else ["a"]
    b = ["b", "b_scale", "b_zero_point"]
    y = ["y_scale", "y_zero_point"] if y_in_bytes else []
    nodes = [
        helper.make_node("DequantizeLinear" if a_in_bytes else "Identity", a, ["a32"]),
        helper.make_node("DequantizeLinear", b, ["b32"]),
        helper.make_node("Add", ["a32", "b32"], ["sum"]),
        helper.make_node("QuantizeLinear" if y_in_bytes else "Identity", ["sum", *y], ["y"]),
    ]
    return body(name, [*a, *b, *y], nodes)


def _geglu() -> onnx.FunctionProto:
    node = helper.make_node
    inputs = ["x", "x_scale", "x_zero_point", "bias", "y_scale", "y_zero_point"]
    nodes = [
        node("Constant", [], ["root_of_2"], value_float=math.sqrt(2)),
        node("Constant", [], ["one"], value_float=1.0),
        node("Constant", [], ["half"], value_float=0.5),
        node("DequantizeLinear", inputs[:3], ["x32"]),
        node("Add", ["x32", "bias"], ["halves"]),
        node("Split", ["halves"], ["h", "g"], axis=-1, num_outputs=2),
        node("Div", ["g", "root_of_2"], ["scaled"]),
        node("Erf", ["scaled"], ["error"]),
        node("Add", ["error", "one"], ["shifted"]),
        node("Mul", ["half", "shifted"], ["probability"]),
        node("Mul", ["g", "probability"], ["gelu"]),
        node("Mul", ["h", "gelu"], ["gated"]),
        node("QuantizeLinear", ["gated", *inputs[4:]], ["y"]),
    ]
    return body(GEGLU, inputs, nodes)


def _group_norm(*, quantised: bool, silu: bool) -> onnx.FunctionProto:
    node = helper.make_node
    x = ("x", "x_scale", "x_zero_point") if quantised else ("x",)
    nodes = [
        node("DequantizeLinear", x, ["x32"]) if quantised else node("Identity", x, ["x32"]),
        *(normalise := group_norm("x32", silu=silu)),
        node("QuantizeLinear", [normalise[-1].output[0], "y_scale", "y_zero_point"], ["bytes"]),
        node("Transpose", ["bytes"], ["y"], perm=[0, 2, 3, 1]),
    ]
    inputs = [*x, "gamma", "beta", "y_scale", "y_zero_point"]
    return body(GROUP_NORMS[quantised, silu], inputs, nodes, ["groups", "epsilon"])
