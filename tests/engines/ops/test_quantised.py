"""The operators between quantised layers: native builds, ONNX Runtime's operators, function bodies, against float64."""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from native_scan import isas
from onnx import TensorProto, helper
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator

from mdnet_engines.ops import native
from mdnet_engines.ops.quantised import GEGLU, GROUP_NORMS, RESIDUAL_SUMS, function
from mdnet_engines.ops.selective_scan import DOMAIN, OPSET, VERSION

needs_library = pytest.mark.skipif(
    native.custom_op_library() is None, reason="mdnet was installed without its native library"
)
QUIET = 4
X_SCALE, X_ZERO_POINT = np.float32(0.05), np.uint8(117)
# Of the values before they are rounded, in steps of y: 255 steps of a float32 with some ten roundings behind it.
TOLERANCE = 1e-3


def spread(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Values that differ in mean and variance from channel to channel."""
    return rng.normal(size=shape) * rng.uniform(0.2, 2, shape[3]) + rng.normal(size=shape[3])


def far_from_zero(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=shape) + 3000


def alike(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Every group is one value: its variance is 0."""
    return np.full(shape, 1.3)


def alike_but_one(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    values = np.full(shape, 1.3)
    values.flat[0] += 0.05  # a byte's step
    return values


def wide(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes reach both their ends."""
    return rng.normal(size=shape) * 30


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]
    groups: int
    values: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] = spread
    y_scale: float = 0.03
    y_zero_point: int = 128
    epsilon: float = 1e-6


CASES = [
    Case("as in the encoder", (1, 24, 24, 64), 32),
    Case("a batch of odd sizes", (3, 7, 9, 20), 5),
    Case("one channel in a group", (2, 5, 5, 6), 6),
    Case("one group", (2, 5, 11, 7), 1),
    Case("one place", (2, 1, 1, 24), 4),
    Case("one value in a group", (2, 1, 1, 3), 3),
    Case("one channel", (2, 6, 5, 1), 1),
    *(Case(f"{channels} channels", (1, 3, 5, channels), channels // 3) for channels in (9, 15, 18, 33, 63)),
    Case("more channels than are summed at once", (1, 6, 5, 600), 4),
    Case("many blocks", (2, 150, 150, 48), 3),
    Case("blocks of many short sums", (1, 1000, 530, 8), 2),
    Case("bytes at their ends", (1, 40, 40, 8), 2, wide),
    Case("far from zero", (1, 40, 40, 8), 2, far_from_zero),
    Case("no variance", (2, 20, 20, 8), 4, alike),
    Case("hardly any variance", (1, 200, 200, 4), 2, alike_but_one, y_scale=2.0),
    Case("cut at both ends", (1, 20, 20, 8), 4, y_scale=0.004),
    Case("zero-point 0", (1, 20, 20, 8), 4, y_zero_point=0),
    Case("zero-point 255", (1, 20, 20, 8), 4, y_zero_point=255),
    Case("large epsilon", (1, 20, 20, 8), 4, epsilon=2.0),
]


def inputs_of(case: Case, *, quantised: bool) -> dict[str, np.ndarray]:
    """An operator's inputs by name, in its order."""
    rng = np.random.default_rng(len(case.name))
    values = case.values(rng, case.shape)
    channels = case.shape[3]
    made: dict[str, np.ndarray] = {"x": values.astype(np.float32)}
    if quantised:
        bytes_of_x = np.clip(np.rint(values / X_SCALE) + X_ZERO_POINT, 0, 255).astype(np.uint8)
        made = {"x": bytes_of_x, "x_scale": np.array(X_SCALE), "x_zero_point": np.array(X_ZERO_POINT)}
    return {
        **made,
        "gamma": rng.uniform(-1, 2, (channels, 1, 1)).astype(np.float32),
        "beta": rng.normal(size=(channels, 1, 1)).astype(np.float32),
        "y_scale": np.array(case.y_scale, np.float32),
        "y_zero_point": np.array(case.y_zero_point, np.uint8),
    }


def exact_steps(case: Case, inputs: dict[str, np.ndarray], *, silu: bool) -> np.ndarray:
    """y in steps, before it is rounded: the formula of the module, in float64."""
    wide = {name: array.astype(np.float64) for name, array in inputs.items()}
    batch = case.shape[0]
    x = wide["x"]
    if "x_scale" in wide:
        x = (x - wide["x_zero_point"]) * wide["x_scale"]
    grouped = x.reshape(batch, -1, case.groups, case.shape[3] // case.groups)
    mean, variance = (of(grouped, axis=(1, 3), keepdims=True) for of in (np.mean, np.var))
    normal = ((grouped - mean) / np.sqrt(variance + case.epsilon)).reshape(case.shape)
    y = normal * wide["gamma"].ravel() + wide["beta"].ravel()
    if silu:
        y = y / (1 + np.exp(-y))
    return np.clip(y / wide["y_scale"] + wide["y_zero_point"], 0, 255)


def assert_rounded(got: np.ndarray, steps: np.ndarray, tolerance: float = TOLERANCE, isa: str = "") -> None:
    """Hold bytes to being the values' nearest integers, but for values that lie between two."""
    assert got.dtype == np.uint8
    assert got.shape == steps.shape
    assert np.abs(got - steps).max() <= 0.5 + tolerance, isa


# --- the kernel in each build ---


class GroupNorm(ctypes.Structure):
    """`MdnetGroupNorm` of `engines/cpp/quantised/quantised.h`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "pixels", "channels", "groups")),
        *((name, ctypes.c_void_p) for name in ("x", "gamma", "beta", "y")),
        *((name, ctypes.c_float) for name in ("x_scale", "y_scale", "epsilon")),
        *((name, ctypes.c_int32) for name in ("y_zero_point", "x_is_uint8", "silu", "isa")),
    ]


def run_native(case: Case, inputs: dict[str, np.ndarray], *, silu: bool, isa: str = "best") -> np.ndarray:
    loaded = native.library()
    assert loaded is not None
    y = np.full((inputs["x"].size + 64,), 0xA5, np.uint8)
    call = GroupNorm(
        case.shape[0],
        case.shape[1] * case.shape[2],
        case.shape[3],
        case.groups,
        *(inputs[name].ctypes.data for name in ("x", "gamma", "beta")),
        y.ctypes.data,
        float(inputs.get("x_scale", 1)),
        float(inputs["y_scale"]),
        case.epsilon,
        int(inputs["y_zero_point"]),
        "x_scale" in inputs,
        silu,
        native.ISAS[isa],
    )
    assert loaded.mdnet_group_norm(ctypes.byref(call), None, None) == 0
    assert (y[inputs["x"].size :] == 0xA5).all()  # nothing is written behind the end
    return y[: inputs["x"].size].reshape(case.shape)


@needs_library
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_build_agrees_with_the_reference(case: Case, quantised: bool, silu: bool) -> None:
    inputs = inputs_of(case, quantised=quantised)
    expected = exact_steps(case, inputs, silu=silu)
    for isa in isas():
        assert_rounded(run_native(case, inputs, silu=silu, isa=isa), expected, isa=isa)


@needs_library
@pytest.mark.parametrize("isa", isas())
def test_every_byte_is_read_as_itself(isa: str) -> None:
    """All 256 bytes in each channel."""
    case = Case("bytes", (1, 16, 16, 19), 1, y_scale=0.02)
    inputs = inputs_of(case, quantised=True)
    rng = np.random.default_rng(0)
    inputs["x"] = np.stack([rng.permutation(256) for _ in range(19)], axis=1).astype(np.uint8).reshape(case.shape)
    got = run_native(case, inputs, silu=True, isa=isa)
    assert_rounded(got, exact_steps(case, inputs, silu=True))


@needs_library
@pytest.mark.parametrize("isa", isas())
def test_halves_are_rounded_to_even(isa: str) -> None:
    """x of ±1 has mean 0 and variance 1; beta then gives any value that is wanted, exactly."""
    halves = np.tile(np.arange(-3.5, 4.5), 3)  # more than a vector of any build
    case = Case("halves", (1, 4, 4, len(halves)), len(halves), y_scale=1.0, y_zero_point=100, epsilon=0.0)
    inputs = inputs_of(case, quantised=True)
    x = np.where(np.arange(16) % 2, 119, 117).astype(np.uint8)
    inputs["x"] = np.repeat(x, len(halves)).reshape(case.shape)
    inputs["x_scale"] = np.array(1, np.float32)
    inputs["gamma"] = np.ones(len(halves), np.float32)
    inputs["beta"] = halves.astype(np.float32)
    got = run_native(case, inputs, silu=False, isa=isa).reshape(16, -1)
    np.testing.assert_array_equal(got[0], np.rint(halves - 1) + 100)
    np.testing.assert_array_equal(got[1], np.rint(halves + 1) + 100)


# --- the operators ---


def model(case: Case, inputs: dict[str, np.ndarray], *, silu: bool) -> onnx.ModelProto:
    """One node and its function body."""
    operator = GROUP_NORMS["x_scale" in inputs, silu]
    return one_node(operator, inputs, TensorProto.UINT8, groups=case.groups, epsilon=case.epsilon)


def one_node(operator: str, inputs: dict[str, np.ndarray], result: int, **attributes: object) -> onnx.ModelProto:
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
        for name, array in inputs.items()
    ]
    y = helper.make_tensor_value_info("y", result, [None] * next(iter(inputs.values())).ndim)
    node = helper.make_node(operator, list(inputs), ["y"], domain=DOMAIN, **attributes)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    graph = helper.make_graph([node], "one_node", values, [y])
    return helper.make_model(graph, opset_imports=opsets, functions=[function(operator)], ir_version=10)


def run(
    proto: onnx.ModelProto,
    inputs: dict[str, np.ndarray],
    *,
    registered: bool = True,
    threads: int = 2,
    profile: Path | None = None,
) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = QUIET
    if registered:
        options.register_custom_ops_library(str(native.custom_op_library()))
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile / "profile")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, inputs)
    if profile:
        session.end_profiling()
    return y


# ONNX Runtime's own normalisation sums in float32: where values lie close together, far from 0, it is steps away.
HARD = (far_from_zero, alike, alike_but_one)


@pytest.mark.parametrize(("quantised", "silu"), GROUP_NORMS)
@pytest.mark.parametrize("case", [case for case in CASES if case.values not in HARD], ids=lambda case: case.name)
def test_the_function_body_agrees_with_the_reference(case: Case, quantised: bool, silu: bool) -> None:
    """Without our library."""
    inputs = inputs_of(case, quantised=quantised)
    proto = model(case, inputs, silu=silu)
    onnx.checker.check_model(proto, full_check=True)
    got = run(proto, inputs, registered=False)
    assert_rounded(got, exact_steps(case, inputs, silu=silu), 5e-3)


@pytest.mark.parametrize(("quantised", "silu"), GROUP_NORMS)
def test_the_function_body_agrees_with_the_reference_in_onnxs_own_evaluator(quantised: bool, silu: bool) -> None:
    inputs = inputs_of(CASES[1], quantised=quantised)
    proto = inline_local_functions(model(CASES[1], inputs, silu=silu))
    next(opset for opset in proto.opset_import if not opset.domain).version = 21  # it has no older DequantizeLinear
    (got,) = ReferenceEvaluator(proto).run(None, inputs)
    assert_rounded(got, exact_steps(CASES[1], inputs, silu=silu), 5e-3)


@needs_library
@pytest.mark.parametrize(("quantised", "silu"), GROUP_NORMS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_native_operator_agrees_with_the_reference(case: Case, quantised: bool, silu: bool) -> None:
    inputs = inputs_of(case, quantised=quantised)
    got = run(model(case, inputs, silu=silu), inputs)
    assert_rounded(got, exact_steps(case, inputs, silu=silu))


@needs_library
@pytest.mark.parametrize(("quantised", "silu"), GROUP_NORMS)
def test_the_native_kernel_runs_although_the_file_has_a_function_body(
    quantised: bool, silu: bool, tmp_path: Path
) -> None:
    inputs = inputs_of(CASES[0], quantised=quantised)
    run(model(CASES[0], inputs, silu=silu), inputs, profile=tmp_path)
    events = json.loads(next(tmp_path.glob("profile*")).read_text())
    ran = {event["args"]["op_name"] for event in events if event.get("args", {}).get("op_name")}
    assert ran == {GROUP_NORMS[quantised, silu]}


@needs_library
@pytest.mark.parametrize("quantised", [True, False])
def test_the_number_of_threads_changes_no_bit(quantised: bool) -> None:
    case = Case("threads", (3, 71, 53, 36), 12)
    inputs = inputs_of(case, quantised=quantised)
    proto = model(case, inputs, silu=True)
    one, *others = (run(proto, inputs, threads=threads) for threads in (1, 2, 5))
    for other in others:
        np.testing.assert_array_equal(one, other)


@needs_library
def test_an_empty_batch_gives_an_empty_result() -> None:
    case = Case("empty", (0, 4, 4, 8), 2)
    inputs = inputs_of(case, quantised=True)
    assert run(model(case, inputs, silu=True), inputs).shape == case.shape


@needs_library
@pytest.mark.parametrize(
    ("changes", "groups", "says"),
    [
        ({}, 5, "QLinearGroupNormSilu: the channels of x can't be divided by groups"),
        ({}, 0, "QLinearGroupNormSilu: groups must be at least 1"),
        ({"x": np.zeros((3, 4, 8), np.uint8)}, 4, "x must have 4 axes"),
        ({"gamma": np.zeros(7, np.float32)}, 4, "gamma and beta need an element for each channel"),
        ({"beta": np.zeros(9, np.float32)}, 4, "gamma and beta need an element for each channel"),
        ({"x_scale": np.ones(8, np.float32)}, 4, "scales and zero-points must be scalars"),
        ({"y_zero_point": np.zeros(2, np.uint8)}, 4, "scales and zero-points must be scalars"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(changes: dict[str, np.ndarray], groups: int, says: str) -> None:
    case = Case("refused", (1, 4, 4, 8), groups)
    inputs = {**inputs_of(case, quantised=True), **changes}
    proto = model(case, inputs, silu=True)
    del proto.functions[:]  # or ONNX Runtime may refuse what the body can't take
    with pytest.raises(Exception, match=says):  # its exceptions share no base class of their own
        run(proto, inputs)


# --- the residual sum ---


class ResidualSum(ctypes.Structure):
    """`MdnetResidualSum` of `engines/cpp/quantised/quantised.h`."""

    _fields_ = [
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in "aby"),
        *((f"{name}_scale", ctypes.c_float) for name in "aby"),
        *((f"{name}_zero_point", ctypes.c_int32) for name in "aby"),
        *((name, ctypes.c_int32) for name in ("a_is_uint8", "y_is_uint8", "isa")),
    ]


def terms(*shape: int, a_bytes: bool = False, y_bytes: bool = False) -> dict[str, np.ndarray]:
    """Inputs in the operator's order."""
    rng = np.random.default_rng(shape[-1])
    made = {"a": rng.normal(size=shape).astype(np.float32)}
    if a_bytes:
        made = {
            "a": rng.integers(0, 256, shape, np.uint8),
            "a_scale": np.array(0.03, np.float32),
            "a_zero_point": np.array(140, np.uint8),
        }
    made |= {
        "b": rng.integers(0, 256, shape, np.uint8),
        "b_scale": np.array(X_SCALE),
        "b_zero_point": np.array(X_ZERO_POINT),
    }
    return made | ({"y_scale": np.array(0.04, np.float32), "y_zero_point": np.array(99, np.uint8)} if y_bytes else {})


def assert_sum(y: np.ndarray, inputs: dict[str, np.ndarray]) -> None:
    """Two roundings of float32, of terms of 7 at most; then that to a byte."""
    wide = {name: array.astype(np.float64) for name, array in inputs.items()}
    a = (wide["a"] - wide["a_zero_point"]) * wide["a_scale"] if "a_scale" in wide else wide["a"]
    exact = a + (wide["b"] - wide["b_zero_point"]) * wide["b_scale"]
    if "y_scale" in wide:
        return assert_rounded(y, np.clip(exact / wide["y_scale"] + wide["y_zero_point"], 0, 255))
    assert y.dtype == np.float32
    assert np.abs(y - exact).max() < 2e-6
    return None


@needs_library
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(("a_bytes", "y_bytes"), RESIDUAL_SUMS)
@pytest.mark.parametrize("count", [1, 15, 64, 1000, 100_001])
def test_every_build_sums(count: int, a_bytes: bool, y_bytes: bool, isa: str) -> None:
    inputs = terms(count, a_bytes=a_bytes, y_bytes=y_bytes)
    y = np.full(count + 16, 7, np.uint8 if y_bytes else np.float32)
    pointers = (inputs["a"].ctypes.data, inputs["b"].ctypes.data, y.ctypes.data)
    scales = (float(inputs.get(f"{name}_scale", 0)) for name in "aby")
    zero_points = (int(inputs.get(f"{name}_zero_point", 0)) for name in "aby")
    call = ResidualSum(count, *pointers, *scales, *zero_points, a_bytes, y_bytes, native.ISAS[isa])
    loaded = native.library()
    assert loaded is not None
    assert loaded.mdnet_residual_sum(ctypes.byref(call), None, None) == 0
    assert_sum(y[:count], inputs)
    assert (y[count:] == 7).all()  # nothing is written behind the end


@pytest.mark.parametrize("registered", [False, pytest.param(True, marks=needs_library)])
@pytest.mark.parametrize(("a_bytes", "y_bytes"), RESIDUAL_SUMS)
@pytest.mark.parametrize("shape", [(3, 7, 5, 11), (1, 200, 200, 8), (33,), (0, 4)])
def test_the_operator_sums(shape: tuple[int, ...], a_bytes: bool, y_bytes: bool, registered: bool) -> None:
    inputs = terms(*shape, a_bytes=a_bytes, y_bytes=y_bytes)
    proto = one_node(RESIDUAL_SUMS[a_bytes, y_bytes], inputs, TensorProto.UINT8 if y_bytes else TensorProto.FLOAT)
    onnx.checker.check_model(proto, full_check=True)
    y = run(proto, inputs, registered=registered)
    assert y.shape == shape
    if y.size:
        assert_sum(y, inputs)


@needs_library
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"a": np.zeros((2, 1, 5), np.float32)}, "ResidualSumQuantize: a and b must have one shape"),
        ({"b": np.zeros((2, 3), np.uint8)}, "ResidualSumQuantize: a and b must have one shape"),
        ({"b_scale": np.ones(5, np.float32)}, "ResidualSumQuantize: scales and zero-points must be scalars"),
        ({"y_scale": np.ones(2, np.float32)}, "ResidualSumQuantize: scales and zero-points must be scalars"),
    ],
)
def test_a_sum_that_makes_no_sense_is_refused_in_words(changes: dict[str, np.ndarray], says: str) -> None:
    inputs = {**terms(2, 3, 5, y_bytes=True), **changes}
    proto = one_node(RESIDUAL_SUMS[False, True], inputs, TensorProto.UINT8)
    del proto.functions[:]
    with pytest.raises(Exception, match=says):
        run(proto, inputs)


# --- GEGLU ---


class Geglu(ctypes.Structure):
    """`MdnetGeglu` of `engines/cpp/quantised/quantised.h`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "channels")),
        *((name, ctypes.c_void_p) for name in ("x", "bias", "y")),
        *((name, ctypes.c_float) for name in ("x_scale", "y_scale")),
        *((name, ctypes.c_int32) for name in ("x_zero_point", "y_zero_point", "isa")),
    ]


def halves(*shape: int) -> dict[str, np.ndarray]:
    """x [..., 2C] and what goes with it, in the operator's order."""
    rng = np.random.default_rng(shape[-1])
    return {
        "x": rng.integers(0, 256, (*shape[:-1], 2 * shape[-1]), np.uint8),
        "x_scale": np.array(X_SCALE),
        "x_zero_point": np.array(X_ZERO_POINT),
        "bias": rng.normal(size=2 * shape[-1]).astype(np.float32),
        "y_scale": np.array(0.1, np.float32),
        "y_zero_point": np.array(99, np.uint8),
    }


def exact_geglu(inputs: dict[str, np.ndarray]) -> np.ndarray:
    """y in steps, before it is rounded, in float64."""
    wide = {name: array.astype(np.float64) for name, array in inputs.items()}
    h, g = np.split((wide["x"] - wide["x_zero_point"]) * wide["x_scale"] + wide["bias"], 2, axis=-1)
    probability = np.vectorize(math.erfc)(-g / math.sqrt(2)) / 2
    return np.clip(h * g * probability / wide["y_scale"] + wide["y_zero_point"], 0, 255)


def run_native_geglu(inputs: dict[str, np.ndarray], isa: str) -> np.ndarray:
    """y, of x [rows, 2C]."""
    rows, channels = len(inputs["x"]), inputs["x"].shape[1] // 2
    size = rows * channels
    memory = np.full(size + 64, 7, np.uint8)
    y = memory[1 : 1 + size]  # nothing is aligned
    call = Geglu(rows, channels, inputs["x"].ctypes.data, inputs["bias"].ctypes.data, y.ctypes.data)
    call.x_scale, call.y_scale = float(inputs["x_scale"]), float(inputs["y_scale"])
    call.x_zero_point, call.y_zero_point = int(inputs["x_zero_point"]), int(inputs["y_zero_point"])
    call.isa = native.ISAS[isa]
    loaded = native.library()
    assert loaded is not None
    assert loaded.mdnet_geglu(ctypes.byref(call), None, None) == 0
    assert memory[0] == 7  # nothing is written before the start
    assert (memory[1 + size :] == 7).all()  # or behind the end
    return y.reshape(rows, channels)


@needs_library
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(
    "channels", [1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 19, 24, 31, 32, 33, 47, 63, 64, 65, 129, 1280]
)
def test_every_build_gates(channels: int, isa: str) -> None:
    inputs = halves(37, channels)
    assert_rounded(run_native_geglu(inputs, isa), exact_geglu(inputs))


@needs_library
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("shape", [(5003, 33), (70_001, 1), (3, 32_769)])
def test_every_build_gates_all_rows_of_many(shape: tuple[int, int], isa: str) -> None:
    """Some rows to a task, and fewer to the last."""
    inputs = halves(*shape)
    assert_rounded(run_native_geglu(inputs, isa), exact_geglu(inputs))


# Scales and zero-points of x and of y: products of 28 by 28 at most, cut at both ends, at one or not at all.
RANGES = {
    "narrow": (0.01, 117, 0.008, 128),
    "usual": (0.05, 128, 0.1, 99),
    "wide": (0.2, 117, 3.1, 128),
    "cut at both ends": (0.2, 140, 0.02, 100),
    "above 0": (0.05, 0, 0.7, 0),
    "below 0": (0.05, 255, 0.001, 255),
}


@needs_library
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("name", RANGES)
def test_every_pair_of_bytes_is_gated(name: str, isa: str) -> None:
    x_scale, x_zero_point, y_scale, y_zero_point = RANGES[name]
    h, g = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    inputs = {
        "x": np.concatenate([h, g], axis=1),
        "x_scale": np.array(x_scale, np.float32),
        "x_zero_point": np.array(x_zero_point, np.uint8),
        "bias": np.zeros(512, np.float32),
        "y_scale": np.array(y_scale, np.float32),
        "y_zero_point": np.array(y_zero_point, np.uint8),
    }
    assert_rounded(run_native_geglu(inputs, isa), exact_geglu(inputs))


# The normal distribution's function is 1 at 8, so that h·8 / 16 is any multiple of a half, exactly.
EXACT_HALVES = {
    "x": np.concatenate([np.arange(40, 74), np.full(34, 64)]).astype(np.uint8)[None],
    "x_scale": np.array(1, np.float32),
    "x_zero_point": np.array(56, np.uint8),
    "bias": np.zeros(68, np.float32),
    "y_scale": np.array(16, np.float32),
    "y_zero_point": np.array(101, np.uint8),
}


@needs_library
@pytest.mark.parametrize("isa", isas())
def test_a_gate_rounds_halves_to_even(isa: str) -> None:
    expected = np.rint((np.arange(40, 74) - 56) / 2) + 101
    np.testing.assert_array_equal(run_native_geglu(EXACT_HALVES, isa)[0], expected)


@needs_library
@pytest.mark.parametrize("field", ["rows", "channels"])
@pytest.mark.parametrize("value", [0, -1])
def test_an_empty_gate_is_refused(field: str, value: int) -> None:
    inputs, y = halves(2, 4), np.zeros(8, np.uint8)
    call = Geglu(2, 4, inputs["x"].ctypes.data, inputs["bias"].ctypes.data, y.ctypes.data, 1, 1)
    setattr(call, field, value)
    loaded = native.library()
    assert loaded is not None
    assert loaded.mdnet_geglu(ctypes.byref(call), None, None) == 3
    assert not y.any()


@needs_library
@pytest.mark.parametrize("isa", [-1, 99])
def test_a_build_that_is_not_there_gates_nothing(isa: int) -> None:
    inputs, y = halves(2, 4), np.zeros(8, np.uint8)
    call = Geglu(2, 4, inputs["x"].ctypes.data, inputs["bias"].ctypes.data, y.ctypes.data, 1, 1, 0, 0, isa)
    loaded = native.library()
    assert loaded is not None
    assert loaded.mdnet_geglu(ctypes.byref(call), None, None) == 2
    assert loaded.mdnet_geglu(None, None, None) == 3


@pytest.mark.parametrize("registered", [False, pytest.param(True, marks=needs_library)])
@pytest.mark.parametrize("shape", [(2, 30, 24), (5,), (0, 8), (3, 0), (2, 1, 3, 17), (1, 2, 1, 2, 1, 2, 2, 33)])
def test_the_operator_gates(shape: tuple[int, ...], registered: bool) -> None:
    inputs = halves(*shape)
    proto = one_node(GEGLU, inputs, TensorProto.UINT8)
    onnx.checker.check_model(proto, full_check=True)
    y = run(proto, inputs, registered=registered)
    assert y.shape == shape
    if y.size:
        assert_rounded(y, exact_geglu(inputs))


@needs_library
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": np.zeros((2, 7), np.uint8)}, "QLinearGeglu: x must have an even number of channels"),
        ({"bias": np.zeros(3, np.float32)}, "QLinearGeglu: x must have an even number of channels"),
        ({"bias": np.zeros(4, np.float32)}, "QLinearGeglu: x must have an even number of channels, and bias as many"),
        ({"x": np.zeros(8, np.uint8).reshape([1] * 8 + [8])}, "QLinearGeglu: x must have 1 to 8 axes"),
        ({"x": np.array(3, np.uint8)}, "QLinearGeglu: x must have 1 to 8 axes"),
        *(
            ({name: np.ones(2, kind)}, "QLinearGeglu: scales and zero-points must be scalars")
            for names, kind in ((("x_scale", "y_scale"), np.float32), (("x_zero_point", "y_zero_point"), np.uint8))
            for name in names
        ),
    ],
)
def test_a_gate_that_makes_no_sense_is_refused_in_words(changes: dict[str, np.ndarray], says: str) -> None:
    inputs = {**halves(2, 4), **changes}
    proto = one_node(GEGLU, inputs, TensorProto.UINT8)
    del proto.functions[:]
    with pytest.raises(Exception, match=says):
        run(proto, inputs)


@pytest.mark.parametrize("registered", [False, pytest.param(True, marks=needs_library)])
def test_the_operator_rounds_halves_to_even(registered: bool) -> None:
    y = run(one_node(GEGLU, EXACT_HALVES, TensorProto.UINT8), EXACT_HALVES, registered=registered)
    np.testing.assert_array_equal(y[0], np.rint((np.arange(40, 74) - 56) / 2) + 101)


@needs_library
def test_neither_batch_nor_threads_change_a_gate() -> None:
    inputs = halves(3, 700, 40)
    proto = one_node(GEGLU, inputs, TensorProto.UINT8)
    together = run(proto, inputs, threads=1)
    np.testing.assert_array_equal(run(proto, inputs, threads=5), together)
    for i in range(3):
        np.testing.assert_array_equal(run(proto, {**inputs, "x": inputs["x"][i : i + 1]}), together[i : i + 1])


@needs_library
def test_the_native_gate_runs_although_the_file_has_a_function_body(tmp_path: Path) -> None:
    inputs = halves(3, 8)
    run(one_node(GEGLU, inputs, TensorProto.UINT8), inputs, profile=tmp_path)
    events = json.loads(next(tmp_path.glob("profile*")).read_text())
    assert {event["args"]["op_name"] for event in events if event.get("args", {}).get("op_name")} == {GEGLU}
