"""Train MD-Net: the diffusion encoder is frozen, so its features are computed once; training touches Vim and fusion.

Loss, optimiser and schedule are ours; the abstract does not give them.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mdnet.data import Rated
from mdnet.metrics import pearson
from mdnet.model import MDNet
from mdnet_rt.preprocess import load_image


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Rates are per step at `batch_size`."""

    epochs: int = 16
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    """Share of the steps over which the rate rises; it then falls along a cosine."""
    clip: float = 1.0
    ema: float = 0.98
    """Decay of the averaged weights per step; they are what is evaluated and kept."""
    validation: float = 0.1
    """Share of the training split that chooses the epoch. The test split has no part in it."""
    seed: int = 0


@dataclass(frozen=True)
class Epoch:
    """What `on_epoch` is told: mean squared error of training, and Pearson on the validation slice."""

    number: int
    of: int
    loss: float
    validation_pearson: float


class FeatureCache:
    """Pixels and frozen features of every image and of its mirror image. Features lie in a memory-mapped file.

    Rows are images; `mirror` selects the flipped half.
    """

    def __init__(self, model: MDNet, data: Rated, folder: Path, on_image: Callable[[int], None], batch: int = 16):
        config = model.config
        count, side = len(data), config.image_size
        self.pixels = torch.empty(2, count, side, side, 3, dtype=torch.uint8)
        self.ratings = torch.from_numpy(data.ratings)
        self.features: dict[str, Tensor] = {}
        for name, shape in config.feature_shapes.items():
            size = 2 * count * math.prod(shape)
            flat = torch.from_file(str(folder / name), shared=True, size=size, dtype=torch.float32)
            self.features[name] = flat.view(2, count, *shape)
        for start in range(0, count, batch):
            files = data.images[start : start + batch]
            rows = slice(start, start + len(files))
            images = torch.from_numpy(np.stack([load_image(file, side) for file in files]))
            for mirror, pixels in enumerate((images, images.flip(2))):
                self.pixels[mirror, rows] = pixels
                with torch.inference_mode():
                    for name, feature in model.diffusion(pixels).items():
                        self.features[name][mirror, rows] = feature
            on_image(len(files))

    def batch(self, rows: Tensor, mirror: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Features, pixels and ratings of `rows`, each mirrored where `mirror` is 1."""
        features = {name: feature[mirror, rows] for name, feature in self.features.items()}
        return features, self.pixels[mirror, rows], self.ratings[rows]


def train(
    model: MDNet,
    data: Rated,
    config: TrainConfig,
    *,
    on_image: Callable[[int], None] = lambda _: None,
    on_epoch: Callable[[Epoch], None] = lambda _: None,
) -> Epoch:
    """Train `model` in place on `data`; leave it with the averaged weights of the best epoch, in evaluation mode.

    Args:
        on_image: called with the number of images whose features have just been computed.
        on_epoch: called after each epoch.

    Returns:
        The best epoch, by Pearson on the validation slice.
    """
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(data), generator=generator)
    held_out = max(2, round(config.validation * len(data)))
    validation, training = order[:held_out], order[held_out:]
    best, best_weights = Epoch(0, config.epochs, math.inf, -math.inf), None
    with tempfile.TemporaryDirectory(prefix="mdnet-features-") as folder:
        cache = FeatureCache(model, data, Path(folder), on_image)
        for number, loss, average in _epochs(model, cache, training, config, generator):
            predicted = _predict(average, cache, validation, config.batch_size)
            score = pearson(cache.ratings[validation].numpy(), predicted)
            score = -1.0 if math.isnan(score) else score  # equal predictions: as bad as it gets
            result = Epoch(number, config.epochs, loss, score)
            on_epoch(result)
            if best_weights is None or score > best.validation_pearson:
                best = result
                best_weights = [value.detach().clone() for value in average.trainable_parameters()]
    with torch.no_grad():
        for parameter, value in zip(model.trainable_parameters(), best_weights or [], strict=True):
            parameter.copy_(value)
    model.eval()
    return best


def _epochs(
    model: MDNet, cache: FeatureCache, rows: Tensor, config: TrainConfig, generator: torch.Generator
) -> Iterator[tuple[int, float, MDNet]]:
    """Train epoch by epoch; give (number, loss) and a model that holds the averaged weights."""
    # The frozen encoder is the same object in both.
    average = copy.deepcopy(model, memo={id(model.diffusion): model.diffusion})
    optimizer = torch.optim.AdamW(_parameter_groups(model, config), lr=config.learning_rate)
    steps = config.epochs * -(-len(rows) // config.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, config.warmup))
    for number in range(1, config.epochs + 1):
        model.train()
        total = 0.0
        for chosen in rows[torch.randperm(len(rows), generator=generator)].split(config.batch_size):
            mirror = torch.randint(2, (len(chosen),), generator=generator)
            features, pixels, ratings = cache.batch(chosen, mirror)
            loss = F.mse_loss(model.fusion(features, model.vim(pixels)), ratings)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.trainable_parameters(), config.clip)
            optimizer.step()
            schedule.step()
            _update_average(average, model, config.ema)
            total += loss.item() * len(chosen)
        yield number, total / len(rows), average.eval()


@torch.inference_mode()
def _predict(model: MDNet, cache: FeatureCache, rows: Tensor, batch_size: int) -> np.ndarray:
    scores = []
    for chosen in rows.split(batch_size):
        features, pixels, _ = cache.batch(chosen, torch.zeros_like(chosen))
        scores.append(model.fusion(features, model.vim(pixels)))
    return torch.cat(scores).numpy()


@torch.no_grad()
def _update_average(average: MDNet, model: MDNet, decay: float) -> None:
    for mean, value in zip(average.trainable_parameters(), model.trainable_parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


def _parameter_groups(model: MDNet, config: TrainConfig) -> list[dict[str, object]]:
    """Weight decay for matrices only: not for biases, norms, embeddings, nor the scan's A and D."""
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    spared = ("A_log", "A_b_log", "pos_embed", "cls_token", "scale_embed")
    decayed = [value for name, value in named if value.dim() > 1 and not name.endswith(spared)]
    others = [value for name, value in named if value.dim() <= 1 or name.endswith(spared)]
    return [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]


def _rate(step: int, steps: int, warmup: float) -> float:
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
