"""The selective scan on its way into an ONNX file, for any model that uses `mdnet.scan.selective_scan`.

    program = torch.onnx.export(model, args, dynamo=True, custom_translation_table=translation_table())
    proto = attach_functions(program.model_proto)

docs/selective-scan.md walks through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import onnx
import onnxscript
import torch
from onnxscript import opset18 as op

import mdnet.scan  # noqa: F401 # registers the operator that the table is about
from mdnet_engines.errors import MDNetError
from mdnet_engines.ops import selective_scan as scan_op
from mdnet_engines.tensorrt.plugin import PARSER_ATTRIBUTES

_FLOAT, _DOUBLE = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `torch.onnx.export(custom_translation_table=…)`: each scan becomes one node of the domain `mdnet`.

    A, D and delta_bias become float32, as every host wants them; so do the activations where they differ in type. The
    export of a float64 model raises `MDNetError`: no host has float64.
    """
    scan_op.register_schemas()
    return {torch.ops.mdnet.selective_scan.default: _translate}


def attach_functions(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Add, in place, the function body of every scan operator in the model; the file then runs anywhere."""
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    used = {node.op_type for node in _with_inner(nodes) if node.domain == scan_op.DOMAIN}
    there = {function.name for function in proto.functions if function.domain == scan_op.DOMAIN}
    proto.functions.extend(scan_op.function(name) for name in sorted(used - there))
    return proto


def _with_inner(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes, and those of the graphs that they hold (`If`, `Loop`)."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _with_inner(graph.node)


def _translate(u, delta, A, B, C, D, z, delta_bias, reverse=False):  # type: ignore[no-untyped-def]
    if any(value.dtype == _DOUBLE for value in (u, delta, A, B, C, D, z, delta_bias)):
        raise MDNetError("the selective scan can't be exported in float64; export the model in float32: model.float()")
    mixed = len({value.dtype for value in (u, delta, B, C, z)}) > 1
    activations = [_float(value) if mixed else value for value in (u, delta, B, C, z)]
    u_, delta, B, C, z = activations
    A, D, delta_bias = (_float(value) for value in (A, D, delta_bias))
    operators = onnxscript.values.Opset(scan_op.DOMAIN, scan_op.VERSION)
    scan = operators.SelectiveScanReverse if reverse else operators.SelectiveScan
    y = scan(u_, delta, A, B, C, D, z, delta_bias, **PARSER_ATTRIBUTES)
    return op.CastLike(y, u) if mixed else y


def _float(value):  # type: ignore[no-untyped-def]
    return value if value.dtype == _FLOAT else op.Cast(value, to=_FLOAT)
