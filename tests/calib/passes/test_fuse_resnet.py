"""Which convolutions of a float32 graph are fused with what is around them, and that the graph computes the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mdnet_calib.passes import fuse_resnet
from mdnet_calib.passes.fuse_resnet import fuse_resnets
from mdnet_engines.ops import native
from mdnet_engines.ops.resnet import CONVOLUTIONS
from mdnet_engines.ops.selective_scan import DOMAIN

RANDOM = np.random.default_rng(0)
NARROW, WIDE, GROUPS = 35, 50, 5
needs_library = pytest.mark.skipif(native.custom_op_library() is None, reason="installed without its native library")
EITHER = [False, pytest.param(True, marks=needs_library)]


class Net:
    """Builds a graph node by node, as torch's exporter writes them, with random weights."""

    def __init__(self, height: int = 33, width: int = 37) -> None:
        self.nodes: list[NodeProto] = []
        self.constants = {
            "by_group": np.array([0, GROUPS, -1]),
            "ones": np.ones(GROUPS, np.float32),
            "zeros": np.zeros(GROUPS, np.float32),
        }
        self.size = ["batch", height, width]
        self.values: dict[str, onnx.ValueInfoProto] = {}

    def image(self, name: str, channels: int) -> onnx.ValueInfoProto:
        batch, height, width = self.size
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, channels, height, width])

    def add(self, kind: str, inputs: list[str], y: str, channels: int = 0, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [y], name=f"node_{y}", **attributes))
        if channels:
            self.values[y] = self.image(y, channels)
        return y

    def constant(self, name: str, *shape: int) -> str:
        self.constants[name] = (RANDOM.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        return name

    def norm(self, x: str, y: str, channels: int, *, silu: bool = True) -> str:
        shape = self.add("Shape", [x], f"{y}_shape", start=0)
        grouped = self.add("Reshape", [x, "by_group"], f"{y}_grouped", allowzero=0)
        unit = self.add("InstanceNormalization", [grouped, "ones", "zeros"], f"{y}_unit", epsilon=1e-6)
        back = self.add("Reshape", [unit, shape], f"{y}_back", channels)
        scaled = self.add("Mul", [back, self.constant(f"{y}_gamma", channels, 1, 1)], f"{y}_scaled", channels)
        normal = self.add("Add", [scaled, self.constant(f"{y}_beta", channels, 1, 1)], f"{y}_normal", channels)
        if not silu:
            return normal
        return self.add("Mul", [normal, self.add("Sigmoid", [normal], f"{y}_gate", channels)], y, channels)

    def conv(self, x: str, y: str, channels: int, outputs: int, kernel: int = 3, **attributes: object) -> str:
        weights = self.constant(f"{y}_w", outputs, channels, kernel, kernel)
        inputs = [x, weights, self.constant(f"{y}_bias", outputs)]
        return self.add("Conv", inputs, y, outputs, **{"pads": [kernel // 2] * 4, **attributes})

    def block(self, x: str, y: str, channels: int, outputs: int) -> str:
        """norm → silu → conv → norm → silu → conv, and the sum with x, or with a 1 × 1 convolution of it."""
        first = self.conv(self.norm(x, f"{y}_n1", channels), f"{y}_c1", channels, outputs)
        second = self.conv(self.norm(first, f"{y}_n2", outputs), f"{y}_c2", outputs, outputs)
        if channels != outputs:
            x = self.conv(x, f"{y}_shortcut", channels, outputs, kernel=1)
        return self.add("Add", [x, second], y, outputs)

    def model(self, outputs: dict[str, int]) -> onnx.ModelProto:
        constants = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(
            self.nodes,
            "net",
            [self.image("x", NARROW)],
            [self.image(name, channels) for name, channels in outputs.items()],
            constants,
            value_info=[value for name, value in self.values.items() if name not in outputs],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(proto: onnx.ModelProto, x: np.ndarray, *, registered: bool = False) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if registered:
        options.register_custom_ops_library(str(native.custom_op_library()))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def fused(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The rewritten graph, which holds nothing that nothing reads."""
    made = fuse_resnets(proto)
    onnx.checker.check_model(made, full_check=True)
    graph = made.graph
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    written = [name for node in graph.node for name in node.output]
    assert set(written) <= read
    assert {tensor.name for tensor in graph.initializer} <= read
    assert {value.name for value in graph.value_info} <= set(written)
    assert len({node.name for node in graph.node}) == len(graph.node)
    return made


def kinds(proto: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def ours(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node if node.domain == DOMAIN]


def two_blocks() -> onnx.ModelProto:
    """Between convolutions that stay, of which one has steps of 2, and with a sum that another node reads too."""
    net = Net()
    net.conv("x", "a", NARROW, NARROW)
    net.block("a", "b", NARROW, WIDE)
    net.block("b", "c", WIDE, WIDE)
    net.norm("c", "n", WIDE, silu=False)
    net.conv("c", "d", WIDE, WIDE, kernel=1)
    return net.model({"n_normal": WIDE, "d": WIDE})


@pytest.mark.parametrize("registered", EITHER)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_graph_computes_the_same(batch: int, registered: bool) -> None:
    """With an odd number of places and channels."""
    proto, x = two_blocks(), RANDOM.normal(size=(batch, NARROW, 33, 37)).astype(np.float32)
    for got, expected in zip(run(fused(proto), x, registered=registered), run(proto, x), strict=True):
        np.testing.assert_allclose(got, expected, atol=3e-5 * np.abs(expected).max(), rtol=0)


def test_blocks_become_two_nodes_and_stay_channels_last() -> None:
    """Three Transposes are left: in front, behind, and one of the weights of the shortcut's product."""
    made = fused(two_blocks())
    assert ours(made) == ["GroupNormSiluConv", "GroupNormSiluConvSum"] * 2
    assert kinds(made)["Conv"] == 2
    assert kinds(made)["InstanceNormalization"] == 1
    assert kinds(made)["Transpose"] == 3
    assert sorted(function.name for function in made.functions) == sorted(CONVOLUTIONS.values())


def test_a_shortcut_becomes_a_product_whose_bias_goes_to_the_sum() -> None:
    made = fused(two_blocks())
    assert kinds(made)["MatMul"] == 1
    producer = {output: node for node in made.graph.node for output in node.output}
    first = next(node for node in made.graph.node if node.op_type == CONVOLUTIONS[True])
    assert [producer[name].op_type for name in first.input[4:]] == ["Add", "MatMul"]
    assert list(producer[first.input[4]].input) == ["b_c2_bias", "b_shortcut_bias"]


def test_a_shortcut_that_something_else_reads_stays() -> None:
    net = Net()
    net.block("x", "b", NARROW, WIDE)
    net.conv("b_shortcut", "y", WIDE, WIDE)
    made = fused(net.model({"b": WIDE, "y": WIDE}))
    assert kinds(made)["MatMul"] == 0
    assert ours(made) == ["GroupNormSiluConv", "GroupNormSiluConvSum"]


def test_constants_outside_of_the_file_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    onnx.save(two_blocks(), file, save_as_external_data=True, location="net.data", size_threshold=1024)
    (tmp_path / "net.data").unlink()
    assert ours(fuse_resnets(onnx.load(file, load_external_data=False)))


@pytest.mark.parametrize(
    "attributes",
    [
        {"strides": [2, 2]},
        {"dilations": [2, 2], "pads": [2] * 4},
        {"pads": [0] * 4},
        {"pads": [0, 0, 2, 2]},
        {"auto_pad": "SAME_UPPER"},
    ],
)
def test_another_convolution_stays(attributes: dict[str, object]) -> None:
    net = Net()
    net.conv(net.norm("x", "n", NARROW), "y", NARROW, WIDE, **attributes)
    proto = net.model({"y": WIDE})
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4))
    assert fuse_resnets(proto) == proto


def test_few_places_or_channels_stay() -> None:
    small, few = Net(31, 33), Net()
    small.conv(small.norm("x", "n", NARROW), "y", NARROW, WIDE)
    few.conv(few.norm("x", "n", NARROW), "y", NARROW, 31)
    for proto in (small.model({"y": WIDE}), few.model({"y": 31})):
        assert fuse_resnets(proto) == proto
    assert fuse_resnet.MIN_PLACES == 1024  # 31 * 33 is one less


@pytest.mark.parametrize("inner", ["n_normal", "n", "n_back"])
def test_a_chain_that_something_else_looks_into_stays(inner: str) -> None:
    net = Net()
    net.conv(net.norm("x", "n", NARROW), "y", NARROW, WIDE)
    proto = net.model({"y": WIDE, inner: NARROW})
    assert fuse_resnets(proto) == proto


def test_without_silu_it_stays() -> None:
    net = Net()
    net.conv(net.norm("x", "n", NARROW, silu=False), "y", NARROW, WIDE)
    proto = net.model({"y": WIDE})
    assert fuse_resnets(proto) == proto


@pytest.mark.parametrize("other", ["column", "itself"])
@pytest.mark.parametrize("registered", EITHER)
def test_a_sum_with_something_of_another_shape_stays(other: str, registered: bool) -> None:
    net = Net()
    conv = net.conv(net.norm("x", "n", NARROW), "c", NARROW, WIDE)
    net.add("Add", [conv, net.constant("column", WIDE, 1, 1) if other == "column" else conv], "y", WIDE)
    proto, x = net.model({"y": WIDE}), RANDOM.normal(size=(2, NARROW, 33, 37)).astype(np.float32)
    made = fused(proto)
    assert ours(made) == ["GroupNormSiluConv"]
    assert kinds(made)["Add"] == 1
    (got,), (expected,) = run(made, x, registered=registered), run(proto, x)
    np.testing.assert_allclose(got, expected, atol=3e-5 * np.abs(expected).max(), rtol=0)


def test_the_graph_that_is_given_stays_as_it_was() -> None:
    proto = two_blocks()
    before = proto.SerializeToString(deterministic=True)
    fuse_resnets(proto)
    assert proto.SerializeToString(deterministic=True) == before
