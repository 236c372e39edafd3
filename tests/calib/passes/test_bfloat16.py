"""Which products and which attention are computed in bfloat16, which are left, and that the graph computes the same.

The plainest cases are in test_onnxruntime_cpu.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mdnet_calib.passes.bfloat16 import MIN_WIDTH, with_bfloat16_products
from mdnet_engines.ops import native
from mdnet_engines.ops.product import ATTENTION, PRODUCTS
from mdnet_engines.ops.selective_scan import DOMAIN, VERSION

RANDOM = np.random.default_rng(0)
W = MIN_WIDTH
PLAIN, TURNED_A, TURNED_B = PRODUCTS.values()
# Of the norm, for each operator. Each input is rounded by 2⁻⁹ at most; attention has four, one behind another.
TOLERANCE = 2.0**-7
EITHER = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(native.custom_op_library() is None, reason="no native library")),
]


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def product(a: str, b: str, y: str = "y") -> NodeProto:
    return helper.make_node("MatMul", [a, b], [y], name=f"product_{y}")


def turn(x: str, y: str, *perm: int) -> NodeProto:
    return helper.make_node("Transpose", [x], [y], name=f"turn_{y}", **({"perm": perm} if perm else {}))


def softmax(axis: int | None = -1, x: str = "scores", y: str = "p") -> NodeProto:
    return helper.make_node("Softmax", [x], [y], name=f"softmax_{y}", **({} if axis is None else {"axis": axis}))


@dataclass(frozen=True)
class Net:
    """A graph, and the operators of ours that it is to have."""

    nodes: Sequence[NodeProto]
    inputs: dict[str, np.ndarray]
    constants: dict[str, np.ndarray]
    ours: Sequence[str] = ()
    outputs: Sequence[str] = ("y",)
    also_inputs: Sequence[str] = ()
    """Constants that a caller may replace."""
    turns: int = 0
    """Transposes that are left."""
    kind: int = TensorProto.FLOAT
    """Of the outputs."""

    def proto(self) -> onnx.ModelProto:
        values = {**self.inputs, **{name: self.constants[name] for name in self.also_inputs}}
        graph = helper.make_graph(
            self.nodes,
            "net",
            [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
                for n, x in values.items()
            ],
            [helper.make_tensor_value_info(name, self.kind, None) for name in self.outputs],
            [numpy_helper.from_array(x, name) for name, x in self.constants.items()],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        outputs = onnx.shape_inference.infer_shapes(made, strict_mode=True).graph.output
        for value, known in zip(made.graph.output, outputs, strict=True):
            value.CopyFrom(known)
        return made


def run(proto: onnx.ModelProto, inputs: dict[str, np.ndarray], *, registered: bool = False) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if registered:
        options.register_custom_ops_library(str(native.custom_op_library()))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: inputs[value.name] for value in session.get_inputs() if value.name in inputs})


def rewritten(proto: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    made = with_bfloat16_products(made)
    onnx.checker.check_model(made, full_check=True)
    return made


def kinds(proto: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def ours(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node if node.domain == DOMAIN]


def assert_alike(got: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


def scaled(*shape: int) -> np.ndarray:
    """Such that scores of it and of normal numbers are some 1: a softmax that is neither flat nor a single 1."""
    return normal(*shape) / np.float32(np.sqrt(shape[-2]))


QKV = {"q": normal(2, 3, 5, 8), "k": scaled(2, 3, 8, 7), "v": normal(2, 3, 7, 6)}
ATTENTION_NODES = [product("q", "k", "scores"), softmax(), product("p", "v")]


def branch(name: str) -> NodeProto:
    """A node whose branches read a value of the graph around it."""
    inner = helper.make_graph(
        [helper.make_node("Neg", [name], ["negated"])],
        "branch",
        [],
        [helper.make_tensor_value_info("negated", TensorProto.FLOAT, None)],
    )
    return helper.make_node("If", ["yes"], ["read"], then_branch=inner, else_branch=inner)


def dequantised(name: str, scale: str = "scale") -> NodeProto:
    return helper.make_node("DequantizeLinear", [f"{name}8", scale], [name], name=f"dequantise_{name}")


def quantised(name: str, of: str) -> NodeProto:
    return helper.make_node("QuantizeLinear", [of, "scale"], [f"{name}8"], name=f"quantise_{name}")


def bytes_of(*shape: int) -> np.ndarray:
    return RANDOM.integers(-100, 100, shape, np.int8)


SCALE = np.array(0.02, np.float32)
HALF = TensorProto.FLOAT16
TURN = turn("x", "t", 0, 2, 1)
TURN_INPUTS, TURN_WEIGHTS = {"x": normal(3, W, 5)}, {"w": normal(W, W)}

TAKEN = {
    "bytes by a weight in float": Net(
        [quantised("a", "x"), dequantised("a"), product("a", "w")],
        {"x": normal(5, W)},
        {"w": normal(W, W), "scale": SCALE},
        [PLAIN],
    ),
    "a weight behind": Net([product("x", "w")], {"x": normal(5, W)}, {"w": normal(W, W)}, [PLAIN]),
    "a weight in front": Net([product("w", "x")], {"x": normal(W, 5)}, {"w": normal(W, W)}, [PLAIN]),
    "a batch": Net([product("x", "w")], {"x": normal(2, 3, 5, W)}, {"w": normal(W, W + 1)}, [PLAIN]),
    "a weight in front of a batch": Net([product("w", "x")], {"x": normal(2, 3, W, 5)}, {"w": normal(W, W)}, [PLAIN]),
    "two weights": Net(
        [product("x", "w", "h"), product("h", "v")],
        {"x": normal(5, W)},
        {"w": normal(W, W), "v": normal(W, W)},
        [PLAIN] * 2,
    ),
    "a weight by a weight": Net(
        [product("w", "v", "h"), product("x", "h")],
        {"x": normal(5, W)},
        {"w": normal(W, W), "v": normal(W, W)},
        [PLAIN],
    ),
    "one weight twice": Net(
        [product("x", "w", "h"), product("h", "w")], {"x": normal(5, W)}, {"w": normal(W, W)}, [PLAIN] * 2
    ),
    "a matrix turned": Net(
        [turn("x", "t", 1, 0), product("t", "w")], {"x": normal(W, 5)}, {"w": normal(W, W)}, [TURNED_A]
    ),
    "a batch turned": Net(
        [turn("x", "t", 0, 2, 1), product("t", "w")], {"x": normal(3, W, 5)}, {"w": normal(W, W)}, [TURNED_A]
    ),
    "four axes turned": Net(
        [turn("x", "t", 0, 1, 3, 2), product("t", "w")], {"x": normal(2, 3, W, 5)}, {"w": normal(W, W)}, [TURNED_A]
    ),
    "a matrix turned behind": Net(
        [turn("x", "t", 1, 0), product("w", "t")], {"x": normal(5, W)}, {"w": normal(W, W)}, [TURNED_B]
    ),
    "a batch turned behind": Net(
        [turn("x", "t", 0, 2, 1), product("w", "t")], {"x": normal(3, 5, W)}, {"w": normal(W, W)}, [TURNED_B]
    ),
    "turned in front and behind": Net(
        [turn("x", "t", 0, 2, 1), product("t", "w", "h"), turn("h", "u", 0, 2, 1), product("v", "u")],
        {"x": normal(3, W, 5)},
        {"w": normal(W, W), "v": normal(W, W)},
        [TURNED_A, TURNED_B],
    ),
    "attention": Net(ATTENTION_NODES, QKV, {}, [ATTENTION]),
    "attention over the last axis by its number": Net(
        [product("q", "k", "scores"), softmax(3), product("p", "v")], QKV, {}, [ATTENTION]
    ),
    "attention over the axis of softmax's default": Net(
        [product("q", "k", "scores"), softmax(None), product("p", "v")], QKV, {}, [ATTENTION]
    ),
    "keys and values of a fixed text": Net(
        ATTENTION_NODES,
        {"q": normal(2, 3, 5, 8)},
        {"k": scaled(1, 3, 8, 7), "v": normal(1, 3, 7, 6)},
        [ATTENTION],
    ),
    "keys and values without heads": Net(
        ATTENTION_NODES, {"q": normal(2, 5, 8)}, {"k": scaled(8, 7), "v": normal(7, 6)}, [ATTENTION]
    ),
    "a query that is constant": Net(
        ATTENTION_NODES, {"k": scaled(8, 7), "v": normal(7, 6)}, {"q": normal(5, 8)}, [ATTENTION]
    ),
    "a weight as keys": Net(ATTENTION_NODES, {"q": normal(5, W)}, {"k": scaled(W, W), "v": normal(W, W)}, [ATTENTION]),
    "keys that are turned": Net(
        [turn("x", "k", 0, 1, 3, 2), *ATTENTION_NODES],
        {"q": QKV["q"], "x": scaled(2, 3, 7, 8), "v": QKV["v"]},
        {},
        [ATTENTION],
        turns=1,
    ),
    "two that share keys": Net(
        [*ATTENTION_NODES, product("r", "k", "s"), softmax(-1, "s", "o"), product("o", "v", "z")],
        {**QKV, "r": normal(2, 3, 5, 8)},
        {},
        [ATTENTION] * 2,
        ("y", "z"),
    ),
    "attention between weights": Net(
        [
            product("x", "w", "q"),
            *ATTENTION_NODES[:2],
            product("p", "v", "h"),
            turn("h", "t", 0, 2, 1),
            product("u", "t"),
        ],
        {"x": normal(2, 5, W), "k": scaled(2, W, 7), "v": normal(2, 7, W)},
        {"w": normal(W, W) / np.float32(np.sqrt(W)), "u": normal(W, W)},
        [PLAIN, ATTENTION, TURNED_B],
    ),
}

LEFT = {
    "narrow in": Net([product("x", "w")], {"x": normal(5, W - 1)}, {"w": normal(W - 1, W)}),
    "narrow out": Net([product("x", "w")], {"x": normal(5, W)}, {"w": normal(W, W - 1)}),
    "narrow in, the weight in front": Net([product("w", "x")], {"x": normal(W - 1, 5)}, {"w": normal(W, W - 1)}),
    "a weight with an axis more": Net([product("x", "w")], {"x": normal(2, 5, W)}, {"w": normal(2, W, W)}),
    "a weight with one axis": Net([product("x", "w")], {"x": normal(5, W)}, {"w": normal(W)}),
    "no weight": Net([product("x", "z")], {"x": normal(W, W), "z": normal(W, W)}, {}),
    "a weight that is only a default": Net(
        [product("x", "w")], {"x": normal(5, W)}, {"w": normal(W, W)}, also_inputs=["w"]
    ),
    "a weight that is computed": Net(
        [helper.make_node("Identity", ["v"], ["w"]), product("x", "w")], {"x": normal(5, W)}, {"v": normal(W, W)}
    ),
    "a weight that is turned": Net(
        [turn("v", "w", 1, 0), product("x", "w")], {"x": normal(5, W)}, {"v": normal(W, W)}, turns=1
    ),
    "two values that are turned": Net(
        [TURN, turn("z", "u", 0, 2, 1), product("t", "u")],
        {"x": normal(3, W, W), "z": normal(3, W, W)},
        {},
        turns=2,
    ),
    "a weight in float16": Net(
        [product("x", "w")],
        {"x": normal(5, W).astype(np.float16)},
        {"w": (normal(W, W) / 16).astype(np.float16)},
        kind=HALF,
    ),
    "a weight in float64": Net(
        [product("x", "w")],
        {"x": normal(5, W).astype(float)},
        {"w": normal(W, W).astype(float)},
        kind=TensorProto.DOUBLE,
    ),
    "a weight in int8": Net(
        [quantised("a", "x"), dequantised("a"), dequantised("w"), product("a", "w")],
        {"x": normal(5, W)},
        {"w8": bytes_of(W, W), "scale": SCALE},
    ),
    "a weight in int8 beside one in float": Net(
        [dequantised("w"), product("w", "v", "h"), product("x", "h")],
        {"x": normal(5, W)},
        {"w8": bytes_of(W, W), "v": normal(W, W), "scale": SCALE},
    ),
    "Gemm": Net([helper.make_node("Gemm", ["x", "w"], ["y"], name="gemm")], {"x": normal(5, W)}, {"w": normal(W, W)}),
    "softmax over another axis": Net([product("q", "k", "scores"), softmax(2), product("p", "v")], QKV, {}),
    "softmax over another axis, from behind": Net(
        [product("q", "k", "scores"), softmax(-2), product("p", "v")], QKV, {}
    ),
    "weights behind": Net(
        [product("q", "k", "scores"), softmax(), product("v", "p")], {**QKV, "v": normal(2, 3, 6, 5)}, {}
    ),
    "scores that are scaled": Net(
        [product("q", "k", "s"), helper.make_node("Mul", ["s", "half"], ["scores"]), softmax(), product("p", "v")],
        QKV,
        {"half": np.array(0.5, np.float32)},
    ),
    "scores that are masked": Net(
        [product("q", "k", "s"), helper.make_node("Add", ["s", "mask"], ["scores"]), softmax(), product("p", "v")],
        QKV,
        {"mask": normal(5, 7)},
    ),
    "weights that are turned": Net(
        [product("q", "k", "scores"), softmax(), turn("p", "t", 0, 1, 3, 2), product("t", "v")],
        {**QKV, "v": normal(2, 3, 5, 6)},
        {},
        turns=1,
    ),
    "a softmax of something else": Net(
        [helper.make_node("Neg", ["q"], ["scores"]), softmax(), product("p", "k")], QKV, {}
    ),
    "a softmax for something else": Net(
        [product("q", "k", "scores"), softmax(), helper.make_node("Neg", ["p"], ["y"])], QKV, {}
    ),
    "a softmax by itself": Net(
        [product("q", "k", "scores"), softmax(), product("p", "p")],
        {"q": normal(7, 8), "k": scaled(8, 7)},
        {},
    ),
    "scores that are an output": Net(ATTENTION_NODES, QKV, {}, outputs=["y", "scores"]),
    "weights that are an output": Net(ATTENTION_NODES, QKV, {}, outputs=["y", "p"]),
    "scores that something else reads": Net(
        [*ATTENTION_NODES, helper.make_node("Neg", ["scores"], ["read"])], QKV, {}, outputs=["y", "read"]
    ),
    "weights that something else reads": Net(
        [*ATTENTION_NODES, helper.make_node("Neg", ["p"], ["read"])], QKV, {}, outputs=["y", "read"]
    ),
    "weights that two products read": Net([*ATTENTION_NODES, product("p", "v", "z")], QKV, {}, outputs=["y", "z"]),
    "scores that a branch reads": Net(
        [*ATTENTION_NODES, branch("scores")], QKV, {"yes": np.array(True)}, outputs=["y", "read"]
    ),
    "weights that a branch reads": Net(
        [*ATTENTION_NODES, branch("p")], QKV, {"yes": np.array(True)}, outputs=["y", "read"]
    ),
    **{
        f"int8 constants as {name}": Net(
            [dequantised(name), *ATTENTION_NODES],
            {other: x for other, x in QKV.items() if other != name},
            {f"{name}8": bytes_of(*QKV[name].shape), "scale": SCALE},
        )
        for name in "qkv"
    },
    **{
        f"float16 constants as {name}": Net(
            ATTENTION_NODES,
            {other: x.astype(np.float16) for other, x in QKV.items() if other != name},
            {name: QKV[name].astype(np.float16)},
            kind=HALF,
        )
        for name in "qkv"
    },
}

# The product is taken, the Transpose in front of it is not.
NOT_TURNED = {
    "axes that count matrices": Net(
        [turn("x", "t", 1, 0, 2), product("t", "w")], {"x": normal(3, 5, W)}, TURN_WEIGHTS, [PLAIN], turns=1
    ),
    "axes of both kinds": Net(
        [turn("x", "t", 2, 1, 0), product("t", "w")], {"x": normal(W, 5, 3)}, TURN_WEIGHTS, [PLAIN], turns=1
    ),
    "all axes moved on": Net(
        [turn("x", "t", 1, 2, 0), product("t", "w")], {"x": normal(W, 3, 5)}, TURN_WEIGHTS, [PLAIN], turns=1
    ),
    "the last two and others": Net(
        [turn("x", "t", 1, 0, 3, 2), product("t", "w")], {"x": normal(2, 3, W, 5)}, TURN_WEIGHTS, [PLAIN], turns=1
    ),
    "no axes": Net([turn("x", "t", 0, 1), product("t", "w")], {"x": normal(5, W)}, TURN_WEIGHTS, [PLAIN], turns=1),
    "all axes, by the default": Net(
        [turn("x", "t"), product("t", "w")], {"x": normal(W, 5, 3)}, TURN_WEIGHTS, [PLAIN], turns=1
    ),
    "an output": Net([TURN, product("t", "w")], TURN_INPUTS, TURN_WEIGHTS, [PLAIN], ["y", "t"], turns=1),
    "read by something else": Net(
        [TURN, product("t", "w"), helper.make_node("Neg", ["t"], ["read"])],
        TURN_INPUTS,
        TURN_WEIGHTS,
        [PLAIN],
        ["y", "read"],
        turns=1,
    ),
    "read by two products": Net(
        [TURN, product("t", "w"), product("t", "w", "z")],
        TURN_INPUTS,
        TURN_WEIGHTS,
        [PLAIN, PLAIN],
        ["y", "z"],
        turns=1,
    ),
    "read by a branch": Net(
        [TURN, product("t", "w"), branch("t")],
        TURN_INPUTS,
        {**TURN_WEIGHTS, "yes": np.array(True)},
        [PLAIN],
        ["y", "read"],
        turns=1,
    ),
}


@pytest.mark.parametrize("registered", EITHER)
@pytest.mark.parametrize("net", [*TAKEN.values(), *NOT_TURNED.values()], ids=[*TAKEN, *NOT_TURNED])
def test_what_is_taken_computes_the_same(net: Net, registered: bool) -> None:
    before = net.proto()
    made = rewritten(before)
    assert ours(made) == list(net.ours)
    assert kinds(made)["Transpose"] == net.turns
    assert not {"Softmax", "Gemm"} & kinds(made).keys()
    expected = run(before, net.inputs)
    assert_alike(run(made, net.inputs, registered=registered), expected, TOLERANCE * len(net.ours))


@pytest.mark.parametrize("net", TAKEN.values(), ids=TAKEN)
def test_the_file_carries_the_bodies_of_what_is_in_it_and_no_more(net: Net) -> None:
    made = rewritten(net.proto())
    assert sorted(function.name for function in made.functions) == sorted(set(net.ours))
    assert {opset.domain: opset.version for opset in made.opset_import} == {"": 18, DOMAIN: VERSION}
    read = {name for node in made.graph.node for name in node.input} | {value.name for value in made.graph.output}
    written = [name for node in made.graph.node for name in node.output]
    assert set(written) <= read
    assert {tensor.name for tensor in made.graph.initializer} <= read
    named = [node.name for node in made.graph.node if node.name]
    assert len(set(named)) == len(named)


@pytest.mark.parametrize("net", TAKEN.values(), ids=TAKEN)
def test_a_second_pass_changes_nothing(net: Net) -> None:
    made = rewritten(net.proto())
    assert rewritten(made).SerializeToString() == made.SerializeToString()


@pytest.mark.parametrize("net", LEFT.values(), ids=LEFT)
def test_what_is_not_so_is_left(net: Net) -> None:
    before = net.proto()
    run(before, net.inputs)  # it is a graph that runs
    assert net.ours == ()
    assert rewritten(before).SerializeToString() == before.SerializeToString()


@pytest.mark.parametrize("registered", EITHER)
def test_inputs_are_rounded_to_bfloat16_and_sums_are_not(registered: bool) -> None:
    """Against float64, nearer than the graph in float32 could come: it is what the module says, and nothing less."""
    net = TAKEN["a weight behind"]
    x, w = (array.astype(ml_dtypes.bfloat16).astype(np.float64) for array in (net.inputs["x"], net.constants["w"]))
    (got,) = run(rewritten(net.proto()), net.inputs, registered=registered)
    np.testing.assert_allclose(got, x @ w, atol=1e-4, rtol=0)
    assert np.abs(net.inputs["x"] @ net.constants["w"] - x @ w).max() > 1e-3


def test_constants_may_lie_outside_of_the_file() -> None:
    net = TAKEN["attention between weights"]
    proto = net.proto()
    for tensor in proto.graph.initializer:
        assert tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="elsewhere")
    assert ours(with_bfloat16_products(proto)) == list(net.ours)


# --- what the native kernels refuse ---

# MatMul takes vectors, and broadcasts as NumPy does; mdnet_engines.ops.product does neither.
UNUSUAL = {
    "a vector by a weight": Net([product("x", "w")], {"x": normal(W)}, {"w": normal(W, W)}),
    "a weight by a vector": Net([product("w", "x")], {"x": normal(W)}, {"w": normal(W, W)}),
    "keys that heads share": Net(
        ATTENTION_NODES, {"q": QKV["q"], "k": scaled(2, 1, 8, 7), "v": normal(2, 1, 7, 6)}, {}
    ),
    "queries that heads share": Net(ATTENTION_NODES, {**QKV, "q": normal(2, 1, 5, 8)}, {}),
    "values that heads share": Net(ATTENTION_NODES, {**QKV, "v": normal(2, 1, 7, 6)}, {}),
    "scores of a vector": Net(ATTENTION_NODES, {"q": normal(8), "k": scaled(8, 7), "v": normal(7, 6)}, {}),
}


@pytest.mark.parametrize("registered", EITHER)
@pytest.mark.parametrize("net", UNUSUAL.values(), ids=UNUSUAL)
def test_a_graph_that_ran_before_still_runs(net: Net, registered: bool) -> None:
    before = net.proto()
    expected = run(before, net.inputs)
    assert_alike(run(rewritten(before), net.inputs, registered=registered), expected, TOLERANCE)
