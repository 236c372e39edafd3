"""MD-Net: a frozen diffusion encoder (local detail) and a Vision Mamba (global structure), joined by attention."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from mdnet.model.config import MDNetConfig
from mdnet.model.diffusion import DiffusionEncoder
from mdnet.model.fusion import Fusion, OnScale
from mdnet.model.vim import VisionMamba


class MDNet(nn.Module):
    """Face photograph → predicted mean rating (SynergyNet, arXiv 2509.17172)."""

    def __init__(self, config: MDNetConfig):
        super().__init__()
        self.config = config
        self.diffusion = DiffusionEncoder(config)
        self.vim = VisionMamba(config)
        self.fusion = Fusion(config)

    def forward(self, image: Tensor) -> Tensor:
        """uint8 RGB (B, S, S, 3) → scores (B,) on the rating scale."""
        with torch.no_grad():
            features = self.diffusion(image)
        return self.fusion(features, self.vim(image))

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Vim and fusion; the diffusion encoder is frozen."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def with_fusion(model: MDNet, fusion: str, seed: int) -> MDNet:
    """`model`'s streams, shared with it, under fresh fusion weights of another kind (`mdnet.model.config.FUSIONS`)."""
    config = dataclasses.replace(model.config, fusion=fusion)
    with torch.device("meta"):  # shapes only: both streams are replaced at once
        changed = MDNet(config)
    changed.diffusion, changed.vim = model.diffusion, model.vim
    changed.fusion = random_fusion(config, seed)
    return changed.eval()


def with_scale(model: MDNet, low: float, high: float) -> MDNet:
    """`model`, changed in place so that its scores are from `low` to `high`; its weights stay.

    Raises:
        UsageError: `low` is not below `high`.
    """
    model.config = dataclasses.replace(model.config, score_min=low, score_max=high)
    model.fusion.head.on_scale = OnScale(model.config)
    return model


def random_fusion(config: MDNetConfig, seed: int) -> Fusion:
    """A fresh fusion, the same for the same seed; leaves the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Fusion(config)


def random_mdnet(config: MDNetConfig, seed: int) -> MDNet:
    """An untrained MD-Net, the same for the same seed; leaves the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MDNet(config).eval()
