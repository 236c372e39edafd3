"""Agreement between predicted and true scores, as the SCUT-FBP5500 benchmark defines it."""

from __future__ import annotations

import math

import numpy as np


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation coefficient (PC) of two vectors; NaN where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm else math.nan


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; equal values share their mean rank."""
    return pearson(_ranks(a), _ranks(b))


def mae(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean absolute error, in rating points."""
    return float(np.abs(truth - predicted).mean())


def rmse(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Root mean squared error, in rating points."""
    return math.sqrt(float(((truth - predicted) ** 2).mean()))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
