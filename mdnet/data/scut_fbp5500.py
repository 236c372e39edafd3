"""SCUT-FBP5500's released layout: images, mean ratings, and the official splits.

    Images/AF1.jpg …
    train_test_files/All_labels.txt
    train_test_files/split_of_60%training and 40%testing/{train,test}.txt
    train_test_files/5_folders_cross_validations_files/cross_validation_{1…5}/{train,test}_{1…5}.txt

A line of a list is an image's name and its mean rating: `CM148.jpg 3.516667`. The name begins with the image's group:
AF, AM, CF or CM, as in Asian or Caucasian, female or male.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from mdnet.data.rated import Rated, Scale, Split
from mdnet_engines.errors import MDNetError, UsageError

Protocol = Literal["60-40", "cv5"]
PROTOCOLS: tuple[str, ...] = get_args(Protocol)
GROUPS = ("AF", "AM", "CF", "CM")
RATING_SCALE = Scale(1.0, 5.0)
FOLDS = 5
RELEASED_SIZES: dict[str, tuple[int, int]] = {"60-40": (3300, 2200), "cv5": (4400, 1100)}
"""Training and test images of each split of the released data set."""

_LISTS = "train_test_files"
_NAME = re.compile(rf"(?:{'|'.join(GROUPS)})[0-9]+\.jpg")
_ROUNDING = 1e-5  # ratings are written with six decimals and kept as float32


def group_of(name: str) -> str:
    """The group that a file name of the data set begins with: one of `GROUPS`.

    Raises:
        MDNetError: the name is not one of the data set's.
    """
    if not _NAME.fullmatch(name):
        raise MDNetError(f"{name!r:.60} is not a name of SCUT-FBP5500; expected {', '.join(GROUPS)} and a number, .jpg")
    return name[:2]


def read_splits(root: Path, protocol: Protocol) -> list[Split]:
    """The splits of a protocol: one for `60-40`, five for `cv5`.

    What is wrong with the files is an error that names the file and, where there is one, the line. No image is both in
    training and in test; over `cv5` every image is in exactly one test list, and every fold has all the images.

    Raises:
        UsageError: `root` is not the data set, or the protocol is unknown.
        MDNetError: a file or an image is missing, a line can't be read or repeats an image, or the splits leak.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(f"unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    if not (root / "Images").is_dir():
        raise UsageError(f"{root} is not SCUT-FBP5500: it has no folder Images (mdnet draw makes a drawn stand-in)")
    files = _list_files(root, protocol)
    if missing := [str(file) for pair in files.values() for file in pair if not file.is_file()]:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MDNetError(f"{missing[0]} is missing{more}; is the data set unpacked whole?")
    present = set(os.listdir(root / "Images"))
    splits = [
        Split(
            name,
            _read_list(root, train, present),
            _read_list(root, test, present),
            None if protocol == "60-40" else fold,
        )
        for fold, (name, (train, test)) in enumerate(files.items(), start=1)
    ]
    for split, (train, test) in zip(splits, files.values(), strict=True):
        if shared := set(split.train.images) & set(split.test.images):
            raise MDNetError(f"{test}: {len(shared)} test images are also in {train.name}, such as {_first(shared)}")
    if protocol == "cv5":
        _check_folds(splits, [test for _, test in files.values()])
    return splits


def departures(root: Path, protocol: Protocol, splits: Sequence[Split]) -> list[str]:
    """How these splits differ from the released data set in ways that stop no run: a line of text for each.

    They are list sizes, and images or ratings that `All_labels.txt` gives otherwise.
    """
    notes = []
    train, test = RELEASED_SIZES[protocol]
    if any((len(split.train), len(split.test)) != (train, test) for split in splits):
        sizes = sorted({f"{len(split.train)} + {len(split.test)}" for split in splits})
        notes.append(
            f"{root} is not the released SCUT-FBP5500: its {protocol} lists have {' or '.join(sizes)} images (training "
            f"+ test), the released {train} + {test}; published figures are of other images"
        )
    file = root / _LISTS / "All_labels.txt"
    if not file.is_file():
        return [*notes, f"{file} is missing; ratings could not be compared with it"]
    every = _ratings_by_name(_read_list(root, file, set(os.listdir(root / "Images"))))
    listed, differing = set[str](), set[str]()
    for part in (part for split in splits for part in (split.train, split.test)):
        ratings = _ratings_by_name(part)
        listed |= ratings.keys()
        differing |= {name for name, rating in ratings.items() if abs(rating - every.get(name, rating)) > _ROUNDING}
    if odd := every.keys() ^ listed:
        notes.append(f"{file}: {len(odd)} images are only in it or only in the {protocol} lists, such as {min(odd)}")
    if differing:
        some = f"{len(differing)} images, such as {min(differing)}"
        notes.append(f"{file} gives another rating than the {protocol} lists for {some}")
    return notes


def _list_files(root: Path, protocol: Protocol) -> dict[str, tuple[Path, Path]]:
    """Split name → its training and its test list."""
    lists = root / _LISTS
    if protocol == "60-40":
        folder = lists / "split_of_60%training and 40%testing"
        return {"60-40": (folder / "train.txt", folder / "test.txt")}
    folds = [lists / "5_folders_cross_validations_files" / f"cross_validation_{n}" for n in range(1, FOLDS + 1)]
    return {
        f"fold {n}": (folder / f"train_{n}.txt", folder / f"test_{n}.txt") for n, folder in enumerate(folds, start=1)
    }


def _check_folds(splits: Sequence[Split], files: Sequence[Path]) -> None:
    tested: dict[Path, Path] = {}
    for split, file in zip(splits, files, strict=True):
        if twice := tested.keys() & set(split.test.images):
            raise MDNetError(
                f"{file}: {len(twice)} test images are also in {tested[min(twice)].name}, such as {_first(twice)}"
            )
        tested |= dict.fromkeys(split.test.images, file)
    for split, file in zip(splits, files, strict=True):
        if odd := tested.keys() ^ {*split.train.images, *split.test.images}:
            raise MDNetError(
                f"{file.parent}: {split.name} and the five test lists list different images; "
                f"{len(odd)} are in only one of them, such as {_first(odd)}"
            )


def _read_list(root: Path, file: Path, present: set[str]) -> Rated:
    """One list, checked line by line; `present` are the names in `Images`."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise MDNetError(f"{file} is not text in UTF-8; expected lines of `NAME.jpg RATING`") from None
    lines: dict[str, int] = {}
    ratings = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name, rating = _read_line(line, f"{file}:{number}")
        if name in lines:
            raise MDNetError(f"{file}:{number}: {name} is listed twice; it is on line {lines[name]} already")
        lines[name] = number
        ratings.append(rating)
    if missing := [name for name in lines if name not in present]:
        first = missing[0]
        raise MDNetError(
            f"{file}:{lines[first]}: {len(missing)} of its images are missing, such as {root / 'Images' / first}"
        )
    if not lines:
        raise MDNetError(f"{file} lists no image")
    images = [root / "Images" / name for name in lines]
    return Rated(images, np.array(ratings, dtype=np.float32), [group_of(name) for name in lines])


def _read_line(line: str, where: str) -> tuple[str, float]:
    name, _, text = line.strip().rpartition(" ")
    try:
        rating = float(text)
    except ValueError:
        name = ""
    if not name:
        raise MDNetError(f"{where}: expected `NAME.jpg RATING`, got {line.strip()!r:.60}")
    try:
        group_of(name)
    except MDNetError as error:
        raise MDNetError(f"{where}: {error}") from None
    if not RATING_SCALE.low <= rating <= RATING_SCALE.high:  # NaN too
        raise MDNetError(f"{where}: the rating of {name} is {text}; expected {RATING_SCALE}")
    return name, rating


def _ratings_by_name(part: Rated) -> dict[str, float]:
    return {image.name: float(rating) for image, rating in zip(part.images, part.ratings, strict=True)}


def _first(images: set[Path]) -> str:
    return min(images).name
