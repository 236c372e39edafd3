"""Maps on one grid, their agreement, and their colours."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from mdnet.explain.maps import agreement, enlarged, joined, painted_look, painted_loss


def test_joined_maps_keep_the_sum_and_the_place() -> None:
    fine, coarse = np.zeros((4, 4)), np.zeros((2, 2))
    fine[3, 0], coarse[0, 1] = 0.25, 0.75
    total = joined({"fine": fine, "coarse": coarse})
    expected = np.zeros((4, 4))
    expected[3, 0] = 0.25
    expected[:2, 2:] = 0.75 / 4
    np.testing.assert_allclose(total, expected)
    assert total.sum() == pytest.approx(1)


def test_agreement_is_the_rank_correlation_with_the_size_of_the_loss() -> None:
    rng = np.random.default_rng(0)
    attention, loss = rng.random((8, 8)), rng.normal(size=(8, 8))
    expected = stats.spearmanr(attention.ravel(), np.abs(loss).ravel()).statistic
    assert agreement(attention, loss) == pytest.approx(expected)
    assert agreement(attention, -(attention**3)) == pytest.approx(1)  # the sign does not count, nor the shape
    assert math.isnan(agreement(attention, np.zeros((8, 8))))


def test_losses_are_orange_gains_blue_and_nothing_is_grey() -> None:
    picture = np.full((4, 4, 3), 100, np.uint8)
    loss = np.zeros((4, 4))
    loss[0, 0], loss[0, 1] = 0.5, -0.5
    red, _, blue = painted_loss(picture, loss, 0.5).astype(int).transpose(2, 0, 1)
    assert red[0, 0] - blue[0, 0] > 100
    assert blue[0, 1] - red[0, 1] > 100
    np.testing.assert_array_equal(red[1:], blue[1:])
    np.testing.assert_array_equal(painted_loss(picture, np.zeros((4, 4)), 0.0)[..., 0], red[1, 1])


def test_the_most_attended_cell_has_the_full_colour() -> None:
    picture = np.full((4, 4, 3), 100, np.uint8)
    painted = painted_look(picture, np.array([[0.0, 0.1], [0.2, 0.0]])).astype(int)
    colour = painted[..., 0] - painted[..., 2]
    assert (enlarged(np.array([[0, 0], [1, 0]]), 4) == (colour == colour.max())).all()
