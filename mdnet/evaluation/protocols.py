"""One protocol, whole: every split scored, every group, mean and spread over the folds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mdnet.data.rated import Rated, Scale
from mdnet.data.source import RatedData, open_data
from mdnet.evaluation.baselines import Baselines, beside, listed
from mdnet.evaluation.evaluate import BATCH_SIZE, FIGURES, Evaluation
from mdnet.evaluation.loaded import LoadedModel
from mdnet.evaluation.scored_model import Device, ScoredModel
from mdnet_engines.backends.candidates import Backend
from mdnet_engines.bundle.manifest import Training
from mdnet_engines.errors import UsageError
from mdnet_engines.framing import mismatch, parse_face
from mdnet_engines.progress import SILENT, Progress


@dataclass(frozen=True)
class SplitResult:
    """The test images of one split, with the score of each."""

    name: str
    model: ScoredModel
    test: Rated
    scores: np.ndarray  # (n,) float64, in rating points
    baselines: Baselines = field(default_factory=dict)

    def evaluation(self, group: str | None = None, baseline: str | None = None) -> Evaluation:
        """The figures on all test images, or on those of one group; NaN if the split has none of the group.

        Args:
            baseline: its figures in place of the model's.
        """
        rows = np.array([group in (None, of) for of in self.test.groups], dtype=bool)
        predicted = self.scores if baseline is None else self.baselines[baseline]
        return Evaluation.of(self.test.ratings[rows], predicted[rows])

    def __str__(self) -> str:
        return f"{self.evaluation()}{beside(self.test.ratings, self.baselines)}"


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n − 1) of each figure over the splits; the latter is NaN for one split."""

    images: int
    mean: dict[str, float]
    sd: dict[str, float]

    def __str__(self) -> str:
        parts = (
            f"{title} {self.mean[name]:.4f} ± {self.sd[name]:.4f}"
            for title, name in zip(("PC", "MAE", "RMSE"), FIGURES, strict=True)
        )
        return f"{'  '.join(parts)} on {self.images} test images"


@dataclass(frozen=True)
class Benchmark:
    """The result of one protocol. `notes` says what a reader must know before comparing it with another."""

    protocol: str
    data: str
    splits: list[SplitResult]
    notes: list[str]

    @property
    def scale(self) -> Scale:
        """Of ratings and scores."""
        return self.splits[0].model.scale

    @property
    def groups(self) -> list[str]:
        """Every group that test images have, sorted; images without one are in none."""
        return sorted({group for split in self.splits for group in split.test.groups if group})

    @property
    def baselines(self) -> list[str]:
        """The baselines that every split has."""
        return [name for name in self.splits[0].baselines if all(name in split.baselines for split in self.splits)]

    def spread(self, group: str | None = None, baseline: str | None = None) -> Spread:
        """Over the splits. A split that lacks a figure makes its mean NaN: half a benchmark is not averaged."""
        results = [split.evaluation(group, baseline) for split in self.splits]
        values = {name: np.array([result.figures()[name] for result in results]) for name in FIGURES}
        return Spread(
            sum(result.images for result in results),
            {name: float(column.mean()) for name, column in values.items()},
            {name: float(column.std(ddof=1)) if len(column) > 1 else math.nan for name, column in values.items()},
        )

    def __str__(self) -> str:
        """Mean and spread over the splits, and the baselines' correlation."""
        spreads = {name: self.spread(baseline=name) for name in self.baselines}
        figures = {name: f"{each.mean['pearson']:.4f} ± {each.sd['pearson']:.4f}" for name, each in spreads.items()}
        return f"{self.spread()}{listed(figures)}"

    def to_json(self) -> dict[str, Any]:
        """Everything, with null for a figure that is not there; `sd` is over the splits, with n − 1."""

        def spread(group: str | None = None, baseline: str | None = None) -> dict[str, Any]:
            over = self.spread(group, baseline)
            return {"images": over.images, "mean": _plain(over.mean), "sd": _plain(over.sd)}

        return {
            "protocol": self.protocol,
            "data": self.data,
            "scale": {"minimum": self.scale.low, "maximum": self.scale.high},
            "notes": self.notes,
            "splits": [
                {
                    "name": split.name,
                    "model": {"path": str(split.model.path), "kind": split.model.kind, **split.model.facts},
                    **_evaluation(split.evaluation()),
                    "groups": {group: _evaluation(split.evaluation(group)) for group in self.groups},
                    "baselines": {name: _evaluation(split.evaluation(baseline=name)) for name in split.baselines},
                    "predictions": [
                        {"image": image.name, "rating": round(float(rating), 6), "score": float(score)}
                        for image, rating, score in zip(
                            split.test.images, split.test.ratings, split.scores, strict=True
                        )
                    ],
                }
                for split in self.splits
            ],
            "overall": spread(),
            "groups": {group: spread(group) for group in self.groups},
            "baselines": {name: spread(baseline=name) for name in self.baselines},
        }


def run_benchmark(
    models: Sequence[ScoredModel],
    data: Path,
    protocol: str | None = None,
    *,
    fold: int | None = None,
    scale: Scale | None = None,
    face: str | None = None,
    device: Device = "cpu",
    backend: Backend = "auto",
    batch_size: int = BATCH_SIZE,
    cache: Path | None = None,
    half_features: bool = False,
    progress: Progress = SILENT,
    on_result: Callable[[SplitResult], None] = lambda _: None,
) -> Benchmark:
    """Score every split of a protocol: with the one model, or with one for each fold, in their order.

    Args:
        data: SCUT-FBP5500's folder, or a table of ratings.
        protocol: by default that of the data (`RatedData.protocol`).
        fold: the only one to score, of a protocol with folds.
        scale: of the ratings, by default the models'.
        face: which square of an image is scored, as `mdnet_engines.framing` writes it; by default each model's own.
        device: what runs checkpoints.
        backend: what runs bundles.
        cache: where frozen features of training lists are kept; with it checkpoints get the ridge baseline.
        half_features: they are kept in float16.
        progress: receives each note before anything is scored, and counts images.
        on_result: called after each split.

    Raises:
        UsageError: another number of models, no such fold, different scales of models or ratings, or `data` is not a
            data set.
        MDNetError: the data set is broken, an image can't be read, or a model can't be loaded.
    """
    rated = open_data(data)
    protocol = rated.protocol(protocol, training=False)
    check_scales(models, rated, scale)
    splits = rated.splits(protocol, progress)
    if fold is not None:
        numbers = ", ".join(str(split.fold) for split in splits if split.fold is not None)
        splits = [split for split in splits if split.fold == fold]
        if not splits:
            raise UsageError(f"--fold {fold}: protocol {protocol} has {f'folds {numbers}' if numbers else 'no folds'}")
    reframed: list[str] = []
    if face is not None:
        used = parse_face(face)
        reframed = [f"{model.path}: {differs}" for model in models if (differs := mismatch(model.face, used))]
        models = [dataclasses.replace(model, face=used) for model in models]
    per_split = assign(models, len(splits), protocol)
    notes = seen_images(per_split, [split.fold for split in splits], protocol, rated)
    notes += [*rated.departures(protocol, splits), *rated.notes(per_split[0].scale), *reframed]
    for note in notes:
        progress.note(note)
    results, loaded = [], None
    for model, split in zip(per_split, splits, strict=True):
        if loaded is None or loaded.model is not model:
            loaded = None  # before the next one is read: two full-size models need not fit side by side
            loaded = LoadedModel(model, device, backend, cache, half_features)
        scores, baselines = loaded.score(split, batch_size, progress)
        results.append(SplitResult(split.name, model, split.test, scores, baselines))
        on_result(results[-1])
    return Benchmark(protocol, str(data), results, notes)


def check_scales(models: Sequence[ScoredModel], data: RatedData, scale: Scale | None) -> None:
    """Raise where models and ratings are not all on one scale: errors in rating points would mean nothing.

    Args:
        scale: of the ratings, where the user has said it.
    """
    for model in models:
        trained = f"{model.path} was trained for the scale {model.scale}"
        if model.scale != models[0].scale:
            raise UsageError(f"{trained}, {models[0].path} for {models[0].scale}; one evaluation needs one scale")
        if scale is not None and scale != model.scale:
            raise UsageError(
                f"{trained}, --scale says {scale}; train a model with --scale {scale.low:g} {scale.high:g}"
            )
        data.check_scale(model.scale, f"{trained}; for these ratings train one with --scale {{fitting}}")


def assign(models: Sequence[ScoredModel], splits: int, protocol: str) -> list[ScoredModel]:
    """The model of each split.

    Raises:
        UsageError: there are neither one nor as many as splits.
    """
    if len(models) not in (1, splits):
        expected = "one" if splits == 1 else f"one, or {splits} in the order of the folds"
        raise UsageError(f"{len(models)} models for protocol {protocol}; expected {expected}")
    return [*models] if len(models) == splits else [*models] * splits


def seen_images(
    per_split: Sequence[ScoredModel], folds: Sequence[int | None], protocol: str, data: RatedData
) -> list[str]:
    """A line for each model that, by what it says of its training, has learned from images it is tested on.

    A table is known by its hash. SCUT-FBP5500 is not: whether the data are those it was trained on can't be told from
    a name, so a line says what it would mean. One model for all folds gets a line even if it says nothing.

    Args:
        folds: the number of each split's fold.
    """
    notes = []
    for model in {model.path: model for model in per_split}.values():
        tested = [fold for fold, other in zip(folds, per_split, strict=True) if other.path == model.path]
        if (reason := _seen(model.training, protocol, tested, data)) is not None:
            notes.append(f"{model.path} {reason}")
    return notes


_NO_RESULT = "these figures are no benchmark result"


def _seen(training: Training, protocol: str, folds: Sequence[int | None], data: RatedData) -> str | None:
    of = f" of {training.data!r}" if training.data else ""
    so = "so" if training.data_sha256 else "so on the same data"
    if training.data_sha256 != data.sha256 and training.protocol is not None:
        if training.data == data.name:
            return f"was trained on another {data.name!r}, so whether it has seen test images is not known"
        return None
    if training.protocol is not None and training.protocol != protocol:
        return f"was trained with {training.protocol}{of}, {so} it has seen test images of {protocol}: {_NO_RESULT}"
    if None in folds:
        return None
    if training.fold is not None and [*folds] != [training.fold]:
        tested = ", ".join(str(fold) for fold in folds if fold != training.fold)
        return f"was trained for fold {training.fold}{of}, {so} it has seen test images of fold {tested}: {_NO_RESULT}"
    if len(folds) > 1:
        it_says = f" (it says:{of})" if of else ""
        so = f"so if it was trained on this data{it_says}, it has seen test images"
        return f"scores all {len(folds)} folds, {so}: {_NO_RESULT}"
    return None


def _evaluation(result: Evaluation) -> dict[str, Any]:
    return {"images": result.images, **_plain(result.figures())}


def _plain(figures: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}
