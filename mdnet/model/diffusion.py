"""The frozen half of MD-Net: Stable Diffusion's VAE encoder, U-Net down path and mid block, on diffusers' own modules.

Submodules carry diffusers' names, so `vae.encoder.*`, `vae.quant_conv.*` and `unet.*` of a published checkpoint load
by key. The decoder halves are never built.
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.vae import Encoder, EncoderTiny
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2DCrossAttn, get_down_block
from torch import Tensor, nn

from mdnet.model.config import MDNetConfig


class VAEEncoder(nn.Module):
    """Image in [-1, 1] → the mode of the latent posterior, scaled as the U-Net expects it."""

    def __init__(self, config: MDNetConfig):
        super().__init__()
        self.scaling = config.vae_scaling
        self.encoder = Encoder(
            out_channels=config.latent_channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            block_out_channels=config.vae_channels,
            layers_per_block=config.vae_layers,
            norm_num_groups=config.norm_groups,
            double_z=True,
        )
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        moments = self.quant_conv(self.encoder(image))  # (B, 2·4, S/8, S/8): mean, then log-variance
        mean, _ = moments.chunk(2, dim=1)
        return mean * self.scaling


class TinyVAEEncoder(nn.Module):
    """Image in [-1, 1] → latent, by an encoder that was distilled from a VAE's to give what the U-Net expects.

    The encoder itself moves the range to [0, 1], which TAESD was trained in.
    """

    def __init__(self, config: MDNetConfig):
        super().__init__()
        self.scaling = config.vae_scaling
        self.encoder = EncoderTiny(
            in_channels=3,
            out_channels=config.latent_channels,
            num_blocks=config.vae_blocks,
            block_out_channels=config.vae_channels,
            act_fn="relu",
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.encoder(image) * self.scaling


class UNetEncoder(nn.Module):
    """Latent, timestep and context → feature maps of the down path and the mid block."""

    def __init__(self, config: MDNetConfig):
        super().__init__()
        channels, time_dim = config.unet_channels, 4 * config.unet_channels[0]
        heads = config.unet_heads_by_level
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.time_proj = Timesteps(channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(channels[0], time_dim)
        self.down_blocks = nn.ModuleList()
        for level, out_channels in enumerate(channels):
            last = level == len(channels) - 1
            self.down_blocks.append(
                get_down_block(
                    "DownBlock2D" if last else "CrossAttnDownBlock2D",
                    num_layers=config.unet_layers,
                    in_channels=channels[max(level - 1, 0)],
                    out_channels=out_channels,
                    temb_channels=time_dim,
                    add_downsample=not last,
                    resnet_eps=1e-5,
                    resnet_act_fn="silu",
                    resnet_groups=config.norm_groups,
                    cross_attention_dim=config.context_dim,
                    num_attention_heads=heads[level],
                    attention_head_dim=heads[level],  # unused by these blocks; diffusers warns without it
                    use_linear_projection=config.unet_linear_projection,
                    downsample_padding=1,
                )
            )
        self.mid_block = UNetMidBlock2DCrossAttn(
            in_channels=channels[-1],
            temb_channels=time_dim,
            resnet_groups=config.norm_groups,
            cross_attention_dim=config.context_dim,
            num_attention_heads=heads[-1],
            use_linear_projection=config.unet_linear_projection,
        )

    def forward(self, latent: Tensor, timestep: int, context: Tensor) -> dict[str, Tensor]:
        """See `encode`; the time embedding is computed from `timestep` (the same for the whole batch)."""
        steps = torch.full((1,), timestep, device=latent.device)
        return self.encode(latent, self.time_embedding(self.time_proj(steps).to(latent.dtype)), context)

    def encode(self, latent: Tensor, time: Tensor | None, context: Tensor | None) -> dict[str, Tensor]:
        """Run the down path.

        Args:
            latent: (B, 4, S/8, S/8).
            time: (1, time_dim), or None where it was folded into the convolutions.
            context: (B, tokens, context_dim), or None where it was folded into the attentions.

        Returns:
            `down_s16` (B, C1, S/16, S/16) and `down_s32` (B, C2, S/32, S/32), each taken after its level's last
            transformer and before the downsampling; `mid_s64` (B, C3, S/64, S/64) after the mid block.
        """
        x = self.conv_in(latent)
        levels = []
        for block in self.down_blocks[:-1]:
            x, states = block(x, time, encoder_hidden_states=context)
            levels.append(states[-2])  # states end with the downsampled map, which is x
        x, _ = self.down_blocks[-1](x, time)
        x = self.mid_block(x, time, encoder_hidden_states=context)
        return {"down_s16": levels[1], "down_s32": levels[2], "mid_s64": x}


class DiffusionEncoder(nn.Module):
    """The frozen stream: uint8 image → multi-scale diffusion features. No noise is added; the prompt is empty.

    `context` is the text encoder's output for the empty prompt, stored with the weights (tokens, context_dim).
    """

    def __init__(self, config: MDNetConfig):
        super().__init__()
        self.timestep = config.timestep
        self.vae = TinyVAEEncoder(config) if config.vae == "tiny" else VAEEncoder(config)
        self.unet = UNetEncoder(config)
        self.context: Tensor
        self.register_buffer("context", torch.randn(config.context_length, config.context_dim))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> DiffusionEncoder:
        """Stay in evaluation mode: the encoder is frozen."""
        return super().train(False)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """uint8 image (B, S, S, 3) → features by name; shapes as `UNetEncoder.encode` gives them."""
        latent = self.vae(to_vae_range(image, self.context.dtype))
        return self.unet(latent, self.timestep, self.context.expand(image.shape[0], -1, -1))


def to_vae_range(image: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 (B, S, S, 3) → (B, 3, S, S) in [-1, 1], as Stable Diffusion's VAE was trained."""
    return image.to(dtype).permute(0, 3, 1, 2) / 127.5 - 1.0
