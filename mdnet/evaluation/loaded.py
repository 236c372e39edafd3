"""A model that is ready to score the splits of a protocol, and the baselines beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mdnet.data.rated import Split
from mdnet.evaluation.baselines import Baselines, frozen_ridge, group_mean
from mdnet.evaluation.evaluate import BATCH_SIZE, predict
from mdnet.evaluation.scored_model import Device, ScoredModel
from mdnet_engines.backends.candidates import Backend
from mdnet_engines.progress import SILENT, Progress

if TYPE_CHECKING:
    from mdnet.model.net import MDNet


class LoadedModel:
    """A model with its weights read; with `cache`, a checkpoint gives the ridge baseline too."""

    def __init__(self, model: ScoredModel, device: Device, backend: Backend, cache: Path | None, half_features: bool):
        self.model, self._half = model, half_features
        self._cached = (model.load_torch(device), cache) if cache and model.kind == "checkpoint" else None
        self._score = None if self._cached else model.load(device, backend)

    def score(self, split: Split, batch_size: int, progress: Progress) -> tuple[np.ndarray, Baselines]:
        """The scores of the test images, float64 (n,), and what baselines predict for them."""
        if self._cached is not None:
            model, cache = self._cached
            return score_beside_baselines(
                model, split, cache=cache, half_features=self._half, batch_size=batch_size, progress=progress
            )
        assert self._score is not None
        scores = predict(
            self._score,
            self.model.image_size,
            split.test,
            to_srgb=self.model.to_srgb,
            face=self.model.face,
            batch_size=batch_size,
            progress=progress,
        )
        return scores, group_mean(split.train, split.test)


def score_beside_baselines(
    model: MDNet,
    split: Split,
    *,
    cache: Path,
    half_features: bool = False,
    batch_size: int = BATCH_SIZE,
    progress: Progress = SILENT,
) -> tuple[np.ndarray, Baselines]:
    """A PyTorch model's scores of the test images, float64 (n,), and what both baselines predict for them.

    Args:
        cache: where frozen features of the training list are kept; what is missing is computed.

    Raises:
        MDNetError: as `predict` and `mdnet.training.features.cached_features`.
    """
    from mdnet.evaluation.frozen import PoolingScores

    score, size, face = PoolingScores(model), model.config.image_size, model.config.face
    scores = predict(score, size, split.test, face=face, batch_size=batch_size, progress=progress)
    return scores, {
        **group_mean(split.train, split.test),
        **frozen_ridge(
            model, split.train, score.features(), cache=cache, half_features=half_features, progress=progress
        ),
    }
