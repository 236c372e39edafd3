"""The choice of blocks, with drifts that are known: each block adds its own harm to the score."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import Recorded

from mdnet_calib.sensitivity import Budget, Choice, Drift, block_of, choose


class Additive:
    """A model whose blocks each move the score by their harm, all in one direction; it remembers what was asked."""

    def __init__(self, harm: dict[str, float]):
        self.harm = harm
        self.asked: list[list[str]] = []

    @property
    def nodes(self) -> list[str]:
        """Two nodes for each block, the second ones after all the first, as where branches meet."""
        return [f"{block}/{part}" for part in ("conv1", "conv2") for block in self.harm]

    def __call__(self, nodes: list[str]) -> Drift:
        self.asked.append(nodes)
        total = sum(self.harm[block] for block in dict.fromkeys(node.split("/")[0] for node in nodes))
        return Drift(total, total / 2, 1 - total / 100)

    def choose(self, limit: float, min_pearson: float = 0.0) -> Choice:
        return choose(self.nodes, Budget(limit, min_pearson), self)


def test_everything_within_the_budget_takes_one_run() -> None:
    model = Additive({"a": 0.05, "b": 0.01, "c": 0.03})
    choice = model.choose(0.15)
    assert model.asked == [model.nodes]
    assert choice.nodes == model.nodes
    assert (choice.blocks, choice.float_blocks, choice.alone) == (["a", "b", "c"], [], {})
    assert choice.drift.max_abs == pytest.approx(0.09)


def test_the_worst_block_goes_back_to_float_and_is_recorded() -> None:
    model = Additive({"a": 0.05, "b": 0.5, "c": 0.03})
    choice = model.choose(0.15)
    assert (choice.blocks, choice.float_blocks) == (["a", "c"], ["b"])
    assert choice.nodes == ["a/conv1", "c/conv1", "a/conv2", "c/conv2"]  # in the graph's order, blocks whole
    assert choice.drift == model(choice.nodes)
    assert choice.alone == {block: model([f"{block}/conv1"]) for block in "abc"}


@settings(max_examples=100)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=12), st.integers(1, 3000))
def test_as_many_of_the_most_harmless_blocks_as_fit(harms: list[int], limit: int) -> None:
    """Harms in whole numbers, so that sums are exact and a budget may be met to the last."""
    model = Additive({f"{i:02}": float(harm) for i, harm in enumerate(harms)})
    choice = model.choose(float(limit), min_pearson=-math.inf)
    ascending = sorted(harms)
    fitting = max(n for n in range(len(harms) + 1) if sum(ascending[:n]) <= limit)
    taken = [harms[int(block)] for block in choice.blocks]
    assert sorted(taken) == ascending[:fitting]
    assert choice.drift.max_abs == sum(taken)
    assert sorted(choice.blocks + choice.float_blocks) == list(model.harm)
    bisection = math.ceil(math.log2(len(harms))) if len(harms) > 1 else 0
    assert len(model.asked) <= 1 + len(harms) + bisection


def test_blocks_may_be_put_in_order_by_fewer_images() -> None:
    """What is asked of each block alone decides the order only; what is kept is within the budget on all images."""
    model, quick = Additive({"a": 0.05, "b": 0.1, "c": 0.03}), Additive({"a": 0.3, "b": 0.2, "c": 0.1})
    choice = choose(model.nodes, Budget(0.15, 0), model, drift_alone=quick)
    assert (choice.blocks, choice.float_blocks) == (["b", "c"], ["a"])
    assert len(quick.asked) == 3
    assert choice.drift == Drift(0.13, 0.065, 1 - 0.13 / 100)
    assert choice.alone["a"].max_abs == 0.3


def test_nothing_that_fits_gives_nothing() -> None:
    choice = Additive({"a": 0.2, "b": 0.3}).choose(0.15)
    assert (choice.nodes, choice.blocks, choice.float_blocks) == ([], [], ["a", "b"])
    assert choice.drift == Drift(0, 0, None)
    assert choice.alone.keys() == {"a", "b"}


def test_the_correlation_is_part_of_the_budget() -> None:
    """Within the score's limit together, but 0.04 of correlation is lost; 0.01 may be."""
    assert Additive({"a": 1.0, "b": 3.0}).choose(100.0, min_pearson=0.99).blocks == ["a"]


@pytest.mark.parametrize(
    ("drift", "allowed"),
    [
        (Drift(0.15, 0.01, 0.995), True),  # a limit may be reached
        (Drift(0.1501, 0.01, 1.0), False),
        (Drift(0.01, 0.01, 0.9949), False),
        (Drift(0.01, 0.01, None), True),
        (Drift(math.nan, math.nan, None), False),
        (Drift(0.01, 0.01, math.nan), False),
        (Drift(math.inf, math.inf, 1.0), False),
    ],
)
def test_what_a_budget_allows(drift: Drift, allowed: bool) -> None:
    assert Budget(max_score_drift=0.15, min_pearson=0.995).allows(drift) is allowed


def test_a_block_that_gives_nan_is_the_most_harmful() -> None:
    harm = {"a": 0.03, "b": 0.01, "c": 0.04, "d": 0.02, "e": 0.015}
    for broken in harm:
        choice = Additive(harm | {broken: math.nan}).choose(0.2)
        assert choice.blocks == [block for block in harm if block != broken]
        assert choice.float_blocks == [broken]


def test_steps_are_told_with_their_block() -> None:
    model = Additive({"a": 0.05, "b": 0.5, "c": 0.03})
    told = Recorded()
    choose(model.nodes, Budget(0.15, 0), model, progress=told)
    assert len(told.steps) == len(model.asked)
    assert "all 3 blocks" in told.steps[0]
    assert ["a" in told.steps[1], "b" in told.steps[2], "c" in told.steps[3]] == [True] * 3


@pytest.mark.parametrize(
    ("node", "block"),
    [
        ("vae.down_blocks.1.resnets.0.conv_shortcut/node_conv2d_6", "vae.down_blocks.1.resnets.0"),
        ("vae.down_blocks.2.downsamplers.0.conv/node_conv2d_11", "vae.down_blocks.2.downsamplers.0"),
        ("vae.mid_block.attentions.0.to_q/node_MatMul_271", "vae.mid_block.attentions.0"),
        ("vae.mid_block.attentions.0.to_out.0/node_MatMul_330", "vae.mid_block.attentions.0"),
        ("unet.down_blocks.10.resnets.12.conv1/node_conv2d", "unet.down_blocks.10.resnets.12"),
        ("unet.down_blocks.0.attentions.0.proj_in/node_conv2d_23", "unet.down_blocks.0.attentions.0"),
        (
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0/node_MatMul_534",
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1",
        ),
        (
            "unet.mid_block.attentions.0.transformer_blocks.1.ff.net.0.proj/node_MatMul_1080",
            "unet.mid_block.attentions.0.transformer_blocks.1.ff",
        ),
        ("vae.layers.3.conv.0/node_conv2d_4", "vae.layers.3"),
        ("vae.layers.14/node_conv2d_34", "vae.layers.14"),
        ("unet.conv_in/node_conv2d_20", "unet.conv_in"),
        ("node_conv2d", "node_conv2d"),
    ],
)
def test_block_of_a_node(node: str, block: str) -> None:
    assert block_of(node) == block
