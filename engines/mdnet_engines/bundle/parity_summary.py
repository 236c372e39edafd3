"""What a manifest says of a bundle's agreement with PyTorch."""

from __future__ import annotations

from pydantic import Field

from mdnet_engines.bundle.part import Part


class ParitySummary(Part):
    """Agreement of the bundle with PyTorch fp32 on `images` images (scores in rating points)."""

    passed: bool
    forced: bool = False
    images: int
    source: str
    max_abs: float | None
    mean_abs: float | None
    """None where a score was not finite."""
    pearson: float | None = None
    spearman: float | None = None
    """None where the reference scores hardly vary (random weights), which leaves a correlation no meaning."""
    not_evaluated: str = Field(default="", max_length=2000)
    """The gates that could not be evaluated, and why: `passed` says nothing of them."""

    def __str__(self) -> str:
        """The differences and what was not evaluated, for one line of output."""
        return self.figures() + (f"; not evaluated: {self.not_evaluated}" if self.not_evaluated else "")

    def figures(self) -> str:
        """The differences alone."""
        if self.max_abs is None or self.mean_abs is None:
            return f"scores that are not finite, {self.source}"
        correlation = "" if self.pearson is None else f", Pearson {self.pearson:.6f}"
        return f"max |Δscore| {self.max_abs:.2g}, mean {self.mean_abs:.2g}{correlation}, {self.source}"
