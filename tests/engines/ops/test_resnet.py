"""The convolutions of a ResNet block against float64: the operators with the kernel and with the function body."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
import pytest
from fences import fenced
from native_scan import isas
from numpy.lib.stride_tricks import sliding_window_view
from onnx import TensorProto, helper, numpy_helper

from mdnet_engines.ops import native
from mdnet_engines.ops.resnet import CONVOLUTIONS, function
from mdnet_engines.ops.selective_scan import DOMAIN, OPSET, VERSION

RANDOM = np.random.default_rng(0)
EPSILON = 1e-6
needs_library = pytest.mark.skipif(native.custom_op_library() is None, reason="installed without its native library")
EITHER = [False, pytest.param(True, marks=needs_library)]
# batch, height, width, channels, outputs, groups
SIZES = [
    (1, 1, 3, 2, 1, 1),
    (2, 4, 4, 32, 32, 8),
    (1, 5, 3, 7, 5, 7),
    (3, 9, 14, 30, 45, 3),
    (2, 33, 6, 64, 96, 32),
    (1, 8, 12, 130, 17, 10),
]


def inputs_of(size: tuple[int, ...], *, residual: bool) -> dict[str, np.ndarray]:
    batch, height, width, channels, outputs, _ = size
    arrays = {
        "x": RANDOM.normal(2, 3, (batch, height, width, channels)),
        "gamma": RANDOM.uniform(0.5, 2, (channels, 1, 1)),
        "beta": RANDOM.normal(size=(channels, 1, 1)),
        "w": RANDOM.normal(size=(outputs, channels, 3, 3)) / np.sqrt(9 * channels),
        "bias": RANDOM.normal(size=outputs),
    }
    if residual:
        arrays["residual"] = RANDOM.normal(size=(batch, height, width, outputs))
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def scale_and_offset(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each image and channel, in float64."""
    batch, channels = len(x), x.shape[-1]
    grouped = x.astype(np.float64).reshape(batch, -1, groups, channels // groups)
    mean = np.repeat(grouped.mean(axis=(1, 3)), channels // groups, axis=1)
    scale = gamma.ravel() / np.sqrt(np.repeat(grouped.var(axis=(1, 3)), channels // groups, axis=1) + EPSILON)
    return scale, beta.ravel() - mean * scale


def expected(inputs: Mapping[str, np.ndarray], groups: int) -> np.ndarray:
    x, w = inputs["x"], inputs["w"].astype(np.float64)
    scale, offset = scale_and_offset(x, inputs["gamma"], inputs["beta"], groups)
    normal = x * scale[:, None, None] + offset[:, None, None]
    padded = np.pad(normal / (1 + np.exp(-normal)), ((0, 0), (1, 1), (1, 1), (0, 0)))
    sums = np.einsum("bhwcij,ocij->bhwo", sliding_window_view(padded, (3, 3), axis=(1, 2)), w)
    return sums + inputs["bias"] + inputs.get("residual", 0)


def model(inputs: Mapping[str, np.ndarray], groups: int, *, constant: bool) -> onnx.ModelProto:
    """One node and its function body; its weights are an input or a constant."""
    operator = CONVOLUTIONS["residual" in inputs]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * array.ndim)
        for name, array in inputs.items()
        if name != "w" or not constant
    ]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)
    node = helper.make_node(operator, list(inputs), ["y"], domain=DOMAIN, groups=groups, epsilon=EPSILON)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    weights = [numpy_helper.from_array(inputs["w"], "w")] if constant else []
    graph = helper.make_graph([node], "one_node", values, [y], weights)
    return helper.make_model(graph, opset_imports=opsets, functions=[function(operator)], ir_version=10)


def run(
    inputs: Mapping[str, np.ndarray], groups: int, *, registered: bool, constant: bool = True, threads: int = 1
) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if registered:
        options.register_custom_ops_library(str(native.custom_op_library()))
    proto = model(inputs, groups, constant=constant)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {value.name: inputs[value.name] for value in session.get_inputs()}
    return session.run(None, feeds)[0]


@pytest.mark.parametrize("registered", EITHER)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_block_is_normalised_gated_and_convolved(size: tuple[int, ...], residual: bool, registered: bool) -> None:
    """By the kernel as exactly as Winograd's transforms allow."""
    inputs, groups = inputs_of(size, residual=residual), size[-1]
    got = run(inputs, groups, registered=registered)
    np.testing.assert_allclose(got, expected(inputs, groups), atol=2e-5, rtol=0)


@needs_library
def test_weights_that_are_no_constant_give_the_same() -> None:
    inputs = inputs_of(SIZES[3], residual=True)
    results = [run(inputs, SIZES[3][-1], registered=True, constant=constant) for constant in (False, True)]
    np.testing.assert_array_equal(*results)


@needs_library
def test_an_image_gives_what_it_gives_alone_with_any_number_of_threads() -> None:
    inputs, groups = inputs_of(SIZES[3], residual=True), SIZES[3][-1]
    whole = run(inputs, groups, registered=True, threads=2)
    for i in range(len(whole)):
        alone = {name: a[i : i + 1] if name in ("x", "residual") else a for name, a in inputs.items()}
        np.testing.assert_array_equal(run(alone, groups, registered=True)[0], whole[i])


@needs_library
def test_no_image_at_all_gives_none() -> None:
    inputs = inputs_of((0, 4, 4, 8, 8, 2), residual=False)
    assert run(inputs, 2, registered=True).shape == (0, 4, 4, 8)


REFUSED = {
    "the channels of x can't be divided by groups": {"groups": 3},
    "groups must be at least 1": {"groups": 0},
    "outputs, channels of x, 3, 3": {"w": np.zeros((8, 7, 3, 3), np.float32)},
    "outputs, channels of x, 3, 3 ": {"w": np.zeros((8, 8, 1, 3), np.float32)},
    "gamma and beta need an element": {"gamma": np.zeros(7, np.float32)},
    "bias must have an element": {"bias": np.zeros(9, np.float32)},
    "the residual must have the shape of y": {"residual": np.zeros((1, 4, 4, 7), np.float32)},
}


@needs_library
@pytest.mark.parametrize("reason", REFUSED)
def test_a_node_whose_inputs_do_not_fit_is_refused(reason: str) -> None:
    inputs = inputs_of((1, 4, 4, 8, 8, 2), residual=True)
    groups = REFUSED[reason].get("groups", 2)
    inputs |= {name: value for name, value in REFUSED[reason].items() if name != "groups"}
    with pytest.raises(Exception, match=f"{CONVOLUTIONS[True]}: .*{reason.strip()}"):
        run(inputs, groups, registered=True)


# --- scale and offset ---


class GroupNormScale(ctypes.Structure):
    """`MdnetGroupNormScale` of `engines/cpp/quantised/quantised.h`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "pixels", "channels", "groups")),
        *((name, ctypes.c_void_p) for name in ("x", "gamma", "beta", "scale", "offset")),
        ("epsilon", ctypes.c_float),
        ("isa", ctypes.c_int32),
    ]


def find_scale(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, groups: int, isa: str) -> list[np.ndarray]:
    loaded = native.library()
    assert loaded is not None
    kept = [fenced(array) for array in (x, gamma, beta)]
    found = [np.full((len(x), x.shape[-1]), np.nan, np.float32) for _ in range(2)]
    pointers = [array.ctypes.data for array in (*kept, *found)]
    call = GroupNormScale(len(x), x.shape[1], x.shape[2], groups, *pointers, EPSILON, native.ISAS[isa])
    assert loaded.mdnet_group_norm_scale(ctypes.byref(call), None, None) == 0
    return found


@needs_library
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("mean", [0, 3, 1000])
@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 100, 6), (1, 3000, 320), (2, 40_000, 5)])
def test_every_build_finds_scale_and_offset(shape: tuple[int, int, int], mean: float, isa: str) -> None:
    """Of values far from 0 too: of the sums of squares only what differs from one value is left then."""
    groups = 5 if shape[2] % 5 == 0 else 2
    x = RANDOM.normal(mean, 1, shape).astype(np.float32)
    gamma, beta = RANDOM.uniform(0.5, 2, shape[2]).astype(np.float32), RANDOM.normal(size=shape[2]).astype(np.float32)
    scale, offset = find_scale(x, gamma, beta, groups, isa)
    scale64, offset64 = scale_and_offset(x, gamma, beta, groups)
    np.testing.assert_allclose(scale, scale64, rtol=2e-5)
    np.testing.assert_allclose(offset, offset64, rtol=2e-5, atol=1e-5)


@needs_library
@pytest.mark.parametrize("changes", [{name: 0} for name in ("batch", "pixels", "channels", "groups")] + [{"groups": 3}])
def test_a_normalisation_that_makes_no_sense_is_refused(changes: Mapping[str, int]) -> None:
    loaded = native.library()
    assert loaded is not None
    memory = np.zeros((5, 8), np.float32)
    call = GroupNormScale(1, 1, 8, 2, *(row.ctypes.data for row in memory), EPSILON, 0)
    for name, value in changes.items():
        setattr(call, name, value)
    assert loaded.mdnet_group_norm_scale(ctypes.byref(call), None, None) == 3
    assert loaded.mdnet_group_norm_scale(None, None, None) == 3
    assert not memory.any()
