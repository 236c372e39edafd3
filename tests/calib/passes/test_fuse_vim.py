"""Which nodes of Vim are fused, which are left, and that the graph computes the same.

The plainest cases are in test_onnxruntime_cpu.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mdnet_calib.passes.fuse_vim import fuse_vim
from mdnet_engines.ops import native
from mdnet_engines.ops.selective_scan import DOMAIN, VERSION

RANDOM = np.random.default_rng(0)
CHANNELS, LENGTH, TAPS = 6, 20, 4
X = RANDOM.normal(size=(2, CHANNELS, LENGTH)).astype(np.float32)
TOLERANCE = 1e-6  # of the norm: float32, in another order
EITHER = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(native.custom_op_library() is None, reason="no native library")),
]
Spoil = Callable[[onnx.ModelProto], None]


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def net(taps: int = TAPS, **attributes: object) -> onnx.ModelProto:
    """x → depthwise convolution → SiLU → u → root mean square norm → y"""
    node = helper.make_node
    nodes = [
        node(
            "Conv", ["x", "w", "bias"], ["c"], name="conv", **{"group": CHANNELS, "pads": [taps - 1, 0], **attributes}
        ),
        node("Sigmoid", ["c"], ["gate"], name="sigmoid"),
        node("Mul", ["c", "gate"], ["u"], name="silu"),
        node("Mul", ["u", "u"], ["square"], name="square"),
        node("ReduceMean", ["square", "last"], ["mean"], name="mean"),
        node("Sqrt", ["mean"], ["root"], name="root"),
        node("Reciprocal", ["root"], ["inverse"], name="inverse"),
        node("Mul", ["u", "inverse"], ["y"], name="norm"),
    ]
    constants = {"w": normal(CHANNELS, 1, taps), "bias": normal(CHANNELS), "last": np.array([-1])}
    graph = helper.make_graph(
        nodes,
        "vim",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", CHANNELS, LENGTH])],
        [of_three_axes("y")],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def of_three_axes(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 3)


def run(proto: onnx.ModelProto, *, registered: bool = False) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if registered:
        options.register_custom_ops_library(str(native.custom_op_library()))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X.astype(np.float16 if "float16" in session.get_inputs()[0].type else np.float32)})


def fused(proto: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    made = fuse_vim(made)
    onnx.checker.check_model(made, full_check=True)
    return made


def kinds(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def assert_alike(got: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert np.linalg.norm(one - other) <= TOLERANCE * np.linalg.norm(other)


CONV, SILU = ["Conv", "Sigmoid", "Mul"], ["DepthwiseConvSilu"]
MEAN, NORM, DIVISION = ["Mul", "ReduceMean", "Sqrt"], ["Reciprocal", "Mul"], ["Div"]


# --- what is fused ---


@pytest.mark.parametrize("registered", EITHER)
@pytest.mark.parametrize(
    ("taps", "pads"), [(4, [3, 0]), (4, [0, 3]), (4, [1, 2]), (1, [0, 0]), (2, [1, 0]), (9, [8, 0]), (30, [29, 0])]
)
def test_a_convolution_takes_its_silu_in_and_a_norm_divides(taps: int, pads: list[int], registered: bool) -> None:
    before = net(taps, pads=pads)
    made = fused(before)
    assert kinds(made) == [*SILU, *MEAN, *DIVISION]
    attributes = {a.name: helper.get_attribute_value(a) for a in made.graph.node[0].attribute}
    assert attributes == {"group": CHANNELS, "before": pads[0]}
    assert list(made.graph.node[-1].input) == ["u", "root"]
    assert_alike(run(made, registered=registered), run(before))


def test_the_file_carries_one_body_and_nothing_unused() -> None:
    made = fused(net())
    assert [function.name for function in made.functions] == SILU
    assert {opset.domain: opset.version for opset in made.opset_import} == {"": 18, DOMAIN: VERSION}
    read = {name for node in made.graph.node for name in node.input} | {value.name for value in made.graph.output}
    written = {name for node in made.graph.node for name in node.output}
    assert written <= read
    assert {tensor.name for tensor in made.graph.initializer} == {"w", "bias", "last"}
    assert len({node.name for node in made.graph.node}) == len(made.graph.node)


def test_a_second_pass_changes_nothing() -> None:
    made = fused(net())
    assert fused(made).SerializeToString() == made.SerializeToString()


def test_constants_may_lie_outside_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "vim.onnx"
    onnx.save(net(), file, save_as_external_data=True, location="vim.data", size_threshold=0)
    assert kinds(fuse_vim(onnx.load(file, load_external_data=False))) == [*SILU, *MEAN, *DIVISION]


# --- changes to the graph ---


def node(proto: onnx.ModelProto, name: str) -> NodeProto:
    (found,) = (node for node in proto.graph.node if node.name == name)
    return found


def change(name: str, **attributes: object) -> Spoil:
    """Give the convolution other attributes."""

    def spoil(proto: onnx.ModelProto) -> None:
        conv = node(proto, name)
        kept = [attribute for attribute in conv.attribute if attribute.name not in attributes]
        del conv.attribute[:]
        conv.attribute.extend(kept)
        conv.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())

    return spoil


def without_pads(**attributes: object) -> Spoil:
    def spoil(proto: onnx.ModelProto) -> None:
        conv = node(proto, "conv")
        kept = [attribute for attribute in conv.attribute if attribute.name != "pads"]
        del conv.attribute[:]
        conv.attribute.extend(kept)
        change("conv", **attributes)(proto)

    return spoil


def weights(name: str, array: np.ndarray, **attributes: object) -> Spoil:
    def spoil(proto: onnx.ModelProto) -> None:
        (found,) = (tensor for tensor in proto.graph.initializer if tensor.name == name)
        found.CopyFrom(numpy_helper.from_array(array, name))
        change("conv", **attributes)(proto)

    return spoil


def computed(name: str) -> Spoil:
    def spoil(proto: onnx.ModelProto) -> None:
        proto.graph.node.insert(0, helper.make_node("Identity", [name], ["computed"], name="identity"))
        conv = node(proto, "conv")
        conv.input[list(conv.input).index(name)] = "computed"

    return spoil


def only_a_default(name: str) -> Spoil:
    def spoil(proto: onnx.ModelProto) -> None:
        (found,) = (tensor for tensor in proto.graph.initializer if tensor.name == name)
        proto.graph.input.append(helper.make_tensor_value_info(name, found.data_type, found.dims))

    return spoil


def without_bias(proto: onnx.ModelProto) -> None:
    del node(proto, "conv").input[2]


def also_out(name: str) -> Spoil:
    return lambda proto: proto.graph.output.append(of_three_axes(name))


def also_read(name: str) -> Spoil:
    def spoil(proto: onnx.ModelProto) -> None:
        proto.graph.node.append(helper.make_node("Neg", [name], ["read_too"], name="reader"))
        proto.graph.output.append(of_three_axes("read_too"))

    return spoil


def read_in_a_branch(name: str) -> Spoil:
    def spoil(proto: onnx.ModelProto) -> None:
        inner = helper.make_graph(
            [helper.make_node("Neg", [name], ["negated"])], "branch", [], [of_three_axes("negated")]
        )
        proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
        branch = helper.make_node("If", ["yes"], ["read_too"], name="if", then_branch=inner, else_branch=inner)
        proto.graph.node.append(branch)
        proto.graph.output.append(of_three_axes("read_too"))

    return spoil


def reads(name: str, index: int, value: str) -> Spoil:
    """Have a node read another value."""

    def spoil(proto: onnx.ModelProto) -> None:
        node(proto, name).input[index] = value

    return spoil


def is_now(name: str, kind: str) -> Spoil:
    def spoil(proto: onnx.ModelProto) -> None:
        node(proto, name).op_type = kind

    return spoil


def of_an_image(proto: onnx.ModelProto) -> None:
    """Two axes for places, of which one has a single place."""
    conv = node(proto, "conv")
    conv.input[0] = "image"
    conv.output[0] = "image_c"
    axis = numpy_helper.from_array(np.array([2]), "axis")
    at = list(proto.graph.node).index(conv)
    proto.graph.node.insert(at + 1, helper.make_node("Squeeze", ["image_c", "axis"], ["c"], name="squeeze"))
    proto.graph.node.insert(at, helper.make_node("Unsqueeze", ["x", "axis"], ["image"], name="unsqueeze"))
    proto.graph.initializer.append(axis)
    weights("w", normal(CHANNELS, 1, 1, TAPS), pads=[0, 3, 0, 0])(proto)


def in_float16(proto: onnx.ModelProto) -> None:
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))


def test_operands_may_be_in_either_order() -> None:
    proto = net()
    for name in ("silu", "norm"):
        first, second = node(proto, name).input
        node(proto, name).input[:] = [second, first]
    made = fused(proto)
    assert kinds(made) == [*SILU, *MEAN, *DIVISION]
    assert list(made.graph.node[-1].input) == ["u", "root"]
    assert_alike(run(made), run(proto))


@pytest.mark.parametrize("spoil", [also_out("u"), also_read("u"), also_out("root"), also_read("root")])
def test_values_at_the_ends_may_be_read_elsewhere(spoil: Spoil) -> None:
    proto = net()
    spoil(proto)
    made = fused(proto)
    assert [kind for kind in kinds(made) if kind != "Neg"] == [*SILU, *MEAN, *DIVISION]
    assert_alike(run(made), run(proto))


# --- what is left ---

LEFT: dict[str, Spoil] = {
    "the output is longer": change("conv", pads=[TAPS, 0]),
    "the output is shorter": change("conv", pads=[TAPS - 2, 0]),
    "no pads": without_pads(),
    "strides": change("conv", strides=[2]),
    "dilations": change("conv", dilations=[3], pads=[9, 0]),
    "dilations that shorten": change("conv", dilations=[2]),
    "auto_pad SAME_UPPER": without_pads(auto_pad="SAME_UPPER"),
    "auto_pad VALID": without_pads(auto_pad="VALID"),
    "auto_pad SAME_LOWER": without_pads(auto_pad="SAME_LOWER"),
    "some channels to a filter": weights("w", normal(CHANNELS, 2, TAPS), group=CHANNELS // 2),
    "all channels to a filter": weights("w", normal(CHANNELS, CHANNELS, TAPS), group=1),
    "an image": of_an_image,
    "computed weights": computed("w"),
    "a computed bias": computed("bias"),
    "weights that are only a default": only_a_default("w"),
    "a bias that is only a default": only_a_default("bias"),
    "no bias": without_bias,
    "the sum is an output": also_out("c"),
    "the sum is read elsewhere": also_read("c"),
    "the sum is read in a branch": read_in_a_branch("c"),
    "the gate is an output": also_out("gate"),
    "the gate is read elsewhere": also_read("gate"),
    "the gate is read in a branch": read_in_a_branch("gate"),
    "the gate is another value's": reads("sigmoid", 0, "x"),
    "the gate is for another value": reads("silu", 0, "x"),
    "the gate for itself": reads("silu", 0, "gate"),
    "another gate": is_now("sigmoid", "HardSigmoid"),
    "a gate that is added": is_now("silu", "Add"),
}


def two_filters_to_a_channel(proto: onnx.ModelProto) -> None:
    """The output has twice the channels."""
    weights("w", normal(2 * CHANNELS, 1, TAPS))(proto)
    weights("bias", normal(2 * CHANNELS))(proto)


LEFT["two filters to a channel"] = two_filters_to_a_channel


@pytest.mark.parametrize("why", LEFT)
def test_a_convolution_that_is_not_exactly_so_is_left(why: str) -> None:
    proto = net()
    LEFT[why](proto)
    made = fused(proto)
    assert made.functions == []
    assert {node.domain for node in made.graph.node} == {""}
    assert kinds(made).count("Conv") == 1
    assert "Div" in kinds(made)
    assert_alike(run(made), run(proto))


def test_a_convolution_in_float16_is_left() -> None:
    proto = net()
    in_float16(proto)
    made = fused(proto)
    assert kinds(made) == [*CONV, *MEAN, *DIVISION]
    assert run(made)[0].dtype == np.float16


UNDIVIDED: dict[str, Spoil] = {
    "the inverse is an output": also_out("inverse"),
    "the inverse is read elsewhere": also_read("inverse"),
    "the inverse is read in a branch": read_in_a_branch("inverse"),
    "the inverse by itself": reads("norm", 0, "inverse"),
    "the inverse is added": is_now("norm", "Add"),
    "the inverse of something else": is_now("root", "Exp"),
    "the inverse of an input": reads("inverse", 0, "x"),
}


@pytest.mark.parametrize("why", UNDIVIDED)
def test_a_norm_that_is_not_exactly_so_is_left(why: str) -> None:
    proto = net()
    UNDIVIDED[why](proto)
    made = fused(proto)
    assert "Div" not in kinds(made)
    assert kinds(made).count("Reciprocal") == 1
    assert kinds(made)[0] == SILU[0]
    assert_alike(run(made), run(proto))


@pytest.mark.parametrize("x", [0.0, 1.0, np.inf])
def test_a_norm_of_nothing_is_what_it_was(x: float) -> None:
    """Division by a root of 0: what was no number, or infinity, still is."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Sqrt", ["x"], ["root"], name="root"),
        helper.make_node("Reciprocal", ["root"], ["inverse"], name="inverse"),
        helper.make_node("Mul", ["x", "inverse"], ["y"], name="norm"),
    ]
    graph = helper.make_graph(
        nodes, "root", [value("x", TensorProto.FLOAT, [None] * 3)], [value("y", TensorProto.FLOAT, [None] * 3)]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    made = fused(proto)
    assert kinds(made) == ["Sqrt", "Div"]
    assert {opset.domain for opset in made.opset_import} == {""}
    results = []
    for each in (proto, made):
        session = onnxruntime.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"])
        results.append(session.run(None, {"x": np.full((1, 1, 1), x, np.float32)})[0])
    np.testing.assert_array_equal(*results)
