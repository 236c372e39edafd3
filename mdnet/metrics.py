"""Agreement between predicted and true scores, as the SCUT-FBP5500 benchmark defines it.

PC, MAE and RMSE are those of the data set's paper (Liang et al., arXiv 1801.06345); its repository's README calls the
MAE "maximum absolute error", a slip: its figures are means. All are computed in float64, whatever is given.
"""

from __future__ import annotations

import math

import numpy as np


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation coefficient (PC) of two vectors (n,); NaN where one of them is constant."""
    a, b = (np.asarray(values, dtype=np.float64) for values in (a, b))
    if not len(a) or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm else math.nan


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two vectors (n,); equal values share their mean rank."""
    return pearson(_ranks(a), _ranks(b))


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


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
