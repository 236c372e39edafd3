"""Score a test set and compare with its ratings. Needs no torch, but for `evaluate`, which takes a PyTorch model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mdnet.data.rated import Rated
from mdnet_engines.errors import MDNetError
from mdnet_engines.parity.metrics import mae, pearson, rmse
from mdnet_engines.progress import SILENT, Progress
from mdnet_rt.images.face_crop import face_finder
from mdnet_rt.images.preprocess import ImageError, load_image

if TYPE_CHECKING:
    from mdnet.evaluation.scored_model import ScoreBatch
    from mdnet.model.net import MDNet

BATCH_SIZE = 16
FIGURES = ("pearson", "mae", "rmse")


@dataclass(frozen=True)
class Evaluation:
    """Pearson correlation, mean absolute and root mean squared error (rating points) on `images` images.

    A figure that the images don't give (no image, or a correlation of equal numbers) is NaN.
    """

    images: int
    pearson: float
    mae: float
    rmse: float

    @classmethod
    def of(cls, ratings: np.ndarray, scores: np.ndarray) -> Evaluation:
        """Compare `scores` (n,) with `ratings` (n,)."""
        return cls(len(ratings), pearson(ratings, scores), mae(ratings, scores), rmse(ratings, scores))

    def figures(self) -> dict[str, float]:
        """The three figures by their field's name."""
        return {name: getattr(self, name) for name in FIGURES}

    def __str__(self) -> str:
        return f"PC {self.pearson:.4f}  MAE {self.mae:.4f}  RMSE {self.rmse:.4f} on {self.images} test images"


def load_needed(file: Path, size: int, *, to_srgb: bool = True, face: float | None = None) -> np.ndarray:
    """As `load_image`, with the framing `face` of a manifest; an image that can't be used is a `MDNetError`, which ends
    the work.
    """
    try:
        return load_image(file, size, find_box=face_finder(face), to_srgb=to_srgb)
    except ImageError as error:
        raise MDNetError(f"{file}: {error}; every image of the split is needed") from error


def predict(
    score: ScoreBatch,
    image_size: int,
    data: Rated,
    *,
    to_srgb: bool = True,
    face: float | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Progress = SILENT,
) -> np.ndarray:
    """The scores of `data`'s images, float64 (n,).

    Args:
        to_srgb: whether colour profiles of images are applied.
        face: which square of an image is scored, as a manifest has it.

    Raises:
        MDNetError: an image can't be read, or its score is not finite. A benchmark with missing images is none.
    """
    predicted, advance = [], progress.count(f"scoring {len(data)} images", len(data))
    for start in range(0, len(data), batch_size):
        files = data.images[start : start + batch_size]
        pixels = np.stack([load_needed(file, image_size, to_srgb=to_srgb, face=face) for file in files])
        scores = np.asarray(score(pixels), dtype=np.float64)
        for file, value in zip(files, scores, strict=True):
            if not np.isfinite(value):
                raise MDNetError(f"{file}: its score is not finite ({value})")
        predicted.append(scores)
        advance(len(files))
    return np.concatenate(predicted) if predicted else np.zeros(0)


def evaluate(model: MDNet, data: Rated, *, batch_size: int = BATCH_SIZE, progress: Progress = SILENT) -> Evaluation:
    """Score `data` with a PyTorch model and compare; raises as `predict`."""
    from mdnet.evaluation.scored_model import torch_scores

    size, face = model.config.image_size, model.config.face
    scores = predict(torch_scores(model), size, data, face=face, batch_size=batch_size, progress=progress)
    return Evaluation.of(data.ratings, scores)
