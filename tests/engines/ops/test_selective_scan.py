"""The operators' function body in hosts that have nothing of ours, against the float64 reference."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import AttributeProto, GraphProto, TensorProto
from onnx_evaluator import evaluate
from scan_cases import (
    EVERY_CASE,
    HALF_CASES,
    NUMPY_TYPES,
    PARAMETERS,
    SCAN_CASES,
    ScanCase,
    assert_close,
    make_inputs,
    reference_scan,
)
from scan_model import model, operator_of, run

from mdnet_engines.ops import selective_scan as scan_op

BOTH = (scan_op.FORWARD, scan_op.REVERSE)
SMALL = ScanCase("small", batch=2, channels=3, length=7, states=4, reverse=False)


def stock_session(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """ONNX Runtime as anybody installs it: no custom-op library registered."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def sessions() -> dict[tuple[str, str], onnxruntime.InferenceSession]:
    """One file per operator and type of the activations runs every case: no axis is fixed in it."""
    return {(name, dtype): stock_session(model(name, dtype)) for name in BOTH for dtype in NUMPY_TYPES}


@pytest.mark.parametrize("case", EVERY_CASE, ids=lambda case: case.name)
def test_stock_onnxruntime_runs_the_function_body(case: ScanCase, sessions: dict) -> None:
    inputs = make_inputs(case)
    got = run(sessions[operator_of(case), case.dtype], inputs)
    assert got.dtype == ("float16" if case.dtype == "float16" else "float32")
    assert_close(got, reference_scan(**inputs, reverse=case.reverse), case.dtype)


# onnx's own evaluator has a softplus that overflows above 88: its limit, not the function body's.
GENTLE = [case for case in SCAN_CASES if case.elements <= 10_000 and case.delta_mean <= 0 and case.delta_std == 1]


@pytest.mark.parametrize("case", GENTLE, ids=lambda case: case.name)
def test_onnx_reference_evaluator_runs_the_function_body(case: ScanCase) -> None:
    inputs = make_inputs(case)
    (got,) = evaluate(model(operator_of(case)), inputs)
    assert_close(got, reference_scan(**inputs, reverse=case.reverse))


def test_reverse_scan_equals_flipped_forward(sessions: dict) -> None:
    inputs = make_inputs(SMALL)
    flipped = {n: x if n in PARAMETERS else np.ascontiguousarray(x[:, :, ::-1]) for n, x in inputs.items()}
    (forward,) = sessions[scan_op.FORWARD, "float32"].run(None, flipped)
    (reverse,) = sessions[scan_op.REVERSE, "float32"].run(None, inputs)
    np.testing.assert_array_equal(reverse, forward[:, :, ::-1])  # the same operations in the same order


@pytest.mark.parametrize("name", BOTH)
def test_one_file_runs_at_every_batch_size(name: str) -> None:
    """Only the batch is symbolic, as in the exported graphs; each image's result is its own."""
    session = stock_session(model(name, sizes={"channels": 3, "length": 7, "states": 4}))
    inputs = make_inputs(ScanCase("batch", batch=5, channels=3, length=7, states=4, reverse=name == scan_op.REVERSE))
    (whole,) = session.run(None, inputs)
    for size in (1, 2, 3):
        part = {n: x if n in PARAMETERS else x[:size] for n, x in inputs.items()}
        np.testing.assert_allclose(session.run(None, part)[0], whole[:size], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", [SMALL, HALF_CASES[0]], ids=["float32", "float16"])
@pytest.mark.parametrize("name", BOTH)
def test_full_check_passes_with_the_schemas_registered(case: ScanCase, name: str) -> None:
    scan_op.register_schemas()
    onnx.checker.check_model(model(name, case.dtype), full_check=True)


@pytest.mark.parametrize("name", BOTH)
def test_shapes_are_inferred_through_the_function_body(name: str) -> None:
    inferred = onnx.shape_inference.infer_shapes(
        model(name, sizes={"batch": 2, "channels": 3, "length": 7, "states": 4}), check_type=True, strict_mode=True
    )
    assert [axis.dim_value for axis in inferred.graph.output[0].type.tensor_type.shape.dim] == [2, 3, 7]


def test_registering_the_schemas_twice_is_harmless() -> None:
    scan_op.register_schemas()
    scan_op.register_schemas()
    for name in BOTH:
        schema = onnx.defs.get_schema(name, scan_op.DOMAIN)
        assert tuple(formal.name for formal in schema.inputs) == scan_op.INPUTS
        assert schema.since_version == scan_op.VERSION


@pytest.mark.parametrize("change", ["type", "count"])
def test_the_schema_refuses_wrong_inputs(change: str) -> None:
    scan_op.register_schemas()
    proto = model(scan_op.FORWARD)
    if change == "type":
        proto.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    else:
        del proto.graph.node[0].input[-1]
    with pytest.raises((onnx.checker.ValidationError, onnx.shape_inference.InferenceError)):
        onnx.checker.check_model(proto, full_check=True)


def subgraphs(nodes: Iterable[onnx.NodeProto]) -> Iterable[GraphProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield attribute.g
                yield from subgraphs(attribute.g.node)


@pytest.mark.parametrize("name", BOTH)
def test_the_scan_body_holds_no_constants(name: str) -> None:
    """TensorRT's parser takes a body's constants only as values of the outer graph."""
    bodies = list(subgraphs(scan_op.function(name).node))
    assert len(bodies) == 1
    for body in bodies:
        assert not body.initializer
        assert not body.sparse_initializer
        assert "Constant" not in {node.op_type for node in body.node}


@pytest.mark.parametrize("name", BOTH)
def test_operator_and_body_need_nothing_but_standard_operators(name: str) -> None:
    function = scan_op.function(name)
    nodes = [*function.node, *(node for body in subgraphs(function.node) for node in body.node)]
    assert {node.domain for node in nodes} == {""}
    assert [(opset.domain, opset.version) for opset in function.opset_import] == [("", scan_op.OPSET)]
    assert not function.attribute  # an ahead-of-time TensorRT plugin can't carry any
    assert not function.attribute_proto
