"""Attention as it is read is the attention that made the score."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mdnet.explain.attention import look, weights, without_attention
from mdnet.model.config import preset
from mdnet.model.fusion import Attention
from mdnet.model.net import MDNet, random_mdnet
from mdnet_engines.errors import MDNetError

CONFIG = preset("demo")


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (128, 128, 3), dtype=np.uint8)


def spoken(model: MDNet) -> MDNet:
    """Attention of fresh weights is nearly even; with larger ones, maps that are mixed up would show."""
    for block in model.fusion.blocks:
        for layer in (block.cross, block.attend):
            with torch.no_grad():
                layer.to_q.weight *= 4
                layer.to_kv.weight *= 4
    return model


@torch.no_grad()
def test_the_weights_are_those_that_the_layer_applies() -> None:
    torch.manual_seed(0)
    layer = Attention(12, heads=3)
    queries, context = 3 * torch.randn(2, 5, 12), 3 * torch.randn(2, 7, 12)
    values = layer.to_kv(context)[..., 12:].unflatten(-1, (3, 4)).transpose(1, 2)
    found = layer.to_out((weights(layer, queries, context) @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, layer(queries, context), rtol=0, atol=1e-5)  # sums in another order


@pytest.mark.parametrize("fusion", ["cross-attention", "diffusion-only"])
@torch.no_grad()
def test_the_explained_pass_gives_the_models_own_score(fusion: str) -> None:
    model = spoken(random_mdnet(dataclasses.replace(CONFIG, fusion=fusion), seed=1))
    assert look(model, picture()).score == float(model(torch.from_numpy(picture())[None]))
    hooks = [len(module._forward_hooks) for module in model.modules()]
    assert not any(hooks)


@torch.no_grad()
def test_maps_follow_the_definition_step_by_step() -> None:
    """An independent pass with PyTorch's own multi-head attention, and rollout for one token as a sum over paths."""
    model = spoken(random_mdnet(CONFIG, seed=2))
    image, fusion, index = torch.from_numpy(picture())[None], model.fusion, CONFIG.vim_class_index
    features, tokens = model.diffusion(image), model.vim(image)
    local = fusion.norm_local(torch.cat([scale(features[name]) for name, scale in fusion.scales.items()], dim=1))

    def matrix(layer: Attention, queries: Tensor, context: Tensor) -> np.ndarray:
        (k_weight, _), (k_bias, _) = layer.to_kv.weight.chunk(2), layer.to_kv.bias.chunk(2)
        dim = queries.shape[-1]
        _, found = F.multi_head_attention_forward(
            queries.transpose(0, 1),
            context.transpose(0, 1),
            context.transpose(0, 1),
            dim,
            layer.heads,
            torch.cat([layer.to_q.weight, k_weight, k_weight]),
            torch.cat([layer.to_q.bias, k_bias, k_bias]),
            None,
            None,
            False,
            0.0,
            torch.eye(dim),
            None,
            training=False,
        )
        assert found is not None
        return found[0].double().numpy()

    cross, attend = [], []
    for block in fusion.blocks:
        cross.append(matrix(block.cross, block.norm_cross(tokens), local))
        asked = tokens + block.cross(block.norm_cross(tokens), local)
        attend.append(matrix(block.attend, block.norm_self(asked), block.norm_self(asked)))
        tokens = block(tokens, local)
    (c1, c2), (a1, a2) = cross, attend
    own = (c1[index] + c2[index]) / 2
    # Every path from the class token to the diffusion tokens, by the halves that it passes through.
    identity = np.eye(len(a1))
    second = (identity + a2)[index] / 2
    traced = second @ c2 / 2 + second / 2 @ ((identity + a1) / 2 @ c1 / 2)
    found = look(model, picture())
    for expected, maps in ((own, found.own), (traced / traced.sum(), found.traced)):
        assert {name: cells.shape for name, cells in maps.items()} == {
            name: shape[1:] for name, shape in CONFIG.feature_shapes.items()
        }
        np.testing.assert_allclose(np.concatenate([cells.ravel() for cells in maps.values()]), expected, atol=2e-6)
        assert sum(cells.sum() for cells in maps.values()) == pytest.approx(1, abs=1e-5)
    assert np.abs(own - traced / traced.sum()).max() > 1e-3  # the two readings are not one


@pytest.mark.parametrize(("scale", "row", "column"), [("down_s16", 5, 2), ("down_s32", 0, 3), ("mid_s64", 1, 0)])
@torch.no_grad()
def test_a_fusion_that_looks_at_one_place_gives_that_place(scale: str, row: int, column: int) -> None:
    # One head: normalised tokens are equally long, so a token's largest product is with itself.
    model = random_mdnet(dataclasses.replace(CONFIG, fusion_heads=1), seed=0)
    fusion, dim = model.fusion, CONFIG.vim_dim
    torch.manual_seed(0)
    for tokens in fusion.scales.values():  # local tokens: where and how fine, whatever the picture
        tokens.proj.weight.zero_()
        tokens.scale_embed.copy_(torch.randn(dim))
    wanted = fusion.scales[scale].positions[row * CONFIG.feature_shapes[scale][2] + column]
    key = fusion.norm_local(fusion.scales[scale].proj.bias + fusion.scales[scale].scale_embed + wanted)
    for block in fusion.blocks:
        block.cross.to_q.weight.zero_()
        block.cross.to_q.bias.copy_(50 * key)
        block.cross.to_kv.weight[:dim].copy_(torch.eye(dim))
        block.cross.to_kv.bias[:dim].zero_()
    found = look(model, picture())
    for maps in (found.own, found.traced):
        assert maps[scale][row, column] > 0.99
        assert sum(cells.sum() for cells in maps.values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("fusion", ["concatenation", "vim-only"])
def test_a_model_without_attention_to_the_maps_says_so(fusion: str) -> None:
    config = dataclasses.replace(CONFIG, fusion=fusion)
    assert fusion in str(without_attention(config))
    with pytest.raises(MDNetError, match=f"no attention: its fusion is {fusion}"):
        look(random_mdnet(config, seed=0), picture())
