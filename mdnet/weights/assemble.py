"""A checkpoint to train from, of published weights: Stable Diffusion's encoder, Vision Mamba, and a fresh fusion."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from mdnet.model.config import PRESETS, MDNetConfig
from mdnet.model.net import MDNet, random_fusion
from mdnet.weights.null_prompt import null_prompt
from mdnet.weights.stable_diffusion import context_dim_of, open_encoder, take_encoder
from mdnet.weights.tiny_vae import open_tiny_vae, take_tiny_vae
from mdnet.weights.vision_mamba import open_vim, take_vim
from mdnet_engines.bundle.files import sha256_of
from mdnet_engines.errors import UsageError
from mdnet_engines.progress import SILENT, Progress

RESTRICTIONS = "its use restrictions pass on to this checkpoint and to what is made of it"
TAESD_LICENCE = "MIT (madebyollin/taesd)"
VIM_LICENCE = "Apache-2.0 (hustvl/Vim)"


class Imported(NamedTuple):
    """What `import_weights` made: `notes` go into the checkpoint, `dropped` are Vim's keys that were left out."""

    model: MDNet
    notes: dict[str, object]
    dropped: list[str]


def import_weights(
    sd: Path,
    vim: Path,
    *,
    vae: Path | None = None,
    preset: str | None = None,
    image_size: int | None = None,
    null_prompt_file: Path | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Imported:
    """Put published weights together.

    Args:
        sd: diffusers folder or single file of Stable Diffusion 1.x or 2.x.
        vim: checkpoint of hustvl/Vim.
        vae: a distilled VAE encoder in place of `sd`'s: a folder of diffusers' AutoencoderTiny, or TAESD's file.
        preset: None takes it from Vim's width, the width of the U-Net's prompts, and whether there is a `vae`.
        image_size: None takes the preset's.
        null_prompt_file: the null prompt's embedding, in place of `sd`'s text encoder.
        seed: for the fusion, which nobody has published.
        progress: receives each step, and what is unusual about a file.

    Returns:
        The model in evaluation mode, float32, on the CPU; notes with the sources' hashes and licences.

    Raises:
        MDNetError: a file is missing, damaged, unsafe, or of another model.
        UsageError: the preset's VAE is a tiny one and `vae` is missing, or it is not, and `vae` is given.
    """
    progress.step("opening the files")
    config, vim_weights = open_vim(vim, preset, image_size, progress=progress)
    if preset is None:
        config = _with_encoder(config, context_dim_of(sd), tiny=vae is not None)
    if (vae is not None) != (config.vae == "tiny"):
        raise UsageError(
            f"preset {config.preset} has Stable Diffusion's own VAE; --vae is for presets such as sd15-taesd-vim-s"
            if vae
            else f"preset {config.preset} needs --vae: AutoencoderTiny's folder, or taesd_encoder.safetensors or .pth"
        )
    sd_weights = open_encoder(sd, config)
    vae_weights = open_tiny_vae(vae, config) if vae else None
    progress.step("Vision Mamba")
    vim_state, dropped = take_vim(vim_weights, config)
    progress.step("Stable Diffusion's encoders")
    encoder = take_encoder(sd_weights, config)
    if vae_weights:
        encoder |= take_tiny_vae(vae_weights, config)
    progress.step("the null prompt's embedding")
    encoder["context"], context_files = null_prompt(sd, null_prompt_file, config)
    with torch.device("meta"):  # shapes only: random weights would be replaced at once
        model = MDNet(config)
    model.diffusion.load_state_dict(encoder, assign=True)
    model.vim.load_state_dict(vim_state, assign=True)
    model.fusion = random_fusion(config, seed)
    progress.step("hashes of the files")
    root = sd if sd.is_dir() else sd.parent
    notes: dict[str, object] = {
        "stable_diffusion": {
            "files": _hashes(sd_weights.files, root),
            "licence": f"{sd_licence(config)}; {RESTRICTIONS}",
        },
        "null_prompt": {"files": _hashes(context_files, root)},
        "vim": {"files": _hashes(vim_weights.files, vim.parent), "licence": VIM_LICENCE},
        "fusion": f"fresh weights, seed {seed}",
    }
    if vae and vae_weights:
        root = vae if vae.is_dir() else vae.parent
        notes["vae"] = {"files": _hashes(vae_weights.files, root), "licence": TAESD_LICENCE}
    return Imported(model.eval(), notes, dropped)


def sd_licence(config: MDNetConfig) -> str:
    """The licence of Stable Diffusion's weights in a preset: 2.x is what takes prompts of 1,024 channels."""
    return "CreativeML Open RAIL++-M" if config.context_dim == 1024 else "CreativeML OpenRAIL-M"


def _with_encoder(config: MDNetConfig, context_dim: int | None, *, tiny: bool) -> MDNetConfig:
    """The preset like `config` with this encoder; `config` where there is none, and what differs is named later."""
    wanted = (config.vim_dim, context_dim or config.context_dim, tiny)
    for each in PRESETS.values():
        if (each.vim_dim, each.context_dim, each.vae == "tiny") == wanted:
            return dataclasses.replace(each, image_size=config.image_size, vim_stride=config.vim_stride)
    return config


def _hashes(files: Iterable[Path], root: Path) -> dict[str, str]:
    """Name → sha256; names are relative to `root` where they can be, never a path of somebody's machine."""
    return {
        (file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name): sha256_of(file)
        for file in files
    }
