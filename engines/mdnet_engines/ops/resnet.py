"""The convolutions of a ResNet block in float32, as ONNX operators with a function body: for ONNX Runtime on the CPU.

Domain "mdnet", version 1; 3 × 3, steps of 1, a zero on each side; channels last, the attributes required.

    y = GroupNormSiluConv   (x, gamma, beta, w, bias)             conv(silu(group_norm(x))) + bias
    y = GroupNormSiluConvSum(x, gamma, beta, w, bias, residual)   the same + residual

    x [batch, height, width, channels]   gamma, beta: an element for each channel   w [outputs, channels, 3, 3]
    bias [outputs]   residual and y [batch, height, width, outputs]

The native kernel never writes the normalised tensor: what is read for the convolution is normalised and gated. It
multiplies by Winograd's algorithm (`engines/cpp/winograd/winograd.h`), a quarter of the multiplications, so its results
differ from the function body's by float32's rounding.
"""

from __future__ import annotations

import onnx
from onnx import helper

from mdnet_engines.ops.function_body import body, group_norm

CONVOLUTIONS = {False: "GroupNormSiluConv", True: "GroupNormSiluConvSum"}
"""By whether a residual is added."""


def function(name: str) -> onnx.FunctionProto:
    """The function body of the operator `name`."""
    node = helper.make_node
    residual = ["residual"] if name == CONVOLUTIONS[True] else []
    nodes = [
        *(normalise := group_norm("x", silu=True)),
        node("Conv", [normalise[-1].output[0], "w", "bias"], ["convolved"], pads=[1, 1, 1, 1]),
        node("Transpose", ["convolved"], ["channels_last"], perm=[0, 2, 3, 1]),
        node("Add", ["channels_last", *residual], ["y"]) if residual else node("Identity", ["channels_last"], ["y"]),
    ]
    return body(name, ["x", "gamma", "beta", "w", "bias", *residual], nodes, ["groups", "epsilon"])
