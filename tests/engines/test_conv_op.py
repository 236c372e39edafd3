"""Two convolutions against float64: every build of the kernel, and the operators with it and with the function body."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from native_scan import isas
from onnx import TensorProto, helper

from mdnet_engines import native
from mdnet_engines.conv_op import CONV_SILU, IMAGE_CONV, function
from mdnet_engines.scan_op import DOMAIN, VERSION

RANDOM = np.random.default_rng(0)
needs_library = pytest.mark.skipif(native.custom_op_library() is None, reason="installed without its native library")
TOLERANCE = 1e-5  # sums of at most 200 products of normal numbers, in float32


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def wide(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array).double() for array in arrays]


def conv_silu(x: np.ndarray, w: np.ndarray, bias: np.ndarray, before: int) -> np.ndarray:
    x64, w64, bias64 = wide(x, w, bias)
    padded = F.pad(x64, (before, w.shape[2] - 1 - before))
    return F.silu(F.conv1d(padded, w64, bias64, groups=len(w))).numpy()


def image_conv(x: np.ndarray, w: np.ndarray, bias: np.ndarray, pad: int) -> np.ndarray:
    x64, w64, bias64 = wide(x, w, bias)
    return F.conv2d(x64.permute(0, 3, 1, 2), w64, bias64, padding=pad).permute(0, 2, 3, 1).numpy()


def native_call(function_name: str, call: ctypes.Structure, y: np.ndarray, size: int) -> np.ndarray:
    loaded = native.library()
    assert loaded is not None
    assert getattr(loaded, function_name)(ctypes.byref(call)) == 0
    assert np.isnan(y[size:]).all()  # nothing is written behind the end
    return y[:size]


# --- along a sequence ---


class ConvSilu(ctypes.Structure):
    """`MdnetConvSilu` of `engines/cpp/conv.h`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "channels", "length", "taps", "before")),
        *((name, ctypes.c_void_p) for name in ("x", "w", "bias", "y")),
        ("isa", ctypes.c_int32),
    ]


@needs_library
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(("taps", "before"), [(1, 0), (4, 3), (4, 0), (4, 1), (7, 6)])
@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 33, 257])
def test_every_build_convolves(length: int, taps: int, before: int, isa: str) -> None:
    x, w, bias = normal(2, 5, length), normal(5, 1, taps), normal(5)
    y = np.full(x.size + 32, np.nan, np.float32)
    pointers = (array.ctypes.data for array in (x, w, bias, y))
    call = ConvSilu(10, 5, length, taps, before, *pointers, native.ISAS[isa])
    got = native_call("mdnet_conv_silu_here", call, y, x.size).reshape(x.shape)
    np.testing.assert_allclose(got, conv_silu(x, w, bias, before), atol=TOLERANCE, rtol=0)


# --- of an image ---


class ImageConv(ctypes.Structure):
    """`MdnetImageConv` of `engines/cpp/conv.h`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "channels")),
        *((name, ctypes.c_int64) for name in ("outputs", "kernel_height", "kernel_width", "pad")),
        *((name, ctypes.c_void_p) for name in ("x", "w", "bias", "y")),
        ("isa", ctypes.c_int32),
    ]


# x, w, pad
IMAGES = [
    ((1, 1, 1, 1), (1, 1, 1, 1), 0),
    ((2, 9, 13, 3), (40, 3, 3, 3), 1),
    ((1, 8, 6, 4), (64, 4, 3, 3), 0),
    ((1, 7, 5, 2), (17, 2, 5, 3), 2),
    ((2, 3, 20, 5), (130, 5, 1, 1), 1),
]


@needs_library
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(("x_shape", "w_shape", "pad"), IMAGES)
def test_every_build_convolves_images(x_shape: tuple[int, ...], w_shape: tuple[int, ...], pad: int, isa: str) -> None:
    x, w, bias = normal(*x_shape), normal(*w_shape), normal(w_shape[0])
    expected = image_conv(x, w, bias, pad)
    y = np.full(expected.size + 32, np.nan, np.float32)
    pointers = (array.ctypes.data for array in (x, w, bias, y))
    call = ImageConv(*x_shape, w_shape[0], *w_shape[2:], pad, *pointers, native.ISAS[isa])
    got = native_call("mdnet_image_conv_here", call, y, expected.size).reshape(expected.shape)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)


@needs_library
@pytest.mark.parametrize("changes", [{"height": 1}, {"width": 2}, {"outputs": 0}, {"channels": 0}, {"pad": -1}])
def test_sizes_without_an_output_are_refused(changes: Mapping[str, int]) -> None:
    x, w, bias, y = normal(1, 4, 4, 2), normal(8, 2, 3, 3), normal(8), normal(32)
    pointers = (array.ctypes.data for array in (x, w, bias, y))
    call = ImageConv(1, 4, 4, 2, 8, 3, 3, 0, *pointers, 0)
    for name, value in changes.items():
        setattr(call, name, value)
    loaded = native.library()
    assert loaded is not None
    assert loaded.mdnet_image_conv_here(ctypes.byref(call)) == 3


# --- the operators ---


def run(operator: str, arrays: list[np.ndarray], *, registered: bool, **attributes: int) -> np.ndarray:
    inputs = dict(zip(("x", "w", "bias"), arrays, strict=True))
    graph = helper.make_graph(
        [helper.make_node(operator, list(inputs), ["y"], domain=DOMAIN, **attributes)],
        "convolution",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, array.shape) for n, array in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * arrays[0].ndim)],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, VERSION)]
    bodies = [] if registered else [function(operator)]  # or ONNX Runtime may refuse what the body can't take
    proto = helper.make_model(graph, opset_imports=opsets, functions=bodies, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if registered:
        options.register_custom_ops_library(str(native.custom_op_library()))
    else:
        onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


@pytest.mark.parametrize("registered", [False, pytest.param(True, marks=needs_library)])
@pytest.mark.parametrize("before", [0, 1, 3])
def test_the_sequence_operator_convolves(before: int, registered: bool) -> None:
    arrays = [normal(3, 6, 19), normal(6, 1, 4), normal(6)]
    got = run(CONV_SILU, arrays, registered=registered, group=6, before=before)
    np.testing.assert_allclose(got, conv_silu(*arrays, before), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("registered", [False, pytest.param(True, marks=needs_library)])
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
        (CONV_SILU, ((1, 6, 9), (6, 1, 4), (5,)), {"group": 6, "before": 3}, "bias must have an element"),
        (CONV_SILU, ((1, 6, 9), (6, 1, 4), (6,)), {"group": 6, "before": -1}, "an attribute is negative"),
        (IMAGE_CONV, ((1, 9, 9, 3), (8, 4, 3, 3), (8,)), {"pad": 1}, "x must have 4 axes"),
        (IMAGE_CONV, ((1, 2, 9, 3), (8, 3, 5, 3), (8,)), {"pad": 1}, "x is smaller than w"),
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
