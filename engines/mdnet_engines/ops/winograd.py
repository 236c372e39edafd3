"""3x3 convolutions between bytes by Winograd's algorithm, as ONNX operators with a function body of standard operators.

Domain "mdnet", version 1. x and y are channels last, steps are 1, and zeros are padded on all sides:

    y = WinogradConvQuantize           (x…, w, w_scale, bias, y…)
    y = WinogradConvSum                (x…, w, w_scale, bias, c…, a)
    y = WinogradConvSumQuantize        (x…, w, w_scale, bias, c…, a, y…)
    y = WinogradConvQLinearSum         (x…, w, w_scale, bias, c…, a…)
    y = WinogradConvQLinearSumQuantize (x…, w, w_scale, bias, c…, a…, y…)

    x… is x, x_scale, x_zero_point; c…, a… and y… likewise, but that c and y themselves are no inputs
    x [batch, height, width, C] uint8   w [O, C, 3, 3] int8 and w_scale [O], both constant   bias [O]   other scales and
    zero-points: scalars   a [batch, height, width, O] float32 or, with QLinear, uint8
    → y [batch, height, width, O] float32 or, with Quantize, uint8

The last four are the residual sums of `mdnet_engines.ops.quantised`, a + c, with the convolution whose bytes are c. The
function body rounds c, as ONNX Runtime's own convolution would; the native kernel keeps it in float32, which is nearer
to what the float graph computes.

The native kernel takes the bytes as what they stand for and multiplies in bfloat16, with a quarter of a direct
convolution's multiplications: on processors with AVX-512 BF16 that is faster than int8. On those without VNNI it
multiplies in float32. On all others ONNX Runtime runs the function body, which it makes its int8 convolution of.

The attribute `keep_bytes` is required. With 0 the native kernel transforms w once, and keeps eight times its bytes in
bfloat16 and sixteen times in float32. With 1 it keeps w and transforms it in each run, which then takes longer: on wide
layers 1 to 5 %, in float32 10 to 12 %.
"""

from __future__ import annotations

import onnx
from onnx import NodeProto, helper

from mdnet_engines.ops import native
from mdnet_engines.ops.function_body import body

CONV_QUANTIZE = "WinogradConvQuantize"
CONV_SUMS = {
    (False, False): "WinogradConvSum",
    (False, True): "WinogradConvSumQuantize",
    (True, False): "WinogradConvQLinearSum",
    (True, True): "WinogradConvQLinearSumQuantize",
}
"""By whether a, and y, is in bytes."""
NAMES = (CONV_QUANTIZE, *CONV_SUMS.values())


def function(name: str) -> onnx.FunctionProto:
    """The function body of the operator `name`."""
    x = ["x", "x_scale", "x_zero_point"]
    if name == CONV_QUANTIZE:
        inputs = [*x, "w", "w_scale", "bias", "y_scale", "y_zero_point"]
        nodes = [*_convolution("y_scale", "y_zero_point"), _channels_last("bytes", "y")]
        return body(name, inputs, nodes, ["keep_bytes"])
    a_in_bytes, y_in_bytes = next(kind for kind, known in CONV_SUMS.items() if known == name)
    a = ["a", "a_scale", "a_zero_point"] if a_in_bytes else ["a"]
    y = ["y_scale", "y_zero_point"] if y_in_bytes else []
    nodes = [
        *_convolution("c_scale", "c_zero_point"),
        _channels_last("bytes", "c"),
        helper.make_node("DequantizeLinear", ["c", "c_scale", "c_zero_point"], ["c32"]),
        helper.make_node("DequantizeLinear" if a_in_bytes else "Identity", a, ["a32"]),
        helper.make_node("Add", ["a32", "c32"], ["sum"]),
        helper.make_node("QuantizeLinear" if y_in_bytes else "Identity", ["sum", *y], ["y"]),
    ]
    return body(name, [*x, "w", "w_scale", "bias", "c_scale", "c_zero_point", *a, *y], nodes, ["keep_bytes"])


def native_products() -> str:
    """How ONNX Runtime convolves here where a graph has these operators, for people."""
    library = native.library()
    products = -1 if library is None else library.mdnet_winograd_products()
    return {0: "in float32", 1: "in bfloat16"}.get(products, "as its own int8 convolutions")


def _convolution(scale: str, zero_point: str) -> list[NodeProto]:
    """The convolution's bytes, channels second."""
    return [
        helper.make_node("Transpose", ["x"], ["channels_second"], perm=[0, 3, 1, 2]),
        helper.make_node("DequantizeLinear", ["channels_second", "x_scale", "x_zero_point"], ["x32"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale"], ["w32"], axis=0),
        helper.make_node("Conv", ["x32", "w32", "bias"], ["convolved"], pads=[1] * 4),
        helper.make_node("QuantizeLinear", ["convolved", scale, zero_point], ["bytes"]),
    ]


def _channels_last(x: str, y: str) -> NodeProto:
    return helper.make_node("Transpose", [x], [y], perm=[0, 2, 3, 1])
