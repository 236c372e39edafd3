"""Which images calibrate: enough of them, of every kind, none that the result is judged on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mdnet_engines.errors import UsageError
from mdnet_engines.progress import SILENT, Progress
from mdnet_rt.images.face_crop import face_finder
from mdnet_rt.images.preprocess import ImageError, load_image

RangeMethod = Literal["percentile", "minmax"]
"""How a range follows from what `mdnet_calib.ranges` has seen of a value."""
MIN_IMAGES = 8
"""Fewer would let one odd image decide a range."""
_STRATA = 5  # of the ratings, within each group


@dataclass(frozen=True)
class CalibrationSet:
    """Preprocessed images, uint8 (n, S, S, 3), their names and where they are from. `skipped` could not be used."""

    names: list[str]
    pixels: np.ndarray
    source: str
    skipped: int = 0

    @property
    def digest(self) -> str:
        """Hex sha256 over all pixels."""
        return hashlib.sha256(self.pixels.tobytes()).hexdigest()

    def take(self, rows: Sequence[int]) -> CalibrationSet:
        """These images only."""
        source = f"{len(rows)} of {self.source}"
        return CalibrationSet([self.names[i] for i in rows], self.pixels[list(rows)], source, self.skipped)


def load_set(
    files: Sequence[Path], size: int, source: str, *, face: float | None = None, progress: Progress = SILENT
) -> CalibrationSet:
    """Read `files` through the runtime's preprocessing; what can't be read is left out and counted.

    Args:
        face: which square of an image is taken, as a manifest has it.

    Raises:
        UsageError: fewer than `MIN_IMAGES` are left.
    """
    names, arrays = [], []
    advance = progress.count("reading calibration images", len(files))
    for file in files:
        try:
            arrays.append(load_image(file, size, find_box=face_finder(face)))
            names.append(file.name)
        except ImageError:
            pass
        advance(1)
    skipped = len(files) - len(names)
    if len(names) < MIN_IMAGES:
        unreadable = f" ({skipped} could not be read)" if skipped else ""
        raise UsageError(
            f"{source} has {len(names)} usable images{unreadable}; calibration needs at least {MIN_IMAGES}, better 64"
        )
    return CalibrationSet(names, np.stack(arrays), source, skipped)


def refuse_overlap(calibration: CalibrationSet, judged: np.ndarray, what: str) -> None:
    """Raise `UsageError` where an image of `calibration` is among `judged` (uint8 (n, S, S, 3)), pixel for pixel."""
    digests = {hashlib.sha256(image.tobytes()).digest() for image in judged}
    shared = [
        name
        for name, image in zip(calibration.names, calibration.pixels, strict=True)
        if hashlib.sha256(image.tobytes()).digest() in digests
    ]
    if shared:
        raise UsageError(
            f"{len(shared)} calibration images are also {what}, such as {shared[0]}: the bundle would be judged on "
            "images it was fitted to; give another --calib or another --images"
        )


def stratified(ratings: np.ndarray, groups: Sequence[str], count: int, seed: int = 0) -> list[int]:
    """Positions of `count` images that cover every group in its proportion and, within it, the range of ratings.

    Args:
        ratings: (n,) in rating points.
        groups: the group of each (AF, AM, CF, CM).
    """
    random = np.random.default_rng(seed)
    ratings = np.asarray(ratings)
    members = {group: np.array([i for i, of in enumerate(groups) if of == group]) for group in sorted(set(groups))}
    chosen: list[int] = []
    for group, share in zip(members, _shares([len(rows) for rows in members.values()], count), strict=True):
        order = members[group][np.argsort(ratings[members[group]], kind="stable")]
        strata = np.array_split(order, min(_STRATA, len(order)))
        for stratum, part in zip(strata, _shares([len(rows) for rows in strata], share), strict=True):
            chosen += random.permutation(stratum)[:part].tolist()
    return sorted(chosen)


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """`count` split in proportion to `sizes` and none above its size: the largest remainders are rounded up."""
    count = min(count, sum(sizes))
    exact = [count * size / sum(sizes) for size in sizes]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: count - sum(shares)]:
        shares[i] += 1
    return shares


def k_centre(features: np.ndarray, count: int) -> list[int]:
    """Positions of `count` rows that leave no row far from a chosen one (greedy farthest-first traversal).

    T. Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985: at most twice the best radius.

    Args:
        features: (n, d); columns are scaled to unit spread here.
    """
    points = (features - features.mean(axis=0)) / np.maximum(features.std(axis=0), 1e-6)
    chosen = [int(np.argmin((points**2).sum(axis=1)))]  # the most ordinary image first
    distance = np.full(len(points), np.inf)
    while len(chosen) < min(count, len(points)):
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
        distance[chosen] = -1
        chosen.append(int(np.argmax(distance)))
    return sorted(chosen)
