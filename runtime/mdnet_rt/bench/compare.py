"""Two bundles on the same images: how far their scores are apart, whether the order is the same, which is faster.

Images are read once and preprocessed for each bundle as it asks. Both score a batch one right after the other, in
turned order every other batch. Pixels are held for one batch; for an image, its name and two scores.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from mdnet_engines.parity.metrics import pearson, ranks, spearman
from mdnet_engines.system.cores import available_cores
from mdnet_rt.bench.clock import timed
from mdnet_rt.bench.facts import describe_bundle, describe_host
from mdnet_rt.bench.sample import decode, fetch
from mdnet_rt.images.preprocess import ImageError
from mdnet_rt.rows.result import judge

if TYPE_CHECKING:
    from mdnet_engines.bundle.manifest import Manifest, Preprocessing
    from mdnet_rt.scoring.scorer import Scorer
    from mdnet_rt.sources.entry import Entry

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Failure:
    """An image that A, B, or both can't score, and why: None for the bundle that can."""

    image: str
    a: str | None
    b: str | None


@dataclass(frozen=True)
class Pair:
    """One image's scores, and its ranks among all (1 is the highest score, equal scores share their mean rank)."""

    image: str
    a: float
    b: float
    rank_a: float
    rank_b: float

    @property
    def delta(self) -> float:
        """B − A, in rating points."""
        return self.b - self.a

    @property
    def move(self) -> float:
        """By how many places B ranks it higher than A."""
        return self.rank_a - self.rank_b


@dataclass
class Comparison:
    """What both bundles made of the images. Scores are in the order of the images that both could score."""

    images: list[str] = field(default_factory=list)
    a: list[float] = field(default_factory=list)
    b: list[float] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    seconds: list[tuple[int, float, float]] = field(default_factory=list)
    """Images of a batch, and what the graphs of A and of B took for them."""

    def deltas(self) -> np.ndarray:
        """B − A, float64 `[n]`."""
        return np.subtract(self.b, self.a, dtype=np.float64)

    def furthest(self, count: int) -> list[Pair]:
        """Images whose scores are furthest apart, the worst first; none with equal scores."""
        return self._largest(np.abs(self.deltas()), count)

    def most_moved(self, count: int) -> list[Pair]:
        """Images that have moved most places in rank, the worst first; none that has kept its own."""
        return self._largest(np.abs(places(self.a) - places(self.b)), count)

    def summary(self) -> dict[str, float | int | None]:
        """The figures: of B − A in rating points, of agreement, and of speed. None where there is nothing to say.

        `speed_ratio` is the median over batches of A's time over B's: above 1 B is faster.
        """
        apart = np.abs(self.deltas())
        some = len(apart) > 0
        return {
            "images": len(apart) + len(self.failures),
            "scored_by_both": len(apart),
            "only_a": sum(each.a is None for each in self.failures),
            "only_b": sum(each.b is None for each in self.failures),
            "neither": sum(each.a is not None and each.b is not None for each in self.failures),
            "max_abs": float(apart.max()) if some else None,
            "p99_abs": float(np.percentile(apart, 99)) if some else None,
            "mean_abs": float(apart.mean()) if some else None,
            "mean": float(self.deltas().mean()) if some else None,
            "pearson": _known(pearson(self.a, self.b)),
            "spearman": _known(spearman(self.a, self.b)),
            "a_images_per_second": self._rate(1),
            "b_images_per_second": self._rate(2),
            "speed_ratio": float(np.median([a / b for _, a, b in self.seconds])) if self.seconds else None,
        }

    def _largest(self, sizes: np.ndarray, count: int) -> list[Pair]:
        rank_a, rank_b = places(self.a), places(self.b)
        return [
            Pair(self.images[i], self.a[i], self.b[i], float(rank_a[i]), float(rank_b[i]))
            for i in np.argsort(-sizes, kind="stable")[:count]
            if sizes[i]
        ]

    def _rate(self, which: int) -> float | None:
        return 1 / float(np.median([each[which] / each[0] for each in self.seconds])) if self.seconds else None


def compare_bundles(
    a: Scorer,
    b: Scorer,
    entries: Iterable[Entry],
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Comparison:
    """Score every image with both bundles.

    Args:
        advance: called with the number of images just done.

    Raises:
        MDNetError: the graphs could not be run.
    """
    comparison = Comparison()
    scorers = {"a": a, "b": b}
    with ThreadPoolExecutor(min(4, available_cores()), thread_name_prefix="mdnet-decode") as pool:
        for number, batch in enumerate(_batches(entries, batch_size)):
            held = [fetch(entry) for entry in batch]
            images = {
                made: list(pool.map(functools.partial(_decode, made=made), held))
                for made in {scorer.manifest.preprocessing for scorer in scorers.values()}
            }
            if not number:  # whatever is set up by the first run
                for scorer in scorers.values():
                    _score(scorer, images[scorer.manifest.preprocessing])
            order = ("a", "b") if number % 2 == 0 else ("b", "a")
            results = {name: _score(scorers[name], images[scorers[name].manifest.preprocessing]) for name in order}
            _add(comparison, batch, results["a"], results["b"])
            advance(len(batch))
    return comparison


def to_json(found: Comparison, a: Manifest, b: Manifest, *, worst: int) -> dict[str, Any]:
    """All figures, the `worst` rows of either kind, and every image without two scores."""

    def rows(chosen: list[Pair]) -> list[dict[str, Any]]:
        return [{**asdict(pair), "delta": pair.delta, "places_up": pair.move} for pair in chosen]

    return {
        "schema_version": SCHEMA_VERSION,
        **describe_host(),
        "a": describe_bundle(a),
        "b": describe_bundle(b),
        "same_scale": a.score == b.score,
        "summary": found.summary(),
        "furthest_apart": rows(found.furthest(worst)),
        "most_moved": rows(found.most_moved(worst)),
        "failures": [asdict(failure) for failure in found.failures],
    }


def places(values: Iterable[float]) -> np.ndarray:
    """Ranks, float64 `[n]`, 1 for the highest value; equal values share their mean rank."""
    return ranks(-np.asarray(list(values), np.float64))


@dataclass(frozen=True)
class _Scored:
    """A batch in one bundle: score and reason of each image, and the seconds of the graphs for `count` of them."""

    outcomes: list[tuple[float | None, str | None]]
    count: int
    seconds: float


def _score(scorer: Scorer, images: list[np.ndarray | ImageError]) -> _Scored:
    good = [image for image in images if not isinstance(image, ImageError)]
    given, seconds = timed(lambda: scorer.score_batch(np.stack(good))) if good else (np.empty(0), 0.0)
    values = iter(given)
    found = (
        (None, "", str(image)) if isinstance(image, ImageError) else judge(float(next(values))) for image in images
    )
    return _Scored([(score, reason) for score, _, reason in found], len(good), seconds)


def _add(comparison: Comparison, batch: list[Entry], a: _Scored, b: _Scored) -> None:
    for entry, (score_a, reason_a), (score_b, reason_b) in zip(batch, a.outcomes, b.outcomes, strict=True):
        if score_a is None or score_b is None:
            comparison.failures.append(Failure(entry.name, reason_a, reason_b))
        else:
            comparison.images.append(entry.name)
            comparison.a.append(score_a)
            comparison.b.append(score_b)
    if a.count and a.count == b.count:
        comparison.seconds.append((a.count, a.seconds, b.seconds))


def _batches(entries: Iterable[Entry], size: int) -> Iterator[list[Entry]]:
    entries = iter(entries)
    while batch := list(islice(entries, size)):
        yield batch


def _decode(entry: Entry, made: Preprocessing) -> np.ndarray | ImageError:
    try:
        return decode(entry, made.image_size, to_srgb=made.to_srgb, face=made.face)
    except ImageError as error:
        return error


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
