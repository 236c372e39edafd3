"""A tiny VAE encoder in place of a model's own: taught on drawn faces to give the same latents, as TAESD was.

    faces ──┬── the model's VAE encoder, frozen ── latents, as the U-Net takes them ──┐
            └── tiny encoder ───────────────────── latents ───────────────────────────┴─ mean squared error

The U-Net stays: its features change only as far as the latents differ. TAESD was taught with more than this error
(its decoder has an adversarial loss), but its encoder's task is the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mdnet.model.config import PRESETS, MDNetConfig
from mdnet.model.diffusion import TinyVAEEncoder, to_vae_range
from mdnet.model.net import MDNet
from mdnet.training.prior import Fit, draw_faces
from mdnet_engines.errors import UsageError
from mdnet_engines.progress import SILENT, Progress

_SEED = 77_002  # of faces to learn from; the prior's and the splits' are drawn from other seeds


@dataclass(frozen=True)
class DistilConfig:
    """How to teach the encoder. An epoch sees every face once, mirrored or not."""

    faces: int = 2000
    epochs: int = 8
    batch: int = 16
    rate: float = 2e-3
    seed: int = 0


def tiny_preset(config: MDNetConfig) -> MDNetConfig:
    """`config` with the tiny VAE of the preset that is otherwise `config`'s.

    Raises:
        UsageError: there is none, or `config` has a tiny VAE already.
    """
    named = {"preset", *(field.name for field in dataclasses.fields(config) if field.name.startswith("vae"))}
    fixed = ("unet_channels", "unet_layers", "unet_heads", "context_dim", "vim_dim")
    for each in PRESETS.values():
        alike = all(getattr(each, name) == getattr(config, name) for name in fixed)
        if alike and (each.vae, config.vae) == ("tiny", "kl"):
            return dataclasses.replace(config, **{name: getattr(each, name) for name in named})
    tiny = ", ".join(each.preset for each in PRESETS.values() if each.vae == "tiny")
    raise UsageError(f"no preset is {config.preset} with a tiny VAE; those with one: {tiny}")


def distil(
    model: MDNet,
    config: DistilConfig,
    *,
    progress: Progress = SILENT,
    on_epoch: Callable[[int, float], None] = lambda _number, _loss: None,
) -> tuple[MDNet, float]:
    """Teach a tiny encoder the latents of `model`'s VAE, and give the model with it, all else being `model`'s.

    Args:
        progress: counts faces, then epochs.
        on_epoch: called with the epoch's number and its mean squared error of the latents (1 is what zeros reach).

    Returns:
        The model in evaluation mode, and the share of the latents' variance that its encoder has on faces that it did
        not learn from, a tenth of all.

    Raises:
        UsageError: `model` has no preset with a tiny VAE.
    """
    tiny_config = tiny_preset(model.config)
    faces = draw_faces(config.faces, tiny_config.image_size, progress, seed=_SEED)
    advance = progress.count("training", config.epochs)
    held_out, faces = faces.tensor_split([-(-config.faces // 10)])
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        tiny = TinyVAEEncoder(tiny_config)
    targets = torch.stack([_latents(model, faces), _latents(model, faces.flip(2))])  # (2, n, 4, S/8, S/8)
    fit = Fit(list(tiny.parameters()), config.rate, config.epochs * -(-len(faces) // config.batch))
    for number in range(1, config.epochs + 1):
        total = 0.0
        for rows in torch.randperm(len(faces), generator=generator).split(config.batch):
            mirror = torch.randint(2, (len(rows),), generator=generator)
            images = torch.where(mirror.bool()[:, None, None, None], faces[rows].flip(2), faces[rows])
            loss = F.mse_loss(tiny(to_vae_range(images)), targets[mirror, rows])
            fit.step(loss)
            total += loss.item() * len(rows)
        advance(1)
        on_epoch(number, total / len(faces))
    made = _with_vae(model, tiny.eval(), tiny_config)
    wanted = _latents(model, held_out)
    return made, 1 - F.mse_loss(_latents(made, held_out), wanted).item() / wanted.var().item()


def _with_vae(model: MDNet, vae: TinyVAEEncoder, config: MDNetConfig) -> MDNet:
    """`model` with another VAE; what it keeps, it shares with `model`."""
    with torch.device("meta"):  # shapes only: every part is replaced at once
        made = MDNet(config)
    made.vim, made.fusion = model.vim, model.fusion
    made.diffusion.vae, made.diffusion.unet = vae.requires_grad_(False), model.diffusion.unet
    made.diffusion.context = model.diffusion.context
    return made.eval()


@torch.inference_mode()
def _latents(model: MDNet, faces: Tensor) -> Tensor:
    """Latents (n, 4, S/8, S/8) as the U-Net takes them."""
    return torch.cat([model.diffusion.vae(to_vae_range(part)) for part in faces.split(64)]).clone()
