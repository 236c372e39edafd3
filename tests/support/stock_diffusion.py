"""diffusers' own whole models at MD-Net's sizes, and the features that MD-Net takes from their insides."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor

from mdnet.model.config import MDNetConfig, preset

SMALL = {
    "sd15": preset("demo"),
    # As SD 2.1 is: one width of head at every level, linear projections, a wider context.
    "sd21": dataclasses.replace(
        preset("demo"), unet_heads=(2, 3, 4, 4), unet_linear_projection=True, context_dim=64, context_length=12
    ),
    # Wide enough for its convolutions to be quantised.
    "taesd": dataclasses.replace(preset("demo-taesd"), vae_channels=(32,) * 4, vae_layers=2),
}
"""Each encoder that MD-Net knows, at widths for tests."""


class _EnoughError(Exception):
    pass


def vae(config: MDNetConfig) -> AutoencoderKL | AutoencoderTiny:
    if config.vae == "tiny":
        return AutoencoderTiny(
            encoder_block_out_channels=config.vae_channels,
            num_encoder_blocks=config.vae_blocks,
            latent_channels=config.latent_channels,
            scaling_factor=config.vae_scaling,
        )
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=config.vae_channels,
        layers_per_block=config.vae_layers,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        scaling_factor=config.vae_scaling,
    )


def unet(config: MDNetConfig) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=config.unet_channels,
        layers_per_block=config.unet_layers,
        attention_head_dim=config.unet_heads,
        use_linear_projection=config.unet_linear_projection,
        cross_attention_dim=config.context_dim,
        norm_num_groups=config.norm_groups,
    )


def features(
    vae: AutoencoderKL | AutoencoderTiny, unet: UNet2DConditionModel, context: Tensor, timestep: int, image: Tensor
) -> dict[str, Tensor]:
    """uint8 image (B, S, S, 3) → the maps by MD-Net's names; the pass ends after the mid block."""
    found: dict[str, Tensor] = {}
    # A level's output states end with the downsampled map; before it stands the last transformer's output.
    hooks: dict[torch.nn.Module, Callable[[tuple], None]] = {
        unet.down_blocks[1]: lambda output: found.update(down_s16=output[1][-2]),
        unet.down_blocks[2]: lambda output: found.update(down_s32=output[1][-2]),
    }
    handles = [m.register_forward_hook(lambda _m, _i, output, keep=keep: keep(output)) for m, keep in hooks.items()]

    def stop(_module: torch.nn.Module, _inputs: tuple, output: Tensor) -> None:
        found["mid_s64"] = output
        raise _EnoughError

    handles.append(unet.mid_block.register_forward_hook(stop))
    pixels = image.permute(0, 3, 1, 2).float() / 127.5 - 1
    try:
        encoded = vae.encode(pixels)
        latent = encoded.latents if isinstance(vae, AutoencoderTiny) else encoded.latent_dist.mode()
        latent = latent * vae.config.scaling_factor
        unet(latent, torch.tensor(timestep), encoder_hidden_states=context.expand(len(image), -1, -1))
    except _EnoughError:
        return found
    finally:
        for handle in handles:
            handle.remove()
    raise AssertionError("the mid block was not reached")
