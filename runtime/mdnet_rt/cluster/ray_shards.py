"""What passes between driver and actors of `ray_engine.py`: shards of locations there, numbered parts of rows back."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from mdnet_engines.errors import MDNetError, UsageError, printable
from mdnet_rt.rows.result import Result
from mdnet_rt.sources.entry import archive_kind

_ROW = pa.struct(
    [
        ("path", pa.binary()),  # as the reason: names need not be UTF-8, which Arrow's strings are
        ("score", pa.float64()),
        ("status", pa.string()),
        ("reason", pa.binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("pixels", pa.binary()),
    ]
)
_PART = pa.schema(
    [
        ("shard", pa.int64()),
        ("number", pa.int64()),
        ("rows", pa.list_(_ROW)),
        ("last", pa.bool_()),
        ("error", pa.string()),
        ("usage", pa.bool_()),
    ]
)
_SHARD = pa.schema([("number", pa.int64()), ("locations", pa.list_(pa.binary())), ("done", pa.list_(pa.binary()))])


@dataclass(frozen=True)
class Shard:
    """Locations for one actor to score in one go, and the names of their rows that are there already."""

    number: int
    locations: list[str]
    done: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """Some rows of a shard. The last part may have none; it has an `error` where the run must end after them."""

    shard: int
    number: int
    rows: list[Result] = field(default_factory=list)
    last: bool = False
    error: MDNetError | None = None


def split(locations: Iterable[str], done: Iterator[str], size: int) -> Iterator[Shard]:
    """Put locations into shards of `size`, in order, leaving out those that have their row; an archive is one alone.

    Args:
        done: names of the rows that are there, in their order. An archive's go with it, for the actor to leave out.

    Raises:
        UsageError: an archive comes twice in an interrupted run, so that nobody knows which of them its rows are of.
    """
    left, archives, number = _Done(done), set[str](), 0
    resumed = left.any
    held: list[str] = []
    for location in locations:
        if not archive_kind(location):
            if not left.take(location):
                held.append(location)
            if len(held) < size:
                continue
        if held:
            yield Shard(number, held)
            number, held = number + 1, []
        if archive_kind(location):
            if resumed and location in archives:
                raise UsageError(f"{printable(location)} comes twice, which --executor ray can't resume; use local")
            archives.add(location)
            yield Shard(number, [location], left.take_members(location))
            number += 1
    if held:
        yield Shard(number, held)


def encode_shard(shard: Shard) -> pa.Table:
    """A table of one row, which Ray passes to one actor."""
    names = {"locations": [*map(_bytes, shard.locations)], "done": [*map(_bytes, shard.done)]}
    return pa.Table.from_pylist([{"number": shard.number, **names}], _SHARD)


def decode_shards(table: pa.Table) -> Iterator[Shard]:
    """Undo `encode_shard`."""
    for row in table.to_pylist():
        yield Shard(row["number"], [*map(_text, row["locations"])], [*map(_text, row["done"])])


def encode_part(part: Part) -> pa.Table:
    """A table of one row, so that Ray has nowhere to cut it."""
    rows = [
        {
            "path": _bytes(row.path),
            "score": row.score,
            "status": row.status,
            "reason": None if row.reason is None else _bytes(row.reason),
            "width": row.width,
            "height": row.height,
            "pixels": None if row.pixels is None else row.pixels.tobytes(),
        }
        for row in part.rows
    ]
    usage = isinstance(part.error, UsageError)
    error = None if part.error is None else printable(str(part.error))
    fields = {"shard": part.shard, "number": part.number, "rows": rows, "last": part.last}
    return pa.Table.from_pylist([{**fields, "error": error, "usage": usage}], _PART)


def decode_parts(table: pa.Table, size: int) -> Iterator[Part]:
    """Undo `encode_part`; `size` is the side of the images."""
    for part in table.to_pylist():
        rows = [
            Result(
                _text(row["path"]),
                row["score"],
                row["status"],
                None if row["reason"] is None else _text(row["reason"]),
                row["width"],
                row["height"],
                None if row["pixels"] is None else np.frombuffer(row["pixels"], np.uint8).reshape(size, size, 3),
            )
            for row in part["rows"]
        ]
        kind = UsageError if part["usage"] else MDNetError
        error = None if part["error"] is None else kind(part["error"])
        yield Part(part["shard"], part["number"], rows, part["last"], error)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


class _Done:
    """Names of the rows that are there, given out once each.

    As in `run.unfinished` they are compared one by one while they come in the order of the locations, and are held in
    memory, as often as each is there, from where they don't.
    """

    def __init__(self, names: Iterator[str]):
        self._names = names
        self._next = next(names, None)
        self._left: Counter[str] | None = None
        self._sorted: list[str] = []
        self.any = self._next is not None

    def take(self, name: str) -> bool:
        """Whether there is one of this name left."""
        if self._left is None:
            if self._next is None:
                return False
            if self._next == name:
                self._next = next(self._names, None)
                return True
            self._part()
        assert self._left is not None
        found = self._left[name] > 0
        self._left[name] -= found
        return found

    def take_members(self, archive: str) -> list[str]:
        """The names of an archive's rows."""
        taken: list[str] = []
        if self._left is None:
            while self._next is not None and (self._next == archive or self._next.startswith(f"{archive}::")):
                taken.append(self._next)
                self._next = next(self._names, None)
            if taken or self._next is None:
                return taken
            self._part()
        assert self._left is not None
        start, end = (bisect_left(self._sorted, f"{archive}:{mark}") for mark in ":;")  # ; is the character after :
        for name in (archive, *self._sorted[start:end]):
            taken += [name] * self._left.pop(name, 0)
        return taken

    def _part(self) -> None:
        self._left = Counter(self._names)
        if self._next is not None:
            self._left[self._next] += 1
        self._sorted = sorted(self._left)
