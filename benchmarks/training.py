"""What cached features save: an epoch with them against one that runs the encoder: python benchmarks/training.py

Both train the same model on the same faces, decoded and in memory, by the code of `mdnet train`, validation included;
one takes an image's features from the cache, the other computes them for each batch. Epochs take turns; a time is the
median of the rounds, the ratio the median of the rounds' ratios. The first epoch of each is not counted. Weights are
random, which is as much work as others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mdnet.data.drawn_set import write_dataset
from mdnet.data.scut_fbp5500 import read_splits
from mdnet.model.config import PRESETS, TrainConfig, preset
from mdnet.model.diffusion import DiffusionEncoder
from mdnet.model.net import MDNet, random_mdnet
from mdnet.training.features import Features, cached_features
from mdnet.training.train import _Run


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


def seconds_per_epoch(model: MDNet, features: Features, config: TrainConfig, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round's epoch, by contestant."""
    contestants = {"cached": features, "recomputed": Recomputed(features, model.diffusion)}
    runs = {name: _Run(model, source, config) for name, source in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run.epoch()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Measure, print, and write the figures where `-o` says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", choices=list(PRESETS), default="demo")
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--amp", action="store_true", help="as of mdnet train: Vim and fusion in bfloat16")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
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
            times = seconds_per_epoch(model, features, config, options.rounds)
    ratio = float(np.median(np.array(times["recomputed"]) / np.array(times["cached"])))
    figures = {name: {"ms_per_image": float(np.median(values)) / len(data) * 1e3} for name, values in times.items()}
    for name, figure in figures.items():
        print(f"{name:>10}: {figure['ms_per_image']:.4g} ms an image and epoch")
    print(f"{options.preset}, {len(data)} images: an epoch with cached features is {ratio:.3g}× faster")
    if options.output:
        facts = {
            "command": f"python {' '.join(sys.argv)}",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "torch": version("torch"),
            "threads": options.threads,
            "amp": options.amp,
            "images": len(data),
        }
        options.output.write_text(json.dumps({**facts, **figures, "cached_is_x_faster": ratio}, indent=1) + "\n")


if __name__ == "__main__":
    main()
