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
    u, delta, A, B, C, D, z, delta_bias = (np.asarray(x, np.float64) for x in (u, delta, A, B, C, D, z, delta_bias))
    batch, channels, length = u.shape
    h = np.zeros((batch, channels, A.shape[1]))
    y = np.empty_like(u)
    for t in range(length - 1, -1, -1) if reverse else range(length):
        dt = np.logaddexp(0.0, delta[:, :, t] + delta_bias)  # softplus; (batch, D)
        decay = np.exp(dt[:, :, None] * A)  # (batch, D, N)
        h = decay * h + (dt * u[:, :, t])[:, :, None] * B[:, None, :, t]
        gate = z[:, :, t] / (1.0 + np.exp(-z[:, :, t]))
        y[:, :, t] = ((h * C[:, None, :, t]).sum(axis=2) + D * u[:, :, t]) * gate
    return y
