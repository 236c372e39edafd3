"""The ablation table: MD-Net and what is left of it without one stream, or without attention, trained alike.

Every run has the same frozen encoder, training list, configuration and code; only `MDNetConfig.fusion` and the seed
differ. The frozen features are computed once for all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mdnet.data.rated import Rated, Split
from mdnet.evaluation.evaluate import FIGURES, Evaluation
from mdnet.model.config import FUSIONS, TrainConfig
from mdnet.model.net import MDNet, with_fusion
from mdnet.training.features import cached_features, feature_folder
from mdnet.training.state import Fingerprint, fingerprint
from mdnet.training.train import score_features, train
from mdnet_engines.errors import MDNetError, first_line
from mdnet_engines.progress import SILENT, Progress
from mdnet_engines.system.atomic import new_file


@dataclass(frozen=True)
class Run:
    """One trained model on the test list. `fingerprint` says what it was trained from, and how."""

    fusion: str
    seed: int
    best_epoch: int
    test: Evaluation
    fingerprint: Fingerprint

    def __str__(self) -> str:
        return f"{self.fusion}, seed {self.seed}: {self.test} (epoch {self.best_epoch})"


class Results:
    """The runs of a table, in a JSON file that is complete after each of them.

    Args:
        file: read if it exists, so that an interrupted table continues; None keeps nothing.

    Raises:
        MDNetError: the file is something else.
    """

    def __init__(self, file: Path | None):
        self.file, self.runs = file, list[Run]()
        if file is None or not file.exists():
            return
        try:
            for fields in json.loads(file.read_text(encoding="utf-8"))["runs"]:
                self.runs.append(Run(**{**fields, "test": Evaluation(**fields["test"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise MDNetError(
                f"{file} is not a table of `mdnet ablate` ({first_line(error)}); name another file with -o"
            ) from None

    def find(self, fusion: str, wanted: Fingerprint) -> Run | None:
        """The run of exactly these settings, where it was made before."""
        return next((run for run in self.runs if (run.fusion, run.fingerprint) == (fusion, wanted)), None)

    def add(self, run: Run) -> None:
        """Keep a run; the file is replaced atomically."""
        self.runs.append(run)
        if self.file is None:
            return
        content = {"runs": [dataclasses.asdict(run) for run in self.runs]}
        with new_file(self.file) as scratch:
            scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def ablate(
    start: Callable[[int], MDNet],
    split: Split,
    config: TrainConfig,
    *,
    seeds: Sequence[int],
    results: Results,
    fusions: Sequence[str] = FUSIONS,
    cache: Path | None = None,
    half_features: bool = False,
    device: str = "cpu",
    progress: Progress = SILENT,
    on_run: Callable[[Run], None] = lambda _: None,
) -> list[Run]:
    """Train and test every kind of fusion with every seed.

    Args:
        start: gives the model to start from for a seed; its fusion is replaced. The encoder must not depend on it.
        config: its `seed` is replaced.
        results: runs that are in it already are not made again.
        cache: where frozen features are kept; by default they go with the table.
        progress: counts the images of both lists whose features are ready, then the runs.
        on_run: called after each run, those that were there already included.

    Returns:
        The runs, seeds within fusions.

    Raises:
        MDNetError: as `mdnet.training.train.train`.
    """
    runs = []
    with feature_folder(cache) as folder:
        for data in (split.train, split.test):  # first and alone, for their progress
            with _features(start(seeds[0]).to(device), data, folder, half_features, progress):
                pass
        advance = progress.count("training", len(fusions) * len(seeds))
        for fusion in fusions:
            for seed in seeds:
                model = with_fusion(start(seed), fusion, seed).to(device)
                settings = dataclasses.replace(config, seed=seed)
                wanted = fingerprint(model, split.train, settings, half_features=half_features)
                run = results.find(fusion, wanted)
                if run is None:
                    best = train(model, split.train, settings, cache=folder, half_features=half_features)
                    with _features(model, split.test, folder, half_features) as features:
                        scores = score_features(model, features, torch.arange(len(split.test)), config.batch_size)
                    test = Evaluation.of(split.test.ratings, scores)
                    run = Run(fusion, seed, best.number, test, wanted)
                    results.add(run)
                runs.append(run)
                advance(1)
                on_run(run)
    return runs


def table(runs: Sequence[Run]) -> str:
    """The runs as a Markdown table: mean ± sample standard deviation over seeds, a row for each fusion."""
    lines = ["| fusion | PC | MAE | RMSE | seeds |", "| --- | --- | --- | --- | --- |"]
    for fusion in dict.fromkeys(run.fusion for run in runs):
        tests = [run.test.figures() for run in runs if run.fusion == fusion]
        cells = [_cell([figures[name] for figures in tests]) for name in FIGURES]
        lines.append(f"| {' | '.join([fusion, *cells, str(len(tests))])} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def _features(
    model: MDNet, data: Rated, folder: Path, half: bool, progress: Progress = SILENT
) -> contextlib.AbstractContextManager[Any]:
    return cached_features(model.diffusion, model.config, data, folder=folder, half=half, progress=progress)
