"""Fold what is constant at inference into the weights, so that the exported graphs do not compute it.

The functions here change the modules they are given, but never the weights: `with_shared_weights` makes a copy of the
modules that is safe to fold and costs no memory. Every fold is exact up to floating-point rounding;
`tests/export/graphs/test_fold.py` holds the folded encoder to stock diffusers.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from mdnet.model.diffusion import DiffusionEncoder, TinyVAEEncoder, VAEEncoder
from mdnet.model.vim import Block, Branch, Mixer, VisionMamba

Module = TypeVar("Module", bound=nn.Module)


def with_shared_weights(module: Module) -> Module:
    """A copy of `module` and its submodules that holds the same parameters and buffers, not copies of them."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, memo={id(tensor): tensor for tensor in tensors})


@torch.no_grad()
def fold_diffusion(encoder: DiffusionEncoder) -> None:
    """Fold timestep, prompt and posterior out of the encoder.

    - every ResNet block's time projection becomes part of its first convolution's bias;
    - every cross-attention's keys and values become constants;
    - `conv_out`, `quant_conv`, the choice of the mean and the scaling factor become one convolution; of a tiny VAE,
      its last convolution and the scaling factor.

    Afterwards `unet.encode(latent, time=None, context=None)` is what is left to run.
    """
    unet = encoder.unet
    steps = torch.full((1,), encoder.timestep)
    time = unet.time_embedding(unet.time_proj(steps).to(encoder.context.dtype))
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            _fold_time(module, time)
        elif isinstance(module, BasicTransformerBlock):
            module.attn2 = FoldedCrossAttention(module.attn2, encoder.context)  # type: ignore[assignment]
    if isinstance(encoder.vae, TinyVAEEncoder):
        _fold_scaling(encoder.vae)
    else:
        _fold_posterior(encoder.vae)


def _fold_time(block: ResnetBlock2D, time: Tensor) -> None:
    shift = block.time_emb_proj(F.silu(time))[0]  # (C,), added to every pixel of conv1's output
    block.conv1.bias = nn.Parameter(block.conv1.bias + shift, requires_grad=False)
    block.time_emb_proj = None  # type: ignore[assignment] # the block then adds no time embedding


def _fold_posterior(vae: VAEEncoder) -> None:
    conv, quant = vae.encoder.conv_out, vae.quant_conv
    assert conv.bias is not None
    assert quant.bias is not None
    channels = quant.out_channels // 2  # the first half of the moments is the mean, which is the mode
    mix = quant.weight[:channels, :, 0, 0] * vae.scaling  # (4, 8)
    merged = nn.Conv2d(conv.in_channels, channels, 3, padding=1).to(conv.weight)
    merged.weight.copy_(torch.einsum("om,mikl->oikl", mix, conv.weight))
    merged.bias = nn.Parameter(mix @ conv.bias + quant.bias[:channels] * vae.scaling, requires_grad=False)
    vae.encoder.conv_out = merged


def _fold_scaling(vae: TinyVAEEncoder) -> None:
    last = vae.encoder.layers[-1]
    assert isinstance(last, nn.Conv2d)
    for name, parameter in list(last.named_parameters()):
        setattr(last, name, nn.Parameter(parameter * vae.scaling, requires_grad=False))


class FoldedCrossAttention(nn.Module):
    """A diffusers cross-attention whose context never changes: keys (1, heads, d, T) and values are buffers."""

    def __init__(self, attention: Attention, context: Tensor):
        super().__init__()
        self.heads = attention.heads
        self.to_q = attention.to_q
        self.to_out = attention.to_out[0]  # [1] is dropout
        keys, values = (
            projection(context).unflatten(-1, (self.heads, -1)).transpose(0, 1)[None]  # (1, heads, T, d)
            for projection in (attention.to_k, attention.to_v)
        )
        self.keys: Tensor
        self.values: Tensor
        self.register_buffer("keys", keys.mT.contiguous() * attention.scale)
        self.register_buffer("values", values.contiguous())

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """(B, L, C) → (B, L, C); the keyword arguments of diffusers' attention have no part in it."""
        q = self.to_q(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, d)
        out = (q @ self.keys).softmax(dim=-1) @ self.values
        return self.to_out(out.transpose(1, 2).flatten(2))


@torch.no_grad()
def fold_vim(vim: VisionMamba) -> None:
    """Fold every mixer's A = −exp(A_log), the backward taps' order and the mean of the two directions."""
    for module in vim.modules():
        if isinstance(module, Block):
            module.mixer = FoldedMixer(module.mixer)


class FoldedMixer(Mixer):
    """A `Mixer` whose branch tensors are stored ready to run. Its mean of directions is in the output projection."""

    def __init__(self, mixer: Mixer):
        nn.Module.__init__(self)
        self.in_proj = mixer.in_proj
        for prefix, branch in zip(("f", "b"), mixer.branches(), strict=True):
            for name, tensor in branch._asdict().items():
                self.register_buffer(f"{prefix}_{name}", tensor.detach().contiguous())
        self.half_out: Tensor
        self.register_buffer("half_out", mixer.out_proj.weight / 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x, z = (self.in_proj.weight @ tokens.mT).chunk(2, dim=1)
        forward, backward = self.branches()
        y = forward.run(x, z, reverse=False) + backward.run(x, z, reverse=True)
        return F.linear(y.mT, self.half_out)

    def branches(self) -> tuple[Branch, Branch]:
        forward, backward = (
            Branch(**{name: getattr(self, f"{prefix}_{name}") for name in Branch._fields}) for prefix in ("f", "b")
        )
        return forward, backward
