"""What ONNX Runtime on the CPU gets, beside the chains of tests/calib/passes/test_fuse.py, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mdnet_calib.passes.bfloat16 import MIN_WIDTH, with_bfloat16_products
from mdnet_calib.passes.fuse import fuse_between_layers
from mdnet_calib.passes.fuse_vim import fuse_vim
from mdnet_calib.passes.onnxruntime_cpu import PASSES, for_onnxruntime_cpu
from mdnet_engines.ops.selective_scan import DOMAIN

RANDOM = np.random.default_rng(0)
Rewrite = Callable[[onnx.ModelProto], onnx.ModelProto]
D, L = MIN_WIDTH, 20  # channels, steps


def constant(*shape: int) -> np.ndarray:
    return (RANDOM.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)


def net(
    nodes: list[NodeProto], constants: dict[str, np.ndarray], x: tuple[int, ...], outputs: dict[str, int]
) -> onnx.ModelProto:
    """A graph from x; outputs with their number of axes."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * axes) for name, axes in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(proto: onnx.ModelProto) -> list[np.ndarray]:
    """Without our library: function bodies run."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (x,) = session.get_inputs()
    return session.run(None, {"x": np.random.default_rng(1).normal(size=x.shape).astype(np.float32)})


def rewritten(proto: onnx.ModelProto, rewrite: Rewrite, *, error: float) -> list[str]:
    """Our operators after `rewrite`; outputs may be off by that share of their norm."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    made = rewrite(made)
    onnx.checker.check_model(made, full_check=True)
    for got, expected in zip(run(made), run(proto), strict=True):
        assert np.linalg.norm(got - expected) <= error * np.linalg.norm(expected)
    written = {name for node in made.graph.node for name in node.output}
    read = {name for node in made.graph.node for name in node.input} | {value.name for value in made.graph.output}
    assert written <= read
    return [node.op_type for node in made.graph.node if node.domain == DOMAIN]


# --- products ---


def vim_products() -> onnx.ModelProto:
    """x [2, L, D] → W·xᵀ → its transpose · V, and a narrow product."""
    node = helper.make_node
    nodes = [
        node("Transpose", ["x"], ["xt"], perm=[0, 2, 1]),
        node("MatMul", ["w", "xt"], ["wide"], name="in_proj"),
        node("MatMul", ["narrow", "wide"], ["small"], name="x_proj"),
        node("Transpose", ["wide"], ["back"], perm=[0, 2, 1]),
        node("MatMul", ["back", "v"], ["y"], name="out_proj"),
    ]
    constants = {"w": constant(D, D), "narrow": constant(MIN_WIDTH - 1, D), "v": constant(D, D)}
    return net(nodes, constants, (2, L, D), {"small": 3, "y": 3})


def test_wide_products_take_their_transposes_in() -> None:
    made = rewritten(vim_products(), with_bfloat16_products, error=0.01)
    assert made == ["BFloat16MatMulTransposedB", "BFloat16MatMulTransposedA"]


def test_a_transpose_that_something_else_reads_stays() -> None:
    proto = vim_products()
    proto.graph.output.append(helper.make_tensor_value_info("xt", TensorProto.FLOAT, [None] * 3))
    made = rewritten(proto, with_bfloat16_products, error=0.01)
    assert made == ["BFloat16MatMul", "BFloat16MatMulTransposedA"]


def test_a_transpose_of_other_axes_stays() -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["moved"], perm=[1, 0, 2]),
        helper.make_node("MatMul", ["moved", "w"], ["y"]),
    ]
    proto = net(nodes, {"w": constant(D, D)}, (2, L, D), {"y": 3})
    assert rewritten(proto, with_bfloat16_products, error=0.01) == ["BFloat16MatMul"]


def attention(axis: int = -1) -> onnx.ModelProto:
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "k"], ["scores"]),
        node("Softmax", ["scores"], ["p"], axis=axis),
        node("MatMul", ["p", "v"], ["y"]),
    ]
    return net(nodes, {"k": constant(1, 2, 8, 8), "v": constant(1, 2, 8, 8)}, (3, 2, 8, 8), {"y": 4})


@pytest.mark.parametrize("axis", [-1, 3])
def test_attention_becomes_one_node(axis: int) -> None:
    assert rewritten(attention(axis), with_bfloat16_products, error=0.01) == ["BFloat16Attention"]


def test_a_softmax_over_another_axis_is_left() -> None:
    assert rewritten(attention(axis=2), with_bfloat16_products, error=0) == []


@pytest.mark.parametrize("name", ["scores", "p"])
def test_attention_that_something_else_looks_into_is_left(name: str) -> None:
    proto = attention()
    proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4))
    assert rewritten(proto, with_bfloat16_products, error=0) == []


# --- Vim ---


def mixer(**changes: object) -> onnx.ModelProto:
    """A causal convolution with SiLU, and a root mean square norm."""
    node = helper.make_node
    attributes = {"group": 6, "pads": [3, 0], **changes}
    nodes = [
        node("Conv", ["x", "taps", "bias"], ["c"], name="conv", **attributes),
        node("Sigmoid", ["c"], ["gate"]),
        node("Mul", ["c", "gate"], ["u"], name="silu"),
        node("Pow", ["u", "two"], ["square"]),
        node("ReduceMean", ["square", "last"], ["mean"]),
        node("Sqrt", ["mean"], ["root"]),
        node("Reciprocal", ["root"], ["inverse"]),
        node("Mul", ["u", "inverse"], ["y"], name="norm"),
    ]
    constants = {
        "taps": constant(6, 6 // int(str(attributes["group"])), 4),
        "bias": constant(6),
        "two": np.array(2, np.float32),
        "last": np.array([-1]),
    }
    return net(nodes, constants, (2, 6, L), {"y": 3})


def test_a_convolution_takes_its_silu_in_and_a_norm_divides() -> None:
    made = fuse_vim(mixer())
    assert [node.op_type for node in made.graph.node if node.domain == DOMAIN] == ["DepthwiseConvSilu"]
    assert {"Div"} <= {node.op_type for node in made.graph.node}
    assert not {"Conv", "Sigmoid", "Reciprocal"} & {node.op_type for node in made.graph.node}
    assert rewritten(mixer(), fuse_vim, error=1e-6) == ["DepthwiseConvSilu"]


@pytest.mark.parametrize("pads", [[3, 0], [0, 3], [2, 1]])
def test_taps_before_a_step_are_kept(pads: list[int]) -> None:
    assert rewritten(mixer(pads=pads), fuse_vim, error=1e-6) == ["DepthwiseConvSilu"]


@pytest.mark.parametrize("changes", [{"pads": [3, 1]}, {"strides": [2]}, {"dilations": [2]}, {"group": 3}])
def test_another_convolution_is_left(changes: dict[str, object]) -> None:
    assert rewritten(mixer(**changes), fuse_vim, error=1e-6) == []


def test_a_convolution_that_something_else_reads_is_left() -> None:
    proto = mixer()
    proto.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, [None] * 3))
    assert rewritten(proto, fuse_vim, error=1e-6) == []


# --- the first convolution ---


def first(outputs: int = 32, channels: int = 3, **changes: object) -> onnx.ModelProto:
    node = helper.make_node("Conv", ["x", "w", "bias"], ["y"], name="conv_in", **{"pads": [1] * 4, **changes})
    group = int(str(changes.get("group", 1)))
    constants = {"w": constant(outputs, channels // group, 3, 3), "bias": constant(outputs)}
    return net([node], constants, (2, channels, 9, 8), {"y": 4})


def test_the_first_convolution_is_channels_last() -> None:
    assert rewritten(first(), fuse_between_layers, error=1e-6) == ["ImageConv"]


@pytest.mark.parametrize(
    "proto",
    [
        first(outputs=31),
        first(channels=32),
        first(pads=[0, 0, 1, 1]),
        first(strides=[2, 2]),
        first(dilations=[2, 2]),
        first(channels=4, group=2),
    ],
)
def test_other_convolutions_are_left(proto: onnx.ModelProto) -> None:
    assert rewritten(proto, fuse_between_layers, error=1e-6) == []


# --- GEGLU ---


def gated(root: float = 2**0.5, axis: int = 2, num_outputs: int = 2) -> onnx.ModelProto:
    """x → bytes → + bias → halves → h · GELU(g) → bytes → floats, as the exporter and the quantiser leave it."""
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "scale", "zero"], ["bytes"]),
        node("DequantizeLinear", ["bytes", "scale", "zero"], ["floats"]),
        node("Add", ["floats", "bias"], ["shifted"]),
        node("Split", ["shifted"], ["h", "g"], axis=axis, num_outputs=num_outputs),
        node("Div", ["g", "root"], ["scaled"]),
        node("Erf", ["scaled"], ["error"]),
        node("Add", ["error", "one"], ["risen"]),
        node("Mul", ["half", "risen"], ["probability"]),
        node("Mul", ["g", "probability"], ["gelu"]),
        node("Mul", ["h", "gelu"], ["gated"]),
        node("QuantizeLinear", ["gated", "scale", "zero"], ["rounded"]),
        node("DequantizeLinear", ["rounded", "scale", "zero"], ["y"]),
    ]
    numbers = {"scale": 0.03, "root": root, "one": 1, "half": 0.5}
    constants = {name: np.array(number, np.float32) for name, number in numbers.items()}
    constants |= {"zero": np.array(128, np.uint8), "bias": constant(16)}
    return net(nodes, constants, (2, 16, 16), {"y": 3})


def test_geglu_becomes_one_node() -> None:
    assert rewritten(gated(), fuse_between_layers, error=1e-6) == ["QLinearGeglu"]


@pytest.mark.parametrize("proto", [gated(root=1.5), gated(axis=1)])
def test_another_gate_is_left(proto: onnx.ModelProto) -> None:
    assert rewritten(proto, fuse_between_layers, error=0) == []


@pytest.mark.parametrize("name", ["shifted", "h", "g", "gelu", "gated"])
def test_a_gate_that_something_else_looks_into_is_left(name: str) -> None:
    proto = gated()
    proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 3))
    assert rewritten(proto, fuse_between_layers, error=0) == []


@pytest.mark.parametrize("make", [vim_products, attention, mixer, first])
def test_the_graph_that_is_given_stays_as_it_was(make: Callable[[], onnx.ModelProto]) -> None:
    proto = make()
    before = proto.SerializeToString(deterministic=True)
    assert for_onnxruntime_cpu(proto).SerializeToString(deterministic=True) != before
    for rewrite in PASSES:
        rewrite(proto)
    assert proto.SerializeToString(deterministic=True) == before
