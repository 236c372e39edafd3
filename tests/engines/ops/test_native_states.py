"""The native kernel with states, groups and missing inputs, in every build that this processor runs."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_scan import arguments, isas, native_gradients, native_scan, native_states
from scan_cases import (
    EVERY_VARIANT_CASE,
    PARAMETERS,
    VARIANT_CASES,
    VariantCase,
    assert_close,
    expected_of,
    make_variant_inputs,
    reference_states,
)

from mdnet_engines.errors import MDNetError
from mdnet_engines.ops import native

pytestmark = pytest.mark.skipif(
    native.custom_op_library() is None, reason="mdnet was installed without its native library"
)

ISAS = isas()
UNTIMED = settings(deadline=None)  # Hypothesis fails a call of 200 ms, which a busy machine may take
WITHOUT_STEPS = (*PARAMETERS, "h0")
GENTLE_CASES = [case for case in VARIANT_CASES if case.delta_mean == 0]
SLOPE_TOLERANCE = {"float32": 1e-5, "float64": 1e-7}
Inputs = dict[str, np.ndarray]


@pytest.mark.parametrize("case", EVERY_VARIANT_CASE, ids=lambda case: case.name)
def test_agrees_with_the_reference(case: VariantCase) -> None:
    inputs = make_variant_inputs(case)
    y, h_last = expected_of(case, inputs)
    for isa in ISAS:
        got, state = native_states(inputs, reverse=case.reverse, softplus=case.softplus, isa=isa)
        assert got.dtype == inputs["u"].dtype
        assert_close(got, y, case.dtype)
        assert state.dtype == np.float32
        assert_close(state, h_last)


@pytest.mark.parametrize("case", GENTLE_CASES, ids=lambda case: case.name)
def test_gradients_are_the_slopes_of_the_reference(case: VariantCase) -> None:
    """Of each input in turn, through y and the last state, along one direction: by central differences in float64."""
    inputs = {name: value.astype(np.float64) for name, value in make_variant_inputs(case).items()}
    random = np.random.default_rng(1)
    grad = random.standard_normal(inputs["u"].shape)
    grad_last = random.standard_normal((len(grad), *inputs["A"].shape)) if case.state else None
    directions, slopes = {}, {}
    for name, x in inputs.items():
        directions[name] = random.standard_normal(x.shape)
        step = 1e-5 * directions[name]
        (y_up, h_up), (y_down, h_down) = (expected_of(case, {**inputs, name: x + s}) for s in (step, -step))
        change = (grad * (y_up - y_down)).sum() + (0 if grad_last is None else (grad_last * (h_up - h_down)).sum())
        slopes[name] = change / 2e-5
    for dtype, isa in product(SLOPE_TOLERANCE, ISAS):
        used = {name: np.ascontiguousarray(x, dtype) for name, x in inputs.items()}
        last = None if grad_last is None else grad_last.astype(dtype)
        got = native_gradients(used, grad.astype(dtype), last, reverse=case.reverse, softplus=case.softplus, isa=isa)
        assert set(got) == set(inputs)
        for name, slope in slopes.items():
            terms = got[name].astype(np.float64) * directions[name]
            # The differences' own error is some 1e-10 of the terms, float32's that of the forward pass.
            assert abs(terms.sum() - slope) <= SLOPE_TOLERANCE[dtype] * np.abs(terms).sum(), (name, dtype, isa)


@st.composite
def calls(draw: st.DrawFn) -> VariantCase:
    groups = draw(st.sampled_from([0, 1, 2, 3]))
    return VariantCase(
        "drawn",
        batch=draw(st.integers(1, 2)),
        channels=max(groups, 1) * draw(st.integers(1, 20)),
        length=draw(st.integers(1, 150)),
        states=draw(st.integers(1, 20)),
        reverse=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])),
        delta_std=draw(st.sampled_from([0.1, 1.0, 20.0])),
        groups=groups,
        without=draw(st.sampled_from([(), ("z",), ("D", "delta_bias")])),
        softplus=draw(st.booleans()),
        state=True,
    )


def in_pieces(case: VariantCase, inputs: Inputs, cuts: list[int], isa: str) -> tuple[np.ndarray, np.ndarray]:
    """The scan of the pieces between the cuts, each from the last state of the one before."""
    ends = [0, *sorted(cuts), case.length]
    spans = [slice(*ends[i : i + 2]) for i in range(len(ends) - 1) if ends[i] < ends[i + 1]]
    results, state = {}, inputs["h0"]
    for span in reversed(spans) if case.reverse else spans:
        piece = {n: x if n in WITHOUT_STEPS else np.ascontiguousarray(x[..., span]) for n, x in inputs.items()}
        results[span.start], state = native_states(
            {**piece, "h0": state}, reverse=case.reverse, softplus=case.softplus, isa=isa
        )
    return np.concatenate([results[start] for start in sorted(results)], axis=2), state


@pytest.mark.parametrize("isa", ISAS)
@UNTIMED
@given(case=calls(), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_any_cut_gives_the_whole_bit_for_bit(isa: str, case: VariantCase, seed: int, data: st.DataObject) -> None:
    inputs = make_variant_inputs(case, seed)
    if case.dtype != "float16" and data.draw(st.booleans()):
        # The exponents of this step are so large that its tile runs the other loop: a cut gives it other neighbours.
        inputs["delta"][..., data.draw(st.integers(0, case.length - 1))] = 1e9
    cuts = data.draw(st.lists(st.integers(0, case.length), max_size=6))
    whole = native_states(inputs, reverse=case.reverse, softplus=case.softplus, isa=isa)
    for one, other in zip(in_pieces(case, inputs, cuts, isa), whole, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_step_by_step_gives_the_whole_bit_for_bit(isa: str, reverse: bool, dtype: str) -> None:
    case = VariantCase("steps", 2, 19, 70, 17, reverse, state=True)
    inputs = make_variant_inputs(case)
    if dtype != "float16":
        inputs["delta"][..., 30] = 1e9
    of_state = "float64" if dtype == "float64" else "float32"
    inputs = {name: value.astype(of_state if name in WITHOUT_STEPS else dtype) for name, value in inputs.items()}
    whole = native_states(inputs, reverse=reverse, isa=isa)
    for one, other in zip(in_pieces(case, inputs, list(range(case.length)), isa), whole, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("isa", ISAS)
@UNTIMED
@given(case=calls(), seed=st.integers(0, 2**32 - 1))
def test_groups_are_one_call_for_each_group(isa: str, case: VariantCase, seed: int) -> None:
    inputs = make_variant_inputs(case, seed)
    y, h_last = native_states(inputs, reverse=case.reverse, softplus=case.softplus, isa=isa)
    groups = max(case.groups, 1)
    for group, channels in enumerate(np.split(np.arange(case.channels), groups)):
        alone = {
            n: x[channels] if n in PARAMETERS else x if n in ("B", "C") else np.ascontiguousarray(x[:, channels])
            for n, x in inputs.items()
        }
        if case.groups:
            alone |= {n: np.ascontiguousarray(inputs[n][:, group]) for n in ("B", "C")}
        of_group = native_states(alone, reverse=case.reverse, softplus=case.softplus, isa=isa)
        np.testing.assert_array_equal(y[:, channels], of_group[0])
        np.testing.assert_array_equal(h_last[:, channels], of_group[1])


@pytest.mark.parametrize("isa", ISAS)
def test_missing_inputs_are_those_that_change_nothing(isa: str) -> None:
    case = VariantCase("missing", 2, 5, 67, 4, reverse=False, without=("D", "z", "delta_bias"))
    inputs = make_variant_inputs(case)
    zeros = np.zeros(case.channels, np.float32)
    h0 = np.zeros((case.batch, case.channels, case.states), np.float32)
    np.testing.assert_array_equal(
        native_scan(inputs, isa=isa), native_scan({**inputs, "D": zeros, "delta_bias": zeros, "h0": h0}, isa=isa)
    )


@pytest.mark.parametrize("length", [1, 70])
def test_the_state_may_be_updated_in_place(length: int) -> None:
    case = VariantCase("in_place", 2, 19, length, 17, reverse=False, state=True)
    inputs = make_variant_inputs(case)
    y, h_last = native_states(inputs)
    state, got = inputs["h0"].copy(), np.empty_like(y)
    call = arguments({**inputs, "h0": state}, got, reverse=False, isa="best")
    call.h_last = call.h0
    native.run(call)
    np.testing.assert_array_equal(state, h_last)
    np.testing.assert_array_equal(got, y)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize(("name", "value"), [*product(("h0", "delta", "u", "A"), (np.nan, np.inf, -np.inf))])
def test_nan_and_infinity_go_where_the_formula_takes_them(name: str, value: float, length: int, isa: str) -> None:
    case = VariantCase("odd", 2, 5, length, 17, reverse=False, state=True)
    inputs = make_variant_inputs(case)
    inputs[name][tuple(size // 2 for size in inputs[name].shape)] = value
    with np.errstate(all="ignore"):
        expected = [x.astype(np.float32) for x in reference_states(**inputs)]
    for got, exact in zip(native_states(inputs, isa=isa), expected, strict=True):
        for kind in (np.isnan, np.isposinf, np.isneginf):
            np.testing.assert_array_equal(kind(got), kind(exact))


@pytest.mark.parametrize("groups", [-1, 2, 4])
def test_groups_that_do_not_divide_the_channels_are_refused(groups: int) -> None:
    inputs = make_variant_inputs(VariantCase("three", 1, 3, 2, 2, reverse=False))
    call = arguments(inputs, np.empty((1, 3, 2), np.float32), reverse=False, isa="best")
    call.groups = groups
    with pytest.raises(MDNetError, match="sizes or type"):
        native.run(call)
