"""Two convolutions against float64: every build of the kernel, and the operators with it and with the function body."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from convolutions import convolved
from fences import FENCE, fenced
from native_scan import isas
from numpy.lib.stride_tricks import sliding_window_view
from onnx import TensorProto, helper

from mdnet_engines.ops import native
from mdnet_engines.ops.convolution import CONV_SILU, IMAGE_CONV, function
from mdnet_engines.ops.selective_scan import DOMAIN, VERSION

RANDOM = np.random.default_rng(0)
needs_library = pytest.mark.skipif(native.custom_op_library() is None, reason="installed without its native library")
TOLERANCE = 1e-5  # sums of at most 200 products of normal numbers, in float32
EITHER = [False, pytest.param(True, marks=needs_library)]


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def whole(*shape: int) -> np.ndarray:
    """Integers: sums of their products are exact in float32, in any order."""
    return RANDOM.integers(-60, 61, shape).astype(np.float32)


def wide(*arrays: np.ndarray) -> list[np.ndarray]:
    return [array.astype(np.float64) for array in arrays]


def conv_silu(x: np.ndarray, w: np.ndarray, bias: np.ndarray, before: int) -> np.ndarray:
    x64, w64, bias64 = wide(x, w, bias)
    taps = w.shape[2]
    padded = np.pad(x64, ((0, 0), (0, 0), (before, taps - 1 - before)))
    sums = np.einsum("bclk,ck->bcl", sliding_window_view(padded, taps, axis=2), w64[:, 0]) + bias64[:, None]
    return sums / (1 + np.exp(-sums))


def image_conv(x: np.ndarray, w: np.ndarray, bias: np.ndarray, pad: int) -> np.ndarray:
    return convolved(x, w, pad) + bias


def native_call(
    call: ctypes.Structure, arrays: list[np.ndarray], shape: tuple[int, ...], isa: str = "best"
) -> np.ndarray:
    """y of the function that takes such a call, for x, w and bias."""
    loaded = native.library()
    assert loaded is not None
    kept = [fenced(array) for array in arrays]
    call.x, call.w, call.bias = (array.ctypes.data for array in kept)
    size = int(np.prod(shape))
    memory = np.full(size + 64, np.nan, np.float32)
    y = memory[FENCE : FENCE + size]
    call.y, call.isa = y.ctypes.data, native.ISAS[isa]
    assert getattr(loaded, FUNCTIONS[type(call)])(ctypes.byref(call), None, None) == 0
    assert np.isnan(memory[:FENCE]).all()  # nothing is written before the start
    assert np.isnan(memory[FENCE + size :]).all()  # or behind the end
    return y.reshape(shape)


class ConvSilu(ctypes.Structure):
    """`MdnetDepthwiseConvSilu` of `engines/cpp/conv/conv.h`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "channels", "length", "taps", "before")),
        *((name, ctypes.c_void_p) for name in ("x", "w", "bias", "y")),
        ("isa", ctypes.c_int32),
    ]


class ImageConv(ctypes.Structure):
    """`MdnetImageConv` of `engines/cpp/conv/conv.h`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "channels")),
        *((name, ctypes.c_int64) for name in ("outputs", "kernel_height", "kernel_width", "pad")),
        *((name, ctypes.c_void_p) for name in ("x", "w", "bias", "y")),
        ("isa", ctypes.c_int32),
    ]


FUNCTIONS = {ConvSilu: "mdnet_depthwise_conv_silu", ImageConv: "mdnet_image_conv"}


@needs_library
@pytest.mark.parametrize("call", [ConvSilu(6, 3, 9, 4, 3), ImageConv(1, 4, 4, 2, 8, 3, 3, 0)])
@pytest.mark.parametrize("isa", [-1, 99])
def test_a_build_that_is_not_there_is_refused(call: ctypes.Structure, isa: int) -> None:
    loaded = native.library()
    assert loaded is not None
    call.isa = isa
    assert getattr(loaded, FUNCTIONS[type(call)])(ctypes.byref(call), None, None) == 2


@needs_library
@pytest.mark.parametrize("name", FUNCTIONS.values())
def test_no_call_at_all_is_refused(name: str) -> None:
    assert getattr(native.library(), name)(None, None, None) == 3


# --- along a sequence ---


def run_conv_silu(x: np.ndarray, w: np.ndarray, bias: np.ndarray, before: int, isa: str) -> np.ndarray:
    batch, channels, length = x.shape
    return native_call(ConvSilu(batch * channels, channels, length, w.shape[2], before), [x, w, bias], x.shape, isa)


@needs_library
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(
    ("taps", "before"), [(1, 0), (2, 1), (4, 3), (4, 2), (4, 1), (4, 0), (7, 6), (20, 0), (20, 11), (20, 19)]
)
def test_every_build_convolves(taps: int, before: int, isa: str) -> None:
    """Of sequences that are shorter than the taps too."""
    for length in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 257):
        arrays = [normal(2, 5, length), normal(5, 1, taps), normal(5)]
        got = run_conv_silu(*arrays, before, isa)
        np.testing.assert_allclose(got, conv_silu(*arrays, before), atol=TOLERANCE, rtol=0)


@needs_library
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("shape", [(7, 9, 900), (1, 2, 40_000), (500, 80, 1)])
def test_every_build_convolves_all_rows_of_many(shape: tuple[int, int, int], isa: str) -> None:
    """Some rows to a task, and fewer to the last."""
    arrays = [normal(*shape), normal(shape[1], 1, 4), normal(shape[1])]
    got = run_conv_silu(*arrays, 3, isa)
    np.testing.assert_allclose(got, conv_silu(*arrays, 3), atol=TOLERANCE, rtol=0)


@needs_library
@pytest.mark.parametrize("isa", isas())
def test_silu_of_every_size_of_sum(isa: str) -> None:
    """Up to where exp overflows, infinity, and what is no number."""
    edges = np.array([0, 1e-30, 1, 20, 88, 89, 104, 1e4, 3e38, np.inf], np.float32)
    x = np.concatenate([-edges, [np.nan], edges])[None, None]
    got = run_conv_silu(x, np.ones((1, 1, 1), np.float32), np.zeros(1, np.float32), 0, isa)[0, 0]
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x[0, 0] / (1 + np.exp(-x[0, 0].astype(np.float64)))
    np.testing.assert_allclose(got, expected, rtol=3e-6, atol=1e-30)


@needs_library
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_step_that_is_no_number_reaches_the_steps_that_read_it(before: int, isa: str) -> None:
    arrays = [normal(1, 2, 40), normal(2, 1, 4), normal(2)]
    arrays[0][0, 1, 17] = np.nan
    expected = conv_silu(*arrays, before)
    assert np.isnan(expected).sum() == 4
    np.testing.assert_allclose(run_conv_silu(*arrays, before, isa), expected, atol=TOLERANCE, rtol=0)


@needs_library
@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name in ("rows", "channels", "length", "taps") for value in (0, -1)),
        {"before": 4},
        {"before": -1},
    ],
)
def test_a_sequence_that_makes_no_sense_is_refused(changes: Mapping[str, int]) -> None:
    x, w, bias, y = normal(2, 3, 9), normal(3, 4), normal(3), np.zeros(54, np.float32)
    call = ConvSilu(6, 3, 9, 4, 3, *(array.ctypes.data for array in (x, w, bias, y)), 0)
    for name, value in changes.items():
        setattr(call, name, value)
    loaded = native.library()
    assert loaded is not None
    assert loaded.mdnet_depthwise_conv_silu(ctypes.byref(call), None, None) == 3
    assert not y.any()


# --- of an image ---


# x, w, pad
IMAGES = [
    ((1, 1, 1, 1), (1, 1, 1, 1), 0),
    ((2, 9, 13, 3), (40, 3, 3, 3), 1),
    ((1, 8, 6, 4), (64, 4, 3, 3), 0),
    ((1, 7, 5, 2), (17, 2, 5, 3), 2),
    ((2, 3, 20, 5), (130, 5, 1, 1), 1),
]


def run_image_conv(x: np.ndarray, w: np.ndarray, bias: np.ndarray, pad: int, isa: str) -> np.ndarray:
    batch, height, width, _ = x.shape
    shape = (batch, height + 2 * pad - w.shape[2] + 1, width + 2 * pad - w.shape[3] + 1, len(w))
    return native_call(ImageConv(*x.shape, len(w), *w.shape[2:], pad), [x, w, bias], shape, isa)


@needs_library
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(("x_shape", "w_shape", "pad"), IMAGES)
def test_every_build_convolves_images(x_shape: tuple[int, ...], w_shape: tuple[int, ...], pad: int, isa: str) -> None:
    x, w, bias = normal(*x_shape), normal(*w_shape), normal(w_shape[0])
    got = run_image_conv(x, w, bias, pad, isa)
    np.testing.assert_allclose(got, image_conv(x, w, bias, pad), atol=TOLERANCE, rtol=0)


# Kernel and pad; the image is 7 by 13 or as small as the kernel allows.
KERNELS = [
    *((kernel, kernel, pad) for kernel in (1, 3, 5) for pad in (0, 1, 2)),
    (1, 3, 1),
    (5, 1, 2),
    (2, 4, 1),
    (1, 1, 9),
]


@needs_library
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(("height", "width", "pad"), KERNELS)
@pytest.mark.parametrize("small", [False, True])
def test_whole_numbers_are_convolved_exactly(height: int, width: int, pad: int, small: bool, isa: str) -> None:
    """No tolerance in which a place or a channel in the wrong order could hide."""
    size = (max(1, height - 2 * pad), max(1, width - 2 * pad)) if small else (7, 13)
    for channels in (1, 2, 3, 4, 5):
        outputs = (1, 15, 17, 33, 66)[channels - 1]
        arrays = [whole(2, *size, channels), whole(outputs, channels, height, width), whole(outputs)]
        np.testing.assert_array_equal(run_image_conv(*arrays, pad, isa), image_conv(*arrays, pad))


@needs_library
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("outputs", [3, 4, 5, 7, 8, 9, 16, 31, 32, 63, 64, 65, 127, 128, 129])
def test_every_number_of_outputs_is_made_at_every_width(outputs: int, isa: str) -> None:
    for width in (*range(3, 9), 14, 15):  # six pixels are made at a time
        arrays = [whole(1, 3, width, 2), whole(outputs, 2, 3, 3), whole(outputs)]
        np.testing.assert_array_equal(run_image_conv(*arrays, 0, isa), image_conv(*arrays, 0))


@needs_library
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_pixel_that_is_no_number_reaches_the_pixels_that_read_it(value: float, isa: str) -> None:
    """All weights are above 0, so infinity stays infinity."""
    arrays = [normal(1, 6, 11, 3), np.abs(normal(20, 3, 3, 3)) + 1, normal(20)]
    arrays[0][0, 2, 9, 1] = value
    expected = image_conv(*arrays, 1)
    assert np.isfinite(expected).sum() == (6 * 11 - 9) * 20
    np.testing.assert_allclose(run_image_conv(*arrays, 1, isa), expected, atol=TOLERANCE, rtol=1e-6)


@needs_library
@pytest.mark.parametrize(
    "changes",
    [
        {"height": 1},
        {"width": 2},
        {"kernel_height": 5},
        {"kernel_width": 7, "pad": 1},
        {"pad": -1},
        *({name: value} for name, _ in ImageConv._fields_[:7] for value in (0, -1)),
    ],
)
def test_sizes_without_an_output_are_refused(changes: Mapping[str, int]) -> None:
    x, w, bias, y = normal(1, 4, 4, 2), normal(8, 2, 3, 3), normal(8), np.zeros(32, np.float32)
    pointers = (array.ctypes.data for array in (x, w, bias, y))
    call = ImageConv(1, 4, 4, 2, 8, 3, 3, 0, *pointers, 0)
    for name, value in changes.items():
        setattr(call, name, value)
    loaded = native.library()
    assert loaded is not None
    assert loaded.mdnet_image_conv(ctypes.byref(call), None, None) == 3
    assert not y.any()


# --- the operators ---


def open_session(
    operator: str, *, registered: bool, threads: int = 2, profile: Path | None = None, **attributes: int
) -> onnxruntime.InferenceSession:
    """One node. It has no function body where our kernel is to refuse something: ONNX Runtime might do it first."""
    rank = {CONV_SILU: 3, IMAGE_CONV: 4}[operator]
    axes = {"x": rank, "w": rank, "bias": 1}
    bodies = [] if registered and not profile else [function(operator)]
    graph = helper.make_graph(
        [helper.make_node(operator, list(axes), ["y"], domain=DOMAIN, **attributes)],
        "convolution",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * axes[n] if bodies else None) for n in axes],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, VERSION)]
    proto = helper.make_model(graph, opset_imports=opsets, functions=bodies, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if registered:
        options.register_custom_ops_library(str(native.custom_op_library()))
    else:
        onnx.checker.check_model(proto, full_check=True)
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile / "profile")
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(
    operator: str, arrays: list[np.ndarray], *, registered: bool, threads: int = 2, **attributes: int
) -> np.ndarray:
    session = open_session(operator, registered=registered, threads=threads, **attributes)
    return session.run(None, dict(zip(("x", "w", "bias"), arrays, strict=True)))[0]


@pytest.mark.parametrize("registered", EITHER)
@pytest.mark.parametrize(("taps", "before"), [(1, 0), (4, 0), (4, 1), (4, 2), (4, 3), (9, 8)])
@pytest.mark.parametrize("length", [1, 5, 19])
def test_the_sequence_operator_convolves(length: int, taps: int, before: int, registered: bool) -> None:
    arrays = [normal(3, 6, length), normal(6, 1, taps), normal(6)]
    got = run(CONV_SILU, arrays, registered=registered, group=6, before=before)
    np.testing.assert_allclose(got, conv_silu(*arrays, before), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("registered", EITHER)
@pytest.mark.parametrize(("height", "width", "pad"), KERNELS)
def test_the_image_operator_convolves_whole_numbers_exactly(
    height: int, width: int, pad: int, registered: bool
) -> None:
    arrays = [whole(2, 7, 13, 3), whole(33, 3, height, width), whole(33)]
    np.testing.assert_array_equal(run(IMAGE_CONV, arrays, registered=registered, pad=pad), image_conv(*arrays, pad))


@pytest.mark.parametrize("registered", EITHER)
@pytest.mark.parametrize(("x_shape", "w_shape", "pad"), IMAGES)
def test_the_image_operator_convolves(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], pad: int, registered: bool
) -> None:
    arrays = [normal(*x_shape), normal(*w_shape), normal(w_shape[0])]
    got = run(IMAGE_CONV, arrays, registered=registered, pad=pad)
    np.testing.assert_allclose(got, image_conv(*arrays, pad), atol=TOLERANCE, rtol=0)


@needs_library
@pytest.mark.parametrize(
    ("operator", "shapes", "attributes", "reason"),
    [
        (CONV_SILU, ((3, 6), (6, 1, 4), (6,)), {"group": 6, "before": 3}, "x must have 3 axes"),
        (CONV_SILU, ((1, 5, 9), (6, 1, 4), (6,)), {"group": 6, "before": 3}, "x must have 3 axes"),
        (CONV_SILU, ((1, 6, 9), (6, 1, 4), (6,)), {"group": 6, "before": 4}, "w must have 3 axes"),
        (CONV_SILU, ((1, 6, 9), (5, 1, 4), (5,)), {"group": 6, "before": 3}, "w must have 3 axes"),
        (CONV_SILU, ((1, 6, 9), (6, 2, 4), (6,)), {"group": 6, "before": 3}, "w must have 3 axes"),
        (CONV_SILU, ((1, 6, 9), (6, 4), (6,)), {"group": 6, "before": 3}, "w must have 3 axes"),
        (CONV_SILU, ((1, 6, 9), (6, 1, 4), (5,)), {"group": 6, "before": 3}, "bias must have an element"),
        (CONV_SILU, ((1, 6, 9), (6, 1, 4), (6, 1)), {"group": 6, "before": 3}, "bias must have an element"),
        (CONV_SILU, ((1, 6, 9), (), (6,)), {"group": 6, "before": 3}, "bias must have an element"),
        (CONV_SILU, ((1, 6, 9), (6, 1, 4), (6,)), {"group": 6, "before": -1}, "before is negative"),
        (IMAGE_CONV, ((1, 9, 9, 3), (8, 4, 3, 3), (8,)), {"pad": 1}, "x must have 4 axes"),
        (IMAGE_CONV, ((9, 9, 3), (8, 3, 3, 3), (8,)), {"pad": 1}, "x must have 4 axes"),
        (IMAGE_CONV, ((1, 9, 9, 3), (8, 3, 3), (8,)), {"pad": 1}, "x must have 4 axes"),
        (IMAGE_CONV, ((1, 2, 9, 3), (8, 3, 5, 3), (8,)), {"pad": 1}, "x is smaller than w"),
        (IMAGE_CONV, ((1, 9, 4, 3), (8, 3, 3, 7), (8,)), {"pad": 1}, "x is smaller than w"),
        (IMAGE_CONV, ((1, 9, 9, 3), (8, 3, 3, 3), (8,)), {"pad": -1}, "pad is negative"),
        (IMAGE_CONV, ((1, 9, 9, 3), (8, 3, 3, 3), (7,)), {"pad": 1}, "bias must have an element"),
    ],
)
def test_what_does_not_fit_is_refused(
    operator: str, shapes: tuple[tuple[int, ...], ...], attributes: dict[str, int], reason: str
) -> None:
    with pytest.raises(Exception, match=f"{operator}: .*{reason}"):
        run(operator, [normal(*shape) for shape in shapes], registered=True, **attributes)


@needs_library
def test_an_empty_batch_gives_an_empty_result() -> None:
    assert run(CONV_SILU, [normal(0, 2, 5), normal(2, 1, 3), normal(2)], registered=True, group=2, before=2).size == 0
    made = run(IMAGE_CONV, [normal(0, 5, 5, 3), normal(4, 3, 3, 3), normal(4)], registered=True, pad=1)
    assert made.shape == (0, 5, 5, 4)
    assert run(CONV_SILU, [normal(2, 2, 0), normal(2, 1, 3), normal(2)], registered=True, group=2, before=2).size == 0


# Operator, inputs, attributes: enough work for several tasks.
LARGE = [
    (CONV_SILU, [normal(3, 40, 700), normal(40, 1, 4), normal(40)], {"group": 40, "before": 3}),
    (IMAGE_CONV, [normal(3, 23, 31, 3), normal(40, 3, 3, 3), normal(40)], {"pad": 1}),
]


@needs_library
@pytest.mark.parametrize(("operator", "arrays", "attributes"), LARGE)
def test_neither_batch_nor_threads_change_a_bit(
    operator: str, arrays: list[np.ndarray], attributes: dict[str, int]
) -> None:
    x, *weights = arrays
    together = run(operator, arrays, registered=True, threads=1, **attributes)
    np.testing.assert_array_equal(run(operator, arrays, registered=True, threads=5, **attributes), together)
    for i in range(3):
        alone = run(operator, [x[i : i + 1], *weights], registered=True, **attributes)
        np.testing.assert_array_equal(alone, together[i : i + 1])


@needs_library
@pytest.mark.parametrize(("operator", "missing"), [(CONV_SILU, "group"), (CONV_SILU, "before"), (IMAGE_CONV, "pad")])
def test_every_attribute_is_required(operator: str, missing: str) -> None:
    attributes = {"pad": 1} if operator == IMAGE_CONV else {"group": 6, "before": 3}
    del attributes[missing]
    with pytest.raises(Exception, match=missing):
        open_session(operator, registered=True, **attributes)


@needs_library
@pytest.mark.parametrize(("operator", "arrays", "attributes"), LARGE)
def test_the_native_kernel_runs_although_the_file_has_a_function_body(
    operator: str, arrays: list[np.ndarray], attributes: dict[str, int], tmp_path: Path
) -> None:
    session = open_session(operator, registered=True, profile=tmp_path, **attributes)
    session.run(None, dict(zip(("x", "w", "bias"), arrays, strict=True)))
    events = json.loads(Path(session.end_profiling()).read_text())
    assert {event["args"]["op_name"] for event in events if event.get("args", {}).get("op_name")} == {operator}
