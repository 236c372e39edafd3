"""Pre-train Vim on pictures without ratings, where no published Vim fits: MaskFeat (arXiv 2112.09133).

    picture ── patches, some replaced by a learned mask ──> Vim ──> gradients of every patch
                                                                       against those of the whole picture

The targets are histograms of oriented gradients, a face's edges by direction, as MaskFeat found best of what needs no
second model. Ours are not normalised within a block but on a logarithmic scale, over all pictures: how strong gradients
are is what tells smooth skin from rough. Patches that are seen count too, with less weight. Matrices are trained with
Muon, which needs half of AdamW's steps here; docs/mdnet.md has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdnet.model.vim import VisionMamba, to_imagenet_range
from mdnet.training.schedule import cosine, parameter_groups
from mdnet.training.state import StateFile
from mdnet_engines.errors import MDNetError
from mdnet_engines.progress import SILENT, Progress

_BINS = 8
_FAINT = 3e-3  # added before the logarithm: an eighth of what one grey level does


@dataclass(frozen=True)
class PretrainConfig:
    """How to pre-train. Rates are per step at `batch_size`."""

    epochs: int = 4
    batch_size: int = 64
    masked: float = 0.4
    """Share of the patches that are masked: MaskFeat's."""
    seen_weight: float = 0.5
    """Weight of the error on patches that are not masked."""
    muon_rate: float = 0.04
    """Muon's, for matrices."""
    learning_rate: float = 3e-3
    """AdamW's, for everything else."""
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class PretrainEpoch:
    """What `on_epoch` receives: mean squared errors of standardised targets; 1 is what a constant reaches."""

    number: int
    of: int
    masked: float
    seen: float


def pretrain(
    vim: VisionMamba,
    pixels: Tensor,
    config: PretrainConfig,
    *,
    fingerprint: dict[str, str] | None = None,
    state: StateFile | None = None,
    progress: Progress = SILENT,
    on_epoch: Callable[[PretrainEpoch], None] = lambda _: None,
) -> PretrainEpoch:
    """Train `vim` in place, on the device that it is on; gives the last epoch.

    Args:
        pixels: uint8 (n, S, S, 3), mirrored at random.
        fingerprint: what `state` must belong to.
        state: where the run is kept after each epoch, to be resumed. The caller removes it.
        progress: counts epochs.

    Raises:
        UsageError: `state` belongs to another run.
        MDNetError: there are fewer pictures than a batch has, or the loss is not finite.
    """
    if len(pixels) < config.batch_size:
        raise MDNetError(f"{len(pixels)} pictures to pre-train on; expected {config.batch_size} or more, one batch")
    run = _Run(vim, pixels, config)
    if state is not None:
        state.open(fingerprint or {}, run)
    advance = progress.count("pre-training", config.epochs)
    advance(run.number)
    while run.number < config.epochs:
        epoch = run.epoch()
        advance(1)
        if state is not None:
            state.save(run)
        on_epoch(epoch)
    vim.eval()
    return run.last


def gradients(pixels: Tensor, cell: int) -> Tensor:
    """uint8 (B, S, S, 3) → (B, 8, S / cell, S / cell): log mean gradient of each cell by direction."""
    grey = pixels.float().mean(-1) / 255
    along_x = F.pad(grey[:, :, 2:] - grey[:, :, :-2], (1, 1, 0, 0))
    along_y = F.pad(grey[:, 2:] - grey[:, :-2], (0, 0, 1, 1))
    size = torch.hypot(along_x, along_y)
    place = torch.remainder(torch.atan2(along_y, along_x), math.pi) / math.pi * _BINS
    share, lower = place.frac(), place.long()[:, None] % _BINS  # between the two nearest directions
    bins = size.new_zeros(len(size), _BINS, *size.shape[1:])
    bins.scatter_(1, lower, (size * (1 - share))[:, None])
    bins.scatter_add_(1, (lower + 1) % _BINS, (size * share)[:, None])
    return torch.log(F.avg_pool2d(bins, cell) + _FAINT)


class _MaskFeat(nn.Module):
    """Vim, the mask's token, and a linear head that predicts the targets of each patch."""

    def __init__(self, vim: VisionMamba):
        super().__init__()
        self.vim = vim
        projection = vim.patch_embed.proj
        self.patch, self.stride = projection.kernel_size[0], projection.stride[0]
        self.cell = max(1, self.stride // 2)
        self.per_side = self.patch // self.cell
        self.mask = nn.Parameter(torch.zeros(projection.out_channels))
        self.predict = nn.Linear(projection.out_channels, _BINS * self.per_side**2)

    def targets(self, pixels: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) → (B, M, cells · 8), patch by patch."""
        steps = self.stride // self.cell
        cells = gradients(pixels, self.cell).unfold(2, self.per_side, steps).unfold(3, self.per_side, steps)
        return cells.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    def forward(self, pixels: Tensor, masked: Tensor) -> Tensor:
        """uint8 (B, S, S, 3), masked (B, M) → predictions (B, M, cells · 8)."""
        patches = self.vim.patch_embed(to_imagenet_range(pixels))
        tokens = self.vim.encode(torch.where(masked[..., None], self.mask, patches))
        index = self.vim.class_index
        return self.predict(torch.cat([tokens[:, :index], tokens[:, index + 1 :]], dim=1))


class _Run:
    """Everything of a run that changes from epoch to epoch; `state_dict` holds all of it."""

    def __init__(self, vim: VisionMamba, pixels: Tensor, config: PretrainConfig):
        self.pixels, self.config = pixels, config
        self.device = vim.pos_embed.device
        self.generator = torch.Generator().manual_seed(config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = _MaskFeat(vim).to(self.device)
        with torch.no_grad():
            looked_at = torch.cat([self.model.targets(part.to(self.device)) for part in pixels[:1024].split(64)])
        self.mean, self.scale = looked_at.mean((0, 1)), looked_at.std((0, 1)) + 1e-6
        matrices, others = parameter_groups(self.model)
        # A kernel is a matrix for each of its channels, or one vector: AdamW's business, as is what predicts.
        inner = [value for value in matrices if value.dim() == 2 and value is not self.model.predict.weight]
        rest = [value for value in matrices if all(value is not other for other in inner)]
        decay = config.weight_decay
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(inner, lr=config.muon_rate, weight_decay=decay),
            torch.optim.AdamW(
                [{"params": rest, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}],
                lr=config.learning_rate,
                fused=True,
            ),
        ]
        steps = config.epochs * (len(pixels) // config.batch_size)
        self.schedules = [cosine(optimizer, steps, config.warmup) for optimizer in self.optimizers]
        self.number = 0
        self.last = PretrainEpoch(0, config.epochs, math.inf, math.inf)

    def epoch(self) -> PretrainEpoch:
        config, model = self.config, self.model.train()
        self.number += 1
        sums, batches = torch.zeros(2), len(self.pixels) // config.batch_size
        order = torch.randperm(len(self.pixels), generator=self.generator)
        for rows in order[: batches * config.batch_size].split(config.batch_size):
            mirror = torch.randint(2, (len(rows), 1, 1, 1), generator=self.generator).bool()
            pixels = self.pixels[rows]
            pixels = torch.where(mirror, pixels.flip(2), pixels).to(self.device)
            targets = (model.targets(pixels) - self.mean) / self.scale
            masked = (torch.rand(targets.shape[:2], generator=self.generator) < config.masked).to(self.device)
            errors = (model(pixels, masked) - targets).square().mean(-1)
            hidden, seen = errors[masked].mean(), errors[~masked].mean()
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            (hidden + config.seen_weight * seen).backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
                optimizer.step()
                schedule.step()
            sums += torch.stack([hidden.detach(), seen.detach()]).cpu()
        if not sums.isfinite().all():
            raise MDNetError(f"the loss of epoch {self.number} is not finite; try a lower --learning-rate")
        self.last = PretrainEpoch(self.number, config.epochs, *(sums / batches).tolist())
        return self.last

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that it can be read without running code."""
        return {
            "number": self.number,
            "last": [self.last.masked, self.last.seen],
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "steps": [schedule.last_epoch for schedule in self.schedules],
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.number = state["number"]
        self.last = PretrainEpoch(self.number, self.config.epochs, *state["last"])
        self.model.load_state_dict(state["model"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        for schedule, step in zip(self.schedules, state["steps"], strict=True):
            schedule.last_epoch = step
        self.generator.set_state(state["generator"])
