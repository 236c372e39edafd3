"""SCUT-FBP5500's released layout: images, mean ratings, and the official splits.

    Images/AF1.jpg …
    train_test_files/split_of_60%training and 40%testing/{train,test}.txt
    train_test_files/5_folders_cross_validations_files/cross_validation_{1…5}/{train,test}_{1…5}.txt

A line of a split file is an image's name and its mean rating: `CM148.jpg 3.516667`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from mdnet_engines.errors import MDNetError, UsageError

Protocol = Literal["60-40", "cv5"]
PROTOCOLS: tuple[str, ...] = get_args(Protocol)


@dataclass(frozen=True)
class Rated:
    """Images and their mean ratings, in the order of the file they were read from."""

    images: list[Path]
    ratings: np.ndarray  # (n,) float32, in rating points

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: np.ndarray) -> Rated:
        """The subset at `rows`."""
        return Rated([self.images[row] for row in rows], self.ratings[rows])


@dataclass(frozen=True)
class Split:
    """One training and test set of a protocol."""

    name: str
    train: Rated
    test: Rated


def read_splits(root: Path, protocol: Protocol) -> list[Split]:
    """The splits of a protocol: one for `60-40`, five for `cv5`.

    Raises:
        UsageError: `root` is not the data set, or the protocol is unknown.
        MDNetError: a file or an image is missing, a line can't be read, or a test image is also a training image.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(f"unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    if not (root / "Images").is_dir():
        raise UsageError(f"{root} is not SCUT-FBP5500: it has no folder Images (mdnet draw makes a drawn stand-in)")
    lists = root / "train_test_files"
    if protocol == "60-40":
        folder = lists / "split_of_60%training and 40%testing"
        return [_split(root, "60-40", folder / "train.txt", folder / "test.txt")]
    folds = lists / "5_folders_cross_validations_files"
    return [
        _split(root, f"fold {n}", *(folds / f"cross_validation_{n}" / f"{part}_{n}.txt" for part in ("train", "test")))
        for n in range(1, 6)
    ]


def _split(root: Path, name: str, train: Path, test: Path) -> Split:
    split = Split(name, _read_list(root, train), _read_list(root, test))
    if shared := set(split.train.images) & set(split.test.images):
        raise MDNetError(f"{test}: {len(shared)} test images are also in {train.name}, such as {min(shared).name}")
    return split


def _read_list(root: Path, file: Path) -> Rated:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MDNetError(f"{file} is missing; is the data set unpacked whole?") from None
    images, ratings = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name, _, rating = line.strip().rpartition(" ")
        try:
            ratings.append(float(rating))
        except ValueError:
            raise MDNetError(f"{file}:{number}: expected `NAME.jpg RATING`, got {line.strip()!r:.60}") from None
        images.append(root / "Images" / name)
    if missing := [image for image in images if not image.is_file()]:
        raise MDNetError(f"{file}: {len(missing)} of its images are missing, such as {missing[0]}")
    if not images:
        raise MDNetError(f"{file} lists no image")
    return Rated(images, np.array(ratings, dtype=np.float32))
