"""Does the bundle give PyTorch's scores? Measured per graph and on the score."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mdnet_engines.bundle.manifest import GraphName, ScoreScale
from mdnet_engines.parity.gates import (
    LIMITS,
    LIMITS_SCALE,
    batch_gates,
    graph_gates,
    limits_for,
    rating_gates,
    score_gates,
)
from mdnet_engines.parity.metrics import mae, max_abs, pearson
from mdnet_engines.parity.report import EVERY_GROUP, LayerParity, ParityReport, RatingParity, ScorePair, TensorParity
from mdnet_engines.sessions.session import Session, run_graphs

_IN_USE = "score in use"

Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Images:
    """Preprocessed images (n, S, S, 3) uint8, their names, where they are from; ratings (n,) and groups where known."""

    names: list[str]
    pixels: np.ndarray
    source: str
    ratings: np.ndarray | None = None
    groups: list[str] | None = None
    private: bool = False
    """Pictures of people: neither they nor their names may be in a bundle."""

    def without_names(self) -> Images:
        """The same images, numbered from 1."""
        return replace(self, names=[f"picture {i}" for i in range(1, len(self.names) + 1)])

    def besides(self, pixels: np.ndarray) -> Images:
        """Without the images that are among `pixels` (m, S, S, 3) too."""
        others = {hashlib.sha256(image.tobytes()).digest() for image in pixels}
        rows = [i for i, image in enumerate(self.pixels) if hashlib.sha256(image.tobytes()).digest() not in others]
        return replace(
            self,
            names=[self.names[i] for i in rows],
            pixels=self.pixels[rows],
            ratings=None if self.ratings is None else self.ratings[rows],
            groups=None if self.groups is None else [self.groups[i] for i in rows],
        )


def measure(
    sessions: Mapping[GraphName, Session],
    reference: Outputs,
    images: Images,
    *,
    precision: str,
    scale: ScoreScale,
    backend: str,
) -> ParityReport:
    """Compare a bundle's graphs with PyTorch's outputs on the same images.

    Each graph is given the reference's inputs, so that a deviation is charged to the graph that made it; the score
    comes from the graphs one after the other, as in production.

    Args:
        sessions: the three graphs.
        reference: `score` of PyTorch fp32 for all images, and every other graph output for the first of them at least.
        scale: the rating scale, which limits in rating points follow.
    """
    known = _known(sessions, reference)
    runs: list[Outputs] = []
    scores: list[np.ndarray] = []
    for i in range(len(images.pixels)):
        if i < known:
            runs.append(run := _run(sessions, reference, images.pixels, i))
            scores.append(run[_IN_USE])
        else:
            scores.append(run_graphs(sessions, images.pixels[i : i + 1])["score"])
    graphs = _compare(sessions, reference, runs, scale)
    got = np.concatenate(scores)
    limits = limits_for(precision, scale)
    gates = [
        *score_gates(limits, reference["score"], got),
        *graph_gates(limits, graphs),
        *batch_gates(limits, sessions, images.pixels, got),
    ]
    pairs, against = _pairs(images, reference["score"], got), []
    if images.ratings is not None:
        against = compare_with_ratings(images.ratings, images.groups, reference["score"], got, scale)
        gates += rating_gates(limits, against)
    return ParityReport(precision, backend, images.source, graphs, pairs, gates, ratings=against)


def measure_graphs(
    sessions: Mapping[GraphName, Session], reference: Outputs, pixels: np.ndarray, scale: ScoreScale
) -> dict[str, dict[str, TensorParity]]:
    """Compare every graph output with PyTorch's, each graph fed with PyTorch's own inputs, for as many as are known."""
    runs = [_run(sessions, reference, pixels, i) for i in range(_known(sessions, reference))]
    return _compare(sessions, reference, runs, scale)


def measure_scores(
    score: Callable[[np.ndarray], np.ndarray],
    expected: np.ndarray,
    images: Images,
    *,
    precision: str,
    scale: ScoreScale,
    backend: str,
) -> ParityReport:
    """Compare the scores of one batch with PyTorch's: what takes least time, and finds a backend that is off.

    Args:
        score: uint8 (n, S, S, 3) → scores (n,).
        expected: PyTorch's scores (n,).
    """
    got = score(images.pixels)
    gates = score_gates(limits_for(precision, scale), expected, got)
    return ParityReport(precision, backend, images.source, {}, _pairs(images, expected, got), gates)


def compare_with_ratings(
    ratings: np.ndarray, groups: list[str] | None, expected: np.ndarray, got: np.ndarray, scale: ScoreScale
) -> list[RatingParity]:
    """How both lists of scores (n,) agree with the ratings (n,): of all images, then of each group if there are two."""
    named = sorted({group for group in groups or [] if group})
    parts = [(EVERY_GROUP, np.ones(len(ratings), dtype=bool))]
    if len(named) > 1:
        parts += [(group, np.array([of == group for of in groups or []])) for group in named]
    return [
        RatingParity(
            group=group,
            images=int(rows.sum()),
            reference=pearson(ratings[rows], expected[rows]),
            bundle=pearson(ratings[rows], got[rows]) if np.isfinite(got[rows]).all() else math.nan,
            mean_abs=mae(expected[rows], got[rows]),
            of_width=mae(expected[rows], got[rows]) / scale.width,
        )
        for group, rows in parts
    ]


def first_diverging(layers: list[LayerParity], precision: str) -> LayerParity | None:
    """The first layer whose signal-to-noise ratio is below what an output of a graph must have; None where none is."""
    limit = LIMITS[precision].graph_snr_db
    return next((layer for layer in layers if not layer.parity.snr_db >= limit), None)  # NaN diverges too


def compare(expected: np.ndarray, got: np.ndarray) -> TensorParity:
    """Cosine similarity, signal-to-noise ratio (dB) and largest difference, in float64."""
    a, b = expected.astype(np.float64).ravel(), got.astype(np.float64).ravel()
    if not np.isfinite(b).all():
        return TensorParity(math.nan, math.nan, math.nan)  # fails every gate
    noise, signal = float(np.sum((a - b) ** 2)), float(np.sum(a**2))
    norm = math.sqrt(signal * float(np.sum(b**2)))
    cosine = float(a @ b) / norm if norm else float(not noise)
    return TensorParity(cosine, 10 * math.log10(signal / noise) if noise and signal else math.inf, max_abs(a, b))


def _known(sessions: Mapping[GraphName, Session], reference: Outputs) -> int:
    """Of how many images every graph output is known."""
    return min(len(reference[name]) for name in sessions["fusion"].inputs)


def _run(sessions: Mapping[GraphName, Session], reference: Outputs, pixels: np.ndarray, i: int) -> Outputs:
    """Every graph output for one image, each graph fed with the reference's inputs; `_IN_USE` is the score in use."""
    run = run_graphs(sessions, pixels[i : i + 1])
    ideal = {name: reference[name][i : i + 1] for name in sessions["fusion"].inputs}
    return {**run, **sessions["fusion"].run(ideal), _IN_USE: run["score"]}


def _compare(
    sessions: Mapping[GraphName, Session], reference: Outputs, runs: list[Outputs], scale: ScoreScale
) -> dict[str, dict[str, TensorParity]]:
    def parity(output: str) -> TensorParity:
        expected, got = reference[output][: len(runs)], np.concatenate([run[output] for run in runs])
        return _compare_scores(expected, got, scale) if output == "score" else compare(expected, got)

    return {name: {output: parity(output) for output in session.outputs} for name, session in sessions.items()}


def _compare_scores(expected: np.ndarray, got: np.ndarray, scale: ScoreScale) -> TensorParity:
    """As `compare`, but cosine and SNR are those of the same scores on the scale of the limits.

    Both depend on where a scale's zero lies: around it, the same error is a larger part of a score.
    """
    times = LIMITS_SCALE.width / scale.width
    a, b = (LIMITS_SCALE.minimum + times * (values.astype(np.float64) - scale.minimum) for values in (expected, got))
    return replace(compare(a, b), max_abs=max_abs(expected, got))


def _pairs(images: Images, expected: np.ndarray, got: np.ndarray) -> list[ScorePair]:
    return [
        ScorePair(name, float(reference), float(score))
        for name, reference, score in zip(images.names, expected, got, strict=True)
    ]
