"""The variant of a bundle's graphs that ONNX Runtime's CPU kernels, and ours, are fast for."""

from __future__ import annotations

import functools

import onnx

from mdnet_calib.passes.bfloat16 import with_bfloat16_products
from mdnet_calib.passes.fuse import fuse_between_layers
from mdnet_calib.passes.fuse_resnet import fuse_resnets
from mdnet_calib.passes.fuse_vim import fuse_vim
from mdnet_calib.passes.int8 import with_unsigned_activations
from mdnet_calib.passes.winograd import with_winograd_convolutions

EXACT_PASSES = (with_unsigned_activations, fuse_between_layers, fuse_resnets, fuse_vim)
"""Graph → graph, in this order; none changes the graph it is given, nor the precision of its arithmetic."""
PASSES = (*EXACT_PASSES, with_winograd_convolutions, with_bfloat16_products)
"""Those of a graph that may lose precision."""


def for_onnxruntime_cpu(proto: onnx.ModelProto, *, exact: bool = False) -> onnx.ModelProto:
    """The variant of a graph, int8 or float32; constants may lie outside of the file, and none of them changes.

    Args:
        exact: whether float32 arithmetic stays so; else convolutions and wide products may be in bfloat16.
    """
    return functools.reduce(lambda graph, rewrite: rewrite(graph), EXACT_PASSES if exact else PASSES, proto)
