"""Which square of a photo a model sees: the central one, or one around the face. Part of the preprocessing.

`--face` says it, in words: `none` is the central square, `crop` the square around the face at the usual factor,
`crop:1.2` at this one. In a checkpoint's configuration and a bundle's manifest it is `face`: the factor, or nothing.
"""

from __future__ import annotations

import re
from typing import Any

import click

from mdnet_engines.errors import MDNetWarning, UsageError, printable

FACTOR = 0.8
"""Side of the square over the longer side of the face, which the detector takes from hairline to chin. Measured: the
largest that lies inside tight crops, so that these and uncropped portraits give the same picture."""
LEAST, MOST = 0.25, 8.0


class FramingWarning(MDNetWarning):
    """Images are framed otherwise than in training."""


class FaceOption(click.ParamType):
    """A value of `--face`, checked, as the text that it is."""

    name = "none|crop[:FACTOR]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            parse_face(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)
        return str(value)


def parse_face(text: str) -> float | None:
    """The factor that `none`, `crop` or `crop:FACTOR` says; None is the central square.

    Raises:
        UsageError: another text, or a factor that no square can have.
    """
    if text == "none":
        return None
    found = re.fullmatch(r"crop(?::([0-9]{1,3}(?:\.[0-9]{1,6})?))?", text)
    if not found:
        raise UsageError(f"{printable(text)!r} is not a framing; expected none, crop or crop:FACTOR, such as crop:1.2")
    factor = float(found[1]) if found[1] else FACTOR
    if not LEAST <= factor <= MOST:
        raise UsageError(f"crop:{factor:g}: the factor is from {LEAST:g} to {MOST:g} times the face")
    return factor


def describe_face(face: float | None) -> str:
    """The framing in a few words."""
    return "the central square" if face is None else f"a square of {face:g} times the face"


def mismatch(trained: float | None, used: float | None) -> str | None:
    """One line where a model sees another framing than it was trained at, with both; None where they agree."""
    if trained == used:
        return None
    return (
        f"the model was trained on {describe_face(trained)}, and gets {describe_face(used)}; "
        "leave out --face for the framing of training"
    )
