"""Ridge regression with its penalty by generalised cross-validation: the least that frozen features should give."""

from __future__ import annotations

import numpy as np

PENALTIES = np.logspace(-5, 5, 41)
"""Tried, in units of the mean eigenvalue of the features' Gram matrix."""


def ridge(features: np.ndarray, ratings: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Predict the ratings of `asked` (m, d) from `features` (n, d) with `ratings` (n,); float64 (m,).

    Features are standardised by `features`; a constant one counts for nothing. The penalty is that of the least
    generalised cross-validation error (Golub, Heath and Wahba, 1979), which needs no validation slice. What is
    decomposed is the smaller of the two Gram matrices: n² × d or n × d² steps.
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(ratings, dtype=np.float64)
    mean, deviation, level = x.mean(axis=0), x.std(axis=0), y.mean()
    scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 1e-9 * np.abs(x).max(initial=1))
    x, y = (x - mean) * scale, y - level
    dual = len(x) <= x.shape[1]
    values, vectors = np.linalg.eigh(x @ x.T if dual else x.T @ x)
    kept = values > 1e-10 * max(values[-1], 1e-300)
    values, vectors = values[kept], vectors[:, kept]
    if not len(values):
        return np.full(len(asked), level)
    left = vectors if dual else x @ vectors / np.sqrt(values)  # left singular vectors of x
    along = left.T @ y
    shrunk = values / (values + PENALTIES[:, None] * values.mean())  # (penalties, k): what is kept along each
    beyond = max(0.0, y @ y - (along**2).sum())  # of the ratings, what no weights reach
    error = beyond + (((1 - shrunk) * along) ** 2).sum(axis=1)
    freedom = len(x) - 1 - shrunk.sum(axis=1)  # 1 for the mean
    criterion = np.where(freedom > 0, error / np.maximum(freedom, 1e-9) ** 2, np.inf)
    weights = x.T @ (left @ (shrunk[criterion.argmin()] * along / values))
    return level + (np.asarray(asked, dtype=np.float64) - mean) * scale @ weights
