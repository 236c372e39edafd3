"""Two convolutions as ONNX operators with a function body: for ONNX Runtime on the CPU only.

Domain "mdnet", version 1, all float32, the attributes required.

    y = DepthwiseConvSilu(x, w, bias)     x [batch, channels, length]   w [channels, 1, taps]   bias [channels]

    y[t] = silu(bias + Σₖ w[k] · x[t − before + k]), x being 0 before and behind the sequence

`group` is the number of channels, as Conv has it; `before` says how many taps lie before the step: taps − 1 for a
causal convolution, 0 for an anti-causal one.

    y = ImageConv(x, w, bias)     x [batch, height, width, channels]   w [outputs, channels, h, w]   bias [outputs]

The convolution with `pad` zeros on each side; its output is channels last too. It is for images of few channels, where
ONNX Runtime would compute in a layout of its own and reorder the output, which is many times larger.
"""

from __future__ import annotations

import onnx
from onnx import AttributeProto, helper

from mdnet_engines.ops.function_body import body, with_attribute

CONV_SILU = "DepthwiseConvSilu"
IMAGE_CONV = "ImageConv"


def function(name: str) -> onnx.FunctionProto:
    """The function body of the operator `name`."""
    return _conv_silu() if name == CONV_SILU else _image_conv()


def _image_conv() -> onnx.FunctionProto:
    node = helper.make_node
    nodes = [
        with_attribute(node("Constant", [], ["pad_"]), "value_int", "pad", AttributeProto.INT),
        node("Constant", [], ["column"], value_ints=[-1]),
        node("Constant", [], ["none"], value_ints=[0]),
        node("Reshape", ["pad_", "column"], ["side"]),
        node("Concat", ["none", "side", "side", "none"] * 2, ["pads"], axis=0),
        node("Pad", ["x", "pads"], ["padded"]),
        node("Transpose", ["padded"], ["channels_second"], perm=[0, 3, 1, 2]),
        node("Conv", ["channels_second", "w", "bias"], ["sum"]),
        node("Transpose", ["sum"], ["y"], perm=[0, 2, 3, 1]),
    ]
    return body(IMAGE_CONV, ["x", "w", "bias"], nodes, ["pad"])


def _conv_silu() -> onnx.FunctionProto:
    node = helper.make_node
    nodes = [
        with_attribute(node("Constant", [], ["before_"]), "value_int", "before", AttributeProto.INT),
        node("Constant", [], ["last"], value_ints=[2]),
        node("Constant", [], ["none"], value_ints=[0, 0]),
        node("Constant", [], ["one"], value_ints=[1]),
        node("Constant", [], ["column"], value_ints=[-1]),
        node("Shape", ["w"], ["w_shape"]),
        node("Gather", ["w_shape", "last"], ["taps"]),
        node("Reshape", ["before_", "column"], ["before_1"]),
        node("Sub", ["taps", "one"], ["others"]),
        node("Sub", ["others", "before_1"], ["behind"]),
        node("Concat", ["none", "before_1", "none", "behind"], ["pads"], axis=0),
        node("Pad", ["x", "pads"], ["padded"]),
        with_attribute(node("Conv", ["padded", "w", "bias"], ["sum"]), "group", "group", AttributeProto.INT),
        node("Sigmoid", ["sum"], ["gate"]),
        node("Mul", ["sum", "gate"], ["y"]),
    ]
    return body(CONV_SILU, ["x", "w", "bias"], nodes, ["group", "before"])
