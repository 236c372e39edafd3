"""The cases and the float64 reference that every host of SelectiveScan is held to.

    expected = reference_scan(**make_inputs(case), reverse=case.reverse)
    assert_close(got, expected)

The reference is a plain loop over time, written from the formula in `mdnet_engines.ops.selective_scan` and sharing no
code with any host. `SCAN_TOLERANCE` is the bound for float32, relative to the largest output. `REFUSED` are calls that
a host must refuse, and what its message must say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import ml_dtypes
import numpy as np

PARAMETERS = ("A", "D", "delta_bias")  # float32 always, and the same for every image
# Some 50 units of float32's 2⁻²⁴: each state and output sums up to a few hundred rounded products.
SCAN_TOLERANCE = 3e-6
# On CUDA the decay comes from the hardware's exponential, whose 2⁻²² may go the same way in every step: 1.5e-5 in the
# emulation of the worst case.
CUDA_TOLERANCE = 2e-5


@dataclass(frozen=True)
class ScanCase:
    """The sizes, direction and activations' type of one call.

    `delta` is normal(`delta_mean`, `delta_std`) before softplus: `softplus(x)` is `x` for large x and 0 for very
    negative ones, and a naive `log(1 + exp(x))` in float32 is infinite above 88. With `views`, the activations are
    parts of larger arrays: their steps are side by side, their rows are not.
    """

    name: str
    batch: int
    channels: int
    length: int
    states: int
    reverse: bool
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    delta_mean: float = 0.0
    delta_std: float = 1.0
    views: bool = False

    @property
    def elements(self) -> int:
        """Elements of the state over all steps: what a slow host should choose its cases by."""
        return self.batch * self.channels * self.length * self.states


def _both_directions(name: str, *sizes: int, **options: float) -> tuple[ScanCase, ScanCase]:
    return (
        ScanCase(name, *sizes, reverse=False, **options),
        ScanCase(f"{name}_reverse", *sizes, reverse=True, **options),
    )


#                          batch, channels, length, states
SCAN_CASES: tuple[ScanCase, ...] = (
    *_both_directions("one_of_everything", 1, 1, 1, 1),
    *_both_directions("one_step", 2, 32, 1, 16),
    *_both_directions("two_steps", 2, 3, 2, 4),
    *_both_directions("one_channel", 5, 1, 7, 16),
    *_both_directions("one_state", 1, 32, 65, 1),
    *_both_directions("odd_sizes", 5, 3, 65, 17),
    *_both_directions("one_more_than_a_vector", 2, 3, 7, 17),
    *_both_directions("vim_tokens", 1, 96, 197, 16),
    *_both_directions("vim_batch", 5, 32, 197, 16),
    *_both_directions("wide_batch", 2, 96, 65, 4),
    *_both_directions("large_delta", 2, 3, 7, 4, delta_mean=150.0, delta_std=20.0),
    *_both_directions("very_negative_delta", 2, 3, 65, 16, delta_mean=-150.0, delta_std=20.0),
    *_both_directions("delta_of_both_extremes", 2, 32, 65, 16, delta_std=60.0),
    *_both_directions("views", 2, 19, 70, 5, views=True),
    *_both_directions("long", 1, 3, 1025, 16),
)

# Large enough to show a state that is kept in half precision, and what softplus does at its ends.
HALF_CASES: tuple[ScanCase, ...] = tuple(
    replace(case, name=f"{case.name}_{dtype}", dtype=dtype)
    for case in SCAN_CASES
    if case.name.removesuffix("_reverse") in ("two_steps", "odd_sizes", "vim_tokens", "delta_of_both_extremes", "views")
    for dtype in ("float16", "bfloat16")
)
EVERY_CASE = [*SCAN_CASES, *HALF_CASES]
NUMPY_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def make_inputs(case: ScanCase, seed: int = 0) -> dict[str, np.ndarray]:
    """The operator's inputs by name: activations in the case's type, the parameters A, D and delta_bias in float32.

    `A` is negative, from slow to fast decay as in a trained model.
    """
    random = np.random.default_rng(seed)

    def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
        batch, rows, length = shape
        if not case.views:
            values = mean + std * random.standard_normal(shape)
            return values.astype(NUMPY_TYPES[case.dtype])
        whole = mean + std * random.standard_normal((batch, rows + 3, length + 2))
        return whole.astype(NUMPY_TYPES[case.dtype])[:, 1:-2, 2:]

    steps = (case.batch, case.channels, case.length)
    mixes = (case.batch, case.states, case.length)
    return {
        "u": normal(*steps),
        "delta": normal(*steps, mean=case.delta_mean, std=case.delta_std),
        "A": -np.exp(random.uniform(-3.0, 2.5, (case.channels, case.states))).astype(np.float32),
        "B": normal(*mixes),
        "C": normal(*mixes),
        "D": random.standard_normal(case.channels).astype(np.float32),
        "z": normal(*steps),
        "delta_bias": random.uniform(-4.0, 0.0, case.channels).astype(np.float32),
    }


def assert_close(
    got: np.ndarray, expected: np.ndarray, dtype: str = "float32", tolerance: float = SCAN_TOLERANCE
) -> None:
    """Hold an output to the float64 reference: float32's error, and for the half types their one rounding at the end.

    That rounding is half a unit in the last place: 2⁻¹¹ of an element in float16 (2⁻²⁵ near 0), 2⁻⁸ in bfloat16.
    """
    assert got.shape == expected.shape
    rounding, smallest = {"float32": (0.0, 0.0), "float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 0.0)}[dtype]
    bound = tolerance * np.abs(expected).max() + rounding * np.abs(expected) + smallest
    excess = np.abs(got.astype(np.float64) - expected) - bound
    assert (excess <= 0).all(), f"off by up to {excess.max():.3g} more than allowed"


Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Refusal:
    """A call that makes no sense: `spoil` changes good inputs; the host's message holds every one of `says`."""

    name: str
    spoil: Callable[[Inputs], Inputs]
    says: tuple[str, ...]


REFUSED_CASE = ScanCase("to_be_spoilt", batch=2, channels=3, length=7, states=4, reverse=False)


def _grown(name: str) -> Refusal:
    def spoil(inputs: Inputs) -> Inputs:
        shape = [size + 1 for size in inputs[name].shape]
        return {**inputs, name: np.ones(shape, np.float32)}

    # A says itself how many states there are.
    good = {"A": (3, 5), "D": (3,), "delta_bias": (3,), "B": (2, 4, 7), "C": (2, 4, 7)}.get(name, (2, 3, 7))
    grown = (4, 5) if name == "A" else tuple(size + 1 for size in good)
    return Refusal(f"{name}_of_another_shape", spoil, (name, str(grown), str(good)))


def _emptied(axis: int) -> Refusal:
    def spoil(inputs: Inputs) -> Inputs:
        shape = [2, 3, 7]
        shape[axis] = 0
        return {**inputs, "u": np.ones(shape, np.float32)}

    return Refusal(f"u_with_axis_{axis}_empty", spoil, ("empty",))


REFUSED: tuple[Refusal, ...] = (
    *(_grown(name) for name in ("delta", "A", "B", "C", "D", "z", "delta_bias")),
    *(_emptied(axis) for axis in range(3)),
    Refusal("u_of_two_axes", lambda inputs: {**inputs, "u": inputs["u"][0]}, ("u",)),
    Refusal("no_states", lambda inputs: {**inputs, "A": inputs["A"][:, :0]}, ("(3, 0)", "empty")),
)


def reference_scan(
    u: np.ndarray,
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray,
    z: np.ndarray,
    delta_bias: np.ndarray,
    reverse: bool = False,
) -> np.ndarray:
    """The selective scan in float64, one step after the other.

    Shapes: u, delta, z [batch, D, L]; A [D, N]; B, C [batch, N, L]; D, delta_bias [D]; gives [batch, D, L].
    """
    return reference_states(u, delta, A, B, C, D, z, delta_bias, reverse=reverse)[0]


def reference_states(
    u: np.ndarray,
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray | None = None,
    z: np.ndarray | None = None,
    delta_bias: np.ndarray | None = None,
    h0: np.ndarray | None = None,
    *,
    reverse: bool = False,
    softplus: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """The same with the last state [batch, D, N], from `h0`; B, C may be [batch, G, N, L]."""
    u, delta, A, B, C = (np.asarray(x, np.float64) for x in (u, delta, A, B, C))
    batch, channels, length = u.shape
    B, C = (np.repeat(x, channels // x.shape[1], 1) if x.ndim == 4 else x[:, None] for x in (B, C))  # (batch, D, N, L)
    h = np.zeros((batch, channels, A.shape[1])) if h0 is None else np.asarray(h0, np.float64)
    y = np.empty_like(u)
    for t in range(length - 1, -1, -1) if reverse else range(length):
        dt = delta[:, :, t] + (0 if delta_bias is None else delta_bias.astype(np.float64))  # (batch, D)
        dt = np.logaddexp(0.0, dt) if softplus else dt
        decay = np.exp(dt[:, :, None] * A)  # (batch, D, N)
        h = decay * h + (dt * u[:, :, t])[:, :, None] * B[..., t]
        y[:, :, t] = (h * C[..., t]).sum(axis=2)
        if D is not None:
            y[:, :, t] += D.astype(np.float64) * u[:, :, t]
        if z is not None:
            gate = z[:, :, t].astype(np.float64)
            y[:, :, t] *= gate / (1.0 + np.exp(-gate))
    return y, h


@dataclass(frozen=True)
class VariantCase(ScanCase):
    """A call of version 2 of the operator: with `groups` B and C have four axes, with `state` there are h0 and h_last.

    Hosts that have version 1 alone keep to `EVERY_CASE`.
    """

    groups: int = 0
    without: tuple[str, ...] = ()
    softplus: bool = True
    state: bool = False


def _variants(name: str, *sizes: int, **options: object) -> tuple[VariantCase, VariantCase]:
    return (
        VariantCase(name, *sizes, reverse=False, **options),  # type: ignore[arg-type]
        VariantCase(f"{name}_reverse", *sizes, reverse=True, **options),  # type: ignore[arg-type]
    )


#                      batch, channels, length, states
VARIANT_CASES: tuple[VariantCase, ...] = (
    *_variants("state", 2, 19, 70, 17, state=True),
    *_variants("state_of_one_step", 2, 35, 1, 17, state=True),
    *_variants("state_of_one_state", 1, 3, 66, 1, state=True),
    *_variants("state_of_a_decoder", 1, 96, 1, 16, state=True, without=("z",)),
    *_variants("one_group", 2, 5, 9, 4, groups=1),
    *_variants("groups", 2, 12, 67, 5, groups=3),
    *_variants("groups_of_a_vector_and_more", 1, 38, 9, 3, groups=2),
    *_variants("a_group_for_each_channel", 2, 3, 5, 2, groups=3, state=True),
    *_variants("groups_of_views", 2, 8, 20, 4, groups=2, views=True),
    *_variants("vmamba", 2, 64, 49, 1, groups=4, without=("z",)),
    *_variants("one_step_of_groups", 2, 40, 1, 6, groups=2, state=True),
    *_variants("without_z", 2, 5, 67, 4, without=("z",)),
    *_variants("without_d", 2, 5, 67, 4, without=("D",)),
    *_variants("without_delta_bias", 2, 5, 67, 4, without=("delta_bias",)),
    *_variants("without_anything", 2, 5, 67, 4, without=("D", "z", "delta_bias")),
    *_variants("raw_delta", 2, 5, 67, 4, softplus=False),
    *_variants("raw_delta_of_one_step", 2, 5, 1, 4, softplus=False, without=("D", "z", "delta_bias")),
    *_variants("everything", 2, 12, 67, 4, groups=2, without=("z", "D"), softplus=False, state=True),
    *_variants("many_states", 1, 20, 20, 65, state=True),
    *_variants("steep", 1, 4, 70, 4, state=True, delta_mean=1e5, delta_std=1e5),  # dt·A above 2²¹ in some tiles
)
HALF_VARIANT_CASES = tuple(
    replace(case, name=f"{case.name}_{dtype}", dtype=dtype)
    for case in VARIANT_CASES
    if case.name.removesuffix("_reverse") in ("state", "state_of_one_step", "everything", "groups_of_views")
    for dtype in ("float16", "bfloat16")
)
EVERY_VARIANT_CASE = [*VARIANT_CASES, *HALF_VARIANT_CASES]


def make_variant_inputs(case: VariantCase, seed: int = 0) -> Inputs:
    """Inputs by name, those of `case.without` left out; h0 is float32."""
    inputs = make_inputs(case, seed)
    random = np.random.default_rng([seed, 1])
    if case.groups:
        several = make_inputs(replace(case, states=case.groups * case.states), seed)
        for name in ("B", "C"):
            rows = several[name]
            inputs[name] = (
                rows.reshape(case.batch, case.groups, case.states, case.length)
                if not case.views
                else (
                    np.lib.stride_tricks.as_strided(
                        rows,
                        (case.batch, case.groups, case.states, case.length),
                        (rows.strides[0], rows.strides[1] * case.states, rows.strides[1], rows.strides[2]),
                    )
                )
            )
    if not case.softplus:  # sizes of steps, so that no state grows
        inputs["delta"] = np.logaddexp(0, inputs["delta"].astype(np.float32) - 2).astype(inputs["delta"].dtype)
        inputs["delta_bias"] = -inputs["delta_bias"] / 8
    if case.state:
        inputs["h0"] = random.standard_normal((case.batch, case.channels, case.states)).astype(np.float32)
    return {name: value for name, value in inputs.items() if name not in case.without}


def expected_of(case: VariantCase, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """y and the last state, by the reference."""
    return reference_states(**inputs, reverse=case.reverse, softplus=case.softplus)
