"""Frozen features, pooled, for a baseline: of a training list from its cache, of test images while they are scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdnet.data.rated import Rated
from mdnet.evaluation.scored_model import torch_scores
from mdnet.model.net import MDNet
from mdnet.training.features import cached_features
from mdnet_engines.progress import SILENT, Progress

GRID = 2
"""Each map becomes the means of its four quarters. A finer grid gained 0.01 of correlation on 1,830 photographs; at
full size it would take gigabytes."""


def pooled(features: dict[str, Tensor]) -> np.ndarray:
    """Maps by name (b, C, s, s) → (b, d) float32, d = GRID² × all channels."""
    quarters = [F.adaptive_avg_pool2d(each.float(), GRID).flatten(1) for each in features.values()]
    return torch.cat(quarters, dim=1).cpu().numpy()


def training_features(
    model: MDNet, data: Rated, *, cache: Path, half: bool = False, progress: Progress = SILENT
) -> np.ndarray:
    """The pooled features (n, d) of `data`, from the cache; raises as `cached_features`."""
    with cached_features(model.diffusion, model.config, data, folder=cache, half=half, progress=progress) as features:
        rows = torch.arange(len(features)).split(64)
        return np.concatenate([pooled(features.batch(some, torch.zeros_like(some))[0]) for some in rows])


class PoolingScores:
    """Scores as `torch_scores` does, and keeps the pooled features of the images: the encoder runs only once."""

    def __init__(self, model: MDNet):
        self._model, self._score = model, torch_scores(model)
        self._kept: list[np.ndarray] = []

    def __call__(self, images: np.ndarray) -> np.ndarray:
        calls: list[np.ndarray] = []

        def keep(encoder: nn.Module, inputs: tuple[Tensor, ...], features: dict[str, Tensor]) -> None:
            calls.append(pooled(features))

        hook = self._model.diffusion.register_forward_hook(keep)
        try:
            scores = self._score(images)
        finally:
            hook.remove()
        self._kept.append(calls[0][: len(images)])  # whatever else it looked at, it began with these
        return scores

    def features(self) -> np.ndarray:
        """(n, d), of all images that were scored, in their order."""
        return np.concatenate(self._kept)
