"""What every training loop here shares: which weights decay, and how the rate falls."""

from __future__ import annotations

import math

import torch
from torch import nn

_SPARED = ("A_log", "A_b_log", "pos_embed", "cls_token", "scale_embed", "stand_in")


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable weights that decay, and those that don't: biases, norms, embeddings, the scan's A and D."""
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    decayed = [value for name, value in named if value.dim() > 1 and not name.endswith(_SPARED)]
    others = [value for name, value in named if value.dim() <= 1 or name.endswith(_SPARED)]
    return decayed, others


def cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: float) -> torch.optim.lr_scheduler.LambdaLR:
    """A rate that rises over the share `warmup` of the steps and then falls to zero along a cosine."""
    rising = max(1, round(warmup * steps))

    def rate(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
