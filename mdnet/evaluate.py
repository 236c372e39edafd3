"""Score a test set with a PyTorch MD-Net and compare with the ratings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mdnet.data import Rated
from mdnet.metrics import mae, pearson, rmse
from mdnet.model import MDNet
from mdnet_rt.preprocess import load_image


@dataclass(frozen=True)
class Evaluation:
    """Pearson correlation, mean absolute and root mean squared error (rating points) on `images` images."""

    images: int
    pearson: float
    mae: float
    rmse: float

    def __str__(self) -> str:
        return f"PC {self.pearson:.4f}  MAE {self.mae:.4f}  RMSE {self.rmse:.4f} on {self.images} test images"


def evaluate(
    model: MDNet, data: Rated, *, batch_size: int = 16, on_image: Callable[[int], None] = lambda _: None
) -> Evaluation:
    """Score `data` and compare; `on_image` is called with the number of images just scored."""
    predicted = []
    for start in range(0, len(data), batch_size):
        files = data.images[start : start + batch_size]
        pixels = torch.from_numpy(np.stack([load_image(file, model.config.image_size) for file in files]))
        with torch.inference_mode():
            predicted.append(model(pixels).numpy())
        on_image(len(files))
    scores = np.concatenate(predicted)
    truth = data.ratings
    return Evaluation(len(data), pearson(truth, scores), mae(truth, scores), rmse(truth, scores))
