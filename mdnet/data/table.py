"""A table of ratings: a line for each picture, with its mean rating and, where there are, its group and split or fold.

    image,rating,group,split
    images/0001.jpg,7.37,female,train

The first line names the columns, in any order and any case. Paths are relative to the table's folder. `docs/mdnet.md`
has the layout for users.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np

from mdnet.data.rated import Rated, Scale
from mdnet.data.table_file import Cells, read_cells, wrong_lines
from mdnet_engines.errors import MDNetError, printable

COLUMNS: dict[str, tuple[str, ...]] = {
    "image": ("image", "file", "filename", "file_name", "path"),
    "rating": ("rating", "score"),
    "group": ("group",),
    "split": ("split",),
    "fold": ("fold",),
}
"""What a column is for → the names by which it is known."""
PARTS: dict[str, str] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Words of a split column → the part that they mean."""

_ROLES = {name: role for role, names in COLUMNS.items() for name in names}
_MOST_FOLDS = 1000
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_USUAL_SCALES = (Scale(0, 1), Scale(1, 5), Scale(0, 5), Scale(1, 7), Scale(1, 10), Scale(0, 10), Scale(0, 100))


@dataclass(frozen=True)
class RatingTable:
    """A table that was read and checked. Every list has an entry for each picture, in the table's order."""

    file: Path
    rated: Rated
    places: list[str]
    """Where each picture stands, for messages: `ratings.csv:7`."""
    parts: list[str] | None
    """`train`, `val` or `test`; None without a split column."""
    folds: list[int] | None
    """As numbered in the table; None without a fold column."""
    unused: list[str]
    """Columns whose names mean nothing here."""
    sha256: str
    """Of the file."""

    def check_scale(self, scale: Scale, advice: str) -> None:
        """Raise `MDNetError` where a rating is off `scale`, with a scale that fits them all.

        Args:
            advice: what to do about it; `{fitting}` stands for the scale that fits.
        """
        ratings = self.rated.ratings
        off = [
            (place, f"the rating is {rating:g}, off the scale {scale}")
            for place, rating in zip(self.places, ratings, strict=True)
            if not scale.low <= rating <= scale.high
        ]
        if off:
            low, high = float(ratings.min()), float(ratings.max())
            fitting = fitting_scale(low, high)
            reach = f"ratings reach from {low:g} to {high:g}"
            raise wrong_lines(self.file, off, f"{reach}; {advice.format(fitting=f'{fitting.low:g} {fitting.high:g}')}")


def fitting_scale(low: float, high: float) -> Scale:
    """The first usual scale that these ratings are on, else the whole numbers around them."""
    around = Scale(math.floor(low), max(math.ceil(high), math.floor(low) + 1))
    return next((scale for scale in _USUAL_SCALES if scale.low <= low and high <= scale.high), around)


def read_table(file: Path) -> RatingTable:
    """Read a table and check every line; its pictures must exist, and are not opened.

    Raises:
        UsageError: no such file, or not a table by its name.
        MDNetError: it can't be read, lacks a column, lists no picture, or lines are wrong: a missing picture, one that
            is listed twice, no finite rating, an unknown split or fold. The message has the first of them.
    """
    cells = read_cells(file, _ROLES)
    columns = _columns(cells)
    if not cells.rows:
        raise MDNetError(f"{printable(file)} lists no picture")
    lines, places, problems, missing = list[_Line](), list[str](), list[tuple[str, str]](), 0
    listed: dict[str, str] = {}
    for row in cells.rows:
        try:
            line = _read_line({role: row.cells[column] for role, column in columns.items()}, file.parent)
            first = listed.setdefault(os.path.normpath(line.image), row.place)
            if first != row.place:
                raise _WrongLineError(
                    f"{printable(line.image)} is at {first} already; give each picture its mean rating"
                )
        except _WrongLineError as error:
            problems.append((row.place, str(error)))
            missing += isinstance(error, _MissingError)
        else:
            lines.append(line)
            places.append(row.place)
    if problems:
        where = f"{missing} of {len(cells.rows)} pictures are missing (paths are relative to the table's folder)"
        raise wrong_lines(file, problems, where if missing else "")
    return RatingTable(
        file,
        Rated(
            [line.image for line in lines],
            np.array([line.rating for line in lines], dtype=np.float32),
            [line.group for line in lines],
        ),
        places,
        [line.part for line in lines] if "split" in columns else None,
        [line.fold for line in lines] if "fold" in columns else None,
        [name for name in cells.header if name and name not in _ROLES],
        hashlib.sha256(file.read_bytes()).hexdigest(),
    )


class _WrongLineError(Exception):
    """What is wrong with a line."""


class _MissingError(_WrongLineError):
    """Its picture does not exist."""


@dataclass(frozen=True)
class _Line:
    image: Path
    rating: float
    group: str
    part: str
    fold: int


def _columns(cells: Cells) -> dict[str, int]:
    """What a column is for → its position."""
    columns: dict[str, int] = {}
    for position, name in enumerate(cells.header):
        if (role := _ROLES.get(name)) is None:
            continue
        if role in columns:
            both = " and ".join(dict.fromkeys((cells.header[columns[role]], name)))
            raise MDNetError(f"{cells.place}: several columns for the {role} ({both}); rename those that are not it")
        columns[role] = position
    if not columns:
        raise MDNetError(
            f"{cells.place}: expected names of columns, at least image and rating, got {','.join(cells.header)!r:.60}"
        )
    for role in ("image", "rating"):
        if role not in columns:
            known, found = " or ".join(COLUMNS[role]), printable(", ".join(cells.header))
            raise MDNetError(f"{cells.place}: no column for the {role}; expected {known}, got {found:.200}")
    return columns


def _read_line(texts: dict[str, str], folder: Path) -> _Line:
    """The cells of one line by what they are for; raises `_WrongLineError`."""
    return _Line(
        _image(texts["image"], folder),
        _rating(texts["rating"]),
        printable(texts.get("group", "")),
        _part(texts["split"]) if "split" in texts else "",
        _fold(texts["fold"]) if "fold" in texts else 0,
    )


def _image(text: str, folder: Path) -> Path:
    """The picture's file; a relative path may have backslashes, as Windows writes them."""
    if not text:
        raise _WrongLineError("no picture's name")
    if _is_file(image := folder / text):
        return image
    if os.name != "nt" and PureWindowsPath(text).drive:
        raise _WrongLineError(f"{printable(text):.200} is an absolute path of Windows; give one relative to the table")
    if _is_file(image := folder / text.replace("\\", "/")):
        return image
    raise _MissingError(f"{printable(image):.200} is missing")


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 (Path.is_file() raises where a name is too long)


def _rating(text: str) -> float:
    if not text:
        raise _WrongLineError("no rating")
    number = text.replace(",", ".") if _DECIMAL_COMMA.fullmatch(text) else text
    try:
        rating = float(number)
    except ValueError:
        raise _WrongLineError(f"the rating is {printable(text)!r:.60}; expected a number") from None
    if not math.isfinite(rating):
        raise _WrongLineError(f"the rating is {text}; expected a number")
    return rating


def _part(text: str) -> str:
    try:
        return PARTS[text.lower()]
    except KeyError:
        raise _WrongLineError(f"the split is {printable(text)!r:.60}; expected train, val or test") from None


def _fold(text: str) -> int:
    try:
        number = float(text)  # pandas writes whole numbers as 1.0 where a cell is empty
        if not (0 <= number <= _MOST_FOLDS and number.is_integer()):
            raise ValueError
    except ValueError:
        raise _WrongLineError(f"the fold is {printable(text)!r:.60}; expected a whole number such as 1") from None
    return int(number)
