"""The frozen encoder from Stable Diffusion 1.x or 2.x: a diffusers folder or CompVis' and Stability's single file.

    stable-diffusion-v1-5/                              v1-5-pruned-emaonly.safetensors or .ckpt
      unet/  config.json  diffusion_pytorch_model.*       model.diffusion_model.*   (model_ema.* before it)
      vae/   config.json  diffusion_pytorch_model.*       first_stage_model.*
      text_encoder/  tokenizer/   (see null_prompt)       cond_stage_model.*

Only the encoder halves are read. Keys of the single file are translated by diffusers' own loader, which needs no
network for that; such a file says nothing about heads and the latents' scaling: they are the preset's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdnet.model.checkpoint import few
from mdnet.model.config import MDNetConfig
from mdnet.model.diffusion import DiffusionEncoder
from mdnet.weights.foreign_files import Stored, Weights, listing, open_folder, open_weights, read_json, take
from mdnet_engines.errors import MDNetError, printable

LDM_UNET, LDM_UNET_EMA, LDM_VAE = "model.diffusion_model.", "model_ema.", "first_stage_model."
# The other halves, under diffusers' names and under CompVis'.
DECODERS = ("unet.up_blocks.", "unet.conv_norm_out.", "unet.conv_out.", "vae.decoder.", "vae.post_quant_conv.")
LDM_DECODERS = ("output_blocks.", "out.", "decoder.", "post_quant_conv.")
# Published VAEs are older than diffusers' present names for the parts of an attention.
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def context_dim_of(source: Path) -> int | None:
    """The width of the prompts that the U-Net at `source` takes, where the files say it."""
    if source.is_dir():
        file = source / "unet" / "config.json"
        width = read_json(file).get("cross_attention_dim") if file.is_file() else None
        return width if isinstance(width, int) else None
    if not source.exists():
        return None
    stored = open_weights(source).tensors.get(f"{LDM_UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    return stored.shape[-1] if stored else None


def open_encoder(source: Path, config: MDNetConfig) -> Weights:
    """The encoder halves of the U-Net and the VAE at `source`, named as in `DiffusionEncoder`.

    Where the preset's VAE is a tiny one, which lies elsewhere, the U-Net alone.

    Raises:
        MDNetError: `source` is something else, or its configuration is not `config`'s.
    """
    if source.is_dir():
        return _open_diffusers(source, config)
    if not source.exists():
        raise MDNetError(f"{source}: no such file or folder; expected Stable Diffusion, as diffusers or CompVis")
    return _open_compvis(open_weights(source), config)


def take_encoder(weights: Weights, config: MDNetConfig) -> dict[str, Tensor]:
    """Read what `open_encoder` found: the encoder's state dict in float32, without `context`."""
    with torch.device("meta"):
        state = DiffusionEncoder(config).state_dict()
    parts = tuple(f"{part}." for part in _parts(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith(parts)}
    return take(weights, shapes, f"Stable Diffusion's encoder in preset {config.preset}")


def _parts(config: MDNetConfig) -> tuple[str, ...]:
    return ("unet",) if config.vae == "tiny" else ("unet", "vae")


def _open_diffusers(root: Path, config: MDNetConfig) -> Weights:
    parts = _parts(config)
    if not all((root / part).is_dir() for part in parts):
        folders = " and ".join(f"{part}/" for part in parts)
        raise MDNetError(
            f"{root} holds {listing(root)}; expected a diffusers pipeline with {folders}, weights included"
        )
    check_configs(root, config)
    tensors: dict[str, Stored] = {}
    files: list[Path] = []
    for part in parts:
        weights = open_folder(root / part, "diffusion_pytorch_model", "diffusion_pytorch_model")
        files += weights.files
        for name, stored in weights.tensors.items():
            if not f"{part}.{name}".startswith(DECODERS):
                tensors[f"{part}.{_present_name(name)}"] = stored
    return Weights(root, tensors, tuple(files))


def check_configs(root: Path, config: MDNetConfig) -> None:
    """Compare `unet/config.json` and `vae/config.json` with `config`; a field they leave out has diffusers' default.

    Raises:
        MDNetError: one differs; the message names it with both values.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet = {
        "in_channels": config.latent_channels,
        "block_out_channels": config.unet_channels,
        "layers_per_block": config.unet_layers,
        "attention_head_dim": config.unet_heads,
        "cross_attention_dim": config.context_dim,
        "norm_num_groups": config.norm_groups,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "use_linear_projection": config.unet_linear_projection,
        "only_cross_attention": False,
        "resnet_time_scale_shift": "default",
        "act_fn": "silu",
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
    }
    vae = {
        "latent_channels": config.latent_channels,
        "block_out_channels": config.vae_channels,
        "layers_per_block": config.vae_layers,
        "norm_num_groups": config.norm_groups,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "scaling_factor": config.vae_scaling,
        "act_fn": "silu",
    }
    for part, stock, expected in (("unet", UNet2DConditionModel, unet), ("vae", AutoencoderKL, vae)):
        if part in _parts(config):
            check_config(root / part / "config.json", stock, expected, config)


def check_config(file: Path, stock: type, expected: dict[str, Any], config: MDNetConfig) -> None:
    """Compare a part's `config.json` with what `config` expects of diffusers' class `stock`.

    Raises:
        MDNetError: a field differs; the message names it with both values.
    """
    found = read_json(file)
    defaults = inspect.signature(stock).parameters
    for name, wanted in {"_class_name": stock.__name__, **expected}.items():
        value = found.get(name, wanted if name == "_class_name" else defaults.get(name, inspect.Parameter).default)
        if _plain(value) != _plain(wanted):
            shown = printable(str(_plain(value)))
            raise MDNetError(f"{file}: {name} is {shown}, preset {config.preset} expects {_plain(wanted)}")


def _plain(value: Any) -> Any:
    """JSON's lists for tuples, and one number for what may be given once for each block."""
    if isinstance(value, (list, tuple)):
        return value[0] if len(set(map(str, value))) == 1 and not isinstance(value[0], str) else list(value)
    return value


def _present_name(name: str) -> str:
    head, dot, last = name.rpartition(".")
    block, _, layer = head.rpartition(".")
    return f"{block}.{RENAMED[layer]}{dot}{last}" if ".attentions." in name and layer in RENAMED else name


def _open_compvis(weights: Weights, config: MDNetConfig) -> Weights:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    unet, vae = (_encoder_half(weights, prefix) for prefix in (LDM_UNET, LDM_VAE))
    if not unet or not (vae or config.vae == "tiny"):
        raise MDNetError(
            f"{weights.source} holds {_kind(weights.tensors)}; expected Stable Diffusion in one file, with "
            f"{LDM_UNET}* and {LDM_VAE}*, or a diffusers folder"
        )
    blocks = {"down_block_types": config.vae_channels, "up_block_types": config.vae_channels}  # only counted
    converted: dict[str, Any] = {
        f"unet.{name}": value
        for name, value in convert_ldm_unet_checkpoint(unet, {"layers_per_block": config.unet_layers}).items()
    }
    if config.vae == "tiny":
        return Weights(weights.source, converted, weights.files)
    # Here the converter looks into the tensors, to make 1×1 convolutions linear.
    read = {name: stored.read() for name, stored in vae.items()}
    for name, tensor in convert_ldm_vae_checkpoint(read, blocks).items():
        converted[f"vae.{name}"] = Stored(tuple(tensor.shape), tensor.clone)
    return Weights(weights.source, converted, weights.files)


def _encoder_half(weights: Weights, prefix: str) -> dict[str, Stored]:
    """The keys below `prefix` but for the decoder's; where a file has averaged (EMA) weights too, those.

    diffusers' folders hold the averages; its single-file loader would take the others.
    """
    half = {}
    for name, stored in weights.tensors.items():
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith(LDM_DECODERS):
            averaged = LDM_UNET_EMA + name.removeprefix("model.").replace(".", "")
            half[name] = weights.tensors.get(averaged, stored)
    return half


def _kind(names: Iterable[str]) -> str:
    names = list(names)
    if any("lora" in name.lower() for name in names):
        return "a LoRA, changes to a model and no model"
    if any(name.startswith(("down_blocks.", "encoder.")) for name in names):
        return "one part of a diffusers pipeline (give the folder above it)"
    return f"{len(names)} tensors such as {few([printable(name) for name in names[:2]])}"
