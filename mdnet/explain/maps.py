"""Maps over one picture: brought to one grid, compared, painted over it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mdnet_engines.parity.metrics import spearman

GAIN, LOSS, LOOK = (0.13, 0.40, 0.85), (0.90, 0.32, 0.0), (0.95, 0.55, 0.0)
"""Colours, red, green and blue: blue and orange are told apart with any colour vision."""
_GREY = np.array([0.299, 0.587, 0.114])


def joined(maps: Mapping[str, np.ndarray]) -> np.ndarray:
    """The maps of all scales on the finest one's grid: a coarse cell's share is spread evenly over the cells in it."""
    side = max(len(each) for each in maps.values())
    total = np.zeros((side, side))
    for each in maps.values():
        fine = side // len(each)
        total += enlarged(each, side) / fine**2
    return total


def enlarged(cells: np.ndarray, side: int) -> np.ndarray:
    """(s, s) → (side, side), each value repeated: a cell stays a square."""
    times = side // len(cells)
    return cells.repeat(times, axis=0).repeat(times, axis=1)


def agreement(attention: np.ndarray, loss: np.ndarray) -> float:
    """Spearman's rank correlation of attention (s, s) with the size of the loss (s, s), which alone has a sign."""
    return spearman(attention.ravel(), np.abs(loss).ravel())


def painted_loss(picture: np.ndarray, loss: np.ndarray, most: float) -> np.ndarray:
    """`picture` (S, S, 3) in grey, under `loss` (S, S): orange where hiding lowers the score, blue where it raises it.

    Args:
        most: the loss that has the full colour, so that pictures of one page compare.
    """
    share = np.clip(loss / most if most else loss, -1, 1)
    return _painted(picture, np.abs(share), np.where(share[..., None] > 0, LOSS, GAIN))


def painted_look(picture: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """`picture` (S, S, 3) in grey, under attention (s, s) that is lightest where it is 0 and full where it is most."""
    share = enlarged(attention / attention.max(), len(picture))
    return _painted(picture, share, np.broadcast_to(LOOK, picture.shape))


def _painted(picture: np.ndarray, alpha: np.ndarray, colour: np.ndarray) -> np.ndarray:
    grey = (0.35 + 0.65 * (picture / 255 @ _GREY))[..., None]  # lightened, so that a colour shows on black too
    alpha = 0.85 * alpha[..., None]
    return np.rint(255 * (grey * (1 - alpha) + colour * alpha)).astype(np.uint8)
