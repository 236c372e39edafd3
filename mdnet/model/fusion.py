"""Fusion and head: Vim tokens (queries) attend to diffusion features (keys, values); the class token gives the score.

The abstract says that cross-attention joins the streams; a secondary source that the global features are the queries.
The rest is ours, with its reason where it stands.

`MDNetConfig.fusion` names what can be compared with it. Everything else stays as it is, sizes included:

    cross-attention   MD-Net
    concatenation     in place of attention, each Vim token ‖ the mean diffusion token, projected
    diffusion-only    learned constants in place of the Vim tokens
    vim-only          learned constants in place of the diffusion tokens

The class token's logit is what the streams say together. Where `MDNetConfig.stream_heads` is not 0, each stream that
is there also adds a logit of its own (`StreamHead`), so that attention need not learn again what one stream knows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdnet.model.config import MDNetConfig


class Attention(nn.Module):
    """Multi-head attention of `queries` to `context`, both `dim` wide."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_kv = nn.Linear(dim, 2 * dim)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """(B, L, d), (B, T, d) → (B, L, d)."""
        q = self.to_q(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, d / heads)
        k, v = self.to_kv(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Concatenation(nn.Module):
    """What an ablation has in place of cross-attention: every query ‖ the mean of `context`, projected."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Linear(2 * dim, dim)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """(B, L, d), (B, T, d) → (B, L, d)."""
        mean = context.mean(dim=1, keepdim=True).expand_as(queries)
        return self.proj(torch.cat([queries, mean], dim=-1))


class FusionBlock(nn.Module):
    """Cross-attention to the diffusion tokens, self-attention among the Vim tokens, MLP; each normalised before.

    Self-attention carries what each location found in the diffusion features to the class token. Without it the rows
    never meet again, and of all the queries only the class token's would reach the score.
    """

    def __init__(self, config: MDNetConfig):
        super().__init__()
        dim, heads = config.vim_dim, config.fusion_heads
        self.norm_cross = nn.LayerNorm(dim)
        self.cross = Concatenation(dim) if config.fusion == "concatenation" else Attention(dim, heads)
        self.norm_self = nn.LayerNorm(dim)
        self.attend = Attention(dim, heads)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, config.fusion_mlp * dim), nn.GELU(), nn.Linear(config.fusion_mlp * dim, dim)
        )

    def forward(self, tokens: Tensor, local: Tensor, only: int | None = None) -> Tensor:
        """Vim tokens (B, L, d), diffusion tokens (B, T, d) → (B, L, d), or (B, 1, d) where `only` one is asked for."""
        tokens = tokens + self.cross(self.norm_cross(tokens), local)
        normed = queries = self.norm_self(tokens)
        if only is not None:
            tokens, queries = tokens[:, only, None], normed[:, only, None]
        tokens = tokens + self.attend(queries, normed)
        return tokens + self.mlp(self.norm_mlp(tokens))


class ScaleTokens(nn.Module):
    """One diffusion feature map → tokens: normalise over channels, project, add the scale's and the place's embedding.

    The maps of a frozen U-Net differ in magnitude by orders between channels, hence the norm. Attention has no sense of
    place, hence fixed sine-cosine positions in image coordinates, the same for all scales.
    """

    def __init__(self, channels: int, side: int, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.proj = nn.Linear(channels, dim)
        self.scale_embed = nn.Parameter(torch.zeros(dim))
        self.positions: Tensor
        self.register_buffer("positions", sine_positions(side, dim))

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, s, s) → (B, s², d)."""
        return self.proj(self.norm(feature.flatten(2).mT)) + self.scale_embed + self.positions


class Fusion(nn.Module):
    """Diffusion features and Vim tokens → score on the rating scale."""

    def __init__(self, config: MDNetConfig):
        super().__init__()
        dim = config.vim_dim
        self.class_index = config.vim_class_index
        self.scales = nn.ModuleDict(
            {name: ScaleTokens(channels, side, dim) for name, (channels, side, _) in config.feature_shapes.items()}
        )
        self.norm_local = nn.LayerNorm(dim)
        self.only = config.fusion.removesuffix("-only")
        counts = {"diffusion": config.vim_grid**2 + 1, "vim": sum(h * w for _, h, w in config.feature_shapes.values())}
        if self.only in counts:
            self.stand_in = nn.Parameter(torch.randn(counts[self.only], dim) * 0.02)
        self.blocks = nn.ModuleList(FusionBlock(config) for _ in range(config.fusion_depth))
        self.head = Head(config)
        lengths = {"vim": counts["diffusion"], "diffusion": counts["vim"]}
        present = [name for name in lengths if config.stream_heads and self.only in (name, config.fusion)]
        self.stream_heads = nn.ModuleDict({name: StreamHead(config, lengths[name]) for name in present})

    def forward(self, features: dict[str, Tensor], tokens: Tensor) -> Tensor:
        """Features by name (B, C, s, s) and Vim tokens (B, L, d) → scores (B,)."""
        return self.head.on_scale(*self.logits(features, tokens))

    def streams(self, features: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
        """Tokens by stream: `vim` (B, L, d) and `diffusion` (B, T, d); constants in place of one that is left out."""
        local = torch.cat([scale(features[name]) for name, scale in self.scales.items()], dim=1)  # (B, T, d)
        if self.only == "vim":
            local = self.stand_in.expand_as(local)
        elif self.only == "diffusion":
            tokens = self.stand_in.expand_as(tokens)
        return {"vim": tokens, "diffusion": self.norm_local(local)}

    def logits(self, features: dict[str, Tensor], tokens: Tensor) -> list[Tensor]:
        """Logits (B,) whose sum is the score's: of the streams together, then of each one that has a head."""
        streams = self.streams(features, tokens)
        tokens, local = streams["vim"], streams["diffusion"]
        alone = [head(streams[name]) for name, head in self.stream_heads.items()]
        *blocks, last = self.blocks
        for block in blocks:
            tokens = block(tokens, local)
        # No score depends on the rest of the last block.
        return [self.head(last(tokens, local, self.class_index).squeeze(1)), *alone]


class OnScale(nn.Module):
    """Logits → score. The sigmoid keeps every score on the scale, so one off it means a broken engine."""

    def __init__(self, config: MDNetConfig):
        super().__init__()
        self.low, self.high = config.score_min, config.score_max

    def forward(self, *logits: Tensor) -> Tensor:
        """Logits (B,) each, of which the sum counts → scores (B,)."""
        return self.low + (self.high - self.low) * torch.sigmoid(sum(logits[1:], logits[0]))


class Head(nn.Module):
    """Class token → logit."""

    def __init__(self, config: MDNetConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.vim_dim)
        self.hidden = nn.Linear(config.vim_dim, config.head_dim)
        self.out = nn.Linear(config.head_dim, 1)
        self.on_scale = OnScale(config)

    def forward(self, token: Tensor) -> Tensor:
        """(B, d) → logits (B,)."""
        return self.out(F.gelu(self.hidden(self.norm(token)))).squeeze(-1)


class StreamHead(nn.Module):
    """All tokens of one stream → a logit.

    A face is in its place in the picture, so what matters is where something is. The tokens are summed over places
    with learned weights, `MDNetConfig.stream_heads` times, and an MLP reads all the sums.
    """

    def __init__(self, config: MDNetConfig, length: int):
        super().__init__()
        self.norm = nn.LayerNorm(config.vim_dim)
        self.maps = nn.Linear(length, config.stream_heads, bias=False)
        self.hidden = nn.Linear(config.stream_heads * config.vim_dim, config.head_dim)
        self.out = nn.Linear(config.head_dim, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, d) → logits (B,)."""
        sums = self.maps(self.norm(tokens).mT)  # (B, d, maps)
        return self.out(F.gelu(self.hidden(sums.flatten(1)))).squeeze(-1)


def sine_positions(side: int, dim: int) -> Tensor:
    """Fixed 2-D positions (side², dim) of cell centres in [0, 1]²: a quarter each of sin and cos of y, then of x."""
    bands = dim // 4
    centres = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    frequency = 2 * math.pi * torch.logspace(0, 5, bands, base=2.0, dtype=torch.float64)  # 1 … 32 cycles per image
    phase = centres[:, None] * frequency  # (side, bands)
    wave = torch.cat([phase.sin(), phase.cos()], dim=1)  # (side, dim / 2)
    rows, columns = wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, 4 * bands).float()
