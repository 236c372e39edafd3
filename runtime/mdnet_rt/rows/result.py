"""What becomes of an image: one row, whatever happened."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from mdnet_engines.bundle.manifest import Manifest


@dataclass(frozen=True)
class Result:
    """One image: its score on the bundle's rating scale, or why there is none.

    `reason` says why there is no score, or, where there is one, why it is doubtful.

    `width` and `height` are those of the image as its file has it, before EXIF turns it; None where it could not be
    read. `pixels`, the graphs' input (uint8 `[S, S, 3]`), is set if `Scorer.stream` was asked for it.
    """

    path: str
    score: float | None
    status: str = "ok"
    reason: str | None = None
    width: int | None = None
    height: int | None = None
    pixels: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def ok(self) -> bool:
        """Whether the image was scored."""
        return self.status == "ok"


def judge(score: float, warning: str | None = None) -> tuple[float | None, str, str | None]:
    """Score, status and reason of an image that the graphs gave `score`."""
    if math.isfinite(score):
        return score, "ok", warning
    return None, "not_finite", f"score is not finite ({score})"


@dataclass(frozen=True)
class Stamp:
    """What made a run's scores; every row of a file carries it, so that rows of several runs can be put together."""

    model: str
    bundle: str
    """The first 12 hex digits of `Manifest.digest()`."""

    @classmethod
    def of(cls, manifest: Manifest) -> Stamp:
        return cls(manifest.label, manifest.digest()[:12])


@dataclass
class Summary:
    """Counts and score range of a run, row by row."""

    scored: int = 0
    failed: int = 0
    doubtful: int = 0
    """Of those scored: with a warning."""
    low: float = float("inf")
    high: float = float("-inf")

    def add(self, result: Result) -> None:
        """Count one row."""
        if result.score is None:
            self.failed += 1
            return
        self.scored += 1
        self.doubtful += result.reason is not None
        self.low, self.high = min(self.low, result.score), max(self.high, result.score)

    def line(self, seconds: float) -> str:
        """The run in one line; `seconds` is what reading and scoring took."""
        images = self.scored + self.failed
        doubtful = f" ({self.doubtful} with a warning)" if self.doubtful else ""
        text = f"{images} image{'' if images == 1 else 's'}: {self.scored} scored{doubtful}, {self.failed} failed, "
        text += f"{seconds:.1f} s, {images / max(seconds, 1e-9):.1f} images/s"
        return text + (f"; scores {self.low:.1f} to {self.high:.1f}" if self.scored else "")
