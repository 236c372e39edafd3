"""Half precision as typed ONNX: weights and activations in float16, and float32 where half a range would not do.

What stays in float32, and why:
- the selective scan: its state sums hundreds of steps;
- normalisation statistics (mean and variance overflow or lose bits in float16) and softmax;
- the score's head: a handful of multiplications that carry the last digits of the score;
- the inputs and outputs of every graph, so that graphs of different precision can be combined.
"""

from __future__ import annotations

import warnings

import onnx
from onnx.helper import get_attribute_value

from mdnet_engines import scan_op

STATISTICS = frozenset(
    {
        "InstanceNormalization",
        "GroupNormalization",
        "LayerNormalization",
        "LpNormalization",
        "ReduceMean",
        "ReduceSum",
        "Pow",
        "Sqrt",
        "Reciprocal",
        "Softmax",
    }
)
"""Operators that stay in float32 wherever they stand."""

_RANGE_LIMIT = 65504.0


def to_fp16(proto: onnx.ModelProto, *, keep: frozenset[str] = frozenset()) -> onnx.ModelProto:
    """Give `proto` with float16 weights and activations; inputs and outputs keep their types.

    Args:
        proto: a float32 graph, weights included. It is changed and should not be used afterwards.
        keep: names of further nodes to keep in float32, such as the head's.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    functions = list(proto.functions)
    scans = {node.name for node in proto.graph.node if node.domain == scan_op.DOMAIN}
    del proto.functions[:]  # their bodies compute in float32 by themselves and are left as they are
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each weight below the smallest float16 is announced
        half = convert_float_to_float16(
            proto,
            keep_io_types=True,
            disable_shape_infer=True,
            op_block_list=sorted(STATISTICS | set(DEFAULT_OP_BLOCK_LIST)),
            node_block_list=sorted(scans | keep),
            max_finite_val=_RANGE_LIMIT,
        )
    half.functions.extend(functions)
    return half
