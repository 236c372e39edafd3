"""Shards hold every location once, in order; a resumed run leaves out what the local one does."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

import pytest

from mdnet_engines.errors import UsageError
from mdnet_rt.cluster.shards import split
from mdnet_rt.scoring.run import unfinished
from mdnet_rt.sources.entry import Entry, archive_kind

Members = dict[str, list[str]]


def entries(locations: Iterable[str], members: Members) -> Iterator[Entry]:
    """As `read_locations` would give them, were the archives to hold `members`."""
    for location in locations:
        if archive_kind(location):
            yield from (Entry(f"{location}::{member}", b"") for member in members[location])
        else:
            yield Entry(location, b"")


def by_shards(locations: list[str], done: list[str], members: Members, size: int = 3) -> list[str]:
    """What is left to score where each shard is looked at by itself."""
    names: list[str] = []
    for number, shard in enumerate(split(locations, iter(done), size)):
        assert shard.number == number
        names += [entry.name for entry in unfinished(entries(shard.locations, members), iter(shard.done))]
    return names


def test_shards_keep_the_order_and_an_archive_is_one_alone() -> None:
    locations = ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.tar", "s3://x/f.tar?v=1", "g.jpg"]
    shards = [shard.locations for shard in split(locations, iter(()), 3)]
    assert shards == [["a.jpg", "b.jpg", "c.jpg"], ["d.jpg"], ["e.tar"], ["s3://x/f.tar?v=1"], ["g.jpg"]]


@pytest.mark.parametrize("seed", range(200))
def test_what_is_left_to_score_is_what_one_process_would_score(seed: int) -> None:
    chance = random.Random(seed)
    archives = [f"a{i}.tar" for i in range(4)]
    members = {name: [f"{chance.randrange(6)}.jpg" for _ in range(chance.randrange(5))] for name in archives}
    locations = [f"{chance.randrange(12)}.jpg" for _ in range(10)] + archives  # some images come twice
    chance.shuffle(locations)
    everything = [entry.name for entry in entries(locations, members)]
    done = everything[: chance.randrange(len(everything) + 1)]
    if seed % 2:  # inputs have changed since
        for names in (locations, done, *members.values()):
            if names and chance.random() < 0.5:
                del names[chance.randrange(len(names))]
        members["a0.tar"].insert(0, "new.jpg")
        locations.insert(chance.randrange(len(locations)), "new.jpg")
    left = [entry.name for entry in unfinished(entries(locations, members), iter(done))]
    assert by_shards(locations, done, members) == left


def test_an_archive_named_twice_is_refused_only_where_a_run_is_resumed() -> None:
    locations = ["a.tar", "b.jpg", "a.tar"]
    assert len(list(split(locations, iter(()), 3))) == 3
    with pytest.raises(UsageError, match=r"a\.tar comes twice"):
        list(split(locations, iter(["a.tar::1.jpg"]), 3))
