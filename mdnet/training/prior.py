"""The demo's pre-trained encoder: a small latent diffusion model of faces, frozen afterwards like the real one.

    faces ── stage 1 ──> VAE ──> latents (4, S/8, S/8) ── stage 2 ──> U-Net that predicts their noise
                          └─ encoder ─┐                                └─ down path, mid block ─┐
                                      └──────────────────── DiffusionEncoder ───────────────────┘

The real presets take their encoder from Stable Diffusion. Nothing of the demo's size is published, so both stages are
trained here, after latent diffusion (arXiv 2112.10752) and at Stable Diffusion 1.5's settings where size has no say:
diffusers' own modules, ε-prediction, 1,000 steps on the scaled-linear schedule, one constant context (the model is
unconditional). Drawn faces (`draw_faces`) are in no split, photographs in no test list; ratings are never looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image
from torch import Tensor, nn

from mdnet.data.draw_face import draw_face
from mdnet.model.config import MDNetConfig
from mdnet.model.diffusion import to_vae_range
from mdnet.model.net import MDNet
from mdnet.weights.stable_diffusion import DECODERS
from mdnet_engines.progress import SILENT, Progress
from mdnet_rt.images.preprocess import preprocess

_NOISE_STEPS = 1000
_SEED = 77_000  # of drawn faces to learn from; splits are drawn from other seeds


@dataclass(frozen=True)
class PriorConfig:
    """How to train the latent diffusion model. An epoch sees every face once, mirrored or not."""

    vae_epochs: int = 8
    vae_batch: int = 16
    vae_rate: float = 2e-3
    kl: float = 1e-6
    """Weight of the latents' KL divergence, added to a mean absolute error: latent diffusion's."""
    unet_epochs: int = 24
    unet_batch: int = 32
    unet_rate: float = 1e-3
    ema: float = 0.999
    """Decay of the U-Net's averaged weights per step; they are what is kept."""
    seed: int = 0


class LatentDiffusion(NamedTuple):
    """A trained model, whole: what `sample` and `reconstruct` need."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    context: Tensor  # (tokens, context_dim)
    schedule: DDIMScheduler
    scaling: float  # of the latents
    latent: tuple[int, ...]  # their shape without the batch: (4, S/8, S/8)


def train_prior(
    model: MDNet,
    faces: Tensor,
    config: PriorConfig,
    *,
    progress: Progress = SILENT,
    on_epoch: Callable[[str, int, float], None] = lambda _stage, _number, _loss: None,
) -> LatentDiffusion:
    """Train a latent diffusion model at `model`'s sizes, and put its encoder halves into `model`.

    Args:
        faces: uint8 (n, S, S, 3), at least 2.
        progress: counts epochs of both stages.
        on_epoch: called with the stage (`VAE` or `U-Net`), the epoch's number and its mean loss: absolute error in
            [-1, 1] plus the weighted KL divergence, and mean squared error of the noise (1 is what a constant reaches).
    """
    advance = progress.count("training", config.vae_epochs + config.unet_epochs)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        vae, unet = stock_models(model.config)
    for number, loss in enumerate(_train_vae(vae, faces, config, generator), start=1):
        advance(1)
        on_epoch("VAE", number, loss)
    latents = _latents(vae, faces)  # (n, 2, 4, S/8, S/8)
    _normalise(vae, latents, model.config.vae_scaling)
    scaling, shape = model.config.vae_scaling, tuple(latents.shape[2:])
    diffusion = LatentDiffusion(vae, unet, model.diffusion.context, _schedule(), scaling, shape)
    for number, loss in enumerate(_train_unet(diffusion, latents / latents.std(), config, generator), start=1):
        advance(1)
        on_epoch("U-Net", number, loss)
    parts = {"vae": vae.state_dict(), "unet": unet.state_dict()}
    named = {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
    kept = {name: tensor for name, tensor in named.items() if not name.startswith(DECODERS)}
    model.diffusion.load_state_dict({**kept, "context": model.diffusion.context})
    return diffusion


def stock_models(config: MDNetConfig) -> tuple[AutoencoderKL, UNet2DConditionModel]:
    """Both halves of diffusers' VAE and U-Net at the sizes of `config`, with random weights."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=config.vae_channels,
        layers_per_block=config.vae_layers,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        scaling_factor=config.vae_scaling,
    )
    unet = UNet2DConditionModel(
        sample_size=config.image_size // 8,
        block_out_channels=config.unet_channels,
        layers_per_block=config.unet_layers,
        attention_head_dim=config.unet_heads,
        use_linear_projection=config.unet_linear_projection,
        cross_attention_dim=config.context_dim,
        norm_num_groups=config.norm_groups,
    )
    return vae, unet


@torch.inference_mode()
def sample(diffusion: LatentDiffusion, count: int, *, steps: int = 50, seed: int = 0) -> Tensor:
    """`count` new faces, uint8 (count, S, S, 3), by DDIM (arXiv 2010.02502) in `steps` steps."""
    vae, unet, context, schedule, scaling, shape = diffusion
    latent = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    schedule.set_timesteps(steps)
    for step in schedule.timesteps:
        noise = unet(latent, step, context.expand(count, -1, -1)).sample
        latent = schedule.step(noise, step, latent, return_dict=False)[0]
    return _to_pixels(vae.decode(latent / scaling).sample)


@torch.inference_mode()
def reconstruct(diffusion: LatentDiffusion, faces: Tensor) -> Tensor:
    """What is left of `faces`, uint8 (n, S, S, 3), after the VAE's encoder and decoder."""
    vae = diffusion.vae
    return _to_pixels(vae.decode(vae.encode(to_vae_range(faces)).latent_dist.mode()).sample)


def draw_picture(diffusion: LatentDiffusion, faces: Tensor) -> Image.Image:
    """Three rows to look at: `faces`, uint8 (n, S, S, 3), what the VAE leaves of them, and as many samples."""
    rows = [faces, reconstruct(diffusion, faces), sample(diffusion, len(faces))]
    return Image.fromarray(np.concatenate([np.concatenate(list(row.numpy()), axis=1) for row in rows]))


def _train_vae(vae: AutoencoderKL, faces: Tensor, config: PriorConfig, generator: torch.Generator) -> Iterator[float]:
    vae.train()
    fit = Fit(list(vae.parameters()), config.vae_rate, config.vae_epochs * -(-len(faces) // config.vae_batch))
    for _ in range(config.vae_epochs):
        total = 0.0
        for rows in torch.randperm(len(faces), generator=generator).split(config.vae_batch):
            images = to_vae_range(_mirrored(faces[rows], generator))
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample
            # Both terms per number of the picture, so that the KL's weight means what it does in latent diffusion.
            loss = F.l1_loss(decoded, images) + config.kl * posterior.kl().mean() / images[0].numel()
            fit.step(loss)
            total += loss.item() * len(rows)
        yield total / len(faces)
    vae.eval()


def _train_unet(
    diffusion: LatentDiffusion, latents: Tensor, config: PriorConfig, generator: torch.Generator
) -> Iterator[float]:
    unet, schedule = diffusion.unet.train(), diffusion.schedule
    average = copy.deepcopy(unet)
    fit = Fit(list(unet.parameters()), config.unet_rate, config.unet_epochs * -(-len(latents) // config.unet_batch))
    for _ in range(config.unet_epochs):
        total = 0.0
        for rows in torch.randperm(len(latents), generator=generator).split(config.unet_batch):
            clean = latents[rows, torch.randint(2, (len(rows),), generator=generator)]
            noise = torch.randn(clean.shape, generator=generator)
            steps = torch.randint(_NOISE_STEPS, (len(rows),), generator=generator)
            noisy = schedule.add_noise(clean, noise, steps)  # type: ignore[arg-type] # it wants the type's legacy name
            found = unet(noisy, steps, diffusion.context.expand(len(rows), -1, -1)).sample
            loss = F.mse_loss(found, noise)
            fit.step(loss)
            with torch.no_grad():
                for mean, value in zip(average.parameters(), unet.parameters(), strict=True):
                    mean.lerp_(value, 1 - config.ema)
            total += loss.item() * len(rows)
        yield total / len(latents)
    unet.load_state_dict(average.state_dict())
    unet.eval()


class Fit:
    """AdamW at a rate that rises for a tenth of the steps and then falls to zero; gradients of norm 1 at most."""

    def __init__(self, parameters: list[nn.Parameter], rate: float, steps: int):
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, rate, total_steps=steps, pct_start=0.1)

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()


@torch.inference_mode()
def _latents(vae: AutoencoderKL, faces: Tensor) -> Tensor:
    """The unscaled mode of every face's posterior, and of its mirror image's: (n, 2, 4, S/8, S/8)."""
    both = torch.stack([faces, faces.flip(2)], dim=1).flatten(0, 1)
    modes = [vae.encode(to_vae_range(part)).latent_dist.mode() for part in both.split(64)]
    return torch.cat(modes).unflatten(0, (-1, 2)).clone()  # out of inference mode


@torch.no_grad()
def _normalise(vae: AutoencoderKL, latents: Tensor, scaling: float) -> None:
    """Change the VAE's last layer, and its decoder's first, so that latents × `scaling` have unit variance.

    Latent diffusion measures its scaling once the VAE is trained; here the preset's is given, and the weights yield.
    """
    factor = 1 / (scaling * latents.std())
    channels = latents.shape[2]
    quant, post = vae.quant_conv, vae.post_quant_conv
    assert quant is not None
    assert post is not None
    assert quant.bias is not None
    quant.weight[:channels] *= factor
    quant.bias[:channels] *= factor
    quant.bias[channels:] += 2 * factor.log()  # the log-variance
    post.weight /= factor


def _schedule() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=_NOISE_STEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
    )


def draw_faces(count: int, size: int, progress: Progress = SILENT, *, seed: int = _SEED) -> Tensor:
    """Preprocessed faces of a seed, uint8 (count, S, S, 3)."""
    advance = progress.count("drawing", count)
    faces = torch.empty(count, size, size, 3, dtype=torch.uint8)
    for i in range(count):
        faces[i] = _face([seed, i], size)
        advance(1)
    return faces


def _face(seed: list[int], size: int) -> Tensor:
    face, _ = draw_face(np.random.default_rng(seed))
    return torch.from_numpy(preprocess(face, size))


def _mirrored(faces: Tensor, generator: torch.Generator) -> Tensor:
    mirror = torch.randint(2, (len(faces), 1, 1, 1), generator=generator).bool()
    return torch.where(mirror, faces.flip(2), faces)


def _to_pixels(images: Tensor) -> Tensor:
    """(n, 3, S, S) in [-1, 1] → uint8 (n, S, S, 3)."""
    return ((images.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
