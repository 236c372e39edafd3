"""Vision Mamba (Vim, arXiv 2401.09417), numerically as published and loading its state dict by its own key names.

The backward direction needs no flipped copies of the sequence: it is a reverse scan over an anti-causal convolution,
which is what flip → forward → flip computes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdnet.model.config import MDNetConfig
from mdnet.model.vim_mixer import Branch, mix

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Mixer(nn.Module):
    """Vim's bidirectional mixer ("v2"): one input projection, two directions with their own weights, their mean."""

    def __init__(self, config: MDNetConfig):
        super().__init__()
        d, inner, states, rank = config.vim_dim, config.vim_inner, config.vim_state, config.vim_dt_rank
        self.in_proj = nn.Linear(d, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, config.vim_conv, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, states))
        self.D = nn.Parameter(torch.empty(inner))
        self.conv1d_b = nn.Conv1d(inner, inner, config.vim_conv, groups=inner)
        self.x_proj_b = nn.Linear(inner, rank + 2 * states, bias=False)
        self.dt_proj_b = nn.Linear(rank, inner)
        self.A_b_log = nn.Parameter(torch.empty(inner, states))
        self.D_b = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, d, bias=False)
        self.reset_parameters(config.vim_depth)

    @torch.no_grad()
    def reset_parameters(self, depth: int) -> None:
        """Initialise as the published code does; the step sizes start log-uniform in [0.001, 0.1]."""
        for A_log, D, dt_proj in ((self.A_log, self.D, self.dt_proj), (self.A_b_log, self.D_b, self.dt_proj_b)):
            A_log.copy_(torch.log(torch.arange(1, A_log.shape[1] + 1, dtype=torch.float32)).expand_as(A_log))
            D.fill_(1.0)
            bound = dt_proj.in_features**-0.5
            nn.init.uniform_(dt_proj.weight, -bound, bound)
            dt = torch.exp(torch.empty_like(dt_proj.bias).uniform_(math.log(1e-3), math.log(1e-1)))
            dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        # Every layer adds to one residual stream: keep its variance independent of the depth.
        self.out_proj.weight /= math.sqrt(depth)

    def branches(self) -> tuple[Branch, Branch]:
        """The forward and the backward direction, ready to run. A = −exp(A_log)."""
        forward = Branch(
            self.conv1d.weight,
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            -torch.exp(self.A_log.float()),
            self.D,
        )
        backward = Branch(
            self.conv1d_b.weight.flip(-1),  # the first tap meets the latest step
            self.conv1d_b.bias,
            self.x_proj_b.weight,
            self.dt_proj_b.weight,
            self.dt_proj_b.bias,
            -torch.exp(self.A_b_log.float()),
            self.D_b,
        )
        return forward, backward

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, d) → (B, L, d)."""
        forward, backward = self.branches()
        if self.training and torch.is_grad_enabled() and tokens.device.type == "cpu":  # the same, faster
            return mix(tokens, self.in_proj.weight, self.out_proj.weight, forward, backward)
        x, z = (self.in_proj.weight @ tokens.mT).chunk(2, dim=1)  # (B, D, L) each: the layout of the scan
        y = (forward.run(x, z, reverse=False) + backward.run(x, z, reverse=True)) / 2
        return self.out_proj(y.mT)


class Block(nn.Module):
    """Normalise the residual stream, mix, add. The stream is float32 whatever the mixer's type."""

    def __init__(self, config: MDNetConfig):
        super().__init__()
        self.mixer = Mixer(config)
        self.norm = nn.RMSNorm(config.vim_dim, eps=1e-5)

    def forward(self, stream: Tensor) -> Tensor:
        """(B, L, d) → (B, L, d)."""
        return stream + self.mixer(self.norm(stream.to(self.norm.weight.dtype)))


class PatchEmbed(nn.Module):
    """Overlapping or disjoint square patches → tokens, row by row."""

    def __init__(self, config: MDNetConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, config.vim_dim, config.vim_patch, stride=config.vim_stride)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, M, d)."""
        if self.training:  # as a product: the gradient of such a convolution is slow, in bfloat16 a hundredfold
            side, stride = self.proj.kernel_size[0], self.proj.stride[0]
            patches = image.unfold(2, side, stride).unfold(3, side, stride).permute(0, 2, 3, 1, 4, 5)
            return F.linear(patches.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)
        return self.proj(image).flatten(2).mT


class VisionMamba(nn.Module):
    """uint8 image → all tokens after the final norm; the class token stands in the middle."""

    def __init__(self, config: MDNetConfig):
        super().__init__()
        self.class_index = config.vim_class_index
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.vim_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, config.vim_grid**2 + 1, config.vim_dim))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.vim_depth))
        self.norm_f = nn.RMSNorm(config.vim_dim, eps=1e-5)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, image: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) → (B, M + 1, d), M the number of patches."""
        return self.encode(self.patch_embed(to_imagenet_range(image, self.pos_embed.dtype)))

    def encode(self, patches: Tensor) -> Tensor:
        """Embedded patches (B, M, d) → (B, M + 1, d)."""
        cls = self.cls_token.expand(patches.shape[0], -1, -1)  # len() would fix the batch in an export
        tokens = torch.cat([patches[:, : self.class_index], cls, patches[:, self.class_index :]], dim=1)
        stream = (tokens + self.pos_embed).float()
        for layer in self.layers:
            stream = layer(stream)
        return self.norm_f(stream.to(self.norm_f.weight.dtype))


def to_imagenet_range(image: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 (B, S, S, 3) → (B, 3, S, S), normalised by ImageNet's mean and standard deviation."""
    mean = torch.tensor(IMAGENET_MEAN, dtype=dtype, device=image.device)
    std = torch.tensor(IMAGENET_STD, dtype=dtype, device=image.device)
    return ((image.to(dtype) / 255.0 - mean) / std).permute(0, 3, 1, 2)
