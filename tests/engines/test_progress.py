"""Progress in a pipe: a count says where it is at its start and end and from time to time; laps begin with a count."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from recorded import Recorded

from mdnet_engines import progress
from mdnet_engines.progress import Laps, Lines


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    fake = Clock()
    monkeypatch.setattr(progress, "time", fake)
    return fake


def test_a_long_count_speaks_every_thirty_seconds(clock: Clock) -> None:
    said: list[str] = []
    advance = Lines(said.append).count("frozen features of 100 images", 100)
    for _ in range(10):
        clock.now += 10
        advance(10)
    assert said == [
        "[0.0 s] frozen features of 100 images: 0 of 100",
        "[30.0 s] frozen features of 100 images: 30 of 100",
        "[60.0 s] frozen features of 100 images: 60 of 100",
        "[90.0 s] frozen features of 100 images: 90 of 100",
        "[100.0 s] frozen features of 100 images: 100 of 100, 100.0 s",
    ]


def test_a_count_without_a_total_speaks_too(clock: Clock) -> None:
    said: list[str] = []
    advance = Lines(said.append).count("scoring", None)
    clock.now += 31
    advance(7)
    assert said == ["[0.0 s] scoring: 0", "[31.0 s] scoring: 7"]


def test_a_counts_end_is_said_once(clock: Clock) -> None:
    said: list[str] = []
    advance = Lines(said.append).count("training", 2)
    for more in (0, 2, 0):
        advance(more)
    assert len([line for line in said if re.search("2 of 2", line)]) == 1


def test_laps_begin_with_the_last_count_and_pass_everything_on(clock: Clock) -> None:
    recorded = Recorded()
    laps = Laps(recorded)
    features = laps.count("features", 3)
    clock.now += 50
    features(3)
    training = laps.count("training", 2)
    for seconds in (4, 5):
        clock.now += seconds
        training(1)
        assert laps.lap() == seconds
    laps.step("writing")
    laps.note("done")
    assert recorded.counts == [(3, [3]), (2, [1, 1])]
    assert (recorded.steps, recorded.notes) == (["writing"], ["done"])
