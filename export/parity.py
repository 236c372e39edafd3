"""Does the bundle give PyTorch's scores? Measured per graph and on the score, held to one table of gates."""

from __future__ import annotations

from dataclasses import dataclass


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


@dataclass(frozen=True)
class ParityReport:
    """Everything `parity.json` holds and `parity.html` shows."""

    precision: str
    backend: str
    source: str
    graphs: dict[str, dict[str, TensorParity]]
    scores: list[ScorePair]
    gates: list[Gate]
    forced: bool = False

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)
