"""The FP8 rewrite of small graphs: what is quantised, by which scale, and what comes out."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mdnet_calib.passes.fp8 import LARGEST, activations, fp8_nodes, to_fp8
from mdnet_calib.passes.fp16 import to_fp16
from mdnet_engines.errors import MDNetError

FLOAT, HALF, E4M3 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.FLOAT8E4M3FN
WIDTH = 32


def graph(weight: np.ndarray) -> onnx.ModelProto:
    """x (n, 32) → two products with the weight, which add up to y: value and weight are both read twice."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="body/first"),
        helper.make_node("MatMul", ["x", "w"], ["b"], name="body/second"),
        helper.make_node("Add", ["a", "b"], ["y"], name="body/sum"),
    ]
    values = [helper.make_tensor_value_info(name, FLOAT, ["n", weight.shape[1]]) for name in ("a", "b", "y")]
    x = helper.make_tensor_value_info("x", FLOAT, ["n", weight.shape[0]])
    made = helper.make_graph(nodes, "g", [x], values[2:], [numpy_helper.from_array(weight, "w")], value_info=values[:2])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def weight(rows: int = WIDTH, columns: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)


def e4m3(values: np.ndarray, scale: float) -> np.ndarray:
    """Rounded to E4M3 by its definition: 4 significant bits down to 2⁻⁶, steps of 2⁻⁹ below, at most 448."""
    scaled = np.clip(np.asarray(values, np.float64) / scale, -448, 448)
    exponent = np.maximum(np.floor(np.log2(np.abs(scaled), where=scaled != 0, out=np.full(scaled.shape, -9.0))), -6)
    step = 2.0 ** (exponent - 3)
    return np.round(scaled / step) * step * scale


def run(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def constants(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in proto.graph.initializer}


def test_inputs_and_weights_are_rounded_to_e4m3_by_their_largest_magnitude() -> None:
    w, x = weight(), np.random.default_rng(1).normal(size=(5, WIDTH)).astype(np.float32)
    largest = float(np.abs(x).max())
    proto = graph(w)
    nodes = fp8_nodes(proto)
    assert activations(proto, nodes) == ["x"]
    made = to_fp8(proto, {"x": largest}, nodes)
    scales = {
        name: float(np.float16(value / LARGEST)) for name, value in (("x", largest), ("w", float(np.abs(w).max())))
    }
    expected = 2 * e4m3(x, scales["x"]) @ e4m3(w, scales["w"])
    np.testing.assert_allclose(run(made, x), expected, rtol=1e-5, atol=1e-5)


def test_a_value_and_a_weight_are_quantised_once_however_often_they_are_read() -> None:
    proto = graph(weight())
    made = to_fp8(proto, {"x": 4.0}, fp8_nodes(proto))
    kinds = [node.op_type for node in made.graph.node]
    assert (kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")) == (1, 2)
    weights = [tensor for tensor in made.graph.initializer if len(tensor.dims) == 2]
    assert [tensor.data_type for tensor in weights] == [E4M3]


def test_a_node_that_is_not_chosen_keeps_its_float_weight() -> None:
    w, x = weight(), np.random.default_rng(1).normal(size=(5, WIDTH)).astype(np.float32)
    made = to_fp8(graph(w), {"x": float(np.abs(x).max())}, ["body/first"])
    assert constants(made)["w"].data_type == FLOAT
    second = next(node for node in made.graph.node if node.name == "body/second")
    assert list(second.input) == ["x", "w"]
    assert 0 < np.abs(run(made, x) - 2 * x @ w).max() < 0.1 * np.abs(x @ w).max()


@pytest.mark.parametrize(
    ("rows", "columns", "wide"), [(32, 32, True), (48, 64, True), (16, 64, False), (40, 64, False)]
)
def test_channels_must_be_many_and_a_multiple_of_16(rows: int, columns: int, wide: bool) -> None:
    """TensorRT has no FP8 kernel for others."""
    assert bool(fp8_nodes(graph(weight(rows, columns)))) is wide


def test_with_float16_around_it_scales_are_float16_and_no_number_changes() -> None:
    x = np.random.default_rng(1).normal(size=(5, WIDTH)).astype(np.float32)
    largest = float(np.abs(x).max())
    before = to_fp8(graph(weight()), {"x": largest}, ["body/first", "body/second"])
    stored = {name: tensor.raw_data for name, tensor in constants(before).items() if tensor.data_type == E4M3}
    expected = run(before, x)
    made = to_fp16(before)
    scales = [constants(made)[node.input[1]] for node in made.graph.node if node.op_type.endswith("quantizeLinear")]
    assert {tensor.data_type for tensor in scales} <= {HALF}
    assert {name: t.raw_data for name, t in constants(made).items() if t.data_type == E4M3} == stored
    np.testing.assert_allclose(run(made, x), expected, atol=2e-2)


def test_a_value_that_is_always_0_has_a_scale_that_float16_can_hold() -> None:
    x = np.zeros((2, WIDTH), np.float32)
    made = to_fp16(to_fp8(graph(weight()), {"x": 0.0}, ["body/first"]))
    assert (run(made, x) == 0).all()
    assert all(numpy_helper.to_array(t) > 0 for name, t in constants(made).items() if name.endswith("_scale_half"))


def test_a_missing_range_is_refused() -> None:
    proto = graph(weight())
    with pytest.raises(MDNetError, match="no calibrated range for x"):
        to_fp8(proto, {}, fp8_nodes(proto))


def test_without_nodes_the_graph_stays_as_it_is() -> None:
    before = graph(weight())
    expected = before.SerializeToString()
    assert to_fp8(before, {}, []).SerializeToString() == expected
