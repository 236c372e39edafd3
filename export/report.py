"""A parity report for machines (`parity.json`) and for people (`parity.html`, one page that loads nothing else)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from mdnet_engines.errors import BundleError
from mdnet_export.charts import histogram, number, number_beside, scatter, score_text, visible
from mdnet_export.parity import Gate, ParityReport, ScorePair, TensorParity

WORST_SHOWN = 10
MAX_POINTS = 2000
"""Dots in the scatter: more are not told apart by eye, and they are most of the page's size."""


# --- JSON ---


def to_json(report: ParityReport) -> dict[str, Any]:
    """Every field of `report`, plus `passed` for it and for each gate, as what strict JSON can hold.

    NaN and infinities become the strings "NaN", "Infinity", "-Infinity" (null already means "not applicable").
    A file name that is not UTF-8 keeps its surrogates: write it with `json.dumps`' default, ASCII escapes.
    """
    document = asdict(report)
    for part, gate in zip(document["gates"], report.gates, strict=True):
        part["passed"] = gate.passed
    document["passed"] = report.passed
    return _plain(document)


def from_json(document: Mapping[str, Any]) -> ParityReport:
    """The report that `to_json` wrote; what it computed (`passed`) is computed anew, not believed.

    Raises:
        BundleError: a field is missing or is not of its type.
    """
    try:
        return ParityReport(
            precision=_text(document["precision"]),
            backend=_text(document["backend"]),
            source=_text(document["source"]),
            graphs={
                graph: {
                    name: TensorParity(_float(part["cosine"]), _float(part["snr_db"]), _float(part["max_abs"]))
                    for name, part in outputs.items()
                }
                for graph, outputs in document["graphs"].items()
            },
            scores=[
                ScorePair(_text(part["image"]), _float(part["reference"]), _float(part["bundle"]))
                for part in document["scores"]
            ],
            gates=[
                Gate(
                    name=_text(part["name"]),
                    value=None if part["value"] is None else _float(part["value"]),
                    at_most=_bool(part["at_most"]),
                    limit=_float(part["limit"]),
                    note=_text(part["note"]),
                )
                for part in document["gates"]
            ],
            forced=_bool(document["forced"]),
        )
    except KeyError as error:
        raise BundleError(f"parity report: field {error} is missing; rebuild with: mdnet-export build") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise BundleError(f"parity report: {error}; rebuild with: mdnet-export build") from None


_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (float, np.floating)):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _float(value: Any) -> float:
    if isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {value!r:.80}")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r:.80}")
    return value


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, got {value!r:.80}")
    return value


# --- the page ---


def render_html(report: ParityReport, *, title: str, facts: Mapping[str, str]) -> str:
    """One HTML page that shows `report`: no script, no external file, and any UTF-8 writer can save it.

    `facts` is what a reader needs to trust or repeat the measurement (preset, checkpoint hash, versions); precision,
    backend and source of images are taken from `report`, whatever `facts` says.
    """
    measured = {"precision": report.precision, "backend": report.backend, "source": report.source}
    worst = _worst_first(report.scores)[:WORST_SHOWN]
    finite = [pair for pair in report.scores if math.isfinite(pair.delta)]
    shown = _thin(finite, MAX_POINTS)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    return environment.get_template("report.html.j2").render(
        title=title,
        facts={**measured, **facts, **measured},
        verdict=_verdict(report),
        failed=[_gate_row(gate) for gate in report.gates if not gate.passed],
        applicable=sum(gate.value is not None for gate in report.gates),
        gates=[_gate_row(gate) for gate in report.gates],
        graphs={
            graph: {
                name: (f"{part.cosine:.8f}", number(part.snr_db, 4), number(part.max_abs, 3))
                for name, part in outputs.items()
            }
            for graph, outputs in report.graphs.items()
        },
        summary=_summary(report.scores, finite),
        worst=[
            (pair.image, score_text(pair.reference), score_text(pair.bundle), number(pair.delta, 3, "+#"))
            for pair in worst
        ],
        images=len(report.scores),
        finite=len(finite),
        shown=len(shown),
        scatter=scatter(shown, [pair for pair in worst if math.isfinite(pair.delta)]) if finite else None,
        histogram=histogram([pair.delta for pair in finite]) if finite else None,
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
        return {**row, "value": "–", "state": "na"}
    return {**row, "value": number_beside(gate.value, gate.limit), "state": "pass" if gate.passed else "fail"}


def _summary(scores: list[ScorePair], finite: list[ScorePair]) -> dict[str, str]:
    """Statistic → value, over the images where both scores are finite."""
    rows = {"images": str(len(scores)), "images without a finite score": str(len(scores) - len(finite))}
    if not finite:
        return rows
    reference = [pair.reference for pair in finite]
    bundle = [pair.bundle for pair in finite]
    delta = np.array([pair.delta for pair in finite])
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


def _worst_first(scores: list[ScorePair]) -> list[ScorePair]:
    """Largest |Δ| first; a NaN is worse than any number."""
    sizes = [abs(pair.delta) for pair in scores]
    order = sorted(range(len(scores)), key=lambda i: math.inf if math.isnan(sizes[i]) else sizes[i], reverse=True)
    return [scores[i] for i in order]


def _thin(scores: list[ScorePair], limit: int) -> list[ScorePair]:
    """At most `limit` of `scores`: half of them the largest |Δ|, so that no outlier is lost, the rest spread evenly."""
    if len(scores) <= limit:
        return scores
    ordered = _worst_first(scores)
    worst, rest = ordered[: limit // 2], sorted(ordered[limit // 2 :], key=lambda pair: pair.reference)
    spread = np.linspace(0, len(rest) - 1, limit - len(worst)).round().astype(int)
    return worst + [rest[i] for i in spread]
