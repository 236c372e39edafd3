"""A parity report for machines (`parity.json`) and for people (`parity.html`, one page that loads nothing else)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from mdnet_engines.errors import BundleError
from mdnet_export.parity import Gate, ParityReport, ScorePair, TensorParity

WORST_SHOWN = 10
MAX_POINTS = 2000
"""Dots in the scatter: more are not told apart by eye, and they are most of the page's size."""

# Drawing area in SVG units (about a CSS pixel at full width); the margins hold the tick and axis labels.
_WIDTH, _HEIGHT = 480, 466
_LEFT, _RIGHT, _TOP, _BOTTOM = 92, 460, 36, 404
_DIGIT = 9.5
"""Width of a digit of a tick label in the widest of the system fonts."""


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
    finite = [pair for pair in report.scores if math.isfinite(_delta(pair))]
    shown = _thin(finite, MAX_POINTS)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: _visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
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
                name: (f"{part.cosine:.8f}", _number(part.snr_db, 4), _number(part.max_abs, 3))
                for name, part in outputs.items()
            }
            for graph, outputs in report.graphs.items()
        },
        summary=_summary(report.scores, finite),
        worst=[
            (pair.image, _score(pair.reference), _score(pair.bundle), _number(_delta(pair), 3, "+#")) for pair in worst
        ],
        images=len(report.scores),
        finite=len(finite),
        shown=len(shown),
        scatter=_scatter(shown, [pair for pair in worst if math.isfinite(_delta(pair))]) if finite else None,
        histogram=_histogram([_delta(pair) for pair in finite]) if finite else None,
    )


def _verdict(report: ParityReport) -> str:
    if not report.passed:
        return "FORCED" if report.forced else "FAILED"
    # `passed` holds for an empty set of gates too; a page that says PASSED would claim what nobody measured.
    return "PASSED" if any(gate.value is not None for gate in report.gates) else "NOT CHECKED"


def _gate_row(gate: Gate) -> dict[str, str]:
    sign = "≤" if gate.at_most else "≥"
    row = {"name": gate.name, "limit": f"{sign} {_number(gate.limit)}", "note": gate.note}
    if gate.value is None:
        return {**row, "value": "–", "state": "na"}
    return {**row, "value": _number_beside(gate.value, gate.limit), "state": "pass" if gate.passed else "fail"}


def _summary(scores: list[ScorePair], finite: list[ScorePair]) -> dict[str, str]:
    """Statistic → value, over the images where both scores are finite."""
    rows = {"images": str(len(scores)), "images without a finite score": str(len(scores) - len(finite))}
    if not finite:
        return rows
    reference = [pair.reference for pair in finite]
    bundle = [pair.bundle for pair in finite]
    delta = np.array([_delta(pair) for pair in finite])
    size = np.abs(delta)
    return {
        **rows,
        "PyTorch fp32 scores": f"{_score(min(reference))} to {_score(max(reference))}",
        "bundle scores": f"{_score(min(bundle))} to {_score(max(bundle))}",
        "Δ mean (bias)": _number(delta.mean(), 3, "+"),
        "|Δ| mean": _number(size.mean(), 3),
        "|Δ| median": _number(np.median(size), 3),
        "|Δ| 95th percentile": _number(np.percentile(size, 95), 3),
        "|Δ| maximum": _number(size.max(), 3),
    }


def _delta(pair: ScorePair) -> float:
    return float(pair.bundle) - float(pair.reference)


def _worst_first(scores: list[ScorePair]) -> list[ScorePair]:
    """Largest |Δ| first; a NaN is worse than any number."""
    sizes = [abs(_delta(pair)) for pair in scores]
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


# --- text ---


def _visible(text: str) -> str:
    r"""`text` with what would not show, or not encode, as escapes: surrogates (`\udcff`), controls, bidi overrides."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _number(value: float, digits: int = 6, sign: str = "") -> str:
    if math.isnan(value):
        return "NaN"
    if value == 0:
        return "0"
    return f"{value:{sign}.{digits}g}".rstrip(".").replace("inf", "∞").replace("-", "−")


def _number_beside(value: float, limit: float) -> str:
    """`value` with as many digits as it takes to see that it is not `limit`, nor exactly 1."""
    misread = {_number(other) for other in (limit, 1.0) if other != value}
    return next(
        (text for digits in range(6, 17) if (text := _number(value, digits)) not in misread), _number(value, 17)
    )


def _score(value: float) -> str:
    return f"{value:.5f}".replace("-", "−") if abs(value) < 1e6 else _number(value)


# --- charts ---


@dataclass(frozen=True)
class _Axis:
    """Values `low` to `high` drawn between the positions `start` and `end`; `step` separates the ticks."""

    low: float
    high: float
    step: float
    start: float
    end: float

    def position(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        first, last = math.ceil(self.low / self.step - 1e-6), math.floor(self.high / self.step + 1e-6)
        return [k * self.step for k in range(first, last + 1)]

    @property
    def exponent(self) -> int:
        """Power of ten (a multiple of 3) taken out of the tick labels and put beside the axis label."""
        largest = max(abs(self.low), abs(self.high))
        return 0 if 1e-2 <= largest < 1e5 else 3 * math.floor(math.log10(largest) / 3)

    def tick_label(self, value: float) -> str:
        decimals = max(0, self.exponent - math.floor(math.log10(self.step) + 1e-6))
        return f"{value / 10.0**self.exponent:.{decimals}f}".replace("-", "−")

    def unit(self, name: str) -> str:
        """`name`, with the factor that the tick labels leave out."""
        return f"{name} (×10{str(self.exponent).translate(_SUPERSCRIPT)})" if self.exponent else name


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _nice_step(span: float, count: int) -> float:
    """The smallest 1, 2 or 5 × 10ⁿ that covers `span` in at most `count` steps."""
    power = 10.0 ** math.floor(math.log10(span / count))
    return next(m * power for m in (1, 2, 5, 10) if m * power * count >= span * (1 - 1e-9))


def _scatter(pairs: list[ScorePair], worst: list[ScorePair]) -> Markup:
    """Reference on x, bundle on y, on equal scales, with the line where they agree; `worst` are ringed and named."""
    values = [value for pair in pairs for value in (pair.reference, pair.bundle)]
    low, high = min(values), max(values)
    middle = (low + high) / 2
    references = [pair.reference for pair in pairs]
    if max(references) - min(references) < 1e-6 * max(1.0, abs(middle)):  # one value in float32: no range to zoom to
        half = max(0.5, abs(middle) / 10, high - low)
        low, high = middle - half, middle + half
    step = _nice_step(high - low, 6)
    low, high = math.floor(low / step + 1e-6) * step, math.ceil(high / step - 1e-6) * step
    x, y = _Axis(low, high, step, _LEFT, _RIGHT), _Axis(low, high, step, _BOTTOM, _TOP)

    dot = Markup('<circle cx="{:.2f}" cy="{:.2f}" r="{}">{}</circle>')
    dots = [dot.format(x.position(p.reference), y.position(p.bundle), 3, "") for p in pairs]
    rings = [
        dot.format(x.position(p.reference), y.position(p.bundle), 7, Markup("<title>{}</title>").format(_label(p)))
        for p in worst
        if _delta(p) != 0
    ]
    return _chart(
        "scatter",
        "Bundle score against PyTorch fp32 score",
        f"{len(pairs)} images; scores from {_score(min(values))} to {_score(max(values))}; "
        f"largest distance from the line {_number(max(abs(_delta(p)) for p in pairs), 3)} rating points.",
        x,
        y,
        x.unit("PyTorch fp32 score"),
        y.unit("bundle score"),
        Markup('<line class="identity" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(_LEFT, _BOTTOM, _RIGHT, _TOP)
        + Markup('<g class="dots">{}</g>').format(Markup("\n").join(dots))
        + Markup('<g class="rings">{}</g>').format(Markup("\n").join(rings)),
    )


def _label(pair: ScorePair) -> str:
    return f"{_visible(pair.image)}: {_score(pair.reference)} → {_score(pair.bundle)}"


def _histogram(deltas: list[float]) -> Markup:
    """Images per Δ = bundle − reference. One bin is centred on zero, so that agreement does not look like a bias."""
    low, high = min(*deltas, 0.0), max(*deltas, 0.0)
    if high - low < 1e-12:  # no float32 scores differ by so little: all are equal
        low, high = -1e-3, 1e-3
    width = _nice_step(high - low, min(40, max(10, math.isqrt(len(deltas)))))
    bins = [math.floor(delta / width + 0.5) for delta in deltas]
    first, last = math.floor(low / width + 0.5), math.floor(high / width + 0.5)
    counts = np.bincount(np.array(bins) - first, minlength=last - first + 1)
    low, high = (first - 0.5) * width, (last + 0.5) * width
    x = _Axis(low, high, _nice_step(high - low, 9), _LEFT, _RIGHT)
    step = max(1.0, _nice_step(float(counts.max()), 6))
    y = _Axis(0.0, math.ceil(1.02 * counts.max() / step) * step, step, _BOTTOM, _TOP)  # the zero line tops every bar

    bar = Markup('<rect x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}"><title>{}</title></rect>')
    bars = []
    for index, count in enumerate(counts):
        if count == 0:
            continue
        left, right = x.position(low + index * width), x.position(low + (index + 1) * width)
        top = min(y.position(float(count)), _BOTTOM - 2)  # one outlier among thousands must not vanish
        centre = (first + index) * width
        text = f"{count} with Δ {_number(centre - width / 2, 3, '+')} to {_number(centre + width / 2, 3, '+')}"
        bars.append(bar.format(left + 0.5, top, max(right - left - 1, 1), _BOTTOM - top, text))
    return _chart(
        "histogram",
        "Distribution of Δ score",
        f"{len(deltas)} images in bins of {_number(width)} rating points; Δ from {_number(min(deltas), 3, '+')} "
        f"to {_number(max(deltas), 3, '+')}.",
        x,
        y,
        x.unit("Δ = bundle − PyTorch fp32"),
        "images",
        Markup('<g class="bars">{}</g>').format(Markup("\n").join(bars))
        + Markup('<line class="identity" x1="{0:.2f}" y1="{1}" x2="{0:.2f}" y2="{2}"/>').format(
            x.position(0.0), _BOTTOM, _TOP
        ),
    )


def _chart(
    name: str, title: str, description: str, x: _Axis, y: _Axis, x_label: str, y_label: str, marks: Markup
) -> Markup:
    """`marks` with grid, ticks and labels. Tick labels carry the tick's exact position as x (or y)."""
    grid = Markup('<line x1="{:.2f}" y1="{:.2f}" x2="{:.2f}" y2="{:.2f}"/>')
    tick = Markup('<text class="{}-tick" x="{:.2f}" y="{:.2f}" dy="{}">{}</text>')
    lines, labels = [], []
    widest = _DIGIT * (1 + max(len(x.tick_label(value)) for value in x.ticks()))
    every = math.ceil(widest / (x.position(x.low + x.step) - x.position(x.low)))
    for value in x.ticks():
        at = x.position(value)
        lines.append(grid.format(at, _TOP, at, _BOTTOM))
        if round(value / x.step) % every == 0:  # so that 0 is never the one left out
            labels.append(tick.format("x", at, _BOTTOM, "1.5em", x.tick_label(value)))
    for value in y.ticks():
        at = y.position(value)
        lines.append(grid.format(_LEFT, at, _RIGHT, at))
        labels.append(tick.format("y", _LEFT - 8, at, "0.35em", y.tick_label(value)))
    return Markup(
        '<svg id="{name}" viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}-title {name}-desc">\n'
        '<title id="{name}-title">{title}</title>\n<desc id="{name}-desc">{description}</desc>\n'
        '<g class="grid">{lines}</g>\n{marks}\n{labels}\n'
        '<text class="axis" x="{x_middle}" y="{x_below}">{x_label}</text>\n'
        '<text x="{y_left}" y="16">{y_label}</text>\n</svg>'
    ).format(
        name=name,
        width=_WIDTH,
        height=_HEIGHT,
        title=title,
        description=description,
        lines=Markup("").join(lines),
        marks=marks,
        labels=Markup("\n").join(labels),
        x_middle=(_LEFT + _RIGHT) / 2,
        x_below=_BOTTOM + 52,
        x_label=x_label,
        y_left=_LEFT - 40,
        y_label=y_label,
    )
