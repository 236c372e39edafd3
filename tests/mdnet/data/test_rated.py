"""Rated images: their groups are data, and stay with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mdnet.data.rated import Rated


def test_images_without_groups_have_empty_ones() -> None:
    assert Rated([Path("a"), Path("b")], np.ones(2, np.float32)).groups == ["", ""]


def test_a_subset_keeps_each_images_rating_and_group() -> None:
    rated = Rated([Path("a"), Path("b"), Path("c")], np.array([1, 2, 3], np.float32), ["x", "y", ""])
    some = rated.take(np.array([2, 0]))
    assert (some.images, some.ratings.tolist(), some.groups) == ([Path("c"), Path("a")], [3, 1], ["", "x"])
