"""The selective scan's operators, their inputs and what shapes these take: one check for every host in Python."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mdnet_engines.errors import MDNetError

INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
INPUTS_V2 = (*INPUTS, "h0")


@dataclass(frozen=True)
class Variant:
    """One operator of version 2: its direction, and which inputs, steps and outputs it has."""

    reverse: bool = False
    z: bool = True
    softplus: bool = True
    state: bool = False

    @property
    def name(self) -> str:
        """The operator's name."""
        parts = {"Reverse": self.reverse, "NoZ": not self.z, "NoSoftplus": not self.softplus, "State": self.state}
        return "SelectiveScan2" + "".join(part for part, there in parts.items() if there)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of its inputs, in order."""
        gate, state = ("z",) * self.z, ("h0",) * self.state
        return ("u", "delta", "A", "B", "C", "D", *gate, "delta_bias", *state)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of its outputs, in order."""
        return ("y", "h_last") if self.state else ("y",)


VARIANTS: dict[str, Variant] = {
    variant.name: variant for variant in itertools.starmap(Variant, itertools.product((False, True), repeat=4))
}
"""Every operator of version 2 by its name."""

ANY = -1
"""A size that is not known yet, such as TensorRT's symbolic batch; fits every size."""


class ShapeError(MDNetError, ValueError):
    """Inputs of a scan that do not fit each other."""


def check_shapes(
    u: Sequence[int],
    delta: Sequence[int],
    A: Sequence[int],
    B: Sequence[int],
    C: Sequence[int],
    D: Sequence[int],
    z: Sequence[int],
    delta_bias: Sequence[int],
) -> None:
    """Raise `ShapeError`, naming both shapes, where an input does not fit `u` and `A`, or is empty."""
    found = {"delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    _compare(tuple(u), tuple(A), found, groups=None)


def check_shapes_v2(
    u: Sequence[int],
    delta: Sequence[int],
    A: Sequence[int],
    B: Sequence[int],
    C: Sequence[int],
    D: Sequence[int] | None = None,
    z: Sequence[int] | None = None,
    delta_bias: Sequence[int] | None = None,
    h0: Sequence[int] | None = None,
) -> None:
    """The same for version 2 of the operator: optional inputs may be None, B and C may have an axis of groups."""
    inputs = {"delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias, "h0": h0}
    found = {name: shape for name, shape in inputs.items() if shape is not None}
    groups = B[1] if len(B) == 4 else None
    if len(B) != len(C) and {len(B), len(C)} == {3, 4}:
        raise ShapeError(f"B is {tuple(B)}, C {tuple(C)}: both have an axis of groups, or none has")
    _compare(tuple(u), tuple(A), found, groups)
    if groups is not None and (groups < 1 or u[1] % groups):
        raise ShapeError(f"B is {tuple(B)}: its {groups} groups can't share the {u[1]} channels of u {tuple(u)} evenly")


def _compare(u: tuple[int, ...], A: tuple[int, ...], shapes: Mapping[str, Sequence[int]], groups: int | None) -> None:
    if len(u) != 3 or len(A) != 2:
        raise ShapeError(f"u must be (batch, channels, length), A (channels, states); got {u} and {A}")
    if 0 in u or 0 in A:
        raise ShapeError(f"u {u} or A {A} has an empty axis")
    (batch, channels, length), states = u, A[1]
    expected = {
        **dict.fromkeys(("delta", "z"), u),
        "A": (channels, states),
        **dict.fromkeys(("B", "C"), (batch, states, length) if groups is None else (batch, groups, states, length)),
        **dict.fromkeys(("D", "delta_bias"), (channels,)),
        "h0": (batch, channels, states),
    }
    for name, found in shapes.items():
        wanted = expected[name]
        if len(found) != len(wanted) or any(
            ANY not in sizes and sizes[0] != sizes[1] for sizes in zip(found, wanted, strict=True)
        ):
            raise ShapeError(f"{name} is {tuple(found)}, but u {u} and A {A} need {wanted}")
