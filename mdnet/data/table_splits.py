"""The protocols of a table of ratings: its own splits or folds, folds by a seed, or all of its pictures as a test list.

The same picture is never on both sides of a split, by its pixels: in folds that are made here it stays together, in
those that the table gives it is an error that names both lines.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np

from mdnet.data.rated import Split
from mdnet.data.table import RatingTable
from mdnet.data.table_file import wrong_lines
from mdnet_engines.errors import MDNetError, UsageError, printable
from mdnet_engines.progress import SILENT, Progress
from mdnet_rt.images.preprocess import ImageError, load_image

DEFAULT_FOLDS = "kfold:5"
KFOLD = re.compile(r"kfold:([1-9][0-9]{0,2})(?::([0-9]{1,9}))?")
"""`kfold:K` or `kfold:K:SEED`; the seed is 0 by default."""

_SIDE = 128
"""Pixels that pictures are compared at. A number of its own, so that folds don't depend on a model's image size."""


def table_splits(table: RatingTable, protocol: str, progress: Progress = SILENT) -> list[Split]:
    """The splits of a protocol.

    - `split`: trained on `train`; tested on `test`, or on `val` where no line says `test`.
    - `folds`: one split for each number in the fold column, which is tested on.
    - `kfold:K` or `kfold:K:SEED`: K folds of equal size to within one picture, each with its share of every group and
      of the range of ratings. They depend on the pictures, ratings and groups, not on the order of the lines.
    - `all`: every picture is tested on, none is trained on.

    Args:
        progress: counts the pictures that are compared; `all` compares none.

    Raises:
        UsageError: an unknown protocol, or one that this table lacks the column for.
        MDNetError: a picture can't be read, is on both sides of a split, or there are too few.
    """
    file, everything = table.file, np.arange(len(table.rated))
    if protocol == "all":
        nothing = everything[:0]
        return [Split("all", table.rated.take(nothing), table.rated)]
    if protocol == "split":
        if table.parts is None:
            raise UsageError(f"{printable(file)} has no column split, which --protocol split needs")
        parts = np.array(table.parts)
        _refuse_shared(table, table.parts, progress)
        tested = "test" if "test" in table.parts else "val"
        if tested not in table.parts:
            raise MDNetError(f"{printable(file)} has no line with the split test or val; there is nothing to test on")
        rows = {part: np.flatnonzero(parts == part) for part in ("train", tested)}
        return [Split(tested, table.rated.take(rows["train"]), table.rated.take(rows[tested]))]
    if protocol == "folds":
        if table.folds is None:
            raise UsageError(f"{printable(file)} has no column fold, which --protocol folds needs")
        _refuse_shared(table, [f"fold {number}" for number in table.folds], progress)
        return _each_fold(table, np.array(table.folds))
    if found := KFOLD.fullmatch(protocol):
        return _each_fold(table, _deal(table, int(found[1]), int(found[2] or 0), progress))
    raise UsageError(f"protocol {protocol} is not one of a table: split, folds, kfold:K, kfold:K:SEED, all")


def _each_fold(table: RatingTable, numbers: np.ndarray) -> list[Split]:
    """A split for each fold, by `numbers` (n,), the fold of each picture."""
    folds = sorted(set(numbers.tolist()))
    if len(folds) < 2:
        raise MDNetError(f"{printable(table.file)} has one fold; expected two or more")
    rated = table.rated
    return [
        Split(
            f"fold {fold}",
            rated.take(np.flatnonzero(numbers != fold)),
            rated.take(np.flatnonzero(numbers == fold)),
            fold,
        )
        for fold in folds
    ]


def _deal(table: RatingTable, count: int, seed: int, progress: Progress) -> np.ndarray:
    """The fold of each picture, from 1, by the seed.

    Different pictures are sorted by group and, within it, by rating; each `count` in a row get one of each fold.
    """
    if count < 2:
        raise UsageError(f"protocol kfold:{count}; expected two folds or more")
    rated, same = table.rated, dict[str, list[int]]()
    for row, digest in enumerate(_digests(table, progress)):
        same.setdefault(digest, []).append(row)
    if len(same) < count:
        raise MDNetError(f"{printable(table.file)} has {len(same)} different pictures; kfold:{count} needs {count}")

    def kind(digest: str) -> tuple[str, float, str]:
        rows = same[digest]
        return min(rated.groups[row] for row in rows), float(np.mean(rated.ratings[rows])), digest

    random, folds = np.random.default_rng(seed), np.zeros(len(rated), dtype=np.int64)
    ordered = sorted(same, key=kind)
    for start in range(0, len(ordered), count):
        for digest, fold in zip(ordered[start : start + count], random.permutation(count).tolist(), strict=False):
            folds[same[digest]] = 1 + fold
    return folds


def _refuse_shared(table: RatingTable, sides: Sequence[str], progress: Progress) -> None:
    """Raise where a picture is on two sides of what the table splits."""
    if len(set(sides)) < 2:
        return
    first, problems = dict[str, int](), []
    for row, digest in enumerate(_digests(table, progress)):
        other = first.setdefault(digest, row)
        if sides[other] != sides[row]:
            problems.append(
                (
                    table.places[row],
                    f"the picture of {table.places[other]}, which is in {sides[other]}; this is {sides[row]}",
                )
            )
    if problems:
        raise wrong_lines(table.file, problems, "a picture may be on one side of a split only")


def _digests(table: RatingTable, progress: Progress) -> list[str]:
    """Hex sha256 of each picture's pixels: files that differ may hold the same picture."""
    digests, problems = [], []
    advance = progress.count(f"comparing {len(table.rated)} pictures", len(table.rated))
    for image, place in zip(table.rated.images, table.places, strict=True):
        try:
            digests.append(hashlib.sha256(load_image(image, _SIDE).tobytes()).hexdigest())
        except ImageError as error:
            problems.append((place, f"{printable(image)}: {error}"))
        advance(1)
    if problems:
        raise wrong_lines(table.file, problems, "every picture of the table is needed")
    return digests
