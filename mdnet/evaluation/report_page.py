"""A benchmark result for people: one HTML page that loads nothing else and runs nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from mdnet.data.scut_fbp5500 import PROTOCOLS
from mdnet.evaluation.evaluate import FIGURES, Evaluation
from mdnet.evaluation.protocols import Benchmark
from mdnet.evaluation.published import published
from mdnet_engines.report.charts import Point, histogram, residuals, scatter, thin, worst_first
from mdnet_engines.report.numbers import number, score_text
from mdnet_engines.report.page import render

WORST_SHOWN = 10


def render_report(benchmark: Benchmark, *, facts: Mapping[str, str]) -> str:
    """The page for `benchmark`: figures per split and group next to published ones, charts, and the largest errors.

    Args:
        facts: what a reader needs to repeat it (command, versions); data, protocol and models are the benchmark's own.
    """
    points = [
        Point(image.name, float(rating), float(score))
        for split in benchmark.splits
        for image, rating, score in zip(split.test.images, split.test.ratings, split.scores, strict=True)
    ]
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
    )


def _models(benchmark: Benchmark) -> dict[str, str]:
    """The model of each split, or the one of all."""
    rows = {}
    for split in benchmark.splits:
        rows[split.name] = ", ".join([f"{split.model.kind} {split.model.path}", *split.model.facts.values()])
    same = len(set(rows.values())) == 1
    return {"model": next(iter(rows.values()))} if same else {f"model of {name}": text for name, text in rows.items()}


def _averaged(benchmark: Benchmark, group: str | None = None) -> list[str]:
    """PC, MAE and RMSE as text; with the spread where there are several splits."""
    spread = benchmark.spread(group)
    if len(benchmark.splits) == 1:
        return [_figure(spread.mean[name]) for name in FIGURES]
    return [
        "–" if math.isnan(spread.mean[name]) else f"{spread.mean[name]:.4f} ± {spread.sd[name]:.4f}" for name in FIGURES
    ]


def _row(result: Evaluation) -> list[str]:
    return [str(result.images), *(_figure(value) for value in result.figures().values())]


def _figure(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4f}".replace("-", "−")
