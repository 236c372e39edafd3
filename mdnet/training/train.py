"""Train MD-Net: the diffusion encoder is frozen, so its features are computed once; training touches Vim and fusion.

    images ── mdnet.training.features ──> frozen features, on disk ── steps ──> averaged weights of the best epoch
                                                               └─ after each epoch: mdnet.training.state

Loss, optimiser and schedule are ours; the abstract does not give them.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mdnet.data.rated import Rated
from mdnet.model.config import TrainConfig
from mdnet.model.net import MDNet
from mdnet.training.features import Features, cached_features
from mdnet.training.probe import fit_stream_heads
from mdnet.training.schedule import cosine, parameter_groups
from mdnet.training.state import StateFile, fingerprint
from mdnet_engines.errors import MDNetError
from mdnet_engines.parity.metrics import pearson
from mdnet_engines.progress import SILENT, Progress


@dataclass(frozen=True)
class Epoch:
    """What `on_epoch` receives: mean squared error of training, and Pearson on the validation slice."""

    number: int
    """From 1 on; 0 is the linear probe."""
    of: int
    loss: float
    validation_pearson: float
    learning_rate: float = 0.0
    """At the epoch's end."""


def train(
    model: MDNet,
    data: Rated,
    config: TrainConfig,
    *,
    cache: Path | None = None,
    half_features: bool = False,
    state: StateFile | None = None,
    progress: Progress = SILENT,
    on_epoch: Callable[[Epoch], None] = lambda _: None,
) -> Epoch:
    """Train `model` in place on `data`, on the device it is on; leave it with the averaged weights of the best epoch.

    The same seed on the same machine gives the same weights, whether the run was interrupted and resumed or not.

    Args:
        cache: where frozen features are kept (see `mdnet.training.features`); by default they go with the run.
        half_features: keep them in float16.
        state: where the run is kept after each epoch, to be resumed. The caller removes it once it has kept the model.
        progress: counts the images whose features are ready, then the epochs.
        on_epoch: called after each epoch of this process.

    Returns:
        The best epoch, by Pearson on the validation slice. The model is in evaluation mode. Of no epochs it is the
        linear probe, fitted to all of `data`: nothing is chosen, so nothing is held out, and the correlation is NaN.

    Raises:
        UsageError: `state` belongs to another run.
        MDNetError: an image can't be read, the disk is too small for the features, or the loss is not finite.
    """
    with cached_features(
        model.diffusion,
        model.config,
        data,
        folder=cache,
        half=half_features,
        views=config.views,
        progress=progress,
    ) as features:
        known = fingerprint(model, data, config, half_features=half_features) if state is not None else {}
        if config.linear_probe:
            progress.step("fitting the streams' heads")
        if not config.epochs:
            images = torch.arange(len(features))
            error = fit_stream_heads(model, features, images, views=config.views, seed=config.seed)
            return Epoch(0, 0, error, math.nan)
        run = _Run(model, features, config)
        if state is not None:
            state.open(known, run)
        if config.linear_probe and not run.number:
            on_epoch(run.best)
        advance = progress.count("training", config.epochs)
        advance(run.number)
        while not run.finished():
            epoch = run.epoch()
            advance(1)
            if state is not None:
                state.save(run)
            on_epoch(epoch)
    with torch.no_grad():
        for parameter, value in zip(model.trainable_parameters(), run.best_weights, strict=True):
            parameter.copy_(value)
    model.eval()
    return run.best


@torch.inference_mode()
def score_features(model: MDNet, features: Features, rows: Tensor, batch_size: int) -> np.ndarray:
    """Scores (n,) of the images `rows` (n,) from their frozen features, on the device that `model` is on."""
    device, scores = next(model.parameters()).device, []
    for chosen in rows.split(batch_size):
        maps, pixels, _ = features.batch(chosen, torch.zeros_like(chosen), device)
        scores.append(model.fusion(maps, model.vim(pixels)))
    return torch.cat(scores).float().cpu().numpy()


class _Run:
    """Everything of a training run that changes from epoch to epoch; `state_dict` holds all of it."""

    def __init__(self, model: MDNet, features: Features, config: TrainConfig):
        self.model, self.features, self.config = model, features, config
        self.device = next(model.parameters()).device
        self.generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(features), generator=self.generator)
        held_out = max(2, round(config.validation * len(features)))
        self.validation, self.training = order[:held_out], order[held_out:]
        if config.linear_probe:
            error = fit_stream_heads(model, features, self.training, views=config.views, seed=config.seed)
        # The frozen encoder is the same object in both.
        self.average = copy.deepcopy(model, memo={id(model.diffusion): model.diffusion})
        # Asking a model for them walks through the encoder too.
        self.weights: list[Tensor] = [*model.trainable_parameters()]
        self.averages: list[Tensor] = [*self.average.trainable_parameters()]
        decayed, others = parameter_groups(model)
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
        steps = config.epochs * -(-len(self.training) // config.batch_size)
        self.schedule = cosine(self.optimizer, steps, config.warmup)
        self.number = 0
        self.best = Epoch(0, config.epochs, math.inf, -math.inf)
        self.best_weights: list[Tensor] = []
        if config.linear_probe:
            self._look(error)

    def finished(self) -> bool:
        patience = self.config.patience
        return self.number >= self.config.epochs or 0 < patience <= self.number - self.best.number

    def epoch(self) -> Epoch:
        """Train one epoch and look at the averaged weights; keep them where they are the best so far."""
        self.number += 1
        return self._look(self._train())

    def _look(self, loss: float) -> Epoch:
        score = pearson(self.features.ratings[self.validation].numpy(), self._validate())
        score = -1.0 if math.isnan(score) else score  # equal predictions: as bad as it gets
        result = Epoch(self.number, self.config.epochs, loss, score, float(self.schedule.get_last_lr()[0]))
        if not self.best_weights or score > self.best.validation_pearson:
            self.best = result
            self.best_weights = [value.detach().clone() for value in self.averages]
        return result

    def _train(self) -> float:
        model, config = self.model.train(), self.config
        total = 0.0
        rows = self.training[torch.randperm(len(self.training), generator=self.generator)]
        if config.views > 1:
            rows = rows + len(self.features) * torch.randint(config.views, (len(rows),), generator=self.generator)
        for chosen in rows.split(config.batch_size):
            mirror = torch.randint(2, (len(chosen),), generator=self.generator)
            features, pixels, ratings = self.features.batch(chosen, mirror, self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.amp):
                logits = model.fusion.logits(features, model.vim(pixels))
            logits = [logit.float() for logit in logits]
            on_scale = model.fusion.head.on_scale
            error = F.mse_loss(on_scale(*logits), ratings)
            loss = error + config.stream_loss * sum(F.mse_loss(on_scale(logit), ratings) for logit in logits[1:])
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.weights, config.clip)
            self.optimizer.step()
            self.schedule.step()
            with torch.no_grad():
                torch._foreach_lerp_(self.averages, self.weights, 1 - config.ema)
            total += error.item() * len(chosen)
        if not math.isfinite(total):
            raise MDNetError(f"the loss of epoch {self.number} is not finite; try a lower --learning-rate")
        return total / len(rows)

    def _validate(self) -> np.ndarray:
        return score_features(self.average.eval(), self.features, self.validation, self.config.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that it can be read without running code."""
        return {
            "number": self.number,
            "best": dataclasses.asdict(self.best),
            "best_weights": self.best_weights,
            "weights": [value.detach() for value in self.weights],
            "average": [value.detach() for value in self.averages],
            "optimizer": self.optimizer.state_dict(),
            "schedule": {key: value for key, value in self.schedule.state_dict().items() if key != "lr_lambdas"},
            "generator": self.generator.get_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.number, self.best = state["number"], Epoch(**state["best"])
        self.best_weights = [value.to(self.device) for value in state["best_weights"]]
        for parameters, values in ((self.weights, state["weights"]), (self.averages, state["average"])):
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict({**state["schedule"], "lr_lambdas": [None] * len(self.optimizer.param_groups)})
        self.generator.set_state(state["generator"])
