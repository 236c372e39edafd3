"""Numbers and foreign text as a page or a line shows them."""

from __future__ import annotations

import math


def visible(text: str) -> str:
    r"""`text` with what would not show, or not encode, as escapes: surrogates (`\udcff`), controls, bidi overrides."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def number(value: float, digits: int = 6, sign: str = "") -> str:
    if math.isnan(value):
        return "NaN"
    if value == 0:
        return "0"
    return f"{value:{sign}.{digits}g}".rstrip(".").replace("inf", "∞").replace("-", "−")


def number_beside(value: float, limit: float) -> str:
    """`value` with as many digits as it takes to see that it is not `limit`, nor exactly 1."""
    misread = {number(other) for other in (limit, 1.0) if other != value}
    return next((text for digits in range(6, 17) if (text := number(value, digits)) not in misread), number(value, 17))


def correlation_text(value: float, sign: str = "") -> str:
    """Four decimals; a dash where there is none: of one image, or of scores that are all equal."""
    return "–" if math.isnan(value) else f"{value:{sign}.4f}".replace("-", "−")


def score_text(value: float) -> str:
    return f"{value:.5f}".replace("-", "−") if abs(value) < 1e6 else number(value)
