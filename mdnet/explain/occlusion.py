"""Occlusion: what the score loses when a part of the picture is hidden. It asks the model alone, whatever runs it.

A square is painted grey and moved over the picture; each place gives score − score with the square hidden (Zeiler and
Fergus, arXiv 1311.2901, did so for a class's probability). Positive: the hidden part had raised the score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mdnet.evaluation.scored_model import ScoreBatch
from mdnet_engines.errors import MDNetError, UsageError

GREY = 128
"""What hides: the middle of the pixels' range. No colour is neutral for a model that saw none like it."""


@dataclass(frozen=True)
class Occlusion:
    """The score of a picture as it is, and in rating points what it loses by each place that was hidden."""

    score: float
    loss: np.ndarray  # (n, n) float64, by the square's row and column
    pixels: np.ndarray  # (S, S) float64: the mean loss of the squares that hid a pixel

    def cells(self, side: int) -> np.ndarray:
        """(side, side): the mean of `pixels` in the cells of a grid, where `side` divides S."""
        cell = len(self.pixels) // side
        return self.pixels.reshape(side, cell, side, cell).mean(axis=(1, 3))


def default_patch(size: int) -> int:
    """An eighth of the picture's side: about an eye's width in a portrait."""
    return size // 8


def default_stride(patch: int) -> int:
    """Half a square, so that each place is seen by squares on both sides of its edges."""
    return max(1, patch // 2)


def starts(size: int, patch: int, stride: int) -> list[int]:
    """Where squares begin along one side; the last one ends with the picture.

    Raises:
        UsageError: a square does not fit, or some pixels would never be hidden.
    """
    if not 1 <= patch <= size:
        raise UsageError(f"a patch of {patch} pixels; expected 1 to {size}, the side of what the model sees")
    if not 1 <= stride <= patch:
        raise UsageError(f"a stride of {stride} pixels; expected 1 to {patch}, the patch, so that no pixel is left out")
    return [*range(0, size - patch, stride), size - patch]


def occlude(
    score: ScoreBatch,
    picture: np.ndarray,
    *,
    patch: int,
    stride: int,
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda _: None,
) -> Occlusion:
    """Hide squares of `picture`, uint8 (S, S, 3), one after another, and score each.

    Args:
        patch: side of the square, in pixels of what the model sees.
        stride: from one square to the next.
        advance: called with the number of scores that were added.

    Raises:
        UsageError: as `starts`.
        MDNetError: a score is not finite.
    """
    size = len(picture)
    along = starts(size, patch, stride)
    places = [(top, left) for top in along for left in along]
    whole = float(_finite(score(picture[None]))[0])
    advance(1)
    scores = []
    for first in range(0, len(places), batch_size):
        some = places[first : first + batch_size]
        hidden = np.repeat(picture[None], len(some), axis=0)
        for image, (top, left) in zip(hidden, some, strict=True):
            image[top : top + patch, left : left + patch] = GREY
        scores.append(_finite(score(hidden)))
        advance(len(some))
    loss = whole - np.concatenate(scores)
    total, count = np.zeros((size, size)), np.zeros((size, size))
    for (top, left), value in zip(places, loss, strict=True):
        total[top : top + patch, left : left + patch] += value
        count[top : top + patch, left : left + patch] += 1
    return Occlusion(whole, loss.reshape(len(along), len(along)), total / count)


def _finite(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(scores).all():
        raise MDNetError(f"a score is not finite ({scores[~np.isfinite(scores)][0]})")
    return scores
