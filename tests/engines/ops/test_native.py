"""The native kernel, in every build that this processor runs, against the float64 reference."""

from __future__ import annotations

import logging
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_scan import arguments, isas, native_gradients, native_scan
from scan_cases import EVERY_CASE, PARAMETERS, SCAN_CASES, ScanCase, assert_close, make_inputs, reference_scan

from mdnet_engines.errors import MDNetError
from mdnet_engines.ops import native

pytestmark = pytest.mark.skipif(
    native.custom_op_library() is None, reason="mdnet was installed without its native library"
)

ISAS = isas()
GENTLE_CASES = [case for case in SCAN_CASES if case.elements < 100_000 and case.delta_mean == 0 and case.delta_std == 1]
SLOPE_TOLERANCE = {"float32": 1e-5, "float64": 1e-7}
UNTIMED = settings(deadline=None)  # Hypothesis fails a call of 200 ms, which a busy machine may take
UNIT_GATE = 1.2784645427610738  # silu of it is 1


def in_float64(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float64) for name, value in inputs.items()}


@pytest.mark.parametrize("case", EVERY_CASE, ids=lambda case: case.name)
def test_agrees_with_the_reference(case: ScanCase) -> None:
    inputs = make_inputs(case)
    expected = reference_scan(**inputs, reverse=case.reverse)
    for isa in ISAS:
        got = native_scan(inputs, reverse=case.reverse, isa=isa)
        assert got.dtype == inputs["u"].dtype
        assert_close(got, expected, case.dtype)


@pytest.mark.parametrize("case", SCAN_CASES, ids=lambda case: case.name)
def test_float64_is_exact_to_its_rounding(case: ScanCase) -> None:
    inputs = in_float64(make_inputs(case))
    expected = reference_scan(**inputs, reverse=case.reverse)
    for isa in ISAS:
        got = native_scan(inputs, reverse=case.reverse, isa=isa)
        # Some 200 units of float64's 2⁻⁵³, as the long cases sum that many products.
        assert np.abs(got - expected).max() <= 2e-14 * np.abs(expected).max(), isa


@pytest.mark.parametrize("case", GENTLE_CASES, ids=lambda case: case.name)
def test_gradients_are_the_slopes_of_the_reference(case: ScanCase) -> None:
    """Of each input in turn, along one direction: by central differences of the float64 reference."""
    inputs = in_float64(make_inputs(case))
    random = np.random.default_rng(1)
    grad = random.standard_normal(inputs["u"].shape)
    directions, slopes = {}, {}
    for name, x in inputs.items():
        directions[name] = random.standard_normal(x.shape)
        step = 1e-5 * directions[name]
        up, down = (reference_scan(**{**inputs, name: x + s}, reverse=case.reverse) for s in (step, -step))
        slopes[name] = (grad * (up - down)).sum() / 2e-5
    for dtype, isa in product(SLOPE_TOLERANCE, ISAS):
        given = {name: np.ascontiguousarray(x, dtype) for name, x in inputs.items()}
        got = native_gradients(given, grad.astype(dtype), reverse=case.reverse, isa=isa)
        for name, slope in slopes.items():
            terms = got[name].astype(np.float64) * directions[name]
            # The differences' own error is some 1e-10 of the terms, float32's that of the forward pass.
            assert abs(terms.sum() - slope) <= SLOPE_TOLERANCE[dtype] * np.abs(terms).sum(), (name, dtype, isa)


# What can be wrong with one number: (input, value). A zero decay rate times an infinite step is NaN by the formula.
ODD_VALUES = [
    *((name, value) for name in ("u", "delta", "B", "C", "z") for value in (np.nan, np.inf, -np.inf)),
    *((name, value) for name in PARAMETERS for value in (np.nan, np.inf, -np.inf, 0.0)),
    ("A", 5.0),  # a growing state
    ("delta", 1e30),
    ("delta", -1e30),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("name", "value"), ODD_VALUES)
def test_nan_and_infinity_go_where_the_formula_takes_them(name: str, value: float, reverse: bool, dtype: str) -> None:
    inputs = make_inputs(ScanCase("odd", batch=2, channels=5, length=9, states=17, reverse=reverse))
    inputs = {key: array.astype(dtype) for key, array in inputs.items()}
    inputs[name][tuple(size // 2 for size in inputs[name].shape)] = value
    with np.errstate(all="ignore"):
        expected = reference_scan(**inputs, reverse=reverse)
        expected = expected.astype(dtype)  # what float32 can't hold is infinite there
    finite = np.isfinite(expected)
    # The bound of every case, but per channel: a growing state makes one channel far larger than the others.
    scale = np.abs(np.where(finite, expected, 0)).max(axis=2, keepdims=True)
    allowed = np.broadcast_to(3e-6 * scale, expected.shape)[finite]
    for isa in ISAS:
        got = native_scan(inputs, reverse=reverse, isa=isa)
        for kind in (np.isnan, np.isposinf, np.isneginf):
            np.testing.assert_array_equal(kind(got), kind(expected), isa)
        assert (np.abs(got[finite] - expected[finite]) <= allowed).all(), isa


def grid(low: float, high: float) -> np.ndarray:
    """float32 values over a range, dense near 0: linear ones and powers of two."""
    linear = np.linspace(low, high, 200_001)
    powers = np.exp2(np.linspace(-126, 0, 50_001))
    values = np.concatenate([linear, powers, -powers]).astype(np.float32)
    return np.sort(values[(values >= low) & (values <= high)])


def assert_relative(got: np.ndarray, expected: np.ndarray, allowed: np.ndarray) -> None:
    """Hold results to a relative error, those above 1e-36: below, results may be 0."""
    counts = np.abs(expected) >= 1e-36
    relative = np.abs(got - expected)[counts] / np.abs(expected)[counts]
    assert (relative <= allowed[counts]).all(), f"relative error up to {relative.max():.2g}"
    assert (np.abs(got[~counts]) <= 1e-36).all()


def stated(error: float, x: np.ndarray) -> np.ndarray:
    """What vector.h says: an error, and what the rounding of x·log2(e) adds where exp(x) decides the result."""
    return error + 8e-8 * np.maximum(-x, 0)


def one_row(length: int, **given: np.ndarray | float) -> dict[str, np.ndarray]:
    """Inputs of one channel and one state; what is not given passes the state through: y = u."""
    values = {"u": 1.0, "delta": 0.0, "B": 0.0, "C": 1.0, "z": UNIT_GATE, **given}
    steps = {n: np.broadcast_to(np.float32(values[n]), (1, 1, length)).copy() for n in ("u", "delta", "B", "C", "z")}
    parameters = {"A": [[0.0]], "D": [values.get("D", 1.0)], "delta_bias": [0.0]}
    return {**steps, **{name: np.array(value, np.float32) for name, value in parameters.items()}}


@pytest.mark.parametrize("isa", ISAS)
def test_silu_is_as_accurate_as_stated(isa: str) -> None:
    z = grid(-80, 80)
    wide = z.astype(np.longdouble)
    got = native_scan(one_row(len(z), z=z), isa=isa)[0, 0]
    assert_relative(got, wide / (1 + np.exp(-wide)), stated(3e-7, z))


@pytest.mark.parametrize("isa", ISAS)
def test_softplus_is_as_accurate_as_stated(isa: str) -> None:
    delta = grid(-87, 87)
    wide = delta.astype(np.longdouble)
    # One call for each step: the state of a step before would hide a small result.
    inputs = one_row(len(delta), delta=delta, B=1.0, D=0.0)
    alone = {n: x.reshape(-1, 1, 1).copy() if x.ndim == 3 else x for n, x in inputs.items()}
    got = native_scan(alone, isa=isa)[:, 0, 0]
    expected = np.maximum(wide, 0) + np.log1p(np.exp(-np.abs(wide)))
    # The gate is 1 to 1e-7, and multiplies once more.
    assert_relative(got, expected, stated(2.5e-7 + 1.6e-7, delta))


@pytest.mark.parametrize("isa", ISAS)
def test_the_decay_is_as_accurate_as_stated(isa: str) -> None:
    """The state 1 of the first step, after one decay by exp(−dt): y of the second step."""
    dt = grid(0, 80)[1:]
    count = len(dt)
    inputs = {
        "u": np.tile(np.float32([1, 0]), (count, 1, 1)),
        "delta": np.stack([np.full(count, 100, np.float32), dt], axis=1)[:, None],  # softplus(100) = 100
        "B": np.full((count, 1, 2), np.float32(1 / 100)),
        "C": np.ones((count, 1, 2), np.float32),
        "z": np.full((count, 1, 2), np.float32(UNIT_GATE)),
        "A": np.array([[-1]], np.float32),
        "D": np.zeros(1, np.float32),
        "delta_bias": np.zeros(1, np.float32),
    }
    got = native_scan(inputs, isa=isa)[:, 0, 1]
    step = dt.astype(np.longdouble)
    step = step + np.log1p(np.exp(-step))
    # Besides exp there are the step's own error, the gate and four roundings.
    assert_relative(got, np.exp(-step), stated(1.5e-7 + 5e-7, -step) + 2.5e-7 * step)


sizes = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 140), st.integers(1, 20))


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], bool]:
    batch, channels, length, states = draw(sizes)
    reverse = draw(st.booleans())
    case = ScanCase(
        "drawn", batch, channels, length, states, reverse, delta_std=draw(st.sampled_from([0.1, 1.0, 20.0]))
    )
    return make_inputs(case, seed=draw(st.integers(0, 2**32 - 1))), reverse


def flipped(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {n: x if n in PARAMETERS else np.ascontiguousarray(x[:, :, ::-1]) for n, x in inputs.items()}


@pytest.mark.parametrize("isa", ISAS)
@UNTIMED
@given(call=calls())
def test_reverse_is_flip_forward_flip(isa: str, call: tuple[dict[str, np.ndarray], bool]) -> None:
    inputs, reverse = call
    got = native_scan(inputs, reverse=reverse, isa=isa)
    # The same operations in the same order; tiles begin at other steps, which changes no step's arithmetic.
    np.testing.assert_array_equal(got, native_scan(flipped(inputs), reverse=not reverse, isa=isa)[:, :, ::-1])


@pytest.mark.parametrize("isa", ISAS)
@UNTIMED
@given(call=calls(), factor=st.floats(-8, 8))
def test_is_linear_in_u_at_fixed_delta(isa: str, call: tuple[dict[str, np.ndarray], bool], factor: float) -> None:
    inputs, reverse = call
    inputs = in_float64(inputs)
    other = np.random.default_rng(1).standard_normal(inputs["u"].shape)

    def y(u: np.ndarray) -> np.ndarray:
        return native_scan({**inputs, "u": u}, reverse=reverse, isa=isa)

    parts = (y(inputs["u"]), factor * y(other))
    scale = sum(np.abs(part).max() for part in parts)
    np.testing.assert_allclose(y(inputs["u"] + factor * other), sum(parts), rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("isa", ISAS)
@UNTIMED
@given(call=calls(), data=st.data())
def test_chunks_compose(isa: str, call: tuple[dict[str, np.ndarray], bool], data: st.DataObject) -> None:
    """What comes first in the scan does not see the rest; the rest sees it through its last state alone."""
    inputs, reverse = call
    inputs = in_float64(flipped(inputs) if reverse else inputs)
    length = inputs["u"].shape[2]
    cut = data.draw(st.integers(1, length))
    head, tail = (
        {n: x if n in PARAMETERS else np.ascontiguousarray(x[:, :, part]) for n, x in inputs.items()}
        for part in (slice(cut), slice(cut, length))
    )
    whole = native_scan(inputs, isa=isa)
    np.testing.assert_array_equal(whole[:, :, :cut], native_scan(head, isa=isa))
    if cut == length:
        return
    dt = np.logaddexp(0, inputs["delta"] + inputs["delta_bias"][:, None])
    added = (dt * inputs["u"])[:, :, None] * inputs["B"][:, None]  # (batch, D, N, L)
    decay = dt[:, :, None] * inputs["A"][:, :, None]
    state = np.zeros(added.shape[:3])
    for t in range(cut):
        state = np.exp(decay[..., t]) * state + added[..., t]
    carried = np.exp(np.cumsum(decay[..., cut:], axis=-1)) * state[..., None]
    z = tail["z"]
    expected = native_scan(tail, isa=isa) + np.einsum("bdnl,bnl->bdl", carried, tail["C"]) * z / (1 + np.exp(-z))
    np.testing.assert_allclose(whole[:, :, cut:], expected, rtol=0, atol=1e-11 * np.abs(whole).max())


@pytest.mark.parametrize("isa", ISAS)
@UNTIMED
@given(call=calls())
def test_an_image_has_its_result_whatever_the_batch(isa: str, call: tuple[dict[str, np.ndarray], bool]) -> None:
    inputs, reverse = call
    whole = native_scan(inputs, reverse=reverse, isa=isa)
    for image in range(len(whole)):
        alone = {n: x if n in PARAMETERS else x[image : image + 1] for n, x in inputs.items()}
        np.testing.assert_array_equal(native_scan(alone, reverse=reverse, isa=isa)[0], whole[image])


def test_nothing_is_written_outside_the_output() -> None:
    inputs = make_inputs(ScanCase("bounds", batch=3, channels=19, length=70, states=5, reverse=False))
    guarded = np.full((5, 19, 70), 7.0, np.float32)
    native.run(arguments(inputs, guarded[1:4], reverse=False, isa="best"))
    assert (guarded[[0, 4]] == 7).all()
    assert not (guarded[1:4] == 7).any()


@pytest.mark.parametrize("size", ["batch", "channels", "length", "states"])
def test_sizes_below_one_are_refused(size: str) -> None:
    inputs = make_inputs(SCAN_CASES[0])
    call = arguments(inputs, np.empty((1, 1, 1), np.float32), reverse=False, isa="best")
    setattr(call, size, 0)
    with pytest.raises(MDNetError, match="sizes or type"):
        native.run(call)


def test_an_unknown_instruction_set_is_refused() -> None:
    inputs = make_inputs(SCAN_CASES[0])
    call = arguments(inputs, np.empty((1, 1, 1), np.float32), reverse=False, isa="best")
    call.isa = 99
    with pytest.raises(MDNetError, match="instruction set"):
        native.run(call)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder where the library is looked for, empty."""
    monkeypatch.setattr("mdnet_engines.__path__", [str(tmp_path)])
    for cached in (native.library, native._say_it_once):
        cached.cache_clear()
    yield tmp_path
    for cached in (native.library, native._say_it_once):
        cached.cache_clear()


def test_a_missing_library_is_said_once(elsewhere: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert native.custom_op_library() is None
    assert native.library() is None
    native.say_it_is_missing()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert native.MISSING in record.message
    with pytest.raises(MDNetError, match="without its native library"):
        native.run(native.Scan())


def test_a_library_that_can_not_be_loaded_is_one_line(elsewhere: Path) -> None:
    (elsewhere / native._NAME).write_bytes(b"not a library")
    with pytest.raises(MDNetError) as error:
        native.library()
    (line,) = str(error.value).splitlines()
    assert "install mdnet again" in line
