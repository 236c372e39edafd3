"""The demo's stand-in for a pre-trained encoder: taught on drawn faces to see where things are, before any rating.

The real presets take their frozen encoder from Stable Diffusion. Nothing of this size is published, so the encoder
learns to read off a picture how the drawing was made (places, colours, hair, light, blemishes: `targets`), from faces
that no split contains and without their ratings. Then it is frozen like the real one. It is no diffusion model.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdnet.diffusion import DiffusionEncoder, to_vae_range
from mdnet.faces import FaceFactors, draw_factors, render_face
from mdnet.model import MDNet
from mdnet_rt.preprocess import preprocess

_SEED = 77_000  # of the faces; splits are drawn from other seeds


def targets(face: FaceFactors) -> list[float]:
    """What a drawing shows, as numbers: which way and how far its parts are out of place, colours, hair, light."""
    displaced = [direction * (1 - face.symmetry) for direction in face.lopsided]
    displaced += [direction * (1 - face.proportions) for direction in face.off_canon]
    return [
        *displaced,
        *(abs(distance) for distance in displaced),
        face.texture,
        face.roll,
        *face.shift,
        face.scale,
        face.jaw,
        face.eye_opening,
        face.brow_width,
        face.hair_length,
        face.hair_volume,
        face.hairline,
        face.parting,
        *face.light,
        *(channel / 255 for colour in (face.skin, face.hair, face.lips, face.eyes) for channel in colour),
    ]


def train_prior(
    model: MDNet,
    *,
    faces: int,
    epochs: int,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    seed: int = 0,
    on_face: Callable[[int], None] = lambda _: None,
    on_epoch: Callable[[int, float], None] = lambda _number, _error: None,
) -> None:
    """Train `model.diffusion` in place on `faces` drawings, then freeze it again.

    Args:
        on_face: called with the number of faces just drawn.
        on_epoch: called with the epoch's number and its mean squared error; 1 is what a constant would reach.
    """
    pixels, wanted = _draw(faces, model.config.image_size, on_face)
    encoder = model.diffusion
    encoder.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = _Reader(model, wanted.shape[1])
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    steps = epochs * -(-faces // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for number in range(1, epochs + 1):
        total = 0.0
        for rows in torch.randperm(faces, generator=generator).split(batch_size):
            loss = F.mse_loss(reader(encoder, _jitter(pixels[rows], generator)), wanted[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        on_epoch(number, total / faces)
    encoder.requires_grad_(False)


class _Reader(nn.Module):
    """Feature maps → the targets: each map's mean over places, normalised per place, then one linear layer."""

    def __init__(self, model: MDNet, width: int):
        super().__init__()
        shapes = model.config.feature_shapes
        self.norms = nn.ModuleDict({name: nn.LayerNorm(shape[0]) for name, shape in shapes.items()})
        self.heads = nn.ModuleDict({name: nn.Linear(shape[0], width) for name, shape in shapes.items()})

    def forward(self, encoder: DiffusionEncoder, pixels: Tensor) -> Tensor:
        latent = encoder.vae(to_vae_range(pixels))
        features = encoder.unet(latent, encoder.timestep, encoder.context.expand(pixels.shape[0], -1, -1))
        pooled = {name: norm(features[name].flatten(2).mT).mean(1) for name, norm in self.norms.items()}  # (B, C)
        return torch.stack([head(pooled[name]) for name, head in self.heads.items()]).sum(0)


def _draw(count: int, size: int, on_face: Callable[[int], None]) -> tuple[Tensor, Tensor]:
    """Preprocessed faces (n, S, S, 3) uint8, and their targets (n, k), each standardised."""
    pixels = torch.empty(count, size, size, 3, dtype=torch.uint8)
    values = []
    for i in range(count):
        face = draw_factors(np.random.default_rng([_SEED, i]))
        pixels[i] = torch.from_numpy(preprocess(render_face(face), size))
        values.append(targets(face))
        on_face(1)
    wanted = torch.tensor(values, dtype=torch.float32)
    return pixels, (wanted - wanted.mean(0)) / wanted.std(0)


def _jitter(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness, up to 10 %: what a drawing shows does not depend on it."""
    gain = 1 + 0.2 * (torch.rand(len(pixels), 1, 1, 1, generator=generator) - 0.5)
    return (pixels * gain).clamp_(0, 255).to(torch.uint8)
