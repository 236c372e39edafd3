"""Numbers as inline SVG charts, for the pages that `mdnet_engines.report.page` renders. Needs markupsafe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from mdnet_engines.report.numbers import number, score_text, visible

MAX_POINTS = 2000
"""Dots in a scatter: the eye can't distinguish more, and they are most of a page's size."""

# Drawing area in SVG units (about a CSS pixel at full width); the margins hold the tick and axis labels.
_WIDTH, _HEIGHT = 480, 466
_LEFT, _RIGHT, _TOP, _BOTTOM = 92, 460, 36, 404
_DIGIT = 9.5
"""Width of a digit of a tick label in the widest of the system fonts."""


class Point(NamedTuple):
    """Something with a name that has a value on x and one on y, in the same unit."""

    name: str
    x: float
    y: float

    @property
    def delta(self) -> float:
        return self.y - self.x


def worst_first(points: Sequence[Point]) -> list[Point]:
    """Largest |y − x| first; a NaN is worse than any number."""
    return sorted(points, key=lambda point: math.inf if math.isnan(point.delta) else abs(point.delta), reverse=True)


def thin(points: list[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points: half of them the largest |y − x|, so that no outlier is lost, the rest spread over x."""
    if len(points) <= limit:
        return points
    ordered = worst_first(points)
    worst, rest = ordered[: limit // 2], sorted(ordered[limit // 2 :], key=lambda point: point.x)
    spread = np.linspace(0, len(rest) - 1, limit - len(worst)).round().astype(int)
    return worst + [rest[i] for i in spread]


@dataclass(frozen=True)
class Axis:
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
        """Power of ten (a multiple of 3) taken out of the tick labels and put next to the axis label."""
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


def scatter(
    points: Sequence[Point],
    ringed: Sequence[Point],
    *,
    title: str,
    x_label: str,
    y_label: str,
    name: str = "scatter",
    ends: tuple[float, float] | None = None,
) -> Markup:
    """x and y on equal scales, with the line where they agree; `ringed` points are ringed and named.

    Args:
        name: of the chart on its page.
        ends: what both scales begin and end with, for charts that are compared; by default what the points need.
    """
    values = [value for point in points for value in (point.x, point.y)]
    low, high = ends or (min(values), max(values))
    middle = (low + high) / 2
    flat = _spread([point.x for point in points]) < 1e-6 * max(1.0, abs(middle))
    if ends is None and flat:  # one float32 value: no range to zoom to
        half = max(0.5, abs(middle) / 10, high - low)
        low, high = middle - half, middle + half
    x, y = axes((low, high), (low, high))
    return frame(
        name,
        title,
        f"{len(points)} images; scores from {score_text(min(values))} to {score_text(max(values))}; "
        f"largest distance from the line {number(max(abs(p.delta) for p in points), 3)} rating points.",
        x,
        y,
        x.unit(x_label),
        y.unit(y_label),
        Markup('<line class="identity" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(_LEFT, _BOTTOM, _RIGHT, _TOP)
        + dots([(x.position(p.x), y.position(p.y)) for p in points])
        + _rings([(x.position(p.x), y.position(p.y), p) for p in ringed if p.delta != 0]),
    )


def residuals(
    points: Sequence[Point],
    ringed: Sequence[Point],
    *,
    title: str,
    x_label: str,
    y_label: str,
    name: str = "residuals",
) -> Markup:
    """y − x against x, with the line where it is zero; `ringed` points are ringed and named."""
    xs, deltas = [point.x for point in points], [point.delta for point in points]
    low, high = min(xs), max(xs)
    if high - low < 1e-6 * max(1.0, abs(low)):
        low, high = low - 0.5, high + 0.5
    bottom, top = min(*deltas, 0.0), max(*deltas, 0.0)
    if top - bottom < 1e-6:
        bottom, top = bottom - 0.5, top + 0.5
    x, y = axes((low, high), (bottom, top))
    return frame(
        name,
        title,
        f"{len(points)} images; y from {number(min(deltas), 3, '+')} to {number(max(deltas), 3, '+')} rating points.",
        x,
        y,
        x.unit(x_label),
        y.unit(y_label),
        Markup('<line class="identity" x1="{0}" y1="{2:.2f}" x2="{1}" y2="{2:.2f}"/>').format(
            _LEFT, _RIGHT, y.position(0.0)
        )
        + dots([(x.position(p.x), y.position(p.delta)) for p in points])
        + _rings([(x.position(p.x), y.position(p.delta), p) for p in ringed]),
    )


def axes(x: tuple[float, float], y: tuple[float, float]) -> tuple[Axis, Axis]:
    """Axes over the drawing area that hold x and y from their first to their second value."""
    return Axis(*_whole_steps(*x), _LEFT, _RIGHT), Axis(*_whole_steps(*y), _BOTTOM, _TOP)


def _spread(values: Sequence[float]) -> float:
    return max(values) - min(values)


def _whole_steps(low: float, high: float) -> tuple[float, float, float]:
    """A range that holds `low` to `high` and begins and ends at a tick, and the step of its ticks."""
    step = _nice_step(high - low, 6)
    return math.floor(low / step + 1e-6) * step, math.ceil(high / step - 1e-6) * step, step


def dots(positions: Sequence[tuple[float, float]]) -> Markup:
    """A dot at each position."""
    dot = Markup('<circle cx="{:.2f}" cy="{:.2f}" r="3"></circle>')
    return Markup('<g class="dots">{}</g>').format(Markup("\n").join(dot.format(*at) for at in positions))


def _rings(positions: Sequence[tuple[float, float, Point]]) -> Markup:
    ring = Markup('<circle cx="{:.2f}" cy="{:.2f}" r="7"><title>{}: {} → {}</title></circle>')
    rings = [
        ring.format(cx, cy, visible(point.name), score_text(point.x), score_text(point.y))
        for cx, cy, point in positions
    ]
    return Markup('<g class="rings">{}</g>').format(Markup("\n").join(rings))


def histogram(deltas: list[float], *, title: str, x_label: str) -> Markup:
    """Images per Δ. One bin is centred on zero, so that agreement does not look like a bias."""
    low, high = min(*deltas, 0.0), max(*deltas, 0.0)
    if high - low < 1e-12:  # no float32 scores differ by so little: all are equal
        low, high = -1e-3, 1e-3
    width = _nice_step(high - low, min(40, max(10, math.isqrt(len(deltas)))))
    bins = [math.floor(delta / width + 0.5) for delta in deltas]
    first, last = math.floor(low / width + 0.5), math.floor(high / width + 0.5)
    counts = np.bincount(np.array(bins) - first, minlength=last - first + 1)
    edges = [(first + index - 0.5) * width for index in range(len(counts) + 1)]
    x, y, bars = _bars(counts, edges, lambda edge: number(edge, 3, "+"), "Δ")
    return frame(
        "histogram",
        title,
        f"{len(deltas)} images in bins of {number(width)} rating points; Δ from {number(min(deltas), 3, '+')} "
        f"to {number(max(deltas), 3, '+')}.",
        x,
        y,
        x.unit(x_label),
        y.unit("images"),
        bars
        + Markup('<line class="identity" x1="{0:.2f}" y1="{1}" x2="{0:.2f}" y2="{2}"/>').format(
            x.position(0.0), _BOTTOM, _TOP
        ),
    )


def distribution(
    counts: Mapping[int, int], fine: float, low: float, high: float, *, title: str, x_label: str
) -> Markup:
    """Images per score, where the scores are not held any more.

    Args:
        counts: images with a score in `[k * fine, (k + 1) * fine)`, by k; at least one.
        fine: a power of ten, so that every width a reader likes is a number of these bins.
        low: the lowest score.
        high: the highest.
    """
    images, middle = sum(counts.values()), low / 2 + high / 2
    half = max(high / 2 - low / 2, 5 * fine, abs(middle) / 1000)  # one score is no range to zoom to
    width = max(fine, _nice_step(2 * half, min(40, max(10, math.isqrt(images)))))
    each = round(width / fine)
    first = min(min(counts) // each, math.floor((middle - half) / width))
    last = max(max(counts) // each, math.ceil((middle + half) / width) - 1)
    merged = np.zeros(last - first + 1, np.int64)
    for k, count in counts.items():
        merged[k // each - first] += count
    edges = [(first + index) * width for index in range(len(merged) + 1)]
    x, y, bars = _bars(merged, edges, number, "a score from")
    return frame(
        "histogram",
        title,
        f"{images:,} images in bins of {number(width)}; scores from {score_text(low)} to {score_text(high)}.",
        x,
        y,
        x.unit(x_label),
        y.unit("images"),
        bars,
    )


def _bars(
    counts: np.ndarray, edges: Sequence[float], edge_text: Callable[[float], str], what: str
) -> tuple[Axis, Axis, Markup]:
    """Axes, and a bar for each of `counts` that is not zero, between its two of `edges`."""
    x = Axis(edges[0], edges[-1], _nice_step(edges[-1] - edges[0], 9), _LEFT, _RIGHT)
    step = max(1.0, _nice_step(float(counts.max()), 6))
    y = Axis(0.0, math.ceil(1.02 * counts.max() / step) * step, step, _BOTTOM, _TOP)  # the zero line tops every bar
    bar = Markup('<rect x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}"><title>{}</title></rect>')
    bars = []
    for count, (low, high) in zip(counts, pairwise(edges), strict=True):
        if count == 0:
            continue
        left, right = x.position(low), x.position(high)
        top = min(y.position(float(count)), _BOTTOM - 2)  # one outlier among thousands must not vanish
        text = f"{count} with {what} {edge_text(low)} to {edge_text(high)}"
        bars.append(bar.format(left + 0.5, top, max(right - left - 1, 1), _BOTTOM - top, text))
    return x, y, Markup('<g class="bars">{}</g>').format(Markup("\n").join(bars))


def frame(
    name: str, title: str, description: str, x: Axis, y: Axis, x_label: str, y_label: str, marks: Markup
) -> Markup:
    """A chart: `marks` with grid, ticks and labels. Tick labels carry the tick's exact position as x (or y)."""
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
