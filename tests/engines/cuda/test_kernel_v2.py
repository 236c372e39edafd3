"""Version 2's CUDA kernels without a GPU: their source, run thread by thread on the CPU.

Their PTX is tests/engines/cuda/test_kernel.py's and test_ptx.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import cuda_emulation
import numpy as np
import pytest
from scan_cases import (
    EVERY_CASE,
    EVERY_VARIANT_CASE,
    NUMPY_TYPES,
    Inputs,
    ScanCase,
    VariantCase,
    assert_close,
    expected_of,
    make_inputs,
    make_variant_inputs,
    reference_scan,
)

from mdnet_engines.cuda import kernel as cuda_kernel

Run = Callable[..., tuple[np.ndarray, np.ndarray | None]]
CASES = [case for case in EVERY_VARIANT_CASE if case.states <= cuda_kernel.MAX_STATES]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The kernels as they are: `run(inputs, reverse=…, softplus=…, state=…)`."""
    folder = tmp_path_factory.mktemp("scan")
    program = cuda_emulation.build_or_skip(cuda_kernel.source(), folder)

    def call(inputs: Inputs, **options: bool) -> tuple[np.ndarray, np.ndarray | None]:
        return cuda_emulation.launch_v2(program, folder, inputs, **options)  # type: ignore[arg-type]

    return call


def check(case: VariantCase, run: Run) -> None:
    inputs = make_variant_inputs(case)
    y, h_last = run(inputs, reverse=case.reverse, softplus=case.softplus, state=case.state)
    assert y.dtype == NUMPY_TYPES[case.dtype]
    expected, last = expected_of(case, inputs)
    assert_close(y, expected, case.dtype)
    if case.state:
        assert h_last is not None
        assert_close(h_last, last)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_kernel_agrees_with_the_reference(case: VariantCase, run: Run) -> None:
    check(case, run)


@pytest.mark.parametrize("case", EVERY_CASE, ids=[case.name for case in EVERY_CASE])
def test_with_everything_there_it_is_version_1(case: ScanCase, run: Run) -> None:
    inputs = make_inputs(case)
    y, _ = run(inputs, reverse=case.reverse)
    assert_close(y, reference_scan(**inputs, reverse=case.reverse), case.dtype)


@pytest.mark.parametrize(("length", "channels"), [*product((1, 8, 15, 16, 17, 33), (31, 32, 33))])
def test_states_and_groups_around_a_tile(length: int, channels: int, run: Run) -> None:
    for states, reverse, dtype in ((4, False, "bfloat16"), (16, True, "float32"), (33, False, "float16")):
        case = VariantCase("", 2, 2 * channels, length, states, reverse, dtype, groups=2, state=True)
        check(case, run)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("states", [3, 16, 20])
def test_a_cut_changes_no_bit(states: int, reverse: bool, run: Run) -> None:
    case = VariantCase("", 1, 6, 45, states, reverse, "float16", groups=2, state=True)
    inputs = make_variant_inputs(case)
    whole, last = run(inputs, reverse=reverse, state=True)
    for cut in (1, 13, 16, 31, 44):
        parts = [slice(0, cut), slice(cut, None)]
        h, pieces = inputs["h0"], {}
        for part in reversed(parts) if reverse else parts:
            sequences = {name: inputs[name][..., part] for name in ("u", "delta", "z", "B", "C")}
            pieces[part.start], h = run({**inputs, **sequences, "h0": h}, reverse=reverse, state=True)
        np.testing.assert_array_equal(np.concatenate([pieces[0], pieces[cut]], axis=2), whole)
        np.testing.assert_array_equal(h, last)


def test_groups_give_what_each_would_alone(run: Run) -> None:
    inputs = make_variant_inputs(VariantCase("", 2, 70, 21, 5, False, groups=2))
    y, _ = run(inputs, reverse=False)
    for group, part in enumerate((slice(0, 35), slice(35, 70))):
        alone = {name: inputs[name][:, part] for name in ("u", "delta", "z")}
        alone |= {name: inputs[name][part] for name in ("A", "D", "delta_bias")}
        alone |= {name: inputs[name][:, group] for name in ("B", "C")}
        np.testing.assert_array_equal(run(alone, reverse=False)[0], y[:, part])


def test_a_first_state_and_a_last_one_are_wanted_apart(run: Run) -> None:
    case = VariantCase("", 2, 5, 20, 6, False, state=True)
    inputs = make_variant_inputs(case)
    y, h_last = run(inputs, reverse=False, state=False)
    assert h_last is None
    assert_close(y, expected_of(case, inputs)[0])
    without = {name: value for name, value in inputs.items() if name != "h0"}
    _, h_last = run(without, reverse=False, state=True)
    assert h_last is not None
    assert_close(h_last, expected_of(replace(case, state=False), without)[1])


@pytest.mark.parametrize(("tensor", "value"), [*product(("u", "delta", "B", "C", "z", "h0"), (np.nan, np.inf))])
def test_what_is_not_finite_spoils_what_depends_on_it_and_nothing_else(tensor: str, value: float, run: Run) -> None:
    # A slow decay: in float64 too, an infinite state outlives the sequence. The last tile is not full.
    case = VariantCase("", 2, 33, 37, 5, False, delta_mean=-2.0, state=True)
    inputs = make_variant_inputs(case)
    inputs["A"] /= 50
    inputs[tensor] = inputs[tensor].copy()
    inputs[tensor][1, 2, 3 if tensor == "h0" else 36 if tensor in ("C", "z") else 18] = value
    y, h_last = run(inputs, reverse=False, state=True)
    with np.errstate(all="ignore"):
        expected = expected_of(case, inputs)
    for got, right in zip((y, h_last), expected, strict=True):
        finite = np.isfinite(right)
        np.testing.assert_array_equal(np.isfinite(got), finite)
        assert_close(np.where(finite, got, 0), np.where(finite, right, 0))
