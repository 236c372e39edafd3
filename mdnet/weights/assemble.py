"""A checkpoint to train from, of published weights: Stable Diffusion's encoder, Vision Mamba, and a fresh fusion."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from mdnet.model.net import MDNet, random_fusion
from mdnet.weights.null_prompt import null_prompt
from mdnet.weights.stable_diffusion import open_encoder, take_encoder
from mdnet.weights.vision_mamba import open_vim, take_vim
from mdnet_engines.bundle.files import sha256_of
from mdnet_engines.progress import SILENT, Progress

SD_LICENCE = "CreativeML OpenRAIL-M; its use restrictions pass on to this checkpoint and to what is made of it"
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
    preset: str | None = None,
    image_size: int | None = None,
    null_prompt_file: Path | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Imported:
    """Put published weights together.

    Args:
        sd: diffusers folder or CompVis file of Stable Diffusion 1.x.
        vim: checkpoint of hustvl/Vim.
        preset: None takes it from Vim's width.
        image_size: None takes the preset's.
        null_prompt_file: the null prompt's embedding, in place of `sd`'s text encoder.
        seed: for the fusion, which nobody has published.
        progress: receives each step, and what is unusual about a file.

    Returns:
        The model in evaluation mode, float32, on the CPU; notes with the sources' hashes and licences.

    Raises:
        MDNetError: a file is missing, damaged, unsafe, or of another model.
    """
    progress.step("opening the files")
    config, vim_weights = open_vim(vim, preset, image_size, progress=progress)
    sd_weights = open_encoder(sd, config)
    progress.step("Vision Mamba")
    vim_state, dropped = take_vim(vim_weights, config)
    progress.step("Stable Diffusion's encoders")
    encoder = take_encoder(sd_weights, config)
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
        "stable_diffusion": {"files": _hashes(sd_weights.files, root), "licence": SD_LICENCE},
        "null_prompt": {"files": _hashes(context_files, root)},
        "vim": {"files": _hashes(vim_weights.files, vim.parent), "licence": VIM_LICENCE},
        "fusion": f"fresh weights, seed {seed}",
    }
    return Imported(model.eval(), notes, dropped)


def _hashes(files: Iterable[Path], root: Path) -> dict[str, str]:
    """Name → sha256; names are relative to `root` where they can be, never a path of somebody's machine."""
    return {
        (file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name): sha256_of(file)
        for file in files
    }
