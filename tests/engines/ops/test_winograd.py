"""Winograd convolutions against float64: every build of the kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import ml_dtypes
import numpy as np
import pytest
from convolutions import convolved
from fences import FENCE, fenced
from native_scan import isas
from numpy.lib.stride_tricks import sliding_window_view

from mdnet_engines.ops import native

RANDOM = np.random.default_rng(0)
loaded = native.library() if native.custom_op_library() else None
pytestmark = pytest.mark.skipif(loaded is None, reason="mdnet was installed without its native library")
BUILDS = [*isas(), *(["bfloat16"] if loaded is not None and loaded.mdnet_has_bfloat16() else [])]
# Relative to the root of the number of products of normal numbers: the largest error, and the root mean square.
LARGEST, TYPICAL = 2e-5, 2e-6
BFLOAT16 = 2e-2  # root mean square

# batch, height, width, channels, outputs: tiles are 4 by 4, and 16, 8 or 4 channels a vector
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 1, 3),
    (1, 4, 4, 16, 16),
    (2, 9, 13, 5, 7),
    (1, 17, 6, 33, 31),
    (3, 5, 4, 130, 33),
    (1, 8, 70, 32, 64),
    (1, 30, 50, 40, 72),
    (1, 12, 12, 24, 300),
]


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


class Call(ctypes.Structure):
    """`MdnetWinograd` of `engines/cpp/winograd/winograd.h`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "height", "width")),
        *((name, ctypes.c_void_p) for name in ("x", "scale", "offset", "weights", "bias", "residual", "y")),
        *((name, ctypes.c_float) for name in ("x_scale", "y_scale")),
        *((name, ctypes.c_int32) for name in ("x_zero_point", "y_zero_point")),
        *((name, ctypes.c_int32) for name in ("x_is_uint8", "y_is_uint8", "silu")),
        ("residual_scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("residual_zero_point", "residual_is_uint8")),
    ]


@dataclass(frozen=True)
class Case:
    """One call: what goes in, and what of it is quantised or fused."""

    x: np.ndarray
    w: np.ndarray  # int8 weights stay bytes in the kernel's memory, and have a scale for each output
    bias: np.ndarray | None = None
    residual: np.ndarray | None = None
    scale: np.ndarray | None = None
    offset: np.ndarray | None = None
    silu: bool = False
    w_scale: np.ndarray | None = None
    x_scale: float = 1.0
    x_zero_point: int = 0
    y_scale: float = 0.0
    y_zero_point: int = 0
    residual_scale: float = 1.0
    residual_zero_point: int = 0

    def read(self) -> np.ndarray:
        """f(x) of the header, in float64."""
        x = self.x.astype(np.float64)
        if self.x.dtype == np.uint8:
            x = (x - self.x_zero_point) * np.float32(self.x_scale)
        if self.scale is not None and self.offset is not None:
            x = x * self.scale[:, None, None].astype(np.float64) + self.offset[:, None, None]
        return x / (1 + np.exp(-x)) if self.silu else x

    def finished(self, y: np.ndarray) -> np.ndarray:
        """y from the convolution's sums, before it is rounded to bytes."""
        y = y if self.bias is None else y + self.bias
        if self.residual is None:
            return y
        if self.residual.dtype == np.uint8:
            return y + (self.residual.astype(np.float64) - self.residual_zero_point) * np.float32(self.residual_scale)
        return y + self.residual

    def scaled_w(self) -> np.ndarray:
        return self.w if self.w_scale is None else self.w * self.w_scale[:, None, None, None].astype(np.float64)

    def expected(self) -> np.ndarray:
        return self.finished(convolved(self.read(), self.scaled_w(), 1))


def transforms() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of x (6 x 6), weights (6 x 3) and sums (4 x 6), from the five points and infinity, by Toom and Cook."""
    near, far = np.sqrt(0.5), np.sqrt(2)
    points = np.array([0, near, -near, far, -far])
    of_x, of_w, of_sums = np.zeros((6, 6)), np.zeros((6, 3)), np.zeros((4, 6))
    for i, point in enumerate(points):
        others = np.delete(points, i)
        of_x[i, :5] = np.poly(others)[::-1]
        of_w[i] = point ** np.arange(3) / np.prod(point - others)
        of_sums[:, i] = point ** np.arange(4)
    of_x[5], of_w[5, 2], of_sums[3, 5] = np.poly(points)[::-1], 1, 1
    return of_x, of_w, of_sums


def in_bfloat16(case: Case) -> np.ndarray:
    """y where only transformed inputs and weights are rounded."""
    of_x, of_w, of_sums = transforms()
    factor = case.x_scale if case.x.dtype == np.uint8 and case.scale is None else 1.0  # this one is put off
    x = case.read() / np.float32(factor)
    batch, height, width, _ = x.shape
    rows, columns = -(-height // 4), -(-width // 4)
    padded = np.pad(x, ((0, 0), (1, 4 * rows + 1 - height), (1, 4 * columns + 1 - width), (0, 0)))
    tiles = sliding_window_view(padded, (6, 6), axis=(1, 2))[:, ::4, ::4]
    v = np.einsum("ik,bhwckl,jl->bhwcij", of_x, tiles, of_x, optimize=True)
    u = np.einsum("ik,ockl,jl->ocij", of_w, case.w.astype(np.float64), of_w, optimize=True)
    v, u = (a.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64) for a in (v, u))
    sums = np.einsum("bhwcij,ocij->bhwoij", v, u, optimize=True)
    y = np.einsum("ik,bhwokl,jl->bhiwjo", of_sums, sums, of_sums, optimize=True)
    whole = y.reshape(batch, 4 * rows, 4 * columns, -1)[:, :height, :width] * np.float32(factor)
    return case.finished(whole if case.w_scale is None else whole * case.w_scale)


@contextmanager
def packed(w: np.ndarray, build: str, w_scale: np.ndarray | None = None) -> Iterator[int]:
    pointer = pack(w, build) if w_scale is None else pack_bytes(w, w_scale, build)
    assert pointer
    yield pointer
    ctypes.CDLL(None).free(ctypes.c_void_p(pointer))


def pack(w: np.ndarray, build: str, isa: int | None = None) -> int | None:
    assert loaded is not None
    loaded.mdnet_winograd_pack.restype = ctypes.c_void_p
    loaded.mdnet_winograd_pack.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 2, *[ctypes.c_int32] * 2]
    in_bf16 = build == "bfloat16"
    isa = native.ISAS["best" if in_bf16 else build] if isa is None else isa
    given = fenced(w)
    return loaded.mdnet_winograd_pack(given.ctypes.data, w.shape[1], w.shape[0], in_bf16, isa)


def pack_bytes(w: np.ndarray, w_scale: np.ndarray, build: str, isa: int | None = None) -> int | None:
    assert loaded is not None
    loaded.mdnet_winograd_pack_bytes.restype = ctypes.c_void_p
    kinds = [*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2, *[ctypes.c_int32] * 2]
    loaded.mdnet_winograd_pack_bytes.argtypes = kinds
    in_bf16 = build == "bfloat16"
    isa = native.ISAS["best" if in_bf16 else build] if isa is None else isa
    scale = fenced(w_scale)
    return loaded.mdnet_winograd_pack_bytes(w.ctypes.data, scale.ctypes.data, w.shape[1], w.shape[0], in_bf16, isa)


def run(case: Case, build: str) -> np.ndarray:
    """y of the kernel. Nothing is written beside it."""
    assert loaded is not None
    kept = {
        name: array if array.dtype == np.uint8 else fenced(array)
        for name in ("x", "scale", "offset", "bias", "residual")
        if (array := getattr(case, name)) is not None
    }
    in_bytes = bool(case.y_scale)
    shape = (*case.x.shape[:3], len(case.w))
    size = int(np.prod(shape))
    memory = np.full(size + 64, 171 if in_bytes else np.nan, np.uint8 if in_bytes else np.float32)
    y = memory[FENCE : FENCE + size]
    pointers = {name: array.ctypes.data for name, array in kept.items()}
    with packed(case.w, build, case.w_scale) as weights:
        call = Call(*case.x.shape[:3], weights=weights, y=y.ctypes.data, silu=case.silu, **pointers)
        call.x_is_uint8, call.x_scale, call.x_zero_point = case.x.dtype == np.uint8, case.x_scale, case.x_zero_point
        call.y_is_uint8, call.y_scale, call.y_zero_point = in_bytes, case.y_scale, case.y_zero_point
        call.residual_is_uint8 = case.residual is not None and case.residual.dtype == np.uint8
        call.residual_scale, call.residual_zero_point = case.residual_scale, case.residual_zero_point
        assert loaded.mdnet_winograd(ctypes.byref(call), None, None) == 0
    beside = np.concatenate([memory[:FENCE], memory[FENCE + size :]])
    assert (beside == 171).all() if in_bytes else np.isnan(beside).all()
    return y.reshape(shape)


def assert_close(y: np.ndarray, case: Case, build: str) -> None:
    unit = np.sqrt(9 * case.w.shape[1]) * max(1.0, case.read().std())
    if build == "bfloat16":
        assert np.sqrt(np.mean((y - in_bfloat16(case)) ** 2)) <= BFLOAT16 / 10 * unit
        assert np.sqrt(np.mean((y - case.expected()) ** 2)) <= BFLOAT16 * unit
    else:
        error = y - case.expected()
        assert np.abs(error).max() <= LARGEST * unit
        assert np.sqrt(np.mean(error**2)) <= TYPICAL * unit


def with_bytes_for_weights(case: Case) -> Case:
    """Scales are such that y is about as large as with weights that are normal numbers."""
    w = RANDOM.integers(-127, 128, case.w.shape, np.int8)
    scale = (RANDOM.random(len(w)) / 73 + 1e-4).astype(np.float32)
    return Case(**{**vars(case), "w": w, "w_scale": scale})


def case_of(shape: tuple[int, ...], *, of_bytes: bool = False, **others: object) -> Case:
    *sizes, channels, outputs = shape
    x = RANDOM.integers(0, 256, (*sizes, channels), np.uint8) if of_bytes else normal(*sizes, channels)
    given = {"x_scale": 0.013, "x_zero_point": 121} if of_bytes else {}
    return Case(x, normal(outputs, channels, 3, 3), **given, **others)  # type: ignore[arg-type]


# --- what is convolved ---


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_build_convolves(shape: tuple[int, ...], build: str) -> None:
    case = case_of(shape)
    assert_close(run(case, build), case, build)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("of_bytes", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 33, 34, 48, 40)])
def test_weights_may_stay_bytes(shape: tuple[int, ...], of_bytes: bool, build: str) -> None:
    """Transformed in each call, for up to 64 or 96 tiles."""
    case = with_bytes_for_weights(case_of(shape, of_bytes=of_bytes, bias=normal(shape[-1])))
    assert_close(run(case, build), case, build)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("height", range(1, 10))
def test_tiles_may_be_cut_at_every_place(height: int, build: str) -> None:
    for width in (*range(1, 10), 131):
        case = case_of((1, height, width, 3, 5))
        assert_close(run(case, build), case, build)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("outputs", [1, 3, 4, 5, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 129])
def test_every_number_of_channels_is_read_and_written(outputs: int, build: str) -> None:
    case = case_of((1, 6, 7, 130 - outputs, outputs), bias=normal(outputs), residual=normal(1, 6, 7, outputs))
    assert_close(run(case, build), case, build)
    of_bytes = case_of((1, 6, 7, 130 - outputs, outputs), of_bytes=True)
    assert_close(run(of_bytes, build), of_bytes, build)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("of_bytes", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(2, 9, 13, 5, 7), (3, 5, 4, 130, 33), (2, 8, 8, 32, 32)])
def test_normalisation_is_taken_in(shape: tuple[int, ...], silu: bool, of_bytes: bool, build: str) -> None:
    """Each image has its own, and the padding is 0 behind it."""
    batch, _, _, channels, outputs = shape
    scale, offset = normal(batch, channels), normal(batch, channels) + 1
    case = case_of(shape, of_bytes=of_bytes, scale=scale, offset=offset, silu=silu, bias=normal(outputs))
    assert_close(run(case, build), case, build)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("of_bytes", [False, True])
@pytest.mark.parametrize("shape", [(2, 9, 13, 5, 7), (3, 5, 4, 130, 33), (2, 8, 8, 32, 32)])
def test_bytes_are_rounded_and_limited(shape: tuple[int, ...], of_bytes: bool, build: str) -> None:
    """A step of y may lie either way where the sum lies between two of them."""
    case = case_of(shape, of_bytes=of_bytes, bias=normal(shape[-1]))
    case = Case(**{**vars(case), "y_scale": float(case.expected().std()) / 60, "y_zero_point": 117})
    steps = np.clip(case.expected() / np.float32(case.y_scale) + case.y_zero_point, 0, 255)
    assert (steps == 0).any()
    assert (steps == 255).any()
    error = run(case, build) - steps
    assert np.abs(error).max() <= (60 * 0.1 if build == "bfloat16" else 0.501)
    if build == "bfloat16":
        rounded = np.clip(in_bfloat16(case) / np.float32(case.y_scale) + case.y_zero_point, 0, 255)
        assert np.abs(run(case, build) - rounded).mean() < 0.3


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("of_bytes", [False, True])
@pytest.mark.parametrize("y_in_bytes", [False, True])
@pytest.mark.parametrize("outputs", [1, 7, 8, 33, 64])
def test_a_residual_is_added_before_anything_is_rounded(
    outputs: int, y_in_bytes: bool, of_bytes: bool, build: str
) -> None:
    shape = (2, 6, 7, outputs)
    residual = RANDOM.integers(0, 256, shape, np.uint8) if of_bytes else 4 * normal(*shape)
    given = {"residual_scale": 0.05, "residual_zero_point": 99} if of_bytes else {}
    case = Case(normal(2, 6, 7, 3), normal(outputs, 3, 3, 3), normal(outputs), residual, **given)  # type: ignore[arg-type]
    if y_in_bytes:
        case = Case(**{**vars(case), "y_scale": 0.1, "y_zero_point": 130})
        sums = in_bfloat16(case) if build == "bfloat16" else case.expected()
        assert np.abs(run(case, build) - np.clip(sums / np.float32(0.1) + 130, 0, 255)).max() <= 0.51
    else:
        assert_close(run(case, build), case, build)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("bytes_for_weights", [False, True])
def test_an_image_has_the_same_result_in_a_batch(bytes_for_weights: bool, build: str) -> None:
    """To the bit; alone it is cut into other tasks."""
    case = case_of((5, 21, 18, 40, 300), bias=normal(300))
    if bytes_for_weights:
        case = with_bytes_for_weights(case)
    together = run(case, build)
    for i in range(5):
        alone = run(Case(**{**vars(case), "x": case.x[i : i + 1]}), build)
        np.testing.assert_array_equal(alone[0], together[i])


# --- what is no number ---


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [(0, 0), (3, 4), (5, 9), (6, 2)])
def test_a_value_that_is_no_number_reaches_what_reads_it_and_its_tiles(
    place: tuple[int, int], value: float, build: str
) -> None:
    case = case_of((1, 11, 13, 3, 20))
    case.x[0, place[0], place[1], 1] = value
    y = run(case, build)[0]
    read = np.zeros((11, 13), bool)
    read[max(0, place[0] - 1) : place[0] + 2, max(0, place[1] - 1) : place[1] + 2] = True
    assert not np.isfinite(y[read]).any()
    tiles = {(i // 4, j // 4) for i, j in np.argwhere(read)}
    elsewhere = [(i, j) for i in range(11) for j in range(13) if (i // 4, j // 4) not in tiles]
    clean = Case(**{**vars(case), "x": np.where(np.isfinite(case.x), case.x, 0).astype(np.float32)})
    unhurt = run(clean, build)[0]
    assert all((y[i, j] == unhurt[i, j]).all() for i, j in elsewhere)


# --- how accurate it is ---


@cache
def smooth(size: int, channels: int) -> Case:
    """As an encoder has it: neighbours are alike, and the mean is not 0."""
    waves = normal(1, size, size, channels)
    for axis in (1, 2):
        waves = waves + np.roll(waves, 1, axis) + np.roll(waves, 2, axis)
    return Case((np.maximum(waves, -0.3)).astype(np.float32), normal(64, channels, 3, 3))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(("channels", "stated"), [(32, 1.0e-6), (128, 1.5e-6), (512, 2.6e-6)])
def test_it_is_as_accurate_as_stated(channels: int, stated: float, build: str) -> None:
    """Root mean square of the error, relative to that of y."""
    cases = (case_of((1, 32, 32, channels, 64)), smooth(32, channels))
    for case in (*cases, *map(with_bytes_for_weights, cases)):
        expected = case.expected()
        error = np.sqrt(np.mean((run(case, build) - expected) ** 2) / np.mean(expected**2))
        assert error <= (1.3e-2 if build == "bfloat16" else stated)


# --- what is refused ---


def test_weights_of_no_size_or_for_no_such_build_are_not_packed() -> None:
    assert loaded is not None
    w = normal(4, 4, 3, 3)
    assert pack(w, "portable", isa=-1) is None
    assert pack(w, "portable", isa=99) is None
    if "bfloat16" not in BUILDS:
        assert pack(w, "bfloat16") is None
    assert pack(w, "bfloat16", isa=native.ISAS["avx2"]) is None
    assert loaded.mdnet_winograd_pack(None, 4, 4, 0, 0) is None
    assert loaded.mdnet_winograd_pack(w.ctypes.data, 4, 4, 2, 0) is None
    for sizes in ((0, 4), (4, 0), (-1, 4)):
        assert loaded.mdnet_winograd_pack(w.ctypes.data, *sizes, 0, 0) is None
    w_bytes, scale = w.astype(np.int8), normal(4)
    assert pack_bytes(w_bytes, scale, "portable", isa=99) is None
    assert pack_bytes(w_bytes, scale, "bfloat16", isa=native.ISAS["avx2"]) is None
    assert loaded.mdnet_winograd_pack_bytes(None, scale.ctypes.data, 4, 4, 0, 0) is None
    assert loaded.mdnet_winograd_pack_bytes(w_bytes.ctypes.data, None, 4, 4, 0, 0) is None
    for sizes in ((0, 4), (4, 0), (-1, 4)):
        assert loaded.mdnet_winograd_pack_bytes(w_bytes.ctypes.data, scale.ctypes.data, *sizes, 0, 0) is None


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name in ("batch", "height", "width") for value in (0, -1)),
        {"weights": None},
        {"scale": None},
        {"offset": None},
        {"scale": None, "offset": None, "silu": 1},
    ],
)
def test_a_call_that_makes_no_sense_is_refused(changes: Mapping[str, int | None]) -> None:
    assert loaded is not None
    x, vector, y = normal(1, 4, 4, 2), normal(2), np.zeros((1, 4, 4, 8), np.float32)
    with packed(normal(8, 2, 3, 3), "portable") as weights:
        call = Call(1, 4, 4, x.ctypes.data, vector.ctypes.data, vector.ctypes.data, weights, y=y.ctypes.data)
        for name, value in changes.items():
            setattr(call, name, value)
        assert loaded.mdnet_winograd(ctypes.byref(call), None, None) == 3
    assert not y.any()


def test_no_call_at_all_is_refused() -> None:
    assert loaded is not None
    assert loaded.mdnet_winograd(None, None, None) == 3
