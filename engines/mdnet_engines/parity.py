"""Does the bundle give PyTorch's scores? Measured per graph and on the score, held to one table of gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from mdnet_engines.manifest import GraphName, ParitySummary
from mdnet_engines.metrics import mae, pearson, spearman
from mdnet_engines.session import Session, chain

PEARSON_GATE = "score Pearson"
BATCH = 4  # images in the runs that test batching
MAX_SNR_LOST = 6.0  # dB: an error twice as large
_CHAINED = "score of the chain"
RATED_IMAGES = 100  # fewer say little about a correlation with ratings


@dataclass(frozen=True)
class TensorParity:
    """One graph output against PyTorch fp32, over all images at once."""

    cosine: float
    snr_db: float
    max_abs: float


@dataclass(frozen=True)
class Gate:
    """One threshold: `value` must be at most (or at least) `limit`. `value` None: not applicable, and why."""

    name: str
    value: float | None
    at_most: bool
    limit: float
    note: str = ""

    @property
    def passed(self) -> bool:
        if self.value is None:
            return True
        return self.value <= self.limit if self.at_most else self.value >= self.limit


@dataclass(frozen=True)
class ScorePair:
    """One image's score in PyTorch fp32 (`reference`) and in the bundle (`bundle`), in rating points."""

    image: str
    reference: float
    bundle: float

    @property
    def delta(self) -> float:
        return self.bundle - self.reference


@dataclass(frozen=True)
class LayerParity:
    """One layer's value in the bundle against the float graph's, both computed from the same input of the graph."""

    layer: str
    value: str
    parity: TensorParity


@dataclass(frozen=True)
class ParityReport:
    """Everything `parity.json` holds and `parity.html` shows. `layers` is empty where none were compared."""

    precision: str
    backend: str
    source: str
    graphs: dict[str, dict[str, TensorParity]]
    scores: list[ScorePair]
    gates: list[Gate]
    forced: bool = False
    layers: dict[str, list[LayerParity]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)

    def failures(self) -> str:
        """The gates that failed, with value and limit, on one line; empty where all passed."""
        return "; ".join(
            f"{gate.name} is {gate.value:.6g}, allowed is {'at most' if gate.at_most else 'at least'} {gate.limit:g}"
            for gate in self.gates
            if not gate.passed and gate.value is not None
        )

    def summary(self) -> ParitySummary:
        """What the manifest records."""
        expected = np.array([pair.reference for pair in self.scores])
        got = np.array([pair.bundle for pair in self.scores])
        finite = bool(np.isfinite(got).all())
        spread = next(gate.value for gate in self.gates if gate.name == PEARSON_GATE) is not None
        return ParitySummary(
            passed=self.passed,
            forced=self.forced,
            images=len(self.scores),
            source=self.source,
            max_abs=_worst(expected, got) if finite else None,
            mean_abs=mae(expected, got) if finite else None,
            pearson=pearson(expected, got) if spread else None,
            spearman=spearman(expected, got) if spread else None,
        )


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
        graph_cosine=0.95,
        graph_snr_db=10,
        batch_max_abs=2e-2,
    ),
}
"""The one table of thresholds."""

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
    backend: str,
    on_progress: Callable[[], None] = lambda: None,
) -> ParityReport:
    """Compare a bundle's graphs with PyTorch's outputs on the same images.

    Each graph is given the reference's inputs, so that a deviation is charged to the graph that made it; the score
    comes from the graphs one after the other, as in production.

    Args:
        sessions: the three graphs.
        reference: `score` of PyTorch fp32 for all images, and every other graph output for the first of them at least.
        on_progress: called once per image.
    """
    known = _known(sessions, reference)
    runs: list[Outputs] = []
    scores: list[np.ndarray] = []
    for i in range(len(images.pixels)):
        if i < known:
            runs.append(run := _run(sessions, reference, images.pixels, i))
            scores.append(run[_CHAINED])
        else:
            scores.append(chain(sessions, images.pixels[i : i + 1])["score"])
        on_progress()
    graphs = _compare(sessions, reference, runs)
    got = np.concatenate(scores)
    limits = LIMITS[precision]
    gates = [
        *_score_gates(limits, reference["score"], got),
        *_graph_gates(limits, graphs),
        *_batch_gates(limits, sessions, images.pixels, got),
    ]
    if images.ratings is not None:
        gates.append(_rating_gate(limits, images.ratings, reference["score"], got))
    return ParityReport(precision, backend, images.source, graphs, _pairs(images, reference["score"], got), gates)


def measure_graphs(
    sessions: Mapping[GraphName, Session], reference: Outputs, pixels: np.ndarray
) -> dict[str, dict[str, TensorParity]]:
    """Compare every graph output with PyTorch's, each graph fed with PyTorch's own inputs, for as many as are known."""
    return _compare(
        sessions, reference, [_run(sessions, reference, pixels, i) for i in range(_known(sessions, reference))]
    )


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


def measure_scores(
    score: Callable[[np.ndarray], np.ndarray], expected: np.ndarray, images: Images, *, precision: str, backend: str
) -> ParityReport:
    """Compare the scores of one batch with PyTorch's: what takes least time, and finds a backend that is off.

    Args:
        score: uint8 (n, S, S, 3) → scores (n,).
        expected: PyTorch's scores (n,).
    """
    got = score(images.pixels)
    gates = _score_gates(LIMITS[precision], expected, got)
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
    return TensorParity(cosine, 10 * math.log10(signal / noise) if noise and signal else math.inf, _worst(a, b))


def _known(sessions: Mapping[GraphName, Session], reference: Outputs) -> int:
    """Of how many images every graph output is known."""
    return min(len(reference[name]) for name in sessions["fusion"].inputs)


def _run(sessions: Mapping[GraphName, Session], reference: Outputs, pixels: np.ndarray, i: int) -> Outputs:
    """Every graph output for one image, each graph fed with the reference's inputs; `_CHAINED` is the score in use."""
    run = chain(sessions, pixels[i : i + 1])
    ideal = {name: reference[name][i : i + 1] for name in sessions["fusion"].inputs}
    return {**run, **sessions["fusion"].run(ideal), _CHAINED: run["score"]}


def _compare(
    sessions: Mapping[GraphName, Session], reference: Outputs, runs: list[Outputs]
) -> dict[str, dict[str, TensorParity]]:
    return {
        name: {
            output: compare(reference[output][: len(runs)], np.concatenate([run[output] for run in runs]))
            for output in session.outputs
        }
        for name, session in sessions.items()
    }


def _pairs(images: Images, expected: np.ndarray, got: np.ndarray) -> list[ScorePair]:
    return [
        ScorePair(name, float(reference), float(score))
        for name, reference, score in zip(images.names, expected, got, strict=True)
    ]


def _score_gates(limits: Limits, expected: np.ndarray, got: np.ndarray) -> list[Gate]:
    finite = bool(np.isfinite(got).all())
    spread = float(np.std(expected, dtype=np.float64)) >= limits.pearson_needs_sd and finite
    why = "" if spread else "the reference scores hardly vary"
    return [
        Gate("scores that are not finite", float(np.sum(~np.isfinite(got))), True, 0),
        Gate("score max |Δ|", _worst(expected, got), True, limits.score_max_abs),
        Gate("score mean |Δ|", mae(expected, got), True, limits.score_mean_abs),
        Gate(PEARSON_GATE, pearson(expected, got) if spread else None, False, limits.score_pearson, why),
    ]


def _graph_gates(limits: Limits, graphs: Mapping[str, Mapping[str, TensorParity]]) -> list[Gate]:
    parities = [parity for outputs in graphs.values() for parity in outputs.values()]
    return [
        Gate("worst cosine of a graph output", min(p.cosine for p in parities), False, limits.graph_cosine),
        Gate("worst SNR of a graph output, dB", min(p.snr_db for p in parities), False, limits.graph_snr_db),
    ]


def _batch_gates(
    limits: Limits, sessions: Mapping[GraphName, Session], pixels: np.ndarray, singles: np.ndarray
) -> list[Gate]:
    """Largest differences between the rows of a batch of copies, and between a batch and single runs."""
    copies = chain(sessions, np.repeat(pixels[:1], BATCH, axis=0))["score"]
    batch = chain(sessions, pixels[:BATCH])["score"]
    note = f"first {len(batch)} images"
    return [
        Gate("batch of copies, max |Δ| between rows", _worst(copies, copies[:1]), True, limits.batch_max_abs),
        Gate("batch against singles, max |Δ|", _worst(batch, singles[: len(batch)]), True, limits.batch_max_abs, note),
    ]


def _rating_gate(limits: Limits, ratings: np.ndarray, expected: np.ndarray, got: np.ndarray) -> Gate:
    name = "Pearson with the ratings, lost"
    if len(ratings) < RATED_IMAGES or not np.isfinite(got).all():
        return Gate(name, None, True, limits.rating_loss, f"needs {RATED_IMAGES} images")
    lost = pearson(ratings, expected) - pearson(ratings, got)
    # A model that gives every image the same score has no correlation to lose.
    return Gate(name, None if math.isnan(lost) else lost, True, limits.rating_loss, "" if lost == lost else "no spread")


def _worst(a: np.ndarray, b: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):  # ∞ − ∞ is NaN, which no gate accepts
        return float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64))))
