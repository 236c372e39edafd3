"""A benchmark result for people: one HTML page that loads nothing else and runs nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdnet.data.scut_fbp5500 import PROTOCOLS
from mdnet.evaluation.baselines import RIDGE
from mdnet.evaluation.evaluate import FIGURES, Evaluation
from mdnet.evaluation.protocols import Benchmark
from mdnet.evaluation.published import published
from mdnet.evaluation.scored_model import ScoredModel
from mdnet_engines.report.charts import Point, histogram, residuals, scatter, thin, worst_first
from mdnet_engines.report.curves import curve
from mdnet_engines.report.numbers import number, score_text
from mdnet_engines.report.page import render
from mdnet_engines.report.thumbnails import Thumbnail, thumbnail

WORST_SHOWN = 10
GROUPS_DRAWN = 12
"""Groups with charts of their own, the largest; tables have all of them."""
GROUP_POINTS = 500
"""Dots in a group's charts."""
_SIDE = 128  # pixels


@dataclass(frozen=True)
class _Scored:
    """A test image with its rating and its score."""

    file: Path
    group: str
    model: ScoredModel
    point: Point


def render_report(benchmark: Benchmark, *, facts: Mapping[str, str], pictures: bool = False) -> str:
    """The page for `benchmark`: figures per split and group next to published ones, charts, and the largest errors.

    Args:
        facts: what a reader needs to repeat it (command, versions); data, protocol and models are the benchmark's own.
        pictures: show those with the largest errors. Not by default: a page of figures may be shared, faces may not.
    """
    every = _scored(benchmark)
    points = [each.point for each in every]
    shown, worst = thin(points), worst_first(points)[:WORST_SHOWN]
    overall = benchmark.spread()
    several = len(benchmark.splits) > 1
    return render(
        Path(__file__).with_name("report_page.html.j2"),
        title=f"MD-Net on {Path(benchmark.data).name}, protocol {benchmark.protocol}",
        notes=benchmark.notes,
        facts={
            "data": benchmark.data,
            "protocol": benchmark.protocol,
            "scale": str(benchmark.scale),
            **_models(benchmark),
            **facts,
        },
        headline=_averaged(benchmark),
        splits=[(split.name, *_row(split.evaluation())) for split in benchmark.splits],
        groups=[
            (group, str(benchmark.spread(group).images), *_averaged(benchmark, group)) for group in benchmark.groups
        ],
        split_groups=[
            (split.name, [(group, *_row(split.evaluation(group))) for group in benchmark.groups])
            for split in (benchmark.splits if several else [])
        ],
        several=several,
        ours=[_figure(overall.mean[name]) for name in FIGURES],
        scut=benchmark.protocol in PROTOCOLS,
        published=[
            (row.method, row.protocol or "not stated", *map(_figure, (row.pearson, row.mae, row.rmse)), row.source)
            for row in published(benchmark.protocol)
        ],
        images=len(points),
        shown=len(shown),
        scatter=scatter(
            shown, worst, title="Score against mean rating", x_label="mean rating", y_label="predicted score"
        ),
        residuals=residuals(
            shown, worst, title="Residual against mean rating", x_label="mean rating", y_label="predicted − rated"
        ),
        histogram=histogram(
            [point.delta for point in points], title="Distribution of residuals", x_label="Δ = predicted − rated"
        ),
        worst=[(p.name, score_text(p.x), score_text(p.y), number(p.delta, 3, "+#")) for p in worst],
        pictures=_pictures(every, worst) if pictures else None,
        baselines=_baselines(benchmark),
        ridge=RIDGE in benchmark.baselines,
        group_charts=_group_charts(every),
        trainings=_trainings(benchmark),
    )


def _scored(benchmark: Benchmark) -> list[_Scored]:
    return [
        _Scored(image, group, split.model, Point(image.name, float(rating), float(score)))
        for split in benchmark.splits
        for image, group, rating, score in zip(
            split.test.images, split.test.groups, split.test.ratings, split.scores, strict=True
        )
    ]


def _pictures(every: Sequence[_Scored], worst: Sequence[Point]) -> list[Thumbnail]:
    """What the model saw of each of `worst`."""
    by_point = {id(each.point): each for each in every}
    return [thumbnail(each.model.read(each.file), _SIDE) for each in (by_point[id(point)] for point in worst)]


def _baselines(benchmark: Benchmark) -> list[tuple[str, ...]]:
    """A row for the model and for each baseline; none without a baseline."""
    images = str(benchmark.spread().images)
    rows = [(name, images, *_averaged(benchmark, baseline=name)) for name in benchmark.baselines]
    return [("this model", images, *_averaged(benchmark)), *rows] if rows else []


def _group_charts(every: Sequence[_Scored]) -> list[dict[str, Any]]:
    """Charts of the largest groups, all of one scale."""
    groups: dict[str, list[Point]] = {}
    for each in every:
        if each.group:
            groups.setdefault(each.group, []).append(each.point)
    drawn = sorted(groups, key=lambda group: -len(groups[group]))[:GROUPS_DRAWN] if len(groups) > 1 else []
    values = [value for group in drawn for point in groups[group] for value in (point.x, point.y)]
    ends = (min(values), max(values)) if values and min(values) < max(values) else None
    charts = []
    for place, group in enumerate(sorted(drawn), start=1):
        points = groups[group]
        shown = thin(points, GROUP_POINTS)
        charts.append(
            {
                "name": group,
                "images": len(points),
                "shown": len(shown),
                "bias": number(sum(point.delta for point in points) / len(points), 2, "+"),
                "scatter": scatter(
                    shown,
                    [],
                    title=f"{group}: score against mean rating",
                    x_label="mean rating",
                    y_label="predicted score",
                    name=f"scatter-{place}",
                    ends=ends,
                ),
                "residuals": residuals(
                    shown,
                    [],
                    title=f"{group}: residual against mean rating",
                    x_label="mean rating",
                    y_label="predicted − rated",
                    name=f"residuals-{place}",
                ),
            }
        )
    return charts


def _trainings(benchmark: Benchmark) -> list[dict[str, Any]]:
    """The curves of each model that kept its epochs."""
    models = {split.model.path: split.model for split in benchmark.splits if split.model.epochs}
    trainings = []
    for row, model in enumerate(models.values(), start=1):
        curves = []
        for name, label in (("loss", "mean squared error"), ("validation_pearson", "PC")):
            points = [(epoch.number, getattr(epoch, name)) for epoch in model.epochs]
            what = {"loss": "Training loss", "validation_pearson": "PC on the validation slice"}[name]
            curves.append(
                curve(points, model.best_epoch, name=f"{name}-{row}", title=what, x_label="epoch", y_label=label)
            )
        first = model.epochs[0].number
        trainings.append({"model": model.path.name, "curves": curves, "best": model.best_epoch, "first": first})
    return trainings


def _models(benchmark: Benchmark) -> dict[str, str]:
    """The model of each split, or the one of all."""
    rows = {}
    for split in benchmark.splits:
        rows[split.name] = ", ".join([f"{split.model.kind} {split.model.path}", *split.model.facts.values()])
    same = len(set(rows.values())) == 1
    return {"model": next(iter(rows.values()))} if same else {f"model of {name}": text for name, text in rows.items()}


def _averaged(benchmark: Benchmark, group: str | None = None, baseline: str | None = None) -> list[str]:
    """PC, MAE and RMSE as text; with the spread where there are several splits."""
    spread = benchmark.spread(group, baseline)
    if len(benchmark.splits) == 1:
        return [_figure(spread.mean[name]) for name in FIGURES]
    return [
        "–" if math.isnan(spread.mean[name]) else f"{spread.mean[name]:.4f} ± {spread.sd[name]:.4f}" for name in FIGURES
    ]


def _row(result: Evaluation) -> list[str]:
    return [str(result.images), *(_figure(value) for value in result.figures().values())]


def _figure(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4f}".replace("-", "−")
