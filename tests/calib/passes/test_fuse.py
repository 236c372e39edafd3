"""Which chains of a uint8 graph are fused, which are left, and that the graph computes the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mdnet_calib.passes.fuse import fuse_between_layers
from mdnet_calib.passes.int8 import activations, int8_nodes, to_int8, with_unsigned_activations
from mdnet_engines.ops import native
from mdnet_engines.ops.selective_scan import DOMAIN, VERSION

RANDOM = np.random.default_rng(0)
CHANNELS, GROUPS, SIZE = 32, 4, 12
X = RANDOM.normal(size=(2, CHANNELS, SIZE, SIZE)).astype(np.float32)


def group_norm(x: str, name: str, *, silu: bool) -> list[NodeProto]:
    """The nodes that torch's exporter makes of a GroupNorm, and of a SiLU behind it; the last gives `name`."""
    normal = f"{name}_normal" if silu else name
    nodes = [
        helper.make_node("Shape", [x], [f"{name}_shape"], name=f"{name}/shape", start=0),
        helper.make_node("Reshape", [x, "by_group"], [f"{name}_grouped"], name=f"{name}/grouped", allowzero=0),
        helper.make_node(
            "InstanceNormalization",
            [f"{name}_grouped", "ones", "zeros"],
            [f"{name}_unit"],
            name=f"{name}/norm",
            epsilon=1e-6,
        ),
        helper.make_node("Reshape", [f"{name}_unit", f"{name}_shape"], [f"{name}_back"], name=f"{name}/back"),
        helper.make_node("Mul", [f"{name}_back", "gamma"], [f"{name}_scaled"], name=f"{name}/scaled"),
        helper.make_node("Add", [f"{name}_scaled", "beta"], [normal], name=f"{name}/shifted"),
    ]
    if silu:
        nodes += [
            helper.make_node("Sigmoid", [normal], [f"{name}_gate"], name=f"{name}/sigmoid"),
            helper.make_node("Mul", [normal, f"{name}_gate"], [name], name=f"{name}/gated"),
        ]
    return nodes


def image_of(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", CHANNELS, SIZE, SIZE])


def float_net() -> onnx.ModelProto:
    """A ResNet block, and what comes before attention.

    x → conv → a ─┬─ n1 = silu(norm) → conv → b ─┐
                  └────────────────────────────── s ─┬─ n2 = norm → conv → c
                                                     └─ n3 = silu(norm) → conv → d
    """
    nodes = [
        helper.make_node("Conv", ["x", "w_a"], ["a"], name="conv_a", pads=[1, 1, 1, 1]),
        *group_norm("a", "n1", silu=True),
        helper.make_node("Conv", ["n1", "w_b"], ["b"], name="conv_b", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["a", "b"], ["s"], name="sum"),
        *group_norm("s", "n2", silu=False),
        helper.make_node("Conv", ["n2", "w_c"], ["c"], name="conv_c"),
        *group_norm("s", "n3", silu=True),
        helper.make_node("Conv", ["n3", "w_d"], ["d"], name="conv_d"),
    ]
    weights = {
        "w_a": RANDOM.normal(size=(CHANNELS, CHANNELS, 3, 3)) / 17,
        "w_b": RANDOM.normal(size=(CHANNELS, CHANNELS, 3, 3)) / 17,
        "w_c": RANDOM.normal(size=(CHANNELS, CHANNELS, 1, 1)) / 6,
        "w_d": RANDOM.normal(size=(CHANNELS, CHANNELS, 1, 1)) / 6,
        "gamma": RANDOM.uniform(0.5, 2, (CHANNELS, 1, 1)),
        "beta": RANDOM.normal(size=(CHANNELS, 1, 1)),
        "ones": np.ones(GROUPS),
        "zeros": np.zeros(GROUPS),
    }
    constants = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    constants.append(numpy_helper.from_array(np.array([0, GROUPS, -1]), "by_group"))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", CHANNELS, SIZE, SIZE])],
        [
            image_of("c"),
            image_of("d"),
        ],
        constants,
        # The exporter knows what inference does not: the shape that a normalised value gets back.
        value_info=[image_of(f"n{i}_back") for i in (1, 2, 3)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True)


def run(model: onnx.ModelProto | Path, *, registered: bool = False) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if registered:
        options.register_custom_ops_library(str(native.custom_op_library()))
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})


def of_four_axes(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4)


def copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    return made


@pytest.fixture(scope="module")
def signed() -> onnx.ModelProto:
    """The net with its four convolutions and products between Q/DQ pairs, int8."""
    proto = float_net()
    names = activations(proto, int8_nodes(proto))
    probed = copy(proto)
    inner = [name for name in names if name not in ("x", "c", "d")]
    probed.graph.output.extend(of_four_axes(name) for name in inner)
    values = dict(zip(["c", "d", *inner], run(probed), strict=True)) | {"x": X}
    return to_int8(copy(proto), {name: float(np.abs(values[name]).max()) for name in names}, int8_nodes(proto))


@pytest.fixture
def net(signed: onnx.ModelProto) -> onnx.ModelProto:
    """The same with uint8 activations."""
    return with_unsigned_activations(copy(signed))


def fused(proto: onnx.ModelProto) -> onnx.ModelProto:
    made = fuse_between_layers(copy(proto))
    onnx.checker.check_model(made, full_check=True)
    return made


def kinds(proto: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def ours(proto: onnx.ModelProto) -> list[str]:
    return sorted(node.op_type for node in proto.graph.node if node.domain == DOMAIN)


def close(got: np.ndarray, expected: np.ndarray) -> bool:
    """Few values may be a step off, and what a convolution makes of these."""
    return np.linalg.norm(got - expected) < 0.01 * np.linalg.norm(expected)


ALL = ["GroupNormQuantize", "GroupNormSiluQuantize", "QLinearGroupNormSilu", "QLinearResidualSum"]
OTHERS = [name for name in ALL if name != "QLinearGroupNormSilu"]


def test_every_chain_and_every_sum_becomes_one_node(net: onnx.ModelProto) -> None:
    made = fused(net)
    assert ours(made) == ALL
    gone = {"InstanceNormalization", "Sigmoid", "Mul", "Shape", "Reshape", "Add"}
    assert not gone & kinds(made).keys()
    assert sorted(function.name for function in made.functions) == sorted(set(ALL))
    assert {opset.domain: opset.version for opset in made.opset_import} == {"": 18, DOMAIN: VERSION}


def test_bytes_are_read_where_a_layer_leaves_bytes(net: onnx.ModelProto) -> None:
    made = fused(net)
    producer = {output: node for node in made.graph.node for output in node.output}
    sources = {}
    for node in made.graph.node:
        if node.domain == DOMAIN:
            moved = [producer[name] for name in node.input if name in producer]
            assert {transpose.op_type for transpose in moved} == {"Transpose"}
            sources[node.op_type] = [producer[transpose.input[0]].op_type for transpose in moved]
    assert sources == {
        "QLinearGroupNormSilu": ["QuantizeLinear"],
        "QLinearResidualSum": ["QuantizeLinear", "QuantizeLinear"],
        "GroupNormQuantize": ["Transpose"],  # of the sum
        "GroupNormSiluQuantize": ["Transpose"],
    }


def test_groups_and_epsilon_are_kept(net: onnx.ModelProto) -> None:
    norms = [node for node in fused(net).graph.node if "GroupNorm" in node.op_type]
    assert len(norms) == 3
    for norm in norms:
        attributes = {a.name: helper.get_attribute_value(a) for a in norm.attribute}
        assert attributes == {"groups": GROUPS, "epsilon": pytest.approx(1e-6)}


def test_nothing_unused_is_left_and_names_are_unique(net: onnx.ModelProto) -> None:
    made = fused(net).graph
    read = {name for node in made.node for name in node.input} | {value.name for value in made.output}
    written = [name for node in made.node for name in node.output]
    assert set(written) <= read
    assert {tensor.name for tensor in made.initializer} <= read
    assert {value.name for value in made.value_info} <= set(written)
    assert len(set(written)) == len(written)
    named = [node.name for node in made.node if node.name]
    assert len(set(named)) == len(named)


def test_inputs_and_outputs_of_the_graph_do_not_change(net: onnx.ModelProto) -> None:
    made = fused(net)
    for before, after in ((net.graph.input, made.graph.input), (net.graph.output, made.graph.output)):
        assert [part.SerializeToString() for part in before] == [part.SerializeToString() for part in after]


def test_without_our_library_the_graph_computes_the_same(net: onnx.ModelProto) -> None:
    for got, expected in zip(run(fused(net)), run(net), strict=True):
        assert close(got, expected)


@pytest.mark.skipif(native.custom_op_library() is None, reason="mdnet was installed without its native library")
def test_with_our_library_the_graph_computes_the_same(net: onnx.ModelProto) -> None:
    for got, expected in zip(run(fused(net), registered=True), run(net), strict=True):
        assert close(got, expected)


def test_a_graph_is_fused_without_its_weights_in_memory(net: onnx.ModelProto, tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    onnx.save(copy(net), file, save_as_external_data=True, location="net.data", size_threshold=100)
    light = onnx.load(file, load_external_data=False)
    gamma = next(tensor for tensor in light.graph.initializer if tensor.name == "gamma")
    assert gamma.data_location == TensorProto.EXTERNAL
    onnx.save(fuse_between_layers(light), file)
    onnx.checker.check_model(file, full_check=True)
    assert ours(onnx.load(file)) == ALL
    assert close(run(file)[0], run(net)[0])


def laid_out(proto: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The graph that ONNX Runtime makes of `proto`, with our library."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "laid_out.onnx")
    options.register_custom_ops_library(str(native.custom_op_library()))
    onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "laid_out.onnx")


@pytest.mark.skipif(native.custom_op_library() is None, reason="mdnet was installed without its native library")
def test_onnx_runtime_moves_nothing_between_convolutions(net: onnx.ModelProto, tmp_path: Path) -> None:
    """It transposes the graph's inputs and outputs, and has its convolutions channels last as we have our operators."""
    made = laid_out(fused(net), tmp_path)
    convolutions = [node for node in made.graph.node if node.op_type == "QLinearConv"]
    assert [[a.i for a in node.attribute if a.name == "channels_last"] for node in convolutions] == [[1]] * 4
    producer = {output: node for node in made.graph.node for output in node.output}
    for node in made.graph.node:
        if node.domain == DOMAIN:
            assert producer[node.input[0]].op_type in ("QLinearConv", "QLinearResidualSum")
    assert kinds(made)["Transpose"] == 3


def test_a_second_pass_changes_nothing(net: onnx.ModelProto) -> None:
    made = fused(net)
    assert fused(made).SerializeToString() == made.SerializeToString()


def test_a_graph_in_float_or_with_signed_bytes_is_left_as_it_is(signed: onnx.ModelProto) -> None:
    for proto in (float_net(), signed):
        assert fused(proto).SerializeToString() == proto.SerializeToString()


# --- what is left alone ---


def node(proto: onnx.ModelProto, name: str) -> NodeProto:
    (found,) = (node for node in proto.graph.node if node.name == name)
    return found


def also_out(name: str) -> Callable[[onnx.ModelProto], None]:
    return lambda proto: proto.graph.output.append(of_four_axes(name))


def also_read(name: str) -> Callable[[onnx.ModelProto], None]:
    def spoil(proto: onnx.ModelProto) -> None:
        proto.graph.node.append(helper.make_node("Neg", [name], ["read_too"]))
        axes = 3 if name.endswith("_grouped") else 4
        proto.graph.output.append(helper.make_tensor_value_info("read_too", TensorProto.FLOAT, [None] * axes))

    return spoil


def constant(at: str, index: int, array: np.ndarray) -> Callable[[onnx.ModelProto], None]:
    """Give the node `at` another constant as its input `index`."""

    def spoil(proto: onnx.ModelProto) -> None:
        node(proto, at).input[index] = "other"
        proto.graph.initializer.append(numpy_helper.from_array(array, "other"))

    return spoil


def scale_with_an_axis(proto: onnx.ModelProto) -> None:
    """Scale and zero-point of the chain's end, and of what reads it, are rows of one."""
    (quantise,) = (node for node in proto.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "n1")
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    rows = {name: f"{name}_row" for name in quantise.input[1:]}
    for name, row in rows.items():
        proto.graph.initializer.append(numpy_helper.from_array(values[name].reshape(1), row))
    for reader in [node for node in proto.graph.node if node is quantise or node.input[0] == quantise.output[0]]:
        reader.input[1:] = rows.values()


def varying_gamma(proto: onnx.ModelProto) -> None:
    proto.graph.node.insert(0, helper.make_node("Identity", ["gamma"], ["computed"]))
    node(proto, "n1/scaled").input[1] = "computed"


def gate_of_another_value(proto: onnx.ModelProto) -> None:
    node(proto, "n1/sigmoid").input[0] = "n1_scaled"


def shape_of_another_value(proto: onnx.ModelProto) -> None:
    """What the convolution gives has x's shape, but is another value."""
    node(proto, "n1/shape").input[0] = node(proto, "conv_a").output[0]


def read_in_a_subgraph(proto: onnx.ModelProto) -> None:
    """A branch of an If reads the normalised value; no node's inputs name it."""
    inner = helper.make_graph(
        [helper.make_node("Neg", ["n1_normal"], ["negated"])],
        "branch",
        [],
        [of_four_axes("negated")],
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    proto.graph.node.append(helper.make_node("If", ["yes"], ["read_too"], then_branch=inner, else_branch=inner))
    proto.graph.output.append(of_four_axes("read_too"))


SPOILT: dict[str, Callable[[onnx.ModelProto], None]] = {
    "the gated value is an output too": also_out("n1"),
    "the gated value is read twice": also_read("n1"),
    "the normalised value is read twice": also_read("n1_normal"),
    "the normalised value is an output too": also_out("n1_normal"),
    "the normalised value is read by a subgraph": read_in_a_subgraph,
    "the gate is read twice": also_read("n1_gate"),
    "a value inside is an output too": also_out("n1_scaled"),
    "the groups are read twice": also_read("n1_grouped"),
    "groups have a scale of their own": constant("n1/norm", 1, np.array([1, 1, 2, 1], np.float32)),
    "groups have a bias of their own": constant("n1/norm", 2, np.array([0, 0, 1, 0], np.float32)),
    "groups are cut otherwise": constant("n1/grouped", 1, np.array([-1, GROUPS, CHANNELS // GROUPS * SIZE * SIZE])),
    "gamma is for places": constant("n1/scaled", 1, np.ones((1, SIZE, SIZE), np.float32)),
    "gamma is one number": constant("n1/scaled", 1, np.ones((1, 1, 1), np.float32)),
    "gamma has an axis more": constant("n1/scaled", 1, np.ones((1, CHANNELS, 1, 1), np.float32)),
    "gamma is computed": varying_gamma,
    "beta is for places": constant("n1/shifted", 1, np.ones(SIZE, np.float32)),
    "the gate is another value's": gate_of_another_value,
    "the shape is another value's": shape_of_another_value,
    "the scale is a row": scale_with_an_axis,
}


@pytest.mark.parametrize("why", SPOILT)
def test_a_chain_that_is_not_exactly_so_is_left(why: str, net: onnx.ModelProto) -> None:
    SPOILT[why](net)
    onnx.checker.check_model(net, full_check=True)
    made = fused(net)
    assert ours(made) == OTHERS
    assert kinds(made)["InstanceNormalization"] == 1
    assert [function.name for function in made.functions] == OTHERS
    for got, expected in zip(run(made), run(net), strict=True):
        assert close(got, expected)


def of_one_image(proto: onnx.ModelProto) -> None:
    """A term that is broadcast: its batch is 1."""
    proto.graph.node.insert(
        list(proto.graph.node).index(node(proto, "sum")),
        helper.make_node("ReduceMean", [node(proto, "sum").input[0], "batch_axis"], ["one_image"]),
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.array([0]), "batch_axis"))
    node(proto, "sum").input[0] = "one_image"


def per_place(proto: onnx.ModelProto) -> None:
    node(proto, "sum").input[0] = "place"
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((1, 1, SIZE, SIZE), np.float32), "place"))


@pytest.mark.parametrize("spoil", [of_one_image, per_place])
def test_a_sum_of_two_shapes_is_left(spoil: Callable[[onnx.ModelProto], None], net: onnx.ModelProto) -> None:
    spoil(net)
    made = fused(net)
    assert ours(made) == ALL[:3]
    for got, expected in zip(run(made), run(net), strict=True):
        assert close(got, expected)


def test_bytes_that_the_chain_and_the_sum_read_need_no_floats(net: onnx.ModelProto) -> None:
    start = node(net, "n1/grouped").input[0]
    assert start in node(net, "sum").input
    assert not any(start in node.output for node in fused(net).graph.node)


def test_other_readers_of_x_keep_their_floats(net: onnx.ModelProto) -> None:
    """a's DequantizeLinear is read by the chain, by the residual sum, and by a node of another kind."""
    start = node(net, "n1/grouped").input[0]
    net.graph.node.append(helper.make_node("Neg", [start], ["negative"], name="other"))
    net.graph.output.append(image_of("negative"))
    made = fused(net)
    assert any(start in node.output for node in made.graph.node)
    assert sum(start in node.input for node in made.graph.node) == 1
