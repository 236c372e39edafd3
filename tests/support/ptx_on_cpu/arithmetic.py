"""The instructions' arithmetic on arrays with an element for each thread.

float32 is rounded as IEEE 754 says, `fma` once at its end. `ex2.approx` and `rcp.approx` are computed in float64 and
rounded to float32, so they are off by half a unit in the last place (`ex2` by a hair more for one argument in some
10⁸); a GPU's by up to two. `mul` and `add` are not contracted to `fma`, which ptxas may do.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

Array = np.ndarray

_HALFWAY = np.uint64(1 << 28)  # of the 29 bits that float32 lacks
_LOST = np.uint64((1 << 29) - 1)
_SMALLEST_NORMAL = 2.0**-126


def fma(a: Array, b: Array, c: Array) -> Array:
    """a·b + c, rounded to float32 once.

    A product of two float32 is exact in float64, their sum with c is not. Rounding it a second time goes wrong only
    where it is a tie of float32, and for subnormal results; these are redone by rounding the sum to odd.
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    suspect = (total.view(np.uint64) & _LOST) == _HALFWAY
    suspect |= (np.abs(total) < _SMALLEST_NORMAL) & (total != 0)
    if suspect.any():
        exact = _round_to_odd(product[suspect], c[suspect].astype(np.float64), total[suspect])
        total[suspect] = exact
    return total.astype(np.float32)


def _round_to_odd(a: Array, b: Array, total: Array) -> Array:
    """`total` = a + b rounded to nearest; where that is inexact, the neighbour of the sum whose last bit is 1.

    Rounding that to fewer bits equals rounding the exact sum (Boldo and Melquiond, 2008).
    """
    rest = total - a
    error = (a - (total - rest)) + (b - rest)  # of the sum, exact (Knuth's 2Sum)
    bits = total.view(np.int64).copy()
    even = ((bits & 1) == 0) & (error != 0) & np.isfinite(total)
    away = (error > 0) == (total > 0)  # bits grow with the magnitude
    # From zero there is no way down; a sum that rounds to zero in float64 is zero.
    bits[even] += np.where(away, 1, -1)[even]
    return bits.view(np.float64)


def flushed(x: Array) -> Array:
    """`.ftz`: what is subnormal is zero, with its sign."""
    return np.where(np.abs(x) < np.float32(_SMALLEST_NORMAL), np.copysign(np.float32(0), x), x)


def ex2(x: Array) -> Array:
    return flushed(np.exp2(flushed(x).astype(np.float64)).astype(np.float32))


def rcp(x: Array) -> Array:
    return flushed((1 / flushed(x).astype(np.float64)).astype(np.float32))


def shl(x: Array, places: Array) -> Array:
    """PTX shifts everything out where NumPy leaves the result open."""
    width = np.uint32(8 * x.itemsize)
    return np.where(places < width, x << np.minimum(places, width - 1).astype(x.dtype), x.dtype.type(0))


def shr(x: Array, places: Array) -> Array:
    """Likewise; of a signed type the sign fills up."""
    width = np.uint32(8 * x.itemsize)
    last = np.minimum(places, width - 1).astype(x.dtype)
    return x >> last if x.dtype.kind == "i" else np.where(places < width, x >> last, x.dtype.type(0))


def bfi(bits: Array, into: Array, position: Array, length: Array) -> Array:
    """`into` with its `length` bits from `position` on replaced by the lowest of `bits`; 32 bits."""
    position, length = (np.minimum(x & 0xFF, 64).astype(np.uint64) for x in (position, length))
    mask = (((np.uint64(1) << np.minimum(length, 32)) - 1) << np.minimum(position, 32)) & np.uint64(0xFFFFFFFF)
    placed = (bits.astype(np.uint64) << np.minimum(position, 32)) & mask
    return (placed | (into.astype(np.uint64) & ~mask)).astype(np.uint32)


def to_float16(x: Array) -> Array:
    return x.astype(np.float16).view(np.uint16)


def from_float16(bits: Array) -> Array:
    return bits.view(np.float16).astype(np.float32)


def to_bfloat16(x: Array) -> Array:
    return x.astype(ml_dtypes.bfloat16).view(np.uint16)
