"""The selective scan on its way into an ONNX file, for any model that uses `mdnet.scan.selective_scan`.

    program = torch.onnx.export(model, args, dynamo=True, custom_translation_table=translation_table())
    proto = attach_functions(program.model_proto)

docs/selective-scan.md walks through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnxscript
import torch

import mdnet.scan  # noqa: F401 # registers the operator that the table is about
from mdnet_engines import scan_op
from mdnet_engines.tensorrt_plugin import PARSER_ATTRIBUTES


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `torch.onnx.export(custom_translation_table=…)`: each scan becomes one node of the domain `mdnet`."""
    scan_op.register_schemas()
    return {torch.ops.mdnet.selective_scan.default: _translate}


def attach_functions(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Add, in place, the function body of every scan operator that the graph uses; the file then runs anywhere."""
    used = {node.op_type for node in proto.graph.node if node.domain == scan_op.DOMAIN}
    there = {function.name for function in proto.functions if function.domain == scan_op.DOMAIN}
    proto.functions.extend(scan_op.function(name) for name in sorted(used - there))
    return proto


def _translate(u, delta, A, B, C, D, z, delta_bias, reverse=False):  # type: ignore[no-untyped-def]
    operators = onnxscript.values.Opset(scan_op.DOMAIN, scan_op.VERSION)
    op = operators.SelectiveScanReverse if reverse else operators.SelectiveScan
    return op(u, delta, A, B, C, D, z, delta_bias, **PARSER_ATTRIBUTES)
