"""What `--data` names: SCUT-FBP5500's folder, or a table of ratings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from mdnet.data.rated import Scale, Split
from mdnet.data.scut_fbp5500 import PROTOCOLS, RATING_SCALE, Protocol, departures, read_splits
from mdnet.data.table import RatingTable, read_table
from mdnet.data.table_splits import DEFAULT_FOLDS, KFOLD, table_splits
from mdnet_engines.errors import UsageError, printable
from mdnet_engines.progress import SILENT, Progress

TABLE_NAMES = ("ratings.csv", "ratings.parquet")
"""A folder that holds one of these is as good as the table itself."""


@dataclass(frozen=True)
class RatedData:
    """Rated pictures with their protocols: of `table`, or of SCUT-FBP5500's layout where it is None."""

    path: Path
    """As the user named it."""
    table: RatingTable | None = None

    @property
    def name(self) -> str:
        """What a checkpoint's notes call it."""
        return self.path.name if self.table is None else self.table.file.name

    @property
    def sha256(self) -> str | None:
        """Of the table; nothing identifies SCUT-FBP5500."""
        return None if self.table is None else self.table.sha256

    def protocol(self, asked: str | None, *, training: bool) -> str:
        """The protocol that was asked for, else that of the data.

        SCUT-FBP5500: `60-40`. A table: `split` or `folds` by its columns; without either, five folds for training,
        and for evaluation all pictures.

        Raises:
            UsageError: not a protocol, or not one of these data.
        """
        if asked is not None:
            check_protocol(asked)
            if (self.table is None) != (asked in PROTOCOLS):
                raise UsageError(
                    f"protocol {asked} is not one of {printable(self.path)}; known: {_KNOWN[self.table is None]}"
                )
            return asked.removesuffix(":0") if asked.count(":") == 2 else asked
        if self.table is None:
            return "60-40"
        if self.table.parts is not None:
            return "split"
        if self.table.folds is not None:
            return "folds"
        return DEFAULT_FOLDS if training else "all"

    def splits(self, protocol: str, progress: Progress = SILENT) -> list[Split]:
        """The splits of a protocol; raises as `read_splits` and `table_splits`."""
        if self.table is None:
            return read_splits(self.path, cast(Protocol, protocol))
        return table_splits(self.table, protocol, progress)

    def check_scale(self, scale: Scale, advice: str) -> None:
        """Raise where the ratings are not on `scale`.

        Args:
            advice: what to do; `{fitting}` stands for a scale that fits, such as `1 10`.

        Raises:
            MDNetError: the table's ratings are off it, with their lines.
            UsageError: it is another one than SCUT-FBP5500's.
        """
        if self.table is not None:
            self.table.check_scale(scale, advice)
        elif scale != RATING_SCALE:
            fitting = advice.format(fitting=f"{RATING_SCALE.low:g} {RATING_SCALE.high:g}")
            raise UsageError(f"{printable(self.path)} has ratings from {RATING_SCALE}, not {scale}; {fitting}")

    def departures(self, protocol: str, splits: Sequence[Split]) -> list[str]:
        """How SCUT-FBP5500 differs from its release, a line each; none for a table."""
        return departures(self.path, cast(Protocol, protocol), splits) if self.table is None else []

    def notes(self, scale: Scale) -> list[str]:
        """What the user should know of a table before it is used on `scale`, a line each."""
        if self.table is None:
            return []
        notes, file, ratings = [], printable(self.table.file), self.table.rated.ratings
        if self.table.unused:
            notes.append(f"{file}: columns that are not used: {printable(', '.join(self.table.unused)):.200}")
        if len(ratings) >= _MANY and np.ptp(ratings) < (scale.high - scale.low) / 2:
            notes.append(
                f"{file}: ratings reach from {ratings.min():g} to {ratings.max():g}, less than half of the scale "
                f"{scale}; are they on that scale?"
            )
        return notes


_MANY = 20
"""Ratings of so many pictures should fill half of their scale."""
_KNOWN = {True: ", ".join(PROTOCOLS), False: "split, folds, kfold:K, kfold:K:SEED, all"}
"""By whether the data are SCUT-FBP5500's."""


def check_protocol(text: str) -> str:
    """Give `text` back where it has the form of a protocol.

    Raises:
        UsageError: it has not; the message lists all.
    """
    if text in (*PROTOCOLS, "split", "folds", "all") or KFOLD.fullmatch(text):
        return text
    raise UsageError(
        f"unknown protocol {printable(text)!r:.60}; known: {_KNOWN[True]} (SCUT-FBP5500), {_KNOWN[False]} (a table)"
    )


def is_table(path: Path) -> bool:
    """Whether `open_data` would read it as a table: a file, or a folder that holds one."""
    return path.is_file() or (not (path / "Images").is_dir() and any((path / name).is_file() for name in TABLE_NAMES))


def open_data(path: Path) -> RatedData:
    """Look at what `path` names, and read it if it is a table.

    Raises:
        UsageError: it does not exist, or is neither.
        MDNetError: lines of the table are wrong, as `read_table` says.
    """
    if path.is_dir():
        if (path / "Images").is_dir():
            return RatedData(path)
        tables = [path / name for name in TABLE_NAMES if (path / name).is_file()]
        if len(tables) == 1:
            return RatedData(path, read_table(tables[0]))
        if tables:
            raise UsageError(f"{printable(path)} has both {' and '.join(TABLE_NAMES)}; name one of them")
    if path.exists() and not path.is_dir():
        return RatedData(path, read_table(path))
    raise UsageError(
        f"{printable(path)} is neither SCUT-FBP5500 (no folder Images; mdnet draw makes a drawn stand-in) nor a table "
        f"of ratings ({' or '.join(TABLE_NAMES)})"
    )
