"""Ways to train, epoch by epoch against the one that `mdnet train` takes: python benchmarks/training.py

All train a copy of the same model on the same faces, decoded and in memory, by the code of `mdnet train`, validation
included. "cached" takes an image's features from the cache; "recomputed" computes them for each batch, as without a
cache; "bf16" is `mdnet train --amp`; "compiled" has Vim and fusion under `torch.compile`, gradients by autograd, since
it can't trace ours. Epochs take turns; a time is the median of the rounds, a ratio the median of the rounds' ratios.
The first epoch of each is not counted, but given: it includes compiling. Weights are random, which is as much work as
others; the validation's Pearson after the last epoch shows what a way of training does to the result.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from mdnet.data.drawn_set import write_dataset
from mdnet.data.scut_fbp5500 import read_splits
from mdnet.model import vim
from mdnet.model.config import PRESETS, TrainConfig, preset
from mdnet.model.diffusion import DiffusionEncoder
from mdnet.model.net import MDNet, random_mdnet
from mdnet.model.vim_mixer import Branch
from mdnet.training.features import Features, cached_features
from mdnet.training.train import _Run

AGAINST = ("recomputed", "bf16", "compiled")


class Recomputed(Features):
    """Features that are computed for each batch, as they would be without a cache."""

    def __init__(self, cached: Features, encoder: DiffusionEncoder):
        super().__init__(cached.pixels, cached.ratings, [])
        self.encoder = encoder

    def batch(
        self, rows: Tensor, mirror: Tensor, device: torch.device | str = "cpu"
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        pixels = self.pixels[rows]
        pixels = torch.where(mirror.bool()[:, None, None, None], pixels.flip(2), pixels).to(device)
        with torch.no_grad():
            return self.encoder(pixels), pixels, self.ratings[rows].to(device)


class Compiled(_Run):
    """A run whose steps `torch.compile` has compiled."""

    def __init__(self, model: MDNet, features: Features, config: TrainConfig):
        super().__init__(model, features, config)
        model.vim.compile()
        model.fusion.logits = torch.compile(model.fusion.logits)  # type: ignore[method-assign]

    def _train(self) -> float:
        with mock.patch.object(vim, "mix", traceable_mix):
            return super()._train()


def traceable_mix(tokens: Tensor, in_proj: Tensor, out_proj: Tensor, forward: Branch, backward: Branch) -> Tensor:
    """As `mdnet.model.vim_mixer.mix`, with gradients by autograd."""
    x, z = (in_proj @ tokens.mT).chunk(2, dim=1)
    return ((forward.run(x, z, reverse=False) + backward.run(x, z, reverse=True)) / 2).mT @ out_proj.mT


def contestants(model: MDNet, features: Features, config: TrainConfig, chosen: list[str]) -> dict[str, _Run]:
    """A run for each of the `chosen` names, each with its own copy of all that is trained."""
    runs: dict[str, _Run] = {}
    for name in chosen:
        own = copy.deepcopy(model, memo={id(model.diffusion): model.diffusion})
        source = Recomputed(features, model.diffusion) if name == "recomputed" else features
        kind = Compiled if name == "compiled" else _Run
        runs[name] = kind(own, source, dataclasses.replace(config, amp=config.amp or name == "bf16"))
    return runs


def measure(runs: dict[str, _Run], rounds: int) -> dict[str, dict[str, float]]:
    """Let the runs take turns, an epoch each; give every run's figures."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    pearson: dict[str, float] = {}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            pearson[name] = run.epoch().validation_pearson
            times[name].append(time.perf_counter() - start)
    return {
        name: {
            "first_epoch_s": own[0],
            "ms_per_image": float(np.median(own[1:])) / len(runs[name].features) * 1e3,
            "cached_is_x_faster": float(np.median(np.array(own[1:]) / np.array(times["cached"][1:]))),
            "validation_pearson": pearson[name],
        }
        for name, own in times.items()
    }


def main() -> None:
    """Measure, print, and write the figures where `-o` says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", choices=list(PRESETS), default="demo")
    parser.add_argument("--against", default="recomputed", help=f"of {', '.join(AGAINST)}; separated by commas")
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--amp", action="store_true", help="as of mdnet train: Vim and fusion in bfloat16")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    if unknown := set(options.against.split(",")) - set(AGAINST):
        parser.error(f"--against {', '.join(sorted(unknown))}: expected {', '.join(AGAINST)}")
    if options.images < 10 or min(options.batch_size, options.rounds, options.threads) < 1:
        parser.error("--images must be 10 or more, the other numbers 1 or more")
    if options.output and not options.output.parent.is_dir():
        parser.error(f"-o {options.output}: there is no folder {options.output.parent}")
    torch.set_num_threads(options.threads)
    model = random_mdnet(preset(options.preset), seed=0)
    config = TrainConfig(epochs=options.rounds + 1, batch_size=options.batch_size, amp=options.amp)
    with tempfile.TemporaryDirectory() as scratch:
        write_dataset(Path(scratch) / "faces", round(options.images / 0.6), seed=3)
        (split,) = read_splits(Path(scratch) / "faces", "60-40")
        data = split.train.take(np.arange(min(options.images, len(split.train))))
        with cached_features(model.diffusion, model.config, data) as features:
            runs = contestants(model, features, config, ["cached", *options.against.split(",")])
            figures = measure(runs, options.rounds)
    print(f"{options.preset}, {len(data)} images: an epoch, and how many times as long it is as with cached features")
    for name, figure in figures.items():
        first = f"first epoch {figure['first_epoch_s']:.3g} s, validation {figure['validation_pearson']:.4f}"
        print(f"{name:>10}: {figure['cached_is_x_faster']:.3g}×, {figure['ms_per_image']:.4g} ms an image; {first}")
    if options.output:
        facts = {
            "command": f"python {' '.join(sys.argv)}",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "torch": version("torch"),
            "threads": options.threads,
            "amp": options.amp,
            "images": len(data),
        }
        options.output.write_text(json.dumps({**facts, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
