"""Other views of a training image: slightly turned, scaled, moved, lighter or darker.

The encoder is frozen, so what it makes of a view is computed once, like that of the image itself, and a view stays the
same from epoch to epoch. Faces are in the middle of a picture, at much the same size: the views differ by what framing
and light would change, not by what makes another face.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_TURN = 8.0  # degrees to either side
_SCALE = 0.1  # the face is that much smaller or larger
_SHIFT = 0.04  # of the side
_LIGHT, _CONTRAST = 0.15, 0.2


def with_views(pixels: Tensor, views: int) -> Tensor:
    """All images, then their second views, and so on: uint8 (n, S, S, 3) → (n · views, S, S, 3)."""
    return torch.cat([pixels, *(jittered(pixels, seed) for seed in range(1, views))])


def jittered(pixels: Tensor, seed: int) -> Tensor:
    """Another view of each image: uint8 (n, S, S, 3) → the same. Repeatable by its seed and by the image's row."""
    return torch.cat([_jitter(part, seed * 1_000_003 + number) for number, part in enumerate(pixels.split(64))])


def _jitter(pixels: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    turn, scale, x, y, light, contrast = (torch.rand(6, len(pixels), generator=generator) * 2 - 1).unbind()
    angle, size = turn * math.radians(_TURN), 1 / (1 + _SCALE * scale)
    cos, sin = size * angle.cos(), size * angle.sin()
    # grid_sample's image reaches from -1 to 1: a shift of 1 is half a side.
    affine = torch.stack([cos, -sin, 2 * _SHIFT * x, sin, cos, 2 * _SHIFT * y], dim=1).unflatten(1, (2, 3))
    images = pixels.permute(0, 3, 1, 2).float()
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    spread, level = (1 + factor[:, None, None, None] for factor in (_CONTRAST * contrast, _LIGHT * light))
    images = (images - mean) * spread + mean * level
    return images.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
