"""Each scan of a model as one ONNX node, and the function bodies of these nodes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import onnxscript
import torch
from onnxscript import opset18 as op

import mdnet.scan.function  # its package registers the operators that the table is about
from mdnet_engines.cuda.kernel import MAX_STATES
from mdnet_engines.errors import MDNetError
from mdnet_engines.ops import scan_v2
from mdnet_engines.ops import selective_scan as scan_op
from mdnet_engines.tensorrt.plugin import PARSER_ATTRIBUTES

_FLOAT, _DOUBLE = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
_ACTIVATIONS = ("u", "delta", "B", "C", "z")


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `torch.onnx.export(custom_translation_table=…)`: each scan becomes one node of the domain `mdnet`.

    A, D and delta_bias become float32, as every host wants them; so do the activations where they differ in type. The
    export of a float64 model raises `MDNetError`: no host has float64.
    """
    mdnet.scan.function.translated = True
    scan_op.register_schemas()
    scan_v2.register_schemas()
    return {
        torch.ops.mdnet.selective_scan.default: _translate,
        torch.ops.mdnet.selective_scan_v2.default: _translate_v2,
    }


def attach_functions(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Add, in place, the function body of every scan operator in the model; the file then runs anywhere."""
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    used = {node.op_type for node in _with_inner(nodes) if node.domain == scan_op.DOMAIN}
    there = {function.name for function in proto.functions if function.domain == scan_op.DOMAIN}
    proto.functions.extend(function_body(name) for name in sorted(used - there))
    return proto


def function_body(name: str) -> onnx.FunctionProto:
    """The function body of a scan operator of either version."""
    return scan_v2.VARIANTS[name].function() if name in scan_v2.VARIANTS else scan_op.function(name)


def _with_inner(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes, and those of the graphs that they hold (`If`, `Loop`)."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _with_inner(graph.node)


def _translate(u, delta, A, B, C, D, z, delta_bias, reverse=False):  # type: ignore[no-untyped-def]
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    inputs, mixed = _typed(given)
    operators = onnxscript.values.Opset(scan_op.DOMAIN, scan_op.VERSION)
    scan = operators.SelectiveScanReverse if reverse else operators.SelectiveScan
    y = scan(*inputs.values(), **PARSER_ATTRIBUTES)
    return op.CastLike(y, u) if mixed else y


def _translate_v2(  # type: ignore[no-untyped-def]
    u, delta, A, B, C, D, z, delta_bias, h0, reverse, delta_softplus, return_last_state
):
    state = return_last_state or h0 is not None
    variant = scan_v2.Variant(reverse, z is not None, delta_softplus, state)
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias, "h0": h0}
    inputs, mixed = _typed({name: value for name, value in given.items() if value is not None})
    for name in ("D", "delta_bias"):
        if name not in inputs:
            inputs[name] = _zeros(op.Shape(A, start=0, end=1))
    if state and h0 is None:
        inputs["h0"] = _zeros(op.Concat(op.Shape(u, start=0, end=1), op.Shape(A), axis=0))
    scan = getattr(onnxscript.values.Opset(scan_op.DOMAIN, scan_op.VERSION), variant.name)
    # The plugins refuse more states, and those whose number is not known; the function body takes them.
    states = A.shape[1] if A.shape is not None else None
    attributes = PARSER_ATTRIBUTES if isinstance(states, int) and states <= MAX_STATES else {}
    outputs = scan(*(inputs[name] for name in variant.inputs), **attributes)
    # The PyTorch operator always has two results: the second is empty where nobody asks for it.
    y, h_last = outputs if state else (outputs, _zeros(op.Constant(value_ints=[0])))
    return op.CastLike(y, u) if mixed else y, h_last


def _typed(given: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The inputs in the types that the operators take; and whether the activations, now float32, had several."""
    if any(value.dtype == _DOUBLE for value in given.values()):
        raise MDNetError("the selective scan can't be exported in float64; export the model in float32: model.float()")
    mixed = len({value.dtype for name, value in given.items() if name in _ACTIVATIONS}) > 1
    return {
        name: value if name in _ACTIVATIONS and not mixed else _float(value) for name, value in given.items()
    }, mixed


def _zeros(shape: Any) -> Any:
    return op.ConstantOfShape(shape)


def _float(value):  # type: ignore[no-untyped-def]
    return value if value.dtype == _FLOAT else op.Cast(value, to=_FLOAT)


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """The exporter warns about its own internals; a failure still raises."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
