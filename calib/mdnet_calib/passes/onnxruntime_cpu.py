"""The variant of an int8 bundle's graphs that ONNX Runtime's CPU kernels, and ours, are fast for."""

from __future__ import annotations

import functools

import onnx

from mdnet_calib.passes.bfloat16 import with_bfloat16_products
from mdnet_calib.passes.fuse import fuse_between_layers
from mdnet_calib.passes.fuse_vim import fuse_vim
from mdnet_calib.passes.int8 import with_unsigned_activations
from mdnet_calib.passes.winograd import with_winograd_convolutions

PASSES = (
    with_unsigned_activations,
    fuse_between_layers,
    with_winograd_convolutions,
    fuse_vim,
    with_bfloat16_products,
)
"""Graph → graph, in this order; none changes the graph it is given."""


def for_onnxruntime_cpu(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The variant of a graph, int8 or float32; constants may lie outside of the file, and none of them changes."""
    return functools.reduce(lambda graph, rewrite: rewrite(graph), PASSES, proto)
