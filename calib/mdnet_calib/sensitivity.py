"""Which blocks of a graph may be int8, or fp8: as many as a budget on the score allows, the harmless ones first.

A block is a ResNet block, an attention layer, a feed-forward or a down-sampler: what the names of its nodes begin with.
Everything is quantised first. Only where that breaks the budget is each block tried alone, and the worst are put
back to float: as few as meet the budget, found by bisection over the blocks in order of harm.

The budget is tighter than a bundle's gates, which are for images that nothing was chosen on. Least correlation: two
lists of n scores that correlate by ρ differ in their correlation r with ratings by √(2(1 − ρ)(1 − r²)/n) (one standard
deviation, errors independent of ratings): with ρ = 0.9997, n = 500 and r = 0.6 that is 0.0009, of which the gate allows
3.4. Largest drift: of 64 scores it is some 2.5 standard deviations, of 500 it may be 5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mdnet_engines.progress import SILENT, Progress

_PART = r"(?:resnets|downsamplers|attentions|layers)"  # layers: of a tiny VAE
_BLOCK = re.compile(rf"^.*?\.{_PART}\.\d+(?:\.transformer_blocks\.\d+\.\w+)?")


@dataclass(frozen=True)
class Drift:
    """How far scores move from the float graphs' on the calibration images.

    `max_abs` and `mean_abs` in rating points; `pearson` None where the scores vary too little to have one.
    """

    max_abs: float
    mean_abs: float
    pearson: float | None


@dataclass(frozen=True)
class Budget:
    """What may be lost on the calibration images: the largest |Δscore| and the least Pearson correlation.

    The default drift is for scores from 1 to 5.
    """

    max_score_drift: float = 0.05
    min_pearson: float = 0.9997

    def allows(self, drift: Drift) -> bool:
        """Whether `drift` is within it; a NaN is not."""
        correlated = drift.pearson is None or drift.pearson >= self.min_pearson
        return drift.max_abs <= self.max_score_drift and correlated


@dataclass(frozen=True)
class Choice:
    """The blocks of a graph, quantised or kept in float.

    `alone` has, for each block, the drift with that block alone quantised; it is empty where everything was within the
    budget at once.
    """

    nodes: list[str]
    blocks: list[str]
    float_blocks: list[str]
    drift: Drift
    alone: dict[str, Drift]


def block_of(node: str) -> str:
    """The block that a node belongs to; a node outside of any is one of its own, by its module's name."""
    module = node.rpartition("/")[0] or node
    found = _BLOCK.match(module)
    return found[0] if found else module


def choose(
    nodes: Sequence[str],
    budget: Budget,
    drift_of: Callable[[list[str]], Drift],
    *,
    drift_alone: Callable[[list[str]], Drift] | None = None,
    kind: str = "int8",
    progress: Progress = SILENT,
) -> Choice:
    """The largest part of `nodes` that `budget` allows to quantise, in the graph's order.

    Args:
        drift_of: quantises these nodes, scores the calibration images and compares with the float graphs.
        drift_alone: likewise for one block, where fewer images may do, since it only puts blocks in order.
        kind: what they become, for progress.

    The result may be empty, when not even the most harmless block is within the budget.
    """
    blocks: dict[str, list[str]] = {}
    for node in nodes:
        blocks.setdefault(block_of(node), []).append(node)
    progress.step(f"{kind} in all {len(blocks)} blocks")
    everything = drift_of(list(nodes))
    if budget.allows(everything):
        return Choice(list(nodes), list(blocks), [], everything, {})
    alone = {}
    for i, (block, members) in enumerate(blocks.items(), 1):
        progress.step(f"{kind} in block {i} of {len(blocks)} alone: {block}")
        alone[block] = (drift_alone or drift_of)(members)
    harm = {block: drift.mean_abs if math.isfinite(drift.mean_abs) else math.inf for block, drift in alone.items()}
    harmless_first = sorted(blocks, key=lambda block: (harm[block], block))

    def taken(count: int) -> list[str]:
        chosen = set(harmless_first[:count])
        return [node for node in nodes if block_of(node) in chosen]

    nothing = Drift(0.0, 0.0, None)
    fits, drift, too_many = 0, nothing, len(blocks)
    while too_many - fits > 1:
        count = (fits + too_many) // 2
        progress.step(f"{kind} in the {count} most harmless of {len(blocks)} blocks")
        tried = drift_of(taken(count))
        if budget.allows(tried):
            fits, drift = count, tried
        else:
            too_many = count
    chosen = set(harmless_first[:fits])
    return Choice(
        taken(fits),
        [block for block in blocks if block in chosen],
        [block for block in blocks if block not in chosen],
        drift,
        alone,
    )
