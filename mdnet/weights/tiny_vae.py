"""A distilled VAE encoder: diffusers' `AutoencoderTiny`, or TAESD's own file.

    taesd/                                       taesd_encoder.safetensors or .pth
      config.json  diffusion_pytorch_model.*       0.weight  1.conv.0.weight … 14.bias
        encoder.layers.0.weight …

Both number the layers alike, so names differ by a prefix alone. Decoders are never read.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mdnet.model.config import MDNetConfig
from mdnet.model.diffusion import TinyVAEEncoder
from mdnet.weights.foreign_files import Weights, listing, open_folder, open_weights, take
from mdnet.weights.stable_diffusion import check_config
from mdnet_engines.errors import MDNetError

ENCODER, DECODER = "encoder.layers.", "decoder."


def open_tiny_vae(source: Path, config: MDNetConfig) -> Weights:
    """The encoder at `source`, named as in `TinyVAEEncoder`.

    Raises:
        MDNetError: `source` is something else, or its configuration is not `config`'s.
    """
    if source.is_dir():
        if not (source / "config.json").is_file():
            raise MDNetError(f"{source} holds {listing(source)}; expected an AutoencoderTiny with its config.json")
        _check(source / "config.json", config)
        weights = open_folder(source, "diffusion_pytorch_model", "diffusion_pytorch_model")
    else:
        weights = open_weights(source)
    tensors = {
        ENCODER + name if name.split(".")[0].isdigit() else name: stored
        for name, stored in weights.tensors.items()
        if not name.startswith(DECODER)
    }
    return Weights(source, tensors, weights.files)


def take_tiny_vae(weights: Weights, config: MDNetConfig) -> dict[str, Tensor]:
    """Read what `open_tiny_vae` found: its part of the encoder's state dict, in float32."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in TinyVAEEncoder(config).state_dict().items()}
    taken = take(weights, shapes, f"the tiny VAE encoder of preset {config.preset}")
    return {f"vae.{name}": tensor for name, tensor in taken.items()}


def _check(file: Path, config: MDNetConfig) -> None:
    from diffusers import AutoencoderTiny

    expected = {
        "latent_channels": config.latent_channels,
        "encoder_block_out_channels": config.vae_channels,
        "num_encoder_blocks": config.vae_blocks,
        "scaling_factor": config.vae_scaling,
        "act_fn": "relu",
    }
    check_config(file, AutoencoderTiny, expected, config)
