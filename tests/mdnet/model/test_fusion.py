"""How the streams are joined, and what stands in where one of them is left out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mdnet.model.checkpoint import CONFIG_KEY, load_checkpoint, save_checkpoint
from mdnet.model.config import FUSIONS, preset
from mdnet.model.fusion import Concatenation
from mdnet.model.net import MDNet, random_mdnet, with_fusion
from mdnet_engines.errors import UsageError

CONFIG = preset("demo")


def model(fusion: str) -> MDNet:
    return random_mdnet(dataclasses.replace(CONFIG, fusion=fusion), seed=0)


def inputs(seed: int) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = {name: torch.randn(2, *shape, generator=generator) for name, shape in CONFIG.feature_shapes.items()}
    return features, torch.randn(2, CONFIG.vim_grid**2 + 1, CONFIG.vim_dim, generator=generator)


@pytest.mark.parametrize(
    ("fusion", "sees_features", "sees_tokens"),
    [
        ("cross-attention", True, True),
        ("concatenation", True, True),
        ("diffusion-only", True, False),
        ("vim-only", False, True),
    ],
)
@torch.no_grad()
def test_the_score_depends_on_the_streams_that_the_name_says(
    fusion: str, sees_features: bool, sees_tokens: bool
) -> None:
    fused = model(fusion).fusion
    (features, tokens), (other_features, other_tokens) = inputs(0), inputs(1)
    score = fused(features, tokens)
    assert score.shape == (2,)
    assert (not torch.equal(fused(other_features, tokens), score)) == sees_features
    assert (not torch.equal(fused(features, other_tokens), score)) == sees_tokens


def test_concatenation_knows_the_mean_of_the_context_and_no_places() -> None:
    layer = Concatenation(6)
    queries, context = torch.randn(2, 5, 6), torch.randn(2, 7, 6)
    out = layer(queries, context)
    for image in range(2):
        for place in range(5):
            joined = torch.cat([queries[image, place], context[image].sum(0) / 7])
            expected = layer.proj.weight @ joined + layer.proj.bias
            torch.testing.assert_close(out[image, place], expected, rtol=0, atol=1e-5)  # sums in another order
    torch.testing.assert_close(layer(queries, context.flip(1)), out, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_everything_that_is_used_learns(fusion: str) -> None:
    net = model(fusion)
    features, tokens = inputs(0)
    net.fusion(features, tokens).sum().backward()
    unused = {name for name, value in net.fusion.named_parameters() if value.grad is None or not value.grad.any()}
    assert {name.split(".")[0] for name in unused} <= ({"scales"} if fusion == "vim-only" else set()), unused


def test_with_fusion_keeps_the_streams_and_starts_fusion_anew() -> None:
    base = random_mdnet(CONFIG, seed=3)
    changed = with_fusion(base, "vim-only", seed=0)
    assert changed.config == dataclasses.replace(CONFIG, fusion="vim-only")
    assert changed.diffusion is base.diffusion
    assert changed.vim is base.vim
    weights = changed.fusion.state_dict()
    again = with_fusion(base, "vim-only", seed=0).fusion.state_dict()
    other = with_fusion(base, "vim-only", seed=1).fusion.state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not torch.equal(weights["stand_in"], other["stand_in"])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_checkpoint_keeps_its_kind(fusion: str, tmp_path: Path) -> None:
    net = model(fusion)
    save_checkpoint(net, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors")
    assert loaded.config.fusion == fusion
    image = torch.randint(0, 256, (1, 128, 128, 3), dtype=torch.uint8)
    with torch.no_grad():
        # Memory that is mapped from a file may be aligned otherwise, and sums then run in another order.
        torch.testing.assert_close(loaded(image), net(image), rtol=0, atol=1e-5)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="fusion is 'sum'; known: cross-attention, concatenation"):
        dataclasses.replace(CONFIG, fusion="sum")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_training_scores_as_evaluation_does(fusion: str) -> None:
    """In training the last block computes the class token alone."""
    fused, (features, tokens) = model(fusion).fusion, inputs(0)
    results = []
    for training in (False, True):
        fused.train(training).zero_grad()
        score = fused(features, tokens)
        score.sum().backward()
        results.append(
            {"score": score.detach(), **{n: p.grad for n, p in fused.named_parameters() if p.grad is not None}}
        )
    expected, got = results
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6 * float(expected[name].abs().max() + 1))


@pytest.mark.parametrize(
    ("fusion", "heads"),
    [
        ("cross-attention", ["vim", "diffusion"]),
        ("concatenation", ["vim", "diffusion"]),
        ("diffusion-only", ["diffusion"]),
        ("vim-only", ["vim"]),
    ],
)
@torch.no_grad()
def test_each_stream_that_is_there_adds_a_logit_of_its_own(fusion: str, heads: list[str]) -> None:
    fused = model(fusion).fusion
    (features, tokens), (other_features, other_tokens) = inputs(0), inputs(1)
    assert list(fused.stream_heads) == heads
    logits = fused.logits(features, tokens)
    score = 1 + 4 * torch.sigmoid(torch.stack(logits).sum(0))
    torch.testing.assert_close(fused(features, tokens), score, rtol=0, atol=1e-6)
    for name, logit, other_tokens_, other_features_ in zip(
        heads,
        logits[1:],
        fused.logits(features, other_tokens)[1:],
        fused.logits(other_features, tokens)[1:],
        strict=True,
    ):
        assert torch.equal(logit, other_tokens_) == (name == "diffusion")
        assert torch.equal(logit, other_features_) == (name == "vim")


@torch.no_grad()
def test_a_streams_head_knows_where_its_tokens_are() -> None:
    fused = model("vim-only").fusion
    _, tokens = inputs(0)
    moved = tokens.roll(1, dims=1)
    assert not torch.allclose(fused.stream_heads["vim"](tokens), fused.stream_heads["vim"](moved), atol=1e-4)


def test_a_checkpoint_from_before_the_streams_had_heads_loads_and_scores_as_it_did(tmp_path: Path) -> None:
    old = random_mdnet(dataclasses.replace(CONFIG, stream_heads=0), seed=0)
    assert len(old.fusion.stream_heads) == 0
    save_checkpoint(old, tmp_path / "old.safetensors")
    tensors = load_file(tmp_path / "old.safetensors")
    with safe_open(tmp_path / "old.safetensors", "pt") as file:
        metadata = file.metadata()
    fields = json.loads(metadata[CONFIG_KEY])
    del fields["stream_heads"]  # older files lack it
    save_file(tensors, tmp_path / "old.safetensors", {**metadata, CONFIG_KEY: json.dumps(fields)})
    loaded = load_checkpoint(tmp_path / "old.safetensors")
    features, tokens = inputs(0)
    torch.testing.assert_close(loaded.fusion(features, tokens), old.eval().fusion(features, tokens), rtol=0, atol=1e-6)
