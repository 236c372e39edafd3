"""Which convolutions of a uint8 graph become Winograd's, and that the graph computes the same."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mdnet_calib.passes import winograd
from mdnet_calib.passes.fuse import fuse_between_layers
from mdnet_calib.passes.int8 import activations, int8_nodes, to_int8, with_unsigned_activations
from mdnet_calib.passes.winograd import with_winograd_convolutions
from mdnet_engines.ops import native
from mdnet_engines.ops.selective_scan import DOMAIN
from mdnet_engines.ops.winograd import NAMES

CHANNELS, SIZE = 32, 12
X = np.random.default_rng(0).normal(size=(2, CHANNELS, SIZE, SIZE)).astype(np.float32)
EITHER = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(native.custom_op_library() is None, reason="no native library")),
]


def conv(x: str, y: str, *, w: str = "w", **changes: object) -> NodeProto:
    return helper.make_node("Conv", [x, w, "bias"], [y], name=f"conv_{y}", **{"pads": [1] * 4, **changes})


def net(nodes: list[NodeProto], outputs: list[str]) -> onnx.ModelProto:
    """A uint8 graph of such convolutions and sums, as it is behind `fuse_between_layers`."""
    random = np.random.default_rng(1)
    constants = {
        "w": random.normal(size=(CHANNELS, CHANNELS, 3, 3)) / 17,
        "narrow": random.normal(size=(CHANNELS, CHANNELS, 1, 1)) / 6,
        "grouped": random.normal(size=(CHANNELS, CHANNELS // 32, 3, 3)) / 3,
        "bias": random.normal(size=CHANNELS),
    }
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", CHANNELS, SIZE, SIZE])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in outputs],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in constants.items() if n in used],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    chosen = int8_nodes(proto)
    ranges = dict.fromkeys(activations(proto, chosen), 5.0)
    return fuse_between_layers(with_unsigned_activations(to_int8(proto, ranges, chosen)))


def run(proto: onnx.ModelProto, *, registered: bool = False) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if registered:
        options.register_custom_ops_library(str(native.custom_op_library()))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})


def rewritten(proto: onnx.ModelProto, *, registered: bool = False) -> list[str]:
    """The operators that the rewrite makes; the graph computes the same, but for bytes that are a step off."""
    made = with_winograd_convolutions(proto)
    onnx.checker.check_model(made, full_check=True)
    for got, expected in zip(run(made, registered=registered), run(proto), strict=True):
        assert np.linalg.norm(got - expected) <= 0.03 * np.linalg.norm(expected)
    written = {name for node in made.graph.node for name in node.output}
    read = {name for node in made.graph.node for name in node.input} | {value.name for value in made.graph.output}
    assert written <= read
    assert {tensor.name for tensor in made.graph.initializer} <= read
    return sorted(node.op_type for node in made.graph.node if node.op_type in NAMES)


def block(a: str) -> list[NodeProto]:
    """Two convolutions, to which `a` is added."""
    return [conv("x", "first"), conv("first", "b"), helper.make_node("Add", [a, "b"], ["sum"], name="sum")]


@pytest.mark.parametrize("registered", EITHER)
def test_a_convolution_between_bytes_becomes_one_node(registered: bool) -> None:
    made = rewritten(net([conv("x", "first"), conv("first", "y")], ["y"]), registered=registered)
    assert made == ["WinogradConvQuantize"] * 2


@pytest.mark.parametrize("registered", EITHER)
@pytest.mark.parametrize(
    ("nodes", "operator"),
    [
        (block("floats"), "WinogradConvSum"),
        ([*block("floats"), conv("sum", "y", strides=[2, 2])], "WinogradConvSumQuantize"),
        ([*block("shortcut"), conv("x", "shortcut", w="narrow", pads=[0] * 4)], "WinogradConvQLinearSum"),
        (
            [
                *block("shortcut"),
                conv("x", "shortcut", w="narrow", pads=[0] * 4),
                conv("sum", "y", strides=[2, 2]),
            ],
            "WinogradConvQLinearSumQuantize",
        ),
    ],
)
def test_a_residual_sum_is_taken_in(nodes: list[NodeProto], operator: str, registered: bool) -> None:
    """Whether what is added is in bytes, and whether the sum is quantised."""
    floats = helper.make_node("Relu", ["x"], ["floats"], name="floats")
    order = ("floats", "conv_shortcut", "conv_first", "conv_b", "sum", "conv_y")
    used = [node for node in (*nodes, floats) if node is not floats or nodes[2].input[0] == "floats"]
    proto = net(sorted(used, key=lambda node: order.index(node.name)), ["y" if "Quantize" in operator else "sum"])
    assert rewritten(proto, registered=registered) == sorted(["WinogradConvQuantize", operator])


def test_a_sum_beside_another_reader_of_the_convolution_stays() -> None:
    floats = helper.make_node("Relu", ["x"], ["floats"], name="floats")
    proto = net([floats, *block("floats"), conv("b", "y", strides=[2, 2])], ["sum", "y"])
    made = with_winograd_convolutions(proto)
    assert sorted(n.op_type for n in made.graph.node if n.domain == DOMAIN) == [
        "ResidualSum",
        "WinogradConvQuantize",
        "WinogradConvQuantize",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"strides": [2, 2]},
        {"dilations": [2, 2], "pads": [2] * 4},
        {"dilations": [2, 2]},
        {"pads": [0] * 4},
        {"pads": [0, 0, 1, 1]},
        {"w": "narrow", "pads": [0] * 4},
        {"w": "narrow"},
    ],
)
def test_another_convolution_stays(changes: dict[str, object]) -> None:
    assert rewritten(net([conv("x", "y", **changes)], ["y"])) == []  # type: ignore[arg-type]


def test_a_convolution_without_a_bias_stays() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv_y", pads=[1] * 4)
    assert rewritten(net([node], ["y"])) == []


def test_a_convolution_in_float_stays() -> None:
    assert rewritten(net([conv("x", "y", w="grouped", group=32)], ["y"])) == []


def test_wide_layers_of_few_places_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    proto = net([conv("x", "first"), conv("first", "y")], ["y"])
    weights = CHANNELS * CHANNELS * 9 / SIZE**2
    monkeypatch.setattr(winograd, "MOST_WEIGHTS", weights)
    assert len(rewritten(proto)) == 2
    monkeypatch.setattr(winograd, "MOST_WEIGHTS", weights - 0.1)
    assert rewritten(proto) == []


def test_weights_stay_bytes_where_they_would_take_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    proto = net([conv("x", "y")], ["y"])
    weights = CHANNELS * CHANNELS * 9 / SIZE**2
    kept = []
    for most in (weights, weights - 0.1):
        monkeypatch.setattr(winograd, "MOST_TRANSFORMED", most)
        nodes = with_winograd_convolutions(proto).graph.node
        kept += [node.attribute[0].i for node in nodes if node.op_type == "WinogradConvQuantize"]
    assert kept == [0, 1]


def test_the_graph_that_was_given_does_not_change() -> None:
    proto = net([conv("x", "y")], ["y"])
    before = proto.SerializeToString(deterministic=True)
    twice = functools.reduce(lambda graph, _: with_winograd_convolutions(graph), range(2), proto)
    assert proto.SerializeToString(deterministic=True) == before
    assert [function.name for function in twice.functions] == ["WinogradConvQuantize"]
