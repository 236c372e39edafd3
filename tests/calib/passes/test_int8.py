"""The int8 rewrite: what is chosen, where Q/DQ pairs stand, and that both forms compute what was asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
import scan_model
from onnx import TensorProto, helper, numpy_helper
from scan_cases import SCAN_CASES, make_inputs

from mdnet_calib.passes.int8 import MIN_CHANNELS, activations, int8_nodes, to_int8, with_unsigned_activations
from mdnet_engines.errors import MDNetError
from mdnet_engines.ops import selective_scan as scan_op

RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "conv_w": RANDOM.normal(size=(32, 48, 3, 3)),
    "conv_b": RANDOM.normal(size=32),
    "point_w": RANDOM.normal(size=(32, 32, 1, 1)) * np.geomspace(0.5, 2, 32)[:, None, None, None],
    "matmul_w": RANDOM.normal(size=(32, 40)) * np.geomspace(0.5, 2, 40),
    "gemm_w": RANDOM.normal(size=(36, 40)) * np.geomspace(0.5, 2, 36)[:, None],
    "gemm_b": RANDOM.normal(size=36),
}
CHANNEL_AXIS = {"conv_w": 0, "point_w": 0, "matmul_w": 1, "gemm_w": 0}  # the axis of the output channels
NODES = ["a/conv", "b/point", "c/matmul", "d/gemm"]


def value(name: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def model(
    nodes: list[onnx.NodeProto],
    weights: Mapping[str, np.ndarray],
    x: Sequence[int | str] = ("n", 48, 8, 8),
    y: Sequence[int | str] = ("n", 36),
) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", [value("x", x)], [value("y", y)], initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True)


def small_net() -> onnx.ModelProto:
    """x → conv 48→32 → a ─┬─ relu ─ 1×1 conv → b ─┐
    └────────────────────── sum → mean → matmul 32→40 → gemm 40→36 → y"""
    nodes = [
        helper.make_node("Conv", ["x", "conv_w", "conv_b"], ["a"], name="a/conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["r"], name="a/relu"),
        helper.make_node("Conv", ["r", "point_w"], ["b"], name="b/point"),
        helper.make_node("Add", ["a", "b"], ["sum"], name="b/add"),
        helper.make_node("GlobalAveragePool", ["sum"], ["pooled"], name="c/pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="c/flatten"),
        helper.make_node("MatMul", ["flat", "matmul_w"], ["c"], name="c/matmul"),
        helper.make_node("Gemm", ["c", "gemm_w", "gemm_b"], ["y"], name="d/gemm", transB=1),
    ]
    return model(nodes, WEIGHTS)


X = RANDOM.normal(size=(3, 48, 8, 8)).astype(np.float32)


def run(proto: onnx.ModelProto, x: np.ndarray, outputs: list[str] | None = None) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(outputs, {"x": x})[0]


def copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    return made


def largest(proto: onnx.ModelProto, names: Sequence[str], x: np.ndarray) -> dict[str, float]:
    """The ranges of `names` by running the float graph: minmax without the code under test."""
    probed = copy(proto)
    probed.graph.output.extend(value(name, None) for name in names if name not in ("x", "y"))  # type: ignore[arg-type]
    return {name: float(np.abs(x if name == "x" else run(probed, x, [name])).max()) for name in names}


def quantised(proto: onnx.ModelProto, nodes: Sequence[str], x: np.ndarray = X) -> onnx.ModelProto:
    return to_int8(copy(proto), largest(proto, activations(proto, nodes), x), nodes)


class Layout:
    """How a graph of Q/DQ pairs hangs together."""

    def __init__(self, proto: onnx.ModelProto):
        onnx.checker.check_model(proto, full_check=True)
        self.nodes = {node.name: node for node in proto.graph.node}
        self.producer = {output: node for node in proto.graph.node for output in node.output}
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}

    def kind(self, name: str) -> str:
        return self.producer[name].op_type if name in self.producer else ""

    def readers(self, name: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes.values() if name in node.input]

    def scale_of(self, name: str) -> float:
        """The scale that the float value `name` is quantised with."""
        (quantise,) = (node for node in self.readers(name) if node.op_type == "QuantizeLinear")
        return float(self.constants[quantise.input[1]])

    def source(self, dequantised: str) -> str:
        """The float value that a Q/DQ pair has rounded to give `dequantised`."""
        assert self.kind(dequantised) == "DequantizeLinear"
        rounded = self.producer[dequantised].input[0]
        assert self.kind(rounded) == "QuantizeLinear"
        quantise, dequantise = self.producer[rounded], self.producer[dequantised]
        assert list(quantise.input[1:]) == list(dequantise.input[1:])
        return quantise.input[0]

    def weight(self, node: str) -> tuple[np.ndarray, np.ndarray, int]:
        """A node's int8 weight, its scales and their axis."""
        dequantise = self.producer[self.nodes[node].input[1]]
        assert dequantise.op_type == "DequantizeLinear"
        (axis,) = (attribute.i for attribute in dequantise.attribute if attribute.name == "axis")
        stored, scale, zero = (self.constants[name] for name in dequantise.input)
        assert stored.dtype == zero.dtype == np.int8
        assert not zero.any()
        return stored, scale, axis


def rounded(values: np.ndarray, step: np.ndarray | float) -> np.ndarray:
    """What int8 makes of values, from ONNX's definition of QuantizeLinear: it goes to −128."""
    return np.clip(np.rint(values / step), -128, 127) * step


# --- which nodes ---


def test_convolutions_and_products_with_a_weight_are_chosen() -> None:
    proto = small_net()
    assert int8_nodes(proto) == NODES
    assert activations(proto, NODES) == ["x", "a", "r", "b", "flat", "c", "y"]
    assert activations(proto, ["c/matmul"]) == ["flat", "c"]


def test_kept_prefixes_are_not_chosen() -> None:
    assert int8_nodes(small_net(), keep=("a/", "c/mat")) == ["b/point", "d/gemm"]
    assert int8_nodes(small_net(), keep=("conv",)) == NODES  # a prefix, not a part


@pytest.mark.parametrize(
    ("out_channels", "in_channels", "groups", "chosen"),
    [
        (MIN_CHANNELS, MIN_CHANNELS, 1, True),
        (MIN_CHANNELS - 1, 64, 1, False),
        (64, MIN_CHANNELS - 1, 1, False),
        (64, 64, 64, False),  # depthwise: one channel in for each out
    ],
)
def test_narrow_convolutions_stay_in_float(out_channels: int, in_channels: int, groups: int, chosen: bool) -> None:
    weight = np.zeros((out_channels, in_channels // groups, 3, 3))
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv", group=groups)
    proto = model([node], {"w": weight}, ("n", in_channels, 8, 8), ("n", out_channels, 6, 6))
    assert (int8_nodes(proto) == ["conv"]) is chosen


def test_products_without_a_weight_on_the_right_stay_in_float() -> None:
    """Attention (two activations), a weight on the left, and the fixed prompt's keys, which have a head axis."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["q"], name="to_q"),
        helper.make_node("Transpose", ["q"], ["k"], name="t", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "k"], ["s"], name="attention"),
        helper.make_node("MatMul", ["w", "s"], ["l"], name="left"),
        helper.make_node("MatMul", ["l", "prompt"], ["y"], name="cross"),
    ]
    weights = {"w": np.ones((32, 32)), "prompt": np.ones((1, 32, 32))}
    assert int8_nodes(model(nodes, weights, ("n", 32, 32), ("n", 32, 32))) == ["to_q"]


# --- the layout ---


def test_inputs_outputs_and_weights_are_quantised_symmetrically() -> None:
    proto = small_net()
    ranges = largest(proto, activations(proto, NODES), X)
    layout = Layout(to_int8(copy(proto), ranges, NODES))
    inputs = {"a/conv": "x", "b/point": "r", "c/matmul": "flat", "d/gemm": "c"}
    for node, source in inputs.items():
        assert layout.source(layout.nodes[node].input[0]) == source
    for output, reader in {"a": "a/relu", "b": "b/add", "c": "d/gemm"}.items():
        assert layout.source(layout.nodes[reader].input[output == "b"]) == output
    assert layout.source("y") == layout.nodes["d/gemm"].output[0]  # the graph's output keeps its name
    for constant in layout.constants.values():
        if constant.dtype == np.int8 and constant.ndim == 0:
            assert constant == 0  # a zero-point
    for name in inputs.values():
        assert layout.scale_of(name) == pytest.approx(ranges[name] / 127, rel=1e-6)


def test_weights_are_rounded_for_each_output_channel() -> None:
    layout = Layout(quantised(small_net(), NODES))
    for node, name in zip(NODES, CHANNEL_AXIS, strict=True):
        stored, scale, axis = layout.weight(node)
        assert axis == CHANNEL_AXIS[name]
        weight = WEIGHTS[name].astype(np.float32)
        others = tuple(i for i in range(weight.ndim) if i != axis)
        np.testing.assert_allclose(scale, np.abs(weight).max(axis=others) / 64, rtol=1e-6)
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        assert np.abs(stored.astype(int)).max() == 64  # pairs of products with bytes then fit into 16 bits
        # Half a step, and a little for a value that lies between two steps.
        assert (np.abs(stored * scale.reshape(shape) - weight) <= 0.501 * scale.reshape(shape)).all()


def test_biases_and_other_nodes_stay_in_float() -> None:
    layout = Layout(quantised(small_net(), NODES))
    assert layout.nodes["a/conv"].input[2] == "conv_b"
    assert layout.nodes["d/gemm"].input[2] == "gemm_b"
    for bias in ("conv_b", "gemm_b"):
        np.testing.assert_array_equal(layout.constants[bias], WEIGHTS[bias].astype(np.float32))
    assert not any(constant.dtype == np.int32 for constant in layout.constants.values())
    assert not any(node.op_type.startswith("QLinear") for node in layout.nodes.values())


def test_nodes_that_were_not_chosen_are_left_as_they_are() -> None:
    layout = Layout(quantised(small_net(), ["b/point"]))
    assert layout.nodes["a/conv"].input[:] == ["x", "conv_w", "conv_b"]
    assert layout.nodes["c/matmul"].input[1] == "matmul_w"
    assert sum(node.op_type == "QuantizeLinear" for node in layout.nodes.values()) == 2


def test_no_node_gives_the_float_graph() -> None:
    proto = small_net()
    np.testing.assert_array_equal(run(to_int8(copy(proto), {}, []), X), run(proto, X))


def test_inputs_and_outputs_of_the_graph_do_not_change() -> None:
    proto = small_net()
    made = quantised(proto, NODES)
    for before, after in ((proto.graph.input, made.graph.input), (proto.graph.output, made.graph.output)):
        assert [part.SerializeToString() for part in before] == [part.SerializeToString() for part in after]


# --- residual sums ---


def sums(pairs: list[tuple[str, str, str]], convolutions: Mapping[str, str]) -> tuple[onnx.ModelProto, list[str]]:
    """A graph of 1×1 convolutions (output → input) and sums (term, term, output), in the order that they are given."""
    weight = RANDOM.normal(size=(48, 48, 1, 1)) / 7
    made = {
        name: helper.make_node("Conv", [source, f"w_{name}"], [name], name=name)
        for name, source in convolutions.items()
    }
    added = {out: helper.make_node("Add", [one, other], [out], name=out) for one, other, out in pairs}
    done, nodes, waiting = {"x"}, [], {**made, **added}
    while waiting:
        ready = next(name for name, node in waiting.items() if all(i in done or i[:2] == "w_" for i in node.input))
        nodes.append(waiting.pop(ready))
        done.add(ready)
    weights = {f"w_{name}": weight * 3.0**i for i, name in enumerate(convolutions)}  # each term has a range of its own
    return model(nodes, weights, ("n", 48, 8, 8), ("n", 48, 8, 8)), list(convolutions)


def test_the_terms_of_a_residual_sum_share_the_larger_range() -> None:
    proto, nodes = sums([("a", "b", "y")], {"a": "x", "b": "x"})
    ranges = largest(proto, ["x", "a", "b"], X)
    assert ranges["b"] > 2 * ranges["a"]
    layout = Layout(to_int8(copy(proto), ranges, nodes))
    assert layout.scale_of("a") == layout.scale_of("b") == pytest.approx(ranges["b"] / 127, rel=1e-6)
    assert layout.scale_of("x") == pytest.approx(ranges["x"] / 127, rel=1e-6)


def test_a_chain_of_sums_shares_one_range() -> None:
    """b is a term of both sums; the largest, c, only of the second, which stands after the first."""
    proto, nodes = sums([("a", "b", "s"), ("b", "c", "t"), ("s", "t", "y")], {"a": "x", "b": "x", "c": "x"})
    layout = Layout(quantised(proto, nodes))
    assert layout.scale_of("a") == layout.scale_of("b") == layout.scale_of("c")


def test_a_sum_that_is_a_convolutions_input_shares_the_range_of_the_next_sum() -> None:
    proto, nodes = sums([("a", "b", "s"), ("s", "c", "y")], {"a": "x", "b": "x", "c": "s"})
    layout = Layout(quantised(proto, nodes))
    assert layout.scale_of("a") == layout.scale_of("b")
    assert layout.scale_of("s") == layout.scale_of("c")


def test_a_sum_with_itself_or_with_a_constant_has_nothing_to_share() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="m"),
        helper.make_node("Add", ["a", "a"], ["b"], name="twice"),
        helper.make_node("Add", ["b", "bias"], ["y"], name="bias"),
    ]
    weights = {"w": RANDOM.normal(size=(16, 16)), "bias": RANDOM.normal(size=16) * 100}
    x = RANDOM.normal(size=(5, 16)).astype(np.float32)
    proto = model(nodes, weights, ("n", 16), ("n", 16))
    ranges = largest(proto, ["x", "a"], x)
    assert Layout(to_int8(copy(proto), ranges, ["m"])).scale_of("a") == pytest.approx(ranges["a"] / 127, rel=1e-6)


# --- the numbers ---


def both_forms(proto: onnx.ModelProto) -> dict[str, onnx.ModelProto]:
    unsigned = with_unsigned_activations(copy(proto))
    onnx.checker.check_model(unsigned, full_check=True)
    return {"s8": proto, "u8": unsigned}


def test_both_forms_compute_the_product_of_what_was_rounded() -> None:
    """Against the definition of int8 in NumPy. Equal but where a value lies between two steps of the output."""
    weight = WEIGHTS["matmul_w"].astype(np.float32)
    proto = model([helper.make_node("MatMul", ["x", "w"], ["y"], name="m")], {"w": weight}, ("n", 32), ("n", 40))
    x = RANDOM.normal(size=(50, 32)).astype(np.float32)
    ranges = {"x": 2.0, "y": 12.0}  # both cut values
    step = ranges["y"] / 127
    product = rounded(x, ranges["x"] / 127) @ rounded(weight, np.abs(weight).max(axis=0) / 64)
    expected = rounded(product, step)
    assert np.mean(np.abs(product) > ranges["y"]) > 0.01
    for made in both_forms(to_int8(copy(proto), ranges, ["m"])).values():
        off = np.abs(run(made, x) - expected)
        assert off.max() <= 1.001 * step
        assert np.mean(off > 0.01 * step) < 0.01


def test_both_forms_are_near_float_and_within_a_step_of_each_other() -> None:
    proto = small_net()
    expected = run(proto, X)
    signed, unsigned = (run(made, X) for made in both_forms(quantised(proto, NODES)).values())
    step = np.abs(expected).max() / 127
    assert np.abs(signed - unsigned).max() <= 1.001 * step
    # Four layers that each add a hundredth or so of noise.
    assert np.linalg.norm(signed - expected) < 0.05 * np.linalg.norm(expected)
    assert np.abs(signed - expected).max() > 0  # it is int8


def test_the_unsigned_form_has_another_zero_point_and_nothing_else() -> None:
    forms = {name: Layout(made) for name, made in both_forms(quantised(small_net(), NODES)).items()}
    signed, unsigned = (form.constants for form in forms.values())
    moved = {name for name in signed if signed[name].dtype != unsigned[name].dtype}
    assert moved == {node.input[2] for node in forms["s8"].nodes.values() if node.op_type == "QuantizeLinear"}
    for name in signed.keys() | unsigned.keys():
        np.testing.assert_array_equal(unsigned[name], 128 if name in moved else signed[name])
        assert unsigned[name].dtype == (np.uint8 if name in moved else signed[name].dtype)
    assert [node.SerializeToString() for node in forms["s8"].nodes.values()] == [
        node.SerializeToString() for node in forms["u8"].nodes.values()
    ]


@pytest.mark.parametrize("form", ["unsigned already", "asymmetric"])
def test_what_is_not_symmetric_int8_has_no_unsigned_form(form: str) -> None:
    made = quantised(small_net(), NODES)
    if form == "unsigned already":
        made = with_unsigned_activations(made)
    else:
        zero = next(t for t in made.graph.initializer if t.data_type == TensorProto.INT8 and not t.dims)
        zero.CopyFrom(numpy_helper.from_array(np.array(3, np.int8), zero.name))
    with pytest.raises(MDNetError, match=r"is not a symmetric int8 zero-point; quantise the graph anew$"):
        with_unsigned_activations(made)


def test_tensors_that_are_always_zero_stay_zero() -> None:
    """A dead channel, a dead activation: their scale must not be 0, which divides to NaN."""
    weights = {"w": RANDOM.normal(size=(16, 16)), "v": np.zeros((16, 16))}
    weights["w"][:, 5] = 0
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="m"),
        helper.make_node("MatMul", ["a", "v"], ["z"], name="z"),
        helper.make_node("Add", ["a", "z"], ["y"], name="add"),
    ]
    proto = model(nodes, weights, ("n", 16), ("n", 16))
    x = RANDOM.normal(size=(9, 16)).astype(np.float32)
    for made in both_forms(quantised(proto, ["m", "z"], x)).values():
        layout = Layout(made)
        assert all((c > 0).all() for name, c in layout.constants.items() if "scale" in name)
        y = run(made, x)
        assert np.isfinite(y).all()
        assert (y[:, 5] == 0).all()
        assert np.linalg.norm(y - run(proto, x)) < 0.02 * np.linalg.norm(y)
    silent = to_int8(copy(proto), dict.fromkeys(activations(proto, ["m", "z"]), 0.0), ["m", "z"])
    for made in both_forms(silent).values():
        assert (run(made, 0 * x) == 0).all()


def test_a_missing_range_is_said_with_its_tensor() -> None:
    proto = small_net()
    ranges = dict.fromkeys(activations(proto, NODES), 1.0)
    del ranges["r"]
    with pytest.raises(MDNetError, match=r"^no calibrated range for r; calibrate this graph again$"):
        to_int8(proto, ranges, NODES)


# --- graphs with a scan ---


@pytest.mark.parametrize("name", [scan_op.FORWARD, scan_op.REVERSE])
def test_the_scan_and_its_function_are_kept(name: str) -> None:
    """u goes through a product that becomes int8; the scan itself runs by its function body."""
    case = next(case for case in SCAN_CASES if case.dtype == "float32" and case.reverse == (name == scan_op.REVERSE))
    inputs = make_inputs(case)
    length = inputs["u"].shape[-1]
    width = max(length, MIN_CHANNELS)
    wide = {key: grown(x, width) if key in ("u", "delta", "z", "B", "C") else x for key, x in inputs.items()}
    proto = scan_model.model(name, sizes={"length": width})
    mix = np.eye(width, dtype=np.float32) + RANDOM.normal(size=(width, width)).astype(np.float32) / width
    proto.graph.node[0].input[0] = "mixed"
    proto.graph.node[0].name = "scan"
    proto.graph.node.insert(0, helper.make_node("MatMul", ["u", "mix"], ["mixed"], name="m"))
    proto.graph.initializer.append(numpy_helper.from_array(mix, "mix"))
    functions = [function.SerializeToString() for function in proto.functions]
    ranges = {"u": float(np.abs(wide["u"]).max()), "mixed": float(np.abs(wide["u"] @ mix).max())}
    expected = scan_model.run(session(proto), wide)
    assert int8_nodes(proto) == ["m"]
    for made in both_forms(to_int8(copy(proto), ranges, ["m"])).values():
        (scan,) = (node for node in made.graph.node if node.domain == scan_op.DOMAIN)
        assert scan.op_type == name
        assert Layout(made).source(scan.input[0]) == "mixed"
        assert list(scan.input[1:]) == list(scan_op.INPUTS[1:])
        assert [function.SerializeToString() for function in made.functions] == functions
        assert scan_op.DOMAIN in {opset.domain for opset in made.opset_import}
        got = scan_model.run(session(made), wide)
        # The mixing weights have 64 steps for a diagonal of 1, and the rest of a row is not much more than one step.
        assert 0 < np.linalg.norm(got - expected) < 0.1 * np.linalg.norm(expected)


def grown(values: np.ndarray, length: int) -> np.ndarray:
    """Repeated along the last axis until there is enough of it."""
    return np.tile(values, -(-length // values.shape[-1]))[..., :length]


def session(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


# --- manners ---


def test_nothing_is_printed_or_logged(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """The quantiser would log how it treats a channel whose weights are tiny beside its bias."""
    caplog.set_level(logging.DEBUG)
    weight, bias = WEIGHTS["conv_w"].copy(), WEIGHTS["conv_b"].copy()
    weight[3] *= 1e-9
    bias[3] = 1000
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], name="a/conv")
    proto = model([node], {"w": weight, "b": bias}, y=("n", 32, 6, 6))
    ranges = largest(proto, activations(proto, ["a/conv"]), X)
    capfd.readouterr()
    to_int8(proto, ranges, ["a/conv"])
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert logging.root.level == logging.DEBUG
