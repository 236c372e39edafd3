"""Agreement between predicted and true scores, as the SCUT-FBP5500 benchmark defines it.

PC, MAE and RMSE are those of the data set's paper (Liang et al., arXiv 1801.06345); its repository's README calls the
MAE "maximum absolute error", a slip: its figures are means. All are computed in float64, whatever is given.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def pearson(a: ArrayLike, b: ArrayLike) -> float:
    """Pearson's correlation coefficient (PC) of two vectors (n,); NaN where one of them is constant."""
    x, y = (np.asarray(values, dtype=np.float64) for values in (a, b))
    if not len(x) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm else math.nan


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation of two vectors (n,); equal values share their mean rank."""
    return pearson(ranks(a), ranks(b))


def mae(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean absolute error of two vectors (n,), in rating points; NaN where they are empty."""
    errors = _errors(truth, predicted)
    return float(np.abs(errors).mean()) if len(errors) else math.nan


def rmse(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Root mean squared error of two vectors (n,), in rating points; NaN where they are empty."""
    errors = _errors(truth, predicted)
    return math.sqrt(float((errors**2).mean())) if len(errors) else math.nan


def _errors(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return np.asarray(predicted, dtype=np.float64) - np.asarray(truth, dtype=np.float64)


def ranks(values: ArrayLike) -> np.ndarray:
    """Ranks, float64 (n,), 1 for the lowest value; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def max_abs(a: np.ndarray, b: np.ndarray) -> float:
    """Largest absolute difference, in float64; NaN where it is not defined."""
    with np.errstate(invalid="ignore"):  # ∞ − ∞ is NaN, which no gate accepts
        return float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64))))
