"""Occlusion finds what the score depends on, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from mdnet.explain.occlusion import GREY, default_patch, default_stride, occlude, starts
from mdnet_engines.errors import MDNetError, UsageError

SIZE = 64
BRIGHT = np.full((SIZE, SIZE, 3), 228, np.uint8)  # 100 above the grey that hides


def region(images: np.ndarray, top: int = 16, left: int = 40, side: int = 8) -> np.ndarray:
    """A score that depends on one square alone: how bright it is."""
    return images[:, top : top + side, left : left + side].astype(np.float64).mean(axis=(1, 2, 3)) / 100


@pytest.mark.parametrize("sign", [1, -1])
def test_a_score_of_one_region_loses_by_that_region_and_no_other_with_its_sign(sign: int) -> None:
    found = occlude(lambda images: sign * region(images), BRIGHT, patch=8, stride=8)
    expected = np.zeros((8, 8))
    expected[2, 5] = sign * 1.0  # (228 − 128) / 100
    np.testing.assert_allclose(found.loss, expected, atol=1e-12)
    np.testing.assert_allclose(found.pixels, np.kron(expected, np.ones((8, 8))), atol=1e-12)
    assert found.score == pytest.approx(sign * 2.28)


def test_overlapping_squares_share_what_they_hide_by_area() -> None:
    found = occlude(region, BRIGHT, patch=16, stride=8)
    # Squares begin at 0, 8, …, 48. Those from (8 or 16, 32 or 40) hide the region whole, no other any of it.
    expected = np.zeros((7, 7))
    expected[1:3, 4:6] = 1.0
    np.testing.assert_allclose(found.loss, expected, atol=1e-12)
    np.testing.assert_allclose(found.pixels[16:24, 40:48], 1.0)
    assert found.pixels[:8].max() == 0
    np.testing.assert_allclose(found.cells(8)[2, 5], 1.0)
    assert np.unravel_index(found.cells(4).argmax(), (4, 4)) == (1, 2)


def test_every_pixel_is_hidden_where_the_patch_does_not_divide_the_side() -> None:
    assert starts(64, 24, 12) == [0, 12, 24, 36, 40]
    assert starts(64, 64, 1) == [0]
    seen = np.zeros((SIZE, SIZE), bool)

    def score(images: np.ndarray) -> np.ndarray:
        seen[(images == GREY).all(axis=3).any(axis=0)] = True
        return np.zeros(len(images))

    found = occlude(score, BRIGHT, patch=24, stride=20)
    assert seen.all()
    assert np.isfinite(found.pixels).all()


def test_batches_do_not_change_the_map_and_every_score_is_counted() -> None:
    counted: list[int] = []
    picture = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    one = occlude(region, picture, patch=16, stride=16, batch_size=3, advance=counted.append)
    other = occlude(region, picture, patch=16, stride=16, batch_size=100)
    np.testing.assert_array_equal(one.loss, other.loss)
    assert counted == [1, 3, 3, 3, 3, 3, 1]


def test_the_picture_is_left_as_it_was() -> None:
    picture = BRIGHT.copy()
    occlude(region, picture, patch=16, stride=16)
    np.testing.assert_array_equal(picture, BRIGHT)


@pytest.mark.parametrize(
    ("patch", "stride", "reason"),
    [
        (65, 8, "a patch of 65 pixels; expected 1 to 64"),
        (8, 9, "a stride of 9 pixels; expected 1 to 8"),
    ],
)
def test_a_square_that_would_not_cover_the_picture_is_refused(patch: int, stride: int, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        occlude(region, BRIGHT, patch=patch, stride=stride)


def test_a_score_that_is_not_finite_ends_it() -> None:
    with pytest.raises(MDNetError, match=r"a score is not finite \(nan\)"):
        occlude(lambda images: np.full(len(images), np.nan), BRIGHT, patch=16, stride=16)


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_the_defaults_ask_225_times_whatever_the_size(size: int) -> None:
    patch = default_patch(size)
    assert len(starts(size, patch, default_stride(patch))) ** 2 == 225
