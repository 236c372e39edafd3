"""What the driver of `ray_executor.py` gives out: shards of locations, without those that have their row already."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from mdnet_engines.errors import UsageError, printable
from mdnet_rt.sources.entry import archive_kind


class Shard(NamedTuple):
    """Locations for one actor to score in one go, and the names of their rows that are there already."""

    number: int
    locations: list[str]
    done: list[str]


def split(locations: Iterable[str], done: Iterator[str], size: int) -> Iterator[Shard]:
    """Put locations into shards of `size`, in order, leaving out those that have their row; an archive is one alone.

    Args:
        done: names of the rows that are there, in their order. An archive's go with it, for the actor to leave out.

    Raises:
        UsageError: an archive comes twice in an interrupted run, so that nobody knows which of them its rows are of.
    """
    left, archives, number = _Done(done), set[str](), 0
    held: list[str] = []
    for location in locations:
        taken = left.take(location)
        if archive_kind(location):
            if left.any and location in archives:
                raise UsageError(f"{printable(location)} comes twice, which --executor ray can't resume; use local")
            archives.add(location)
            if held:
                yield Shard(number, held, [])
                number, held = number + 1, []
            yield Shard(number, [location], taken)
            number += 1
        elif not taken:
            held.append(location)
            if len(held) == size:
                yield Shard(number, held, [])
                number, held = number + 1, []
    if held:
        yield Shard(number, held, [])


class _Done:
    """Names of the rows that are there, given out once each.

    As in `run.unfinished` they are compared one by one while they come in the order of the locations, and are held in
    memory, as often as each is there, from where they don't.
    """

    def __init__(self, names: Iterator[str]):
        self._names = names
        self._next = next(names, None)
        self._left: Counter[str] = Counter()
        self._sorted: list[str] = []
        self.any = self._next is not None

    def take(self, location: str) -> list[str]:
        """The names of the location's rows: of an image one at most, of an archive all that there are."""
        archive = archive_kind(location) is not None
        taken: list[str] = []
        while self._next == location or (archive and (self._next or "").startswith(f"{location}::")):
            taken.append(str(self._next))
            self._next = next(self._names, None)
            if not archive:
                return taken
        if taken:
            return taken
        if self._next is not None:
            self._left = Counter(chain([self._next], self._names))
            self._sorted = sorted(self._left)
            self._next = None
        if not archive:
            if not self._left[location]:
                return []
            self._left[location] -= 1
            return [location]
        start, end = (bisect_left(self._sorted, f"{location}:{mark}") for mark in ":;")  # ; is the character after :
        return [name for name in (location, *self._sorted[start:end]) for _ in range(self._left.pop(name, 0))]
