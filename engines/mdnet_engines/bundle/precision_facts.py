"""What a manifest says of how its precision came about."""

from __future__ import annotations

from pydantic import Field

from mdnet_engines.bundle.part import Part, Sha256


class CalibrationFacts(Part):
    """Which images the ranges of the graphs' values were measured on."""

    images: int
    source: str = Field(max_length=400)
    sha256: Sha256
    """Of all their pixels, preprocessed."""
    method: str | None = Field(default=None, max_length=40)
    """How a range was made of the values seen; None where nothing is quantised."""

    def __str__(self) -> str:
        """For one line of output."""
        return f"{self.images} images, {self.source}" + (f", ranges by {self.method}" if self.method else "")


class QuantisedFacts(Part):
    """Within which budget blocks of the encoder were quantised, and how much of it they take."""

    float_blocks: list[str]
    """Those that broke the budget."""
    max_score_drift: float
    min_pearson: float
    drift_max_abs: float
    """Largest |Δscore| on the calibration images, in rating points."""
    drift_pearson: float | None = None
    drift_on: list[str] = Field(default=[], max_length=8)
    """The backends that the budget was held on; the drift is that of the worst."""


class Fp8Facts(QuantisedFacts):
    """Which blocks of the encoder are fp8; the others are float16."""

    fp8_blocks: list[str]


class Int8Facts(QuantisedFacts):
    """Which blocks of the encoder are int8, and what it brought."""

    int8_blocks: list[str]
    speedup: float
    """Over the float encoder, on the machine of the build."""
    speedup_on: str
    slower_forced: bool = False
