"""One table of limits, and the gates that hold a measurement to it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mdnet_engines.bundle.manifest import GraphName, ScoreScale
from mdnet_engines.parity.metrics import mae, max_abs, pearson
from mdnet_engines.parity.report import PEARSON_GATE, RATING_GATE, Gate, RatingParity, TensorParity
from mdnet_engines.sessions.session import Session, run_graphs

BATCH = 4  # images in the runs that test batching
MAX_SNR_LOST = 6.0  # dB: an error twice as large
RATED_IMAGES = 100  # over all or in a group: fewer say little about a correlation with ratings


@dataclass(frozen=True)
class Limits:
    """What a precision must hold. Scores in rating points; cosine and SNR for the worst output of any graph."""

    score_max_abs: float
    score_mean_abs: float
    score_pearson: float
    pearson_needs_sd: float
    """A correlation is asked for where the reference scores spread this much: with less, errors within the other
    limits may already spoil it."""
    rating_loss: float
    group_rating_loss: float
    graph_cosine: float
    graph_snr_db: float
    batch_max_abs: float


LIMITS: dict[str, Limits] = {
    "fp32": Limits(
        score_max_abs=1e-3,
        score_mean_abs=1e-3,
        score_pearson=0.99999,
        pearson_needs_sd=0.02,
        rating_loss=1e-3,
        group_rating_loss=1e-3,
        graph_cosine=0.99999,
        graph_snr_db=60,
        batch_max_abs=1e-4,
    ),
    "fp16": Limits(
        score_max_abs=1e-2,
        score_mean_abs=1e-2,
        score_pearson=0.9999,
        pearson_needs_sd=0.2,
        rating_loss=1e-3,
        group_rating_loss=3e-3,
        graph_cosine=0.9999,
        graph_snr_db=35,
        batch_max_abs=2e-3,
    ),
    "int8": Limits(
        score_max_abs=0.15,
        score_mean_abs=0.03,
        score_pearson=0.995,
        pearson_needs_sd=0.2,
        rating_loss=3e-3,
        group_rating_loss=1e-2,
        graph_cosine=0.95,
        graph_snr_db=10,
        batch_max_abs=2e-2,
    ),
    "fp8": Limits(
        score_max_abs=0.1,
        score_mean_abs=0.02,
        score_pearson=0.998,
        pearson_needs_sd=0.2,
        rating_loss=3e-3,
        group_rating_loss=1e-2,
        graph_cosine=0.95,
        graph_snr_db=10,
        batch_max_abs=2e-2,
    ),
}
"""The one table of thresholds, for scores on `LIMITS_SCALE`; `limits_for` has those of another scale."""
LIMITS_SCALE = ScoreScale(minimum=1, maximum=5)
_IN_RATING_POINTS = ("score_max_abs", "score_mean_abs", "pearson_needs_sd", "batch_max_abs")


def limits_for(precision: str, scale: ScoreScale) -> Limits:
    """What `precision` must hold for scores on `scale`: limits in rating points are in proportion to its width."""
    limits, times = LIMITS[precision], scale.width / LIMITS_SCALE.width
    return replace(limits, **{name: times * getattr(limits, name) for name in _IN_RATING_POINTS})


def gate_against_build(graphs: Mapping[str, Mapping[str, TensorParity]], expected: Mapping[str, float]) -> Gate:
    """Whether every output is as near to PyTorch's as where the bundle was built.

    The gates of a precision are wide enough for every model; this one finds what changed since: another weight, int8
    products that saturate.

    Args:
        expected: signal-to-noise ratio of outputs at the build, dB; others are not looked at.
    """
    now = {name: parity.snr_db for outputs in graphs.values() for name, parity in outputs.items()}
    lost = {name: built - now[name] for name, built in expected.items()}
    worst = max(lost, key=lambda name: math.inf if math.isnan(lost[name]) else lost[name], default=None)
    title = "SNR of a graph output, lost since the build, dB"
    if worst is None:
        return Gate(title, None, True, MAX_SNR_LOST, "the build measured no such backend")
    return Gate(title, max(lost[worst], 0.0) if lost[worst] == lost[worst] else math.nan, True, MAX_SNR_LOST, worst)


def score_gates(limits: Limits, expected: np.ndarray, got: np.ndarray) -> list[Gate]:
    finite = bool(np.isfinite(got).all())
    spread = float(np.std(expected, dtype=np.float64)) >= limits.pearson_needs_sd and finite
    why = "" if spread else f"the reference scores hardly vary: their sd is below {limits.pearson_needs_sd:g}"
    return [
        Gate("scores that are not finite", float(np.sum(~np.isfinite(got))), True, 0),
        Gate("score max |Δ|", max_abs(expected, got), True, limits.score_max_abs),
        Gate("score mean |Δ|", mae(expected, got), True, limits.score_mean_abs),
        Gate(PEARSON_GATE, pearson(expected, got) if spread else None, False, limits.score_pearson, why),
    ]


def graph_gates(limits: Limits, graphs: Mapping[str, Mapping[str, TensorParity]]) -> list[Gate]:
    parities = [parity for outputs in graphs.values() for parity in outputs.values()]
    return [
        Gate("worst cosine of a graph output", min(p.cosine for p in parities), False, limits.graph_cosine),
        Gate("worst SNR of a graph output, dB", min(p.snr_db for p in parities), False, limits.graph_snr_db),
    ]


def batch_gates(
    limits: Limits, sessions: Mapping[GraphName, Session], pixels: np.ndarray, singles: np.ndarray
) -> list[Gate]:
    """Largest differences between the rows of a batch of copies, and between a batch and single runs."""
    copies = run_graphs(sessions, np.repeat(pixels[:1], BATCH, axis=0))["score"]
    batch = run_graphs(sessions, pixels[:BATCH])["score"]
    note = f"first {len(batch)} images"
    return [
        Gate("batch of copies, max |Δ| between rows", max_abs(copies, copies[:1]), True, limits.batch_max_abs),
        Gate("batch against singles, max |Δ|", max_abs(batch, singles[: len(batch)]), True, limits.batch_max_abs, note),
    ]


def rating_gates(limits: Limits, compared: Sequence[RatingParity]) -> list[Gate]:
    """What a bundle may lose of the correlation with ratings: over all images, which come first, and in each group.

    Groups that can't be judged share a gate for each reason.
    """
    every, *groups = compared
    limit, why = limits.group_rating_loss, _unjudged(every)
    judged = [part for part in groups if not _unjudged(part)]
    unjudged = Counter(reason for part in groups if (reason := _unjudged(part)))
    return [
        Gate(RATING_GATE, None if why else every.lost, True, limits.rating_loss, why),
        *(Gate(f"{RATING_GATE} in {part.group}", part.lost, True, limit) for part in judged),
        *(
            Gate(f"{RATING_GATE} in {count} of {len(groups)} groups", None, True, limit, reason)
            for reason, count in unjudged.items()
        ),
    ]


def _unjudged(part: RatingParity) -> str:
    """Why nothing can be said of what is lost; empty where it can."""
    if part.images < RATED_IMAGES:
        return f"fewer than {RATED_IMAGES} rated images"
    if math.isnan(part.lost):  # a model that gives every image the same score has no correlation to lose
        return "no correlation: equal scores or ratings, or scores that are not finite"
    return ""
