"""Where the class token looks in the diffusion maps, as the weights of cross-attention say it.

The weights are read by hooks while the model scores a picture as it always does, so the score is the model's own.
Heads are averaged. Two readings, because a fusion block has two attentions:

    own      the weights of the class token's own queries, mean over the blocks
    traced   also what other Vim tokens found, and the class token then read from them: attention rollout (Abnar and
             Zuidema, arXiv 2005.00928) over cross- and self-attention. Each residual connection counts half, what it
             adds the other half: R ← (R + C) / 2 by cross-attention, then R ← (R + A R) / 2 by self-attention, and in
             the end the class token's row.

Neither knows values, signs, MLPs or the score; nor what Vim saw in the pixels, which passes no cross-attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mdnet.model.config import MDNetConfig
from mdnet.model.fusion import Attention, Fusion, FusionBlock
from mdnet.model.net import MDNet
from mdnet_engines.errors import MDNetError

Maps = dict[str, np.ndarray]
"""Scale → (s, s) float64, not negative. All maps of a picture together sum to 1."""


@dataclass(frozen=True)
class Looked:
    """The score of a picture, and the two readings of where the class token looked."""

    score: float
    own: Maps
    traced: Maps


def without_attention(config: MDNetConfig) -> str | None:
    """Why a model of this configuration has no attention over the diffusion maps; None if it has."""
    reasons = {
        "concatenation": "its fusion is concatenation, which has no attention to the diffusion maps",
        "vim-only": "its fusion is vim-only: it attends to learned constants, not to diffusion maps",
    }
    return reasons.get(config.fusion)


@torch.inference_mode()
def look(model: MDNet, picture: np.ndarray) -> Looked:
    """Score `picture`, uint8 (S, S, 3), with `model` in evaluation mode, and read its attention.

    Raises:
        MDNetError: the model has no attention over diffusion maps (`without_attention`).
    """
    if reason := without_attention(model.config):
        raise MDNetError(f"no attention: {reason}")
    device = next(model.parameters()).device
    with _recorded(model.fusion) as blocks:
        score = float(model(torch.from_numpy(picture)[None].to(device)))
    index = model.config.vim_class_index
    own = torch.stack([cross[index] for cross, _ in blocks]).mean(dim=0)
    traced = torch.zeros_like(blocks[0][0])
    for cross, attend in blocks:
        traced = (traced + cross) / 2
        asking = traced if len(attend) > 1 else traced[index, None]  # the last block's is the class token alone
        traced = (asking + attend @ traced) / 2
    (row,) = traced
    return Looked(score, _by_scale(own, model.config), _by_scale(row / row.sum(), model.config))


@contextlib.contextmanager
def _recorded(fusion: Fusion) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Give a list that holds, once one picture was scored, each block's cross- (L, T) and self-attention (L, L).

    The last block's self-attention has one row, the class token's.
    """
    blocks: list[tuple[Tensor, Tensor]] = []
    crosses: list[Tensor] = []

    def cross(layer: nn.Module, inputs: tuple[Tensor, Tensor], _: Tensor) -> None:
        crosses.append(_mean_of_heads(layer, *inputs))

    def attend(layer: nn.Module, inputs: tuple[Tensor, Tensor], _: Tensor) -> None:
        blocks.append((crosses[-1], _mean_of_heads(layer, *inputs)))

    with contextlib.ExitStack() as hooks:
        for block in fusion.blocks:
            assert isinstance(block, FusionBlock)
            hooks.callback(block.cross.register_forward_hook(cross).remove)
            hooks.callback(block.attend.register_forward_hook(attend).remove)
        yield blocks


def _mean_of_heads(layer: nn.Module, queries: Tensor, context: Tensor) -> Tensor:
    assert isinstance(layer, Attention)
    return weights(layer, queries, context)[0].mean(dim=0)


def weights(layer: Attention, queries: Tensor, context: Tensor) -> Tensor:
    """The softmax that `layer` computes for (B, L, d), (B, T, d): (B, heads, L, T) in float32, each row sums to 1."""
    q = layer.to_q(queries).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    k = layer.to_kv(context).chunk(2, dim=-1)[0].unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    return ((q @ k.mT).float() / q.shape[-1] ** 0.5).softmax(dim=-1)


def _by_scale(row: Tensor, config: MDNetConfig) -> Maps:
    """A row (T,) over the diffusion tokens of all scales, cut into their maps."""
    shapes = {name: (height, width) for name, (_, height, width) in config.feature_shapes.items()}
    parts = row.double().cpu().split([height * width for height, width in shapes.values()])
    return {name: part.reshape(shapes[name]).numpy() for name, part in zip(shapes, parts, strict=True)}
