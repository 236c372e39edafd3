"""Rated images and their splits: what every reader of a data set gives, and training and evaluation take."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Scale(NamedTuple):
    """The least and the greatest rating that can be given, such as 1 and 5."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Rated:
    """Images, their mean ratings and their groups, in the order of the file they were read from."""

    images: list[Path]
    ratings: np.ndarray  # (n,) float32, in rating points
    groups: list[str] = field(default_factory=list)
    """Of each image, as the data set has it; empty text where it has none, and that for all by default."""

    def __post_init__(self) -> None:
        if not self.groups:
            object.__setattr__(self, "groups", [""] * len(self.images))

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: np.ndarray) -> Rated:
        """The subset at `rows`."""
        return Rated([self.images[row] for row in rows], self.ratings[rows], [self.groups[row] for row in rows])


@dataclass(frozen=True)
class Split:
    """One training and test set of a protocol."""

    name: str
    train: Rated
    test: Rated
    fold: int | None = None
    """Its number, where the protocol has folds."""
