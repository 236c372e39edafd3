"""The float16 rewrite: which nodes stay in float32, where casts go, and that the numbers hold."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from mdnet_calib.passes.fp16 import QDQ_OPSET, near_overflow, to_fp16
from mdnet_calib.passes.int8 import int8_nodes, to_int8
from mdnet_engines.errors import MDNetError

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


def model(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], values: tuple[str, ...]) -> onnx.ModelProto:
    """x (n, 4) → y (n, 4) through `nodes`, with `values` the names in between."""

    def info(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, FLOAT, ["n", None])

    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", [info("x")], [info("y")], initializers, value_info=[info(v) for v in values])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def types(proto: onnx.ModelProto) -> dict[str, int]:
    """Every value's type, by strict inference, which also refuses a graph whose types don't fit."""
    onnx.checker.check_model(proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    values = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    return values | {tensor.name: tensor.data_type for tensor in inferred.initializer}


def casts(proto: onnx.ModelProto) -> int:
    return sum(node.op_type == "Cast" for node in proto.graph.node)


def run(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


W = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)


def test_matmul_runs_in_half_between_float_ends() -> None:
    proto = to_fp16(model([helper.make_node("MatMul", ["x", "w"], ["y"], name="m")], {"w": W}, ()))
    found = types(proto)
    (matmul,) = (node for node in proto.graph.node if node.op_type == "MatMul")
    assert [found[name] for name in (*matmul.input, *matmul.output)] == [HALF] * 3
    assert found["y"] == FLOAT
    assert casts(proto) == 2
    np.testing.assert_allclose(run(proto, X), X @ W, atol=2e-3 * np.abs(X @ W).max())


def test_softmax_stays_in_float_and_casts_are_shared() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="m"),
        helper.make_node("Softmax", ["a"], ["b"], name="s1"),
        helper.make_node("Softmax", ["a"], ["c"], name="s2", axis=0),
        helper.make_node("Add", ["b", "c"], ["y"], name="add"),
    ]
    proto = to_fp16(model(nodes, {"w": W}, ("a", "b", "c")))
    found = types(proto)
    softmaxes = [node for node in proto.graph.node if node.op_type == "Softmax"]
    assert all(found[name] == FLOAT for node in softmaxes for name in (*node.input, *node.output))
    assert softmaxes[0].input[0] == softmaxes[1].input[0]  # one cast for both
    assert casts(proto) == 5  # x, a, b, c and y


def rms_norm(prefix: str, x: str, y: str) -> list[onnx.NodeProto]:
    steps = [
        ("Pow", [x, "two"], "square"),
        ("ReduceMean", ["square", "last"], "mean"),
        ("Add", ["mean", "eps"], "shifted"),
        ("Sqrt", ["shifted"], "root"),
        ("Reciprocal", ["root"], "inverse"),
        ("Mul", [x, "inverse"], "normed"),
    ]
    local = {name for _, _, name in steps}
    rename = {name: f"{prefix}{name}" for name in local}
    nodes = [
        helper.make_node(kind, [rename.get(name, name) for name in inputs], [rename[out]], name=rename[out])
        for kind, inputs, out in steps
    ]
    return [*nodes, helper.make_node("MatMul", [f"{prefix}normed", "w"], [y], name=f"{prefix}proj")]


def test_rms_norm_and_its_residual_stream_stay_in_float() -> None:
    """The stream is far above float16's range; only the normalised values may be rounded."""
    nodes = [
        *rms_norm("a_", "x", "first"),
        helper.make_node("Add", ["x", "first"], ["stream"], name="residual"),
        *rms_norm("b_", "stream", "y"),
    ]
    inner = tuple(output for node in nodes for output in node.output if output != "y")
    constants = {"two": np.array(2, np.float32), "eps": np.array(1e-5, np.float32), "last": np.array([-1])}
    build = model(nodes, {"w": W, **constants}, inner)
    x = X * 1e6
    expected = run(build, x)
    proto = to_fp16(build)
    found = types(proto)
    float_values = {"stream", "a_square", "a_mean", "a_shifted", "a_root", "a_inverse", "a_normed", "b_normed"}
    assert all(found[name] == FLOAT for name in float_values)
    assert sum(found[n.input[1]] == HALF for n in proto.graph.node if n.op_type == "MatMul") == 2
    np.testing.assert_allclose(run(proto, x), expected, atol=4e-3 * np.abs(expected).max())


def test_named_nodes_stay_in_float() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="body/m"),
        helper.make_node("MatMul", ["a", "w"], ["y"], name="head.out/m"),
    ]
    proto = to_fp16(model(nodes, {"w": W}, ("a",)), keep=("head.",))
    found = types(proto)
    matmuls = {node.name: node for node in proto.graph.node if node.op_type == "MatMul"}
    assert found[matmuls["body/m"].input[1]] == HALF
    assert found[matmuls["head.out/m"].input[1]] == FLOAT  # one weight, in both types


def test_what_the_scan_reads_per_state_is_not_cast_after_its_split() -> None:
    """TensorRT-RTX 1.7.1 can't build the scan's function body where a cast stands between the Split and the scan."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["mixed"], name="m"),
        helper.make_node("Split", ["mixed"], ["dt", "rest"], name="split", num_outputs=2, axis=1),
        helper.make_node(
            "SelectiveScan", ["x", "x", "w", "dt", "rest", "w", "x", "w"], ["y"], domain="mdnet", name="s"
        ),
    ]
    proto = to_fp16(model(nodes, {"w": W}, ("mixed", "dt", "rest")))
    split, scan = (next(n for n in proto.graph.node if n.op_type == kind) for kind in ("Split", "SelectiveScan"))
    assert list(scan.input[3:5]) == list(split.output)
    assert split.input[0] == "mixed_float"


def test_weights_out_of_range_are_clipped_not_infinite() -> None:
    big = np.full((4, 4), -3e38, np.float32)
    proto = to_fp16(model([helper.make_node("Add", ["x", "w"], ["y"], name="mask")], {"w": big}, ()))
    (weight,) = proto.graph.initializer
    assert (numpy_helper.to_array(weight) == np.finfo(np.float16).min).all()


def test_integer_images_are_cast_to_half_at_once() -> None:
    image = helper.make_tensor_value_info("x", TensorProto.UINT8, ["n", 4])
    y = helper.make_tensor_value_info("y", FLOAT, ["n", 4])
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], name="c", to=FLOAT),
        helper.make_node("MatMul", ["a", "w"], ["y"], name="m"),
    ]
    values = [helper.make_tensor_value_info("a", FLOAT, ["n", 4])]
    graph = helper.make_graph(nodes, "g", [image], [y], [numpy_helper.from_array(W, "w")], value_info=values)
    proto = to_fp16(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))
    assert types(proto)["a"] == HALF
    assert casts(proto) == 2


def test_what_can_not_be_rewritten_is_said() -> None:
    with pytest.raises(MDNetError, match="value a has no type"):
        to_fp16(
            model(
                [
                    helper.make_node("MatMul", ["x", "w"], ["a"], name="m"),
                    helper.make_node("MatMul", ["a", "w"], ["y"], name="n"),
                ],
                {"w": W},
                (),
            )
        )
    branch = helper.make_graph([helper.make_node("Identity", ["x"], ["b"])], "b", [], [])
    body = helper.make_node("If", ["x"], ["y"], name="if", then_branch=branch, else_branch=branch)
    with pytest.raises(MDNetError, match="holds a graph of its own"):
        to_fp16(model([body], {}, ()))


# --- what comes near to float16's largest number ---


def two_products(first: float, second: float) -> onnx.ModelProto:
    """x (n, 4) → a = first·x → y = second·a, as products with a diagonal weight; a is read twice."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="body/m"),
        helper.make_node("MatMul", ["a", "w2"], ["b"], name="body/n"),
        helper.make_node("Mul", ["a", "small"], ["c"], name="body/scale"),
        helper.make_node("Add", ["b", "c"], ["y"], name="body/sum"),
    ]
    eye = np.eye(4, dtype=np.float32)
    weights: dict[str, np.ndarray] = {"w1": first * eye, "w2": second * eye, "small": np.array(second, np.float32)}
    return model(nodes, weights, ("a", "b", "c"))


def in_half(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """By NumPy, which rounds each value where the graph says float16; ONNX Runtime's CPU skips it between products."""
    with np.errstate(over="ignore", invalid="ignore"):
        return ReferenceEvaluator(proto).run(None, {"x": x})[0]


def ones(largest: float = 1.0) -> dict[str, np.ndarray]:
    return {"x": np.array([[1, -largest, 0.5, 0]], np.float32)}


def test_a_value_near_the_largest_float16_is_found() -> None:
    """A quarter of 65504 is 16376; the sign does not matter, nor which image it came from."""
    assert near_overflow(two_products(16300, 1e-4), [ones()]) == []
    assert near_overflow(two_products(16400, 1e-4), [ones()]) == ["a"]
    assert near_overflow(two_products(10000, 1e-4), [ones(), ones(3.0), ones()]) == ["a"]


def test_a_value_that_is_float32_anyway_is_not_named() -> None:
    assert near_overflow(two_products(30000, 1e-4), [ones()], keep=("body/",)) == []
    assert near_overflow(two_products(30000, 1e-4), [ones()], keep=("body/m",)) == ["a"]  # its readers would cast it


def test_an_input_of_the_graph_is_looked_at_too() -> None:
    """The encoder's features are inputs of the fusion graph."""
    assert near_overflow(two_products(1e-4, 1.0), [ones(30000)]) == ["x"]


def test_a_value_that_is_infinite_in_float32_is_said() -> None:
    with pytest.raises(MDNetError, match=r"^a is not finite on a calibration image, in float32 already$"):
        near_overflow(two_products(3e38, 1e-4), [ones(10)])


def test_a_large_value_stays_in_float_where_it_is_made_and_read() -> None:
    """At 30000 on a calibration image, at 90000 on another: float16 has no number for that."""
    build = two_products(30000, 1e-4)
    large = near_overflow(build, [ones()])
    x = ones(3.0)["x"]
    expected = run(build, x)
    proto = to_fp16(build, float32_values=large)
    found = types(proto) | {"x": FLOAT}
    around = [node for node in proto.graph.node if "a" in (*node.input, *node.output)]
    assert [node.name for node in around] == ["body/m", "body/n", "body/scale"]  # and no cast
    assert all(found[name] == FLOAT for node in around for name in (*node.input, *node.output))
    (total,) = (node for node in proto.graph.node if node.op_type == "Add")
    assert all(found[name] == HALF for name in (*total.input, *total.output))
    assert not np.isfinite(in_half(to_fp16(two_products(30000, 1e-4)), x)).all()
    for got in (run(proto, x), in_half(proto, x)):
        np.testing.assert_allclose(got, expected, rtol=2e-3)  # b, c and y are rounded to 11 bits


def test_an_output_of_the_graph_can_be_kept_in_float() -> None:
    build = two_products(30000, 1.0)
    large = near_overflow(build, [ones()])
    assert large == ["a", "b", "c", "y"]
    x = ones(3.0)["x"]
    expected = run(build, x)
    np.testing.assert_allclose(run(to_fp16(build, float32_values=large), x), expected, rtol=1e-6)


# --- quantised graphs ---


def quantised_product(range_of_x: float = 4.0, weight: float = 1.0) -> onnx.ModelProto:
    """x (n, 32) → m = x·w → y = m / 2, m in int8 with a range for each of x and m."""
    w = weight * np.random.default_rng(2).normal(size=(32, 32)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="body/m"),
        helper.make_node("Mul", ["m", "half"], ["y"], name="body/scale"),
    ]
    proto = model(nodes, {"w": w, "half": np.array(0.5, np.float32)}, ("m",))
    return to_int8(proto, {"x": range_of_x, "m": 20.0 * weight}, int8_nodes(proto))


def test_scales_become_half_and_int8_weights_stay() -> None:
    """All on the float side of Q/DQ is float16, which the scales must be too for TensorRT; the numbers stay."""
    before = quantised_product()
    weights = {tensor.name: tensor.raw_data for tensor in before.graph.initializer if len(tensor.dims) == 2}
    x = np.random.default_rng(3).normal(size=(3, 32)).astype(np.float32)
    expected = run(before, x)
    proto = to_fp16(before)
    found = types(proto)
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            assert [found[name] for name in (node.input[0], node.input[1])] == [HALF, HALF]
        if node.op_type == "DequantizeLinear":
            assert [found[name] for name in (node.input[1], node.output[0])] == [HALF, HALF]
    stored = {tensor.name: tensor for tensor in proto.graph.initializer if len(tensor.dims) == 2}
    assert {name: tensor.raw_data for name, tensor in stored.items()} == weights
    assert {tensor.data_type for tensor in stored.values()} == {onnx.TensorProto.INT8}
    assert [opset.version for opset in proto.opset_import if not opset.domain] == [QDQ_OPSET]
    step = 20.0 / 127 / 2  # of y: a value that lies between two may go to either
    np.testing.assert_allclose(run(proto, x), expected, atol=1.01 * step)


def test_a_graph_without_quantisers_keeps_its_opset() -> None:
    proto = to_fp16(model([helper.make_node("MatMul", ["x", "w"], ["y"], name="m")], {"w": W}, ()))
    assert [opset.version for opset in proto.opset_import] == [18]


def test_scales_that_half_would_round_away_keep_their_layer_in_float() -> None:
    """A weight of 1e-6 has a scale of 1e-8, which float16 would make 0, and the product with it."""
    before = quantised_product(weight=1e-6)
    x = np.random.default_rng(3).normal(size=(3, 32)).astype(np.float32)
    expected = run(before, x)
    assert np.ptp(expected) > 0
    proto = to_fp16(before)
    found = types(proto) | {"x": FLOAT}
    (product,) = (node for node in proto.graph.node if node.op_type == "MatMul")
    assert {found[name] for name in (*product.input, *product.output)} == {FLOAT}
    np.testing.assert_allclose(run(proto, x), expected, atol=1.01 * 20e-6 / 127 / 2)


def test_what_is_too_large_for_half_is_so_behind_its_quantiser() -> None:
    before = quantised_product(range_of_x=90000.0)
    proto = to_fp16(before, float32_values=["x"])
    found = types(proto) | {"x": FLOAT}
    (product,) = (node for node in proto.graph.node if node.op_type == "MatMul")
    pair = [node for node in proto.graph.node if node.name.startswith("x_")]
    assert [node.op_type for node in pair] == ["QuantizeLinear", "DequantizeLinear"]
    assert found[product.input[0]] == FLOAT
    assert all(found[node.input[1]] == FLOAT for node in pair)
