"""PC, MAE and RMSE against scipy and plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from mdnet_engines.parity.metrics import mae, pearson, rmse, spearman


def test_metrics_agree_with_scipy_and_numpy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=200).round(1), rng.normal(size=200).round(1)  # rounded: ties
    assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert mae(a, b) == pytest.approx(np.mean(np.abs(a - b)))
    assert rmse(a, b) == pytest.approx(np.sqrt(np.mean((a - b) ** 2)))


def test_float32_ratings_lose_no_digits() -> None:
    rng = np.random.default_rng(1)
    a = (1000 + rng.normal(size=5000)).astype(np.float32)  # a float32 mean is off by 1e-4 here
    b = (a + rng.normal(size=5000)).astype(np.float32)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    assert pearson(a, b) == pytest.approx(stats.pearsonr(wide_a, wide_b).statistic, rel=1e-10)
    assert rmse(a, b) == pytest.approx(np.sqrt(np.mean((wide_a - wide_b) ** 2)), rel=1e-12)


def test_errors_of_known_numbers() -> None:
    truth, predicted = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 3.0, 2.0])
    assert (mae(truth, predicted), rmse(truth, predicted)) == (0.5, 1.0)


@pytest.mark.parametrize("constant", [[0.1] * 7, [3.0]])
def test_a_constant_has_no_correlation(constant: list[float]) -> None:
    # 0.1 has no exact mean in binary: what is left over must not be taken for a spread.
    assert math.isnan(pearson(np.array(constant), np.arange(len(constant), dtype=np.float64)))


def test_no_images_have_no_figures() -> None:
    none = np.zeros(0)
    assert all(math.isnan(figure(none, none)) for figure in (pearson, mae, rmse))
