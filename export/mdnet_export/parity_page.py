"""A parity report for people: `parity.html`, one page that loads nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from markupsafe import Markup

from mdnet_engines.parity.gates import LIMITS
from mdnet_engines.parity.measure import first_diverging
from mdnet_engines.parity.report import Gate, ParityReport
from mdnet_engines.report.charts import Point, histogram, scatter, thin, worst_first
from mdnet_engines.report.numbers import correlation_text, number, number_beside, score_text
from mdnet_engines.report.page import render
from mdnet_engines.report.thumbnails import thumbnail

WORST_SHOWN = 10
THUMBNAIL = 96  # pixels


def render_html(
    report: ParityReport, *, title: str, facts: Mapping[str, str], pictures: Mapping[str, np.ndarray] | None = None
) -> str:
    """One HTML page that shows `report`: no script, no external file, and any UTF-8 writer can save it.

    `pictures` are the images by name, uint8 (S, S, 3); those with the largest differences are shown small.

    `facts` is what a reader needs to trust or repeat the measurement (preset, checkpoint hash, versions); precision,
    backend and source of images are taken from `report`, whatever `facts` says.
    """
    measured = {"precision": report.precision, "backend": report.backend, "source": report.source}
    points = [Point(pair.image, pair.reference, pair.bundle) for pair in report.scores]
    finite = [point for point in points if math.isfinite(point.delta)]
    worst, shown = worst_first(points)[:WORST_SHOWN], thin(finite)
    return render(
        Path(__file__).with_name("parity_page.html.j2"),
        title=title,
        facts={**measured, **facts, **measured},
        verdict=_verdict(report),
        failed=[_gate_row(gate) for gate in report.gates if gate.failed],
        evaluated=sum(gate.value is not None for gate in report.gates),
        open=[_gate_row(gate) for gate in report.gates if gate.value is None],
        gates=[_gate_row(gate) for gate in report.gates],
        ratings=[
            (
                part.group,
                str(part.images),
                correlation_text(part.reference),
                correlation_text(part.bundle),
                correlation_text(part.lost, "+"),
                number(part.mean_abs, 3),
                f"{100 * part.of_width:.2f} %",
            )
            for part in report.ratings
        ],
        graphs={
            graph: {
                name: (f"{part.cosine:.8f}", number(part.snr_db, 4), number(part.max_abs, 3))
                for name, part in outputs.items()
            }
            for graph, outputs in report.graphs.items()
        },
        summary=_summary(points, finite),
        worst=[
            (
                thumbnail(pictures[point.name], THUMBNAIL) if pictures and point.name in pictures else None,
                point.name,
                score_text(point.x),
                score_text(point.y),
                number(point.delta, 3, "+#"),
            )
            for point in worst
        ],
        layers={
            graph: [
                (
                    part.layer,
                    f"{part.parity.cosine:.6f}",
                    number(part.parity.snr_db, 4),
                    number(part.parity.max_abs, 3),
                    _bar(part.parity.snr_db),
                )
                for part in parts
            ]
            for graph, parts in report.layers.items()
        },
        diverging={
            graph: first.layer
            for graph, parts in report.layers.items()
            if (first := first_diverging(parts, report.precision)) is not None
        },
        layer_limit=number(LIMITS[report.precision].graph_snr_db) if report.precision in LIMITS else "",
        images=len(points),
        finite=len(finite),
        shown=len(shown),
        scatter=scatter(
            shown,
            [point for point in worst if math.isfinite(point.delta)],
            title="Bundle score against PyTorch fp32 score",
            x_label="PyTorch fp32 score",
            y_label="bundle score",
        )
        if finite
        else None,
        histogram=histogram(
            [point.delta for point in finite], title="Distribution of Δ score", x_label="Δ = bundle − PyTorch fp32"
        )
        if finite
        else None,
    )


def _bar(snr_db: float) -> Markup:
    """A bar as long as the signal-to-noise ratio, from 0 to 100 dB."""
    share = 0.0 if math.isnan(snr_db) else min(max(snr_db, 0.0), 100.0)
    return Markup('<svg width="100" height="8" aria-hidden="true"><rect width="{:.0f}" height="8" /></svg>').format(
        share
    )


def _verdict(report: ParityReport) -> str:
    if not report.passed:
        return "FORCED" if report.forced else "FAILED"
    # `passed` holds for an empty set of gates too; a page that says PASSED would claim what nobody measured.
    return "PASSED" if any(gate.value is not None for gate in report.gates) else "NOT CHECKED"


def _gate_row(gate: Gate) -> dict[str, str]:
    sign = "≤" if gate.at_most else "≥"
    row = {"name": gate.name, "limit": f"{sign} {number(gate.limit)}", "note": gate.note}
    if gate.value is None:
        return {**row, "value": "–", "state": "warn"}
    return {**row, "value": number_beside(gate.value, gate.limit), "state": gate.verdict}


def _summary(points: list[Point], finite: list[Point]) -> dict[str, str]:
    """Statistic → value, over the images where both scores are finite."""
    rows = {"images": str(len(points)), "images without a finite score": str(len(points) - len(finite))}
    if not finite:
        return rows
    reference = [point.x for point in finite]
    bundle = [point.y for point in finite]
    delta = np.array([point.delta for point in finite])
    size = np.abs(delta)
    return {
        **rows,
        "PyTorch fp32 scores": f"{score_text(min(reference))} to {score_text(max(reference))}",
        "bundle scores": f"{score_text(min(bundle))} to {score_text(max(bundle))}",
        "Δ mean (bias)": number(delta.mean(), 3, "+"),
        "|Δ| mean": number(size.mean(), 3),
        "|Δ| median": number(np.median(size), 3),
        "|Δ| 95th percentile": number(np.percentile(size, 95), 3),
        "|Δ| maximum": number(size.max(), 3),
    }
