"""What a parity run finds, as data: per output, per score, per layer, and the gates it was held to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from mdnet_engines.bundle.parity_summary import ParitySummary
from mdnet_engines.parity.metrics import mae, max_abs, pearson, spearman

PEARSON_GATE = "score Pearson"
RATING_GATE = "Pearson with the ratings, lost"
EVERY_GROUP = "all"
Verdict = Literal["pass", "fail", "not evaluated"]


@dataclass(frozen=True)
class TensorParity:
    """One graph output against PyTorch fp32, over all images at once."""

    cosine: float
    snr_db: float
    max_abs: float


@dataclass(frozen=True)
class Gate:
    """One threshold: `value` must be at most (or at least) `limit`. `value` None: not evaluated; `note` says why."""

    name: str
    value: float | None
    at_most: bool
    limit: float
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """A gate that could not be evaluated neither passes nor fails. NaN fails."""
        if self.value is None:
            return "not evaluated"
        holds = self.value <= self.limit if self.at_most else self.value >= self.limit
        return "pass" if holds else "fail"

    @property
    def failed(self) -> bool:
        return self.verdict == "fail"


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
class RatingParity:
    """How PyTorch's scores (`reference`) and the bundle's agree with the ratings of a group of images: Pearson.

    NaN where all scores or all ratings are equal. `mean_abs` is the mean |Δscore|, `of_width` that in widths of the
    rating scale.
    """

    group: str
    images: int
    reference: float
    bundle: float
    mean_abs: float
    of_width: float

    @property
    def lost(self) -> float:
        return self.reference - self.bundle


@dataclass(frozen=True)
class LayerParity:
    """One layer's value in the bundle against the float graph's, both computed from the same input of the graph."""

    layer: str
    value: str
    parity: TensorParity


@dataclass(frozen=True)
class ParityReport:
    """Everything `parity.json` holds and `parity.html` shows.

    `layers` is empty where none were compared, `ratings` where the images have none; its first row is of all images.
    """

    precision: str
    backend: str
    source: str
    graphs: dict[str, dict[str, TensorParity]]
    scores: list[ScorePair]
    gates: list[Gate]
    forced: bool = False
    layers: dict[str, list[LayerParity]] = field(default_factory=dict)
    ratings: list[RatingParity] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no gate failed. `not_evaluated` says what this leaves open."""
        return not any(gate.failed for gate in self.gates)

    def failures(self) -> str:
        """The gates that failed, with value and limit, on one line; empty where all passed."""
        return "; ".join(
            f"{gate.name} is {gate.value:.6g}, allowed is {'at most' if gate.at_most else 'at least'} {gate.limit:g}"
            for gate in self.gates
            if gate.failed
        )

    def not_evaluated(self) -> str:
        """The gates that could not be evaluated, by reason, on one line; empty where all were."""
        names: dict[str, list[str]] = {}
        for gate in self.gates:
            if gate.verdict == "not evaluated":
                names.setdefault(gate.note, []).append(gate.name)
        return "; ".join(f"{', '.join(gates)} ({reason})" for reason, gates in names.items())

    def with_gates_of_gpu_graphs(self, other: ParityReport) -> ParityReport:
        """This report, held to the gates of `other` as well, which measured the graphs that GPUs get."""
        gates = [replace(gate, name=f"graphs for GPUs, on {other.backend}: {gate.name}") for gate in other.gates]
        return replace(self, gates=[*self.gates, *gates])

    def summary(self) -> ParitySummary:
        """What the manifest records."""
        expected = np.array([pair.reference for pair in self.scores])
        got = np.array([pair.bundle for pair in self.scores])
        finite = bool(np.isfinite(got).all())
        spread = next(gate.value for gate in self.gates if gate.name == PEARSON_GATE) is not None
        return ParitySummary(
            passed=self.passed,
            forced=self.forced,
            not_evaluated=self.not_evaluated()[:2000],
            images=len(self.scores),
            source=self.source,
            max_abs=max_abs(expected, got) if finite else None,
            mean_abs=mae(expected, got) if finite else None,
            pearson=pearson(expected, got) if spread else None,
            spearman=spearman(expected, got) if spread else None,
        )
