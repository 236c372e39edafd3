"""The ridge is the textbook's, in both of its forms, and its penalty is that of the least GCV error."""

from __future__ import annotations

import numpy as np
import pytest

from mdnet.evaluation.ridge import PENALTIES, ridge
from mdnet_engines.parity.metrics import pearson


def by_definition(x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Every penalty by the whole hat matrix, (XᵀX + λI)⁻¹Xᵀ; the mean takes one degree of freedom."""
    mean, scale = x.mean(0), x.std(0)
    scale[scale == 0] = np.inf
    z, centred = (x - mean) / scale, y - y.mean()
    gram = z.T @ z
    values = np.linalg.eigvalsh(gram)
    best = (np.inf, np.zeros(x.shape[1]))
    for penalty in PENALTIES * values[values > 1e-10 * values[-1]].mean():
        solve = np.linalg.solve(gram + penalty * np.eye(len(gram)), z.T)
        error = ((centred - z @ (solve @ centred)) ** 2).sum()
        criterion = error / (len(x) - 1 - np.trace(z @ solve)) ** 2
        if criterion < best[0]:
            best = (criterion, solve @ centred)
    return y.mean() + (asked - mean) / scale @ best[1]


@pytest.mark.parametrize(("n", "d"), [(40, 8), (20, 60)])
def test_both_forms_are_the_definition(n: int, d: int) -> None:
    rng = np.random.default_rng(0)
    x, asked = rng.normal(size=(n, d)) * rng.uniform(0.1, 10, d), rng.normal(size=(7, d))
    y = 3 + x[:, :3].sum(1) + rng.normal(0, 5, n)
    np.testing.assert_allclose(ridge(x, y, asked), by_definition(x, y, asked), rtol=1e-6)


def test_the_penalty_fits_the_noise() -> None:
    rng = np.random.default_rng(1)
    x, asked = rng.normal(size=(300, 100)), rng.normal(size=(500, 100))
    weights = rng.normal(size=100)
    exact = ridge(x, x @ weights, asked)
    np.testing.assert_allclose(exact, asked @ weights, atol=1e-2)  # no noise: nearly no penalty
    noise = ridge(x, rng.normal(size=300), asked)
    assert noise.std() < 0.25  # nothing to learn: without a penalty it would be 0.7
    noisy = ridge(x, x @ weights + rng.normal(0, 20, 300), asked)
    least_squares = asked @ np.linalg.lstsq(x, x @ weights + rng.normal(0, 20, 300), rcond=None)[0]
    assert pearson(noisy, asked @ weights) > pearson(least_squares, asked @ weights)


@pytest.mark.parametrize("n", [3, 30])
def test_constant_features_and_ratings_give_the_mean(n: int) -> None:
    asked = np.random.default_rng(0).normal(size=(4, 6))
    np.testing.assert_allclose(ridge(np.full((n, 6), 1e6), np.arange(n), asked), np.full(4, (n - 1) / 2))
    x = np.random.default_rng(1).normal(size=(n, 6))
    np.testing.assert_allclose(ridge(x, np.full(n, 2.5), asked), np.full(4, 2.5))


def test_a_scaled_feature_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    x, asked, y = rng.normal(size=(50, 5)), rng.normal(size=(9, 5)), rng.normal(size=50)
    factors = np.array([1e-4, 1, 1e4, 1, 1])
    np.testing.assert_allclose(ridge(x * factors, y, asked * factors), ridge(x, y, asked), rtol=1e-8)
