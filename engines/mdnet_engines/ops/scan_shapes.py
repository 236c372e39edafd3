"""The selective scan's inputs and what shapes they take: one check for every host that is written in Python."""

from __future__ import annotations

from collections.abc import Sequence

from mdnet_engines.errors import MDNetError

INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
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
    u, A = tuple(u), tuple(A)
    if len(u) != 3 or len(A) != 2:
        raise ShapeError(f"u must be (batch, channels, length), A (channels, states); got {u} and {A}")
    if 0 in u or 0 in A:
        raise ShapeError(f"u {u} or A {A} has an empty axis")
    (batch, channels, length), states = u, A[1]
    expected = {
        "delta": (delta, (batch, channels, length)),
        "A": (A, (channels, states)),
        "B": (B, (batch, states, length)),
        "C": (C, (batch, states, length)),
        "D": (D, (channels,)),
        "z": (z, (batch, channels, length)),
        "delta_bias": (delta_bias, (channels,)),
    }
    for name, (found, wanted) in expected.items():
        if len(found) != len(wanted) or any(
            ANY not in sizes and sizes[0] != sizes[1] for sizes in zip(found, wanted, strict=True)
        ):
            raise ShapeError(f"{name} is {tuple(found)}, but u {u} and A {A} need {wanted}")
