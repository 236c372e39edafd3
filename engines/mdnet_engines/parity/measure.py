"""Does the bundle give PyTorch's scores? Measured per graph and on the score."""

from __future__ import annotations

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
    rating_gate,
    score_gates,
)
from mdnet_engines.parity.metrics import max_abs
from mdnet_engines.parity.report import LayerParity, ParityReport, ScorePair, TensorParity
from mdnet_engines.sessions.session import Session, run_graphs

_IN_USE = "score in use"

Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Images:
    """Preprocessed images (n, S, S, 3) uint8, their names, where they are from, and their ratings (n,) where known."""

    names: list[str]
    pixels: np.ndarray
    source: str
    ratings: np.ndarray | None = None


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
    if images.ratings is not None:
        gates.append(rating_gate(limits, images.ratings, reference["score"], got))
    return ParityReport(precision, backend, images.source, graphs, _pairs(images, reference["score"], got), gates)


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
